//! Extent → slice. A volume of width W uses W slices: its *slots*, a sample without repetition of the ring's slices
//! drawn from its placement id, so that a small volume touches few nodes and a node's death few volumes.
//!
//! Everything here is stored by implication (data lies where it says), so its output may never change:
//! the hash is XXH3-64 of the bytes given below, and golden values guard it.
//!
//! * slot(extent)  = XXH3-64(extent as 8 bytes little-endian) mod W
//! * slots         = partial Fisher–Yates shuffle of 0..slices: step i swaps i with
//!   i + XXH3-64(placement id (16 bytes) ‖ i as 4 bytes little-endian) mod (slices − i)

use crate::ids::{ExtentIndex, SliceId, VolumeId};
use xxhash_rust::xxh3::xxh3_64;

/// The slots of one volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// `width` distinct slices.
    slots: Vec<SliceId>,
}

impl Placement {
    /// `width` and `slices` are powers of two, `width` at most `slices`.
    pub fn new(placement: VolumeId, width: u32, slices: u32) -> Self {
        assert!(width.is_power_of_two() && slices.is_power_of_two() && width <= slices);
        let mut all: Vec<u32> = (0..slices).collect();
        let mut key = [0; 20];
        key[..16].copy_from_slice(&placement.to_bytes());
        for step in 0..width {
            key[16..].copy_from_slice(&step.to_le_bytes());
            let offset = xxh3_64(&key) % u64::from(slices - step);
            all.swap(step as usize, step as usize + offset as usize);
        }
        all.truncate(width as usize);
        Self { slots: all.into_iter().map(SliceId).collect() }
    }

    pub fn slices(&self) -> &[SliceId] {
        &self.slots
    }

    /// Position of the extent's slice in `slices()`.
    pub fn slot_of(&self, extent: ExtentIndex) -> usize {
        (xxh3_64(&extent.0.to_le_bytes()) % self.slots.len() as u64) as usize
    }

    pub fn slice_of(&self, extent: ExtentIndex) -> SliceId {
        self.slots[self.slot_of(extent)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn where_data_lies_never_changes() {
        let placement = Placement::new(VolumeId::from_bytes(*b"torus golden vol"), 8, 4096);
        let slices: Vec<u32> = placement.slices().iter().map(|slice| slice.0).collect();
        assert_eq!(slices, [3984, 1299, 1623, 374, 72, 1021, 542, 404]);
        let extents = [0, 1, 2, 3, 4, 1 << 20, u64::MAX];
        assert_eq!(extents.map(|extent| placement.slot_of(ExtentIndex(extent))), [1, 6, 3, 5, 0, 4, 3]);
    }

    #[test]
    fn a_volume_as_wide_as_the_ring_uses_every_slice_once() {
        let mut slices = Placement::new(VolumeId::from_bytes([9; 16]), 256, 256).slices().to_vec();
        slices.sort();
        assert_eq!(slices, (0..256).map(SliceId).collect::<Vec<_>>());
    }

    proptest! {
        #[test]
        fn slots_are_distinct_slices_of_the_ring(id: [u8; 16], width_bits in 0_u32..9, more_bits in 0_u32..5) {
            let (width, slices) = (1 << width_bits, 1 << (width_bits + more_bits));
            let placement = Placement::new(VolumeId::from_bytes(id), width, slices);
            let mut distinct = placement.slices().to_vec();
            distinct.sort();
            distinct.dedup();
            prop_assert_eq!(distinct.len(), width as usize);
            prop_assert!(distinct.iter().all(|slice| slice.0 < slices));
        }

        #[test]
        fn an_extent_lies_in_the_slice_of_its_slot(extent: u64) {
            let placement = Placement::new(VolumeId::from_bytes([1; 16]), 64, 4096);
            let extent = ExtentIndex(extent);
            prop_assert_eq!(placement.slice_of(extent), placement.slices()[placement.slot_of(extent)]);
        }
    }
}
