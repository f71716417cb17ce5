//! Lists of cores, as people write them.

use crate::limits::CPUS_MAX;
use std::str::FromStr;

/// Cores in the order in which executors take them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuList(pub Vec<usize>);

impl FromStr for CpuList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |part: &str| format!("found {part:?}, expected cores such as 0,2,4 or 0-3");
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let first: usize = first.trim().parse().map_err(|_| wrong(part))?;
            let last: usize = last.trim().parse().map_err(|_| wrong(part))?;
            if last < first || last >= CPUS_MAX {
                return Err(wrong(part));
            }
            cpus.extend(first..=last);
        }
        let mut sorted = cpus.clone();
        sorted.sort_unstable();
        sorted.dedup();
        if sorted.len() != cpus.len() {
            return Err(format!(
                "found {text:?}, where a core is named twice; two executors on one core share its time"
            ));
        }
        Ok(CpuList(cpus))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_single_cores_are_taken_in_order_and_none_twice() {
        assert_eq!("0-2,7".parse(), Ok(CpuList(vec![0, 1, 2, 7])));
        for wrong in ["1,1", "2-1", "x", "", "0-100000"] {
            assert!(wrong.parse::<CpuList>().is_err(), "{wrong}");
        }
    }
}
