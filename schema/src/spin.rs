//! How long an executor looks for work before it sleeps, as people write it.

use crate::limits::{EXECUTOR_SPIN_DEFAULT, EXECUTOR_SPIN_MAX};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// In microseconds; 0: it sleeps at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spin(pub Duration);

impl Default for Spin {
    fn default() -> Self {
        Self(EXECUTOR_SPIN_DEFAULT)
    }
}

impl FromStr for Spin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let most = EXECUTOR_SPIN_MAX.as_micros();
        let wrong = || format!("found {text:?}, expected microseconds from 0 (never) to {most}");
        let spin = Duration::from_micros(text.trim().parse().map_err(|_| wrong())?);
        if spin <= EXECUTOR_SPIN_MAX { Ok(Self(spin)) } else { Err(wrong()) }
    }
}

impl fmt::Display for Spin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.0.as_micros())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_as_it_is_written_and_bounded() {
        assert_eq!(Spin::default().to_string().parse(), Ok(Spin::default()));
        assert_eq!("0".parse(), Ok(Spin(Duration::ZERO)));
        for wrong in ["", "-1", "50us", "1.5", "1001", "99999999999999999999"] {
            let error = wrong.parse::<Spin>().expect_err(wrong);
            assert!(error.contains(wrong) && error.contains("1000"), "{error}");
        }
    }
}
