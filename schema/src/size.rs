//! Sizes as people write them: a number, perhaps with decimals, and a unit, all units powers of 1024.

use crate::limits::{GIB, KIB, MIB, TIB};
use thiserror::Error;

const UNITS: [(&str, u64); 9] =
    [("tib", TIB), ("gib", GIB), ("mib", MIB), ("kib", KIB), ("t", TIB), ("g", GIB), ("m", MIB), ("k", KIB), ("b", 1)];

#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SizeError {
    #[error("{found:?} is not a size; write a number with KiB, MiB, GiB or TiB (or K, M, G, T), such as 10GiB")]
    NotASize { found: String },
    #[error("{found:?} is no whole number of bytes; use a smaller unit")]
    Fraction { found: String },
    #[error("{found:?} is more than 16 EiB")]
    TooLarge { found: String },
}

/// Bytes of `10GiB`, `1.5T`, `512k`, `4096`.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let found = text.to_string();
    let lower = text.trim().to_ascii_lowercase();
    let (number, unit) = UNITS
        .iter()
        .find_map(|(suffix, unit)| lower.strip_suffix(suffix).map(|number| (number.trim_end(), *unit)))
        .unwrap_or((lower.as_str(), 1));
    let (whole, decimals) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(decimals) || decimals.len() > 18 {
        return Err(SizeError::NotASize { found });
    }
    let too_large = SizeError::TooLarge { found: found.clone() };
    let whole: u64 = whole.parse().map_err(|_| too_large.clone())?;
    let bytes = whole.checked_mul(unit).ok_or_else(|| too_large.clone())?;
    let scale = 10_u128.pow(decimals.len() as u32);
    let decimals: u128 = decimals.parse().expect("up to 18 digits fit");
    let part = decimals * u128::from(unit);
    if !part.is_multiple_of(scale) {
        return Err(SizeError::Fraction { found });
    }
    bytes.checked_add((part / scale) as u64).ok_or(too_large)
}

/// The size in the largest unit that keeps it short: `10 GiB`, `1.5 TiB`, `512 B`.
pub fn format(bytes: u64) -> String {
    for (name, unit) in [("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)] {
        if bytes >= unit {
            let number = format!("{:.2}", bytes as f64 / unit as f64);
            let number = number.trim_end_matches('0').trim_end_matches('.');
            return format!("{number} {name}");
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let cases = [
            ("4096", 4096),
            ("10GiB", 10 * GIB),
            ("10 gib", 10 * GIB),
            ("1.5T", TIB + TIB / 2),
            ("512k", 512 * KIB),
            ("7b", 7),
            ("0", 0),
            ("0.25KiB", 256),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_what_was_found() {
        for text in ["", "G", "-1G", "ten", "1.G", "10GB", "1e9", "0x10", "1 2", "+5"] {
            assert_eq!(parse(text), Err(SizeError::NotASize { found: text.into() }), "{text}");
        }
        assert_eq!(parse("0.1K"), Err(SizeError::Fraction { found: "0.1K".into() }));
        assert_eq!(parse("99999999T"), Err(SizeError::TooLarge { found: "99999999T".into() }));
        assert_eq!(parse("99999999999999999999"), Err(SizeError::TooLarge { found: "99999999999999999999".into() }));
    }

    #[test]
    fn sizes_are_shown_in_the_largest_unit_that_keeps_them_short() {
        let cases =
            [(0, "0 B"), (1023, "1023 B"), (10 * GIB, "10 GiB"), (GIB + GIB / 2, "1.5 GiB"), (100 * TIB, "100 TiB")];
        for (bytes, text) in cases {
            assert_eq!(format(bytes), text);
        }
    }
}
