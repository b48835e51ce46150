//! The one error type of the crate.

use std::path::PathBuf;

/// What can go wrong in the engine. Every message names the field, what it got
/// and what was expected.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A model file, or the graph and tensors it holds, is malformed.
    #[error("{0}")]
    Format(String),
    /// An array, or a value of the graph, has an impossible shape.
    #[error("{0}")]
    Shape(String),
    /// An option of the engine (ISA, precision, batch) is unknown or not available.
    #[error("{0}")]
    Config(String),
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
}

/// Result with the crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// `Err(Error::Format(format!(…)))`, the most frequent way out.
macro_rules! bail_format {
    ($($arg:tt)*) => { return Err($crate::error::Error::Format(format!($($arg)*))) };
}
/// `Err(Error::Shape(format!(…)))`.
macro_rules! bail_shape {
    ($($arg:tt)*) => { return Err($crate::error::Error::Shape(format!($($arg)*))) };
}
pub(crate) use {bail_format, bail_shape};
