//! Hash maps with keys of their own: drawn by lot in a program, so that nobody who names volumes or blocks can make them
//! slow, and made of the seed in a simulated world, so that one seed has one course even where a map is iterated.

use ahash::RandomState;
use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::hash::BuildHasher;

pub type Map<K, V> = HashMap<K, V, Keys>;
pub type Set<T> = HashSet<T, Keys>;

thread_local! {
    static SEED: Cell<Option<u64>> = const { Cell::new(None) };
}

/// All maps that this thread makes from now on have the keys of this seed. Only for worlds that are simulated.
pub fn seed_maps_of_this_thread(seed: u64) {
    SEED.set(Some(seed));
}

/// How a map hashes.
#[derive(Clone)]
pub struct Keys(RandomState);

impl Default for Keys {
    fn default() -> Self {
        Self(match SEED.get() {
            Some(seed) => {
                RandomState::with_seeds(seed, !seed, seed.rotate_left(32), seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
            }
            None => RandomState::new(),
        })
    }
}

impl BuildHasher for Keys {
    type Hasher = <RandomState as BuildHasher>::Hasher;

    fn build_hasher(&self) -> Self::Hasher {
        self.0.build_hasher()
    }

    fn hash_one<T: std::hash::Hash>(&self, value: T) -> u64 {
        self.0.hash_one(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order() -> Vec<u64> {
        (0..64).collect::<Set<u64>>().into_iter().collect()
    }

    #[test]
    fn maps_of_one_seed_are_iterated_in_one_order_and_others_in_any() {
        let (by_lot, again) = (order(), order());
        assert_ne!(by_lot, again);
        let seeded = |seed| {
            std::thread::spawn(move || {
                seed_maps_of_this_thread(seed);
                order()
            })
            .join()
            .unwrap()
        };
        assert_eq!(seeded(1), seeded(1));
        assert_ne!(seeded(1), seeded(2));
    }
}
