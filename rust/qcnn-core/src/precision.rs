//! How exactly layers are computed.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// How exactly product-quantised layers are computed. Each precision may also use
/// what those before it do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Precision {
    /// float32 tables and sums.
    Exact,
    /// 16-bit tables and sums where that is faster. Their scale is derived for
    /// every image from bounds that hold for it, so that nothing can overflow.
    #[default]
    Fast,
    /// Also 8-bit tables, or inputs and codewords of 8 bits in convolutions, where that is
    /// faster still. Their scales are derived in the same way.
    Int8,
}

impl Precision {
    /// The name in options and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Fast => "fast",
            Self::Int8 => "int8",
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Precision {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "exact" => Ok(Self::Exact),
            "fast" => Ok(Self::Fast),
            "int8" => Ok(Self::Int8),
            _ => Err(Error::Config(format!(
                "precision is {name:?}, expected \"exact\", \"fast\" or \"int8\""
            ))),
        }
    }
}
