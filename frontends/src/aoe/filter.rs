//! The filter that the kernel runs on every frame of a socket (classic BPF): only requests for our targets wake us.
//! A convenience for the machine, not a check: what passes is looked at again.

use super::wire::{Address, ETHERTYPE, EVERY_SHELF, EVERY_SLOT};
use nix::libc;

/// Of the kernel's `linux/filter.h`: loads from here on are of what the kernel knows of the frame.
const KERNEL_KNOWS: u32 = -0x1000i32 as u32;
const FRAME_IS: u32 = KERNEL_KNOWS + 4;
/// The interface that the frame is of: of a VLAN's frame, the VLAN's, though it came in by the one below.
const INTERFACE: u32 = KERNEL_KNOWS + 8;
/// Frames for others, seen by an interface that listens to everything, or of a VLAN that is not this interface's.
const FOR_OTHERS: u32 = libc::PACKET_OTHERHOST as u32;
const OUTGOING: u32 = libc::PACKET_OUTGOING as u32;

const LOAD_HALF: u16 = (libc::BPF_LD | libc::BPF_H | libc::BPF_ABS) as u16;
const LOAD_BYTE: u16 = (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16;
const LOAD_WORD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const SHIFT_RIGHT: u16 = (libc::BPF_ALU | libc::BPF_RSH | libc::BPF_K) as u16;
const JUMP_IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const JUMP_IF_SET: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// A step whose jumps still name where they lead.
enum Step {
    Do(u16, u32),
    /// Onwards if it is so, otherwise the frame is dropped.
    Need(u32),
    /// Dropped if it is so.
    Refuse(u16, u32),
    /// Taken if it is so.
    Take(u32),
}

/// Frames of our type, not responses, of the interface of that index, to one of `addresses` or to a broadcast of shelf or
/// slot.
pub fn filter(addresses: &[Address], interface: u32) -> Vec<libc::sock_filter> {
    let mut steps = vec![
        Step::Do(LOAD_HALF, 12),
        Step::Need(ETHERTYPE.into()),
        Step::Do(LOAD_WORD, INTERFACE),
        Step::Need(interface),
        Step::Do(LOAD_WORD, FRAME_IS),
        Step::Refuse(JUMP_IF_EQUAL, FOR_OTHERS),
        Step::Refuse(JUMP_IF_EQUAL, OUTGOING),
        Step::Do(LOAD_BYTE, 14),
        Step::Refuse(JUMP_IF_SET, 0x08),
        // Shelf and slot in one: the word without its lowest byte.
        Step::Do(LOAD_WORD, 16),
        Step::Do(SHIFT_RIGHT, 8),
    ];
    steps.extend(addresses.iter().map(|address| Step::Take(u32::from(address.shelf) << 8 | u32::from(address.slot))));
    steps.extend([
        Step::Do(LOAD_BYTE, 18),
        Step::Take(EVERY_SLOT.into()),
        Step::Do(LOAD_HALF, 16),
        Step::Take(EVERY_SHELF.into()),
    ]);
    let drop_at = steps.len();
    let jump = |index: usize, to: usize| (to - index - 1) as u8;
    let steps = steps.iter().enumerate().map(|(index, step)| match *step {
        Step::Do(code, k) => instruction(code, 0, 0, k),
        Step::Need(k) => instruction(JUMP_IF_EQUAL, 0, jump(index, drop_at), k),
        Step::Refuse(code, k) => instruction(code, jump(index, drop_at), 0, k),
        Step::Take(k) => instruction(JUMP_IF_EQUAL, jump(index, drop_at + 1), 0, k),
    });
    steps.chain([instruction(RETURN, 0, 0, 0), instruction(RETURN, 0, 0, u32::MAX)]).collect()
}

fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;
    use torus_schema::limits::AOE_EXPORTS_MAX;

    /// What the kernel does with it; `kind`: what it knows of the frame.
    fn passes(filter: &[libc::sock_filter], frame: &[u8], kind: u32) -> bool {
        let (mut at, mut accumulator) = (0, 0u32);
        let bytes = |from: u32, count: usize| -> Option<u32> {
            let bytes = frame.get(from as usize..from as usize + count)?;
            Some(bytes.iter().fold(0, |number, byte| number << 8 | u32::from(*byte)))
        };
        loop {
            let libc::sock_filter { code, jt, jf, k } = filter[at];
            let load = match code {
                LOAD_WORD if k == FRAME_IS => Some(Some(kind)),
                LOAD_WORD if k == INTERFACE => Some(Some(3)),
                LOAD_WORD => Some(bytes(k, 4)),
                LOAD_HALF => Some(bytes(k, 2)),
                LOAD_BYTE => Some(bytes(k, 1)),
                _ => None,
            };
            if let Some(loaded) = load {
                // A load from behind the frame's end ends the filter, and the frame with it.
                let Some(loaded) = loaded else { return false };
                accumulator = loaded;
            }
            let taken = match code {
                SHIFT_RIGHT => {
                    accumulator >>= k;
                    None
                }
                JUMP_IF_EQUAL => Some(accumulator == k),
                JUMP_IF_SET => Some(accumulator & k != 0),
                RETURN => return k != 0,
                _ => None,
            };
            at += 1 + taken.map_or(0, |taken| usize::from(if taken { jt } else { jf }));
        }
    }

    #[test]
    fn only_requests_for_our_targets_pass() {
        let addresses: Vec<_> = (0..AOE_EXPORTS_MAX as u16).map(|n| Address { shelf: 256 + n, slot: 7 }).collect();
        let of_a_vlan = filter(&addresses, 4);
        let filter = filter(&addresses, 3);
        let frame = |kind: u16, flags: u8, shelf: u16, slot: u8| {
            let mut frame = vec![0; 24];
            frame[12..14].copy_from_slice(&kind.to_be_bytes());
            frame[14] = flags;
            frame[16..18].copy_from_slice(&shelf.to_be_bytes());
            frame[18] = slot;
            frame
        };
        for address in addresses {
            assert!(passes(&filter, &frame(0x88a2, 0x10, address.shelf, 7), 0), "{address}");
            assert!(!passes(&filter, &frame(0x88a2, 0x10, address.shelf, 8), 0), "{address}");
        }
        let ours = frame(0x88a2, 0x10, 256, 7);
        assert!(passes(&filter, &frame(0x88a2, 0x10, 0xffff, 0xff), 1));
        assert!(passes(&filter, &frame(0x88a2, 0x10, 0xffff, 7), 1));
        assert!(passes(&filter, &frame(0x88a2, 0x10, 256, 0xff), 1));
        assert!(!passes(&filter, &frame(0x0800, 0x10, 256, 7), 0));
        assert!(!passes(&filter, &frame(0x88a2, 0x18, 256, 7), 0), "a response");
        assert!(passes(&filter, &ours, 0) && !passes(&of_a_vlan, &ours, 0));
        assert!(!passes(&filter, &ours, FOR_OTHERS));
        assert!(!passes(&filter, &ours, OUTGOING));
        assert!(!passes(&filter, &ours[..19], 0), "too short to say for whom");
    }
}
