//! Each command, each error and a table of frames that are none.

use super::*;
use crate::aoe::ata::Operation;
use crate::aoe::wire::{ATA_BYTES, HEADER_BYTES};
use proptest::prelude::*;

const FACE: Face = Face { mac: MacAddr(2, 0, 0, 0, 0, 2), sectors_max: 2 };
const CLIENT: MacAddr = MacAddr(2, 0, 0, 0, 0, 1);
const E1_2: Address = Address { shelf: 1, slot: 2 };
const SIZE: u64 = 1 << 20;

/// A frame from the client to us; the rest as given.
fn frame(address: Address, command: u8, argument: &[u8]) -> Vec<u8> {
    let request = Header { destination: CLIENT, source: FACE.mac, version: 1, address, command, tag: 7 };
    // A response the other way round, without its flag, is a request.
    let mut frame = wire::response(&request, CLIENT, address, None);
    frame[14] = 0x10;
    frame.extend_from_slice(argument);
    frame
}

fn ata(flags: u8, count: u8, command: u8, lba: u8) -> Vec<u8> {
    let mut argument = Vec::new();
    Registers { flags, feature: 0, count, command, lba: [lba, 0, 0, 0, 0, 0] }.put(&mut argument);
    argument
}

fn decided(frame: &[u8], lists: &Lists) -> Decision<'static> {
    let (header, argument) = match receive(frame, &FACE) {
        Ok(received) => received,
        Err(dropped) => return Decision::Drop(dropped),
    };
    match decide(&header, argument, &FACE, E1_2, lists, SIZE) {
        Decision::Drop(dropped) => Decision::Drop(dropped),
        Decision::Answer(answer) => Decision::Answer(answer),
        Decision::Lists(request) => Decision::Lists(request),
        Decision::Ata(registers, Operation::Write(range, _)) => Decision::Ata(registers, Operation::Write(range, &[])),
        Decision::Ata(registers, Operation::Read(range)) => Decision::Ata(registers, Operation::Read(range)),
        other => panic!("{other:?}"),
    }
}

fn error_of(decision: Decision<'_>) -> Option<u8> {
    match decision {
        Decision::Answer(answer) if answer[14] == 0x1c => Some(answer[15]),
        _ => None,
    }
}

#[test]
fn reads_and_writes_of_the_target_are_asked_for() {
    let read = decided(&frame(E1_2, 0, &ata(0x40, 1, 0x24, 1)), &Lists::default());
    assert!(matches!(read, Decision::Ata(_, Operation::Read(range)) if range == (512..1024)));
    let mut write = frame(E1_2, 0, &ata(0x41, 1, 0x34, 1));
    write.extend_from_slice(&[1; 512]);
    let write = decided(&write, &Lists::default());
    assert!(matches!(write, Decision::Ata(_, Operation::Write(range, _)) if range == (512..1024)));
}

#[test]
fn the_linux_probe_with_data_behind_a_read_is_a_read() {
    let mut probe = frame(E1_2, 0, &ata(0x40, 2, 0x24, 0));
    probe.extend_from_slice(&[0; 1024]);
    assert!(matches!(decided(&probe, &Lists::default()), Decision::Ata(_, Operation::Read(_))));
}

#[test]
fn every_frame_of_the_table_is_dropped_or_answered_with_its_error() {
    let open = Lists::default();
    let masked = Lists { masks: vec![FACE.mac], ..Lists::default() };
    let reserved = Lists { reserved: vec![FACE.mac], ..Lists::default() };
    let read = frame(E1_2, 0, &ata(0x40, 1, 0x24, 0));
    let edited = |at: usize, byte: u8| {
        let mut edited = read.clone();
        edited[at] = byte;
        edited
    };
    let everybody = Address { shelf: 0xffff, slot: 0xff };
    let dropped = [
        ("too short", read[..HEADER_BYTES - 1].to_vec(), &open, Dropped::Short),
        ("another type", edited(12, 0x08), &open, Dropped::NoRequest),
        ("a response", edited(14, 0x18), &open, Dropped::NoRequest),
        ("to another host", edited(5, 9), &open, Dropped::NotOurs),
        ("from a group", edited(6, 3), &open, Dropped::NotOurs),
        ("from ourselves", edited(11, 2), &open, Dropped::NotOurs),
        ("another slot", edited(18, 3), &open, Dropped::NotOurs),
        ("not on the mask list", read.clone(), &masked, Dropped::Masked),
        ("a version of who is not heard", edited(14, 0x20), &masked, Dropped::Masked),
        ("ATA to all", frame(everybody, 0, &ata(0x40, 1, 0x24, 0)), &open, Dropped::Broadcast),
        ("a mask list of all", frame(everybody, 2, &[0, 1, 0, 0]), &open, Dropped::Broadcast),
    ];
    for (what, frame, lists, expected) in dropped {
        assert_eq!(decided(&frame, lists), Decision::Drop(expected), "{what}");
    }
    let refused = [
        ("another version", edited(14, 0x20), &open, 5),
        ("reserved", read.clone(), &reserved, 6),
        ("no command", frame(E1_2, 4, &[]), &open, 1),
        ("a vendor's command", frame(E1_2, 0xf0, &[]), &open, 1),
        ("no registers", frame(E1_2, 0, &[0; ATA_BYTES - 1]), &open, 2),
        ("more than fits", frame(E1_2, 0, &ata(0x40, 3, 0x24, 0)), &open, 2),
        ("a write without data", frame(E1_2, 0, &ata(0x41, 1, 0x34, 0)), &open, 2),
        ("no config", frame(E1_2, 1, &[0; 7]), &open, 2),
        ("a config cut off", frame(E1_2, 1, &[0, 0, 0, 0, 0, 3, 0, 5, b'a']), &open, 2),
        ("a config command", frame(E1_2, 1, &[0, 0, 0, 0, 0, 5, 0, 0]), &open, 2),
        ("a mask command", frame(E1_2, 2, &[0, 2, 0, 0]), &open, 2),
        ("a reserve command", frame(E1_2, 3, &[3, 0]), &open, 2),
        ("a reserve cut off", frame(E1_2, 3, &[1, 1, 2, 0, 0, 0, 0]), &open, 2),
    ];
    for (what, frame, lists, expected) in refused {
        assert_eq!(error_of(decided(&frame, lists)), Some(expected), "{what}");
    }
}

#[test]
fn a_refused_ata_command_has_its_registers_and_no_data() {
    let beyond = decided(&frame(E1_2, 0, &ata(0x40, 1, 0x24, 0)), &Lists::default());
    assert!(matches!(beyond, Decision::Ata(..)));
    let smart = decided(&frame(E1_2, 0, &ata(0, 1, 0xb0, 9)), &Lists::default());
    let Decision::Answer(answer) = smart else { panic!("{smart:?}") };
    assert_eq!(answer[14..16], [0x18, 0], "no error of AoE's");
    assert_eq!(answer[HEADER_BYTES..], [0, 0x04, 1, 0x41, 9, 0, 0, 0, 0, 0, 0, 0]);
}

proptest! {
    #[test]
    fn whatever_comes_is_dropped_answered_or_within_the_volume(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..1200),
        ours in any::<bool>(),
    ) {
        if ours && bytes.len() >= HEADER_BYTES {
            bytes[..HEADER_BYTES - 5].copy_from_slice(&frame(E1_2, 0, &[])[..HEADER_BYTES - 5]);
            bytes[19] &= 3;
        }
        if let Ok((header, argument)) = receive(&bytes, &FACE) {
            match decide(&header, argument, &FACE, E1_2, &Lists::default(), SIZE) {
                Decision::Ata(_, Operation::Read(range)) => {
                    prop_assert!(range.end <= SIZE && range.end - range.start <= 1024);
                }
                Decision::Ata(_, Operation::Write(range, data)) => {
                    prop_assert!(range.end <= SIZE && data.len() as u64 == range.end - range.start);
                }
                Decision::Answer(answer) => prop_assert!(answer.len() <= bytes.len().max(HEADER_BYTES + ATA_BYTES)),
                _ => {}
            }
        }
    }
}
