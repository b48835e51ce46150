//! How exactly layers are computed.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// How exactly product-quantised layers are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// float32 tables and sums.
    Exact,
    /// 16-bit tables and sums where that is faster. Their scale is derived for
    /// every image from bounds that hold for it, so that nothing can overflow.
    #[default]
    Fast,
}

impl Precision {
    /// The name in options and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Fast => "fast",
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
            _ => Err(Error::Config(format!(
                "precision is {name:?}, expected \"exact\" or \"fast\""
            ))),
        }
    }
}
