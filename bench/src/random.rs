//! Numbers that no read-ahead or elevator can foresee, the same for the same seed (splitmix64).

pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below a bound that is small beside 2^64, so that the remainder favours nothing that could be measured.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Everything below `bound`, each once, in no order.
    pub fn shuffled(&mut self, bound: u64) -> Vec<u64> {
        let mut all: Vec<u64> = (0..bound).collect();
        for at in (1..all.len()).rev() {
            let other = self.below(at as u64 + 1) as usize;
            all.swap(at, other);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shuffling_keeps_everything_once_and_nothing_in_order() {
        let mut shuffled = Random::new(7).shuffled(1000);
        assert!(shuffled.windows(2).filter(|pair| pair[0] + 1 == pair[1]).count() < 10);
        shuffled.sort_unstable();
        assert_eq!(shuffled, (0..1000).collect::<Vec<u64>>());
    }
}
