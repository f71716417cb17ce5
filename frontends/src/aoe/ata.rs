//! What an ATA command asks for, and the registers it is answered with, after ATA/ATAPI Command Set 2 (ACS-2).
//! AoE carries the registers; nothing of a drive's bus is there.

use super::wire::{Registers, SECTOR_BYTES};
use crate::device::VolumeError;
use std::ops::Range;

/// ACS-2, annex B: the commands of initiators that there are. All others are aborted, as 6.2.2 asks.
mod command {
    pub const DATA_SET_MANAGEMENT: u8 = 0x06;
    pub const READ_SECTORS: u8 = 0x20;
    pub const READ_SECTORS_EXT: u8 = 0x24;
    pub const READ_DMA_EXT: u8 = 0x25;
    pub const READ_MULTIPLE_EXT: u8 = 0x29;
    pub const WRITE_SECTORS: u8 = 0x30;
    pub const WRITE_SECTORS_EXT: u8 = 0x34;
    pub const WRITE_DMA_EXT: u8 = 0x35;
    pub const WRITE_MULTIPLE_EXT: u8 = 0x39;
    pub const WRITE_DMA_FUA_EXT: u8 = 0x3d;
    pub const READ_VERIFY_SECTORS: u8 = 0x40;
    pub const READ_VERIFY_SECTORS_EXT: u8 = 0x42;
    pub const READ_MULTIPLE: u8 = 0xc4;
    pub const WRITE_MULTIPLE: u8 = 0xc5;
    pub const READ_DMA: u8 = 0xc8;
    pub const WRITE_DMA: u8 = 0xca;
    pub const WRITE_MULTIPLE_FUA_EXT: u8 = 0xce;
    pub const STANDBY_IMMEDIATE: u8 = 0xe0;
    pub const IDLE_IMMEDIATE: u8 = 0xe1;
    pub const STANDBY: u8 = 0xe2;
    pub const IDLE: u8 = 0xe3;
    pub const CHECK_POWER_MODE: u8 = 0xe5;
    pub const FLUSH_CACHE: u8 = 0xe7;
    pub const FLUSH_CACHE_EXT: u8 = 0xea;
    pub const IDENTIFY_DEVICE: u8 = 0xec;
    pub const SET_FEATURES: u8 = 0xef;
}

/// Status register, ACS-2 section 6.1.
const STATUS_READY: u8 = 0x40;
const STATUS_DEVICE_FAULT: u8 = 0x20;
const STATUS_ERROR: u8 = 0x01;
/// Error register, section 6.2.
const ERROR_UNCORRECTABLE: u8 = 0x40;
const ERROR_ID_NOT_FOUND: u8 = 0x10;
const ERROR_ABORT: u8 = 0x04;

/// "FFh: Device is in the PM0:Active state or PM1:Idle state" (7.3.2).
const POWER_ACTIVE: u8 = 0xff;
/// The TRIM bit of DATA SET MANAGEMENT's feature field (7.5.2).
const FEATURE_TRIM: u8 = 0x01;
/// Subcommands of SET FEATURES (table 64) that find things as they are: the cache is off, transfers have no mode.
const SET_TRANSFER_MODE: u8 = 0x03;
const DISABLE_WRITE_CACHE: u8 = 0x82;
/// The LBA bit of the device register: without it the numbers would be cylinder, head and sector.
const DEVICE_LBA: u8 = 0x40;
const LBA_ENTRY_BYTES: usize = 8;

/// A range of the device, in bytes; the end is not beyond the device's.
pub type Bytes = Range<u64>;

/// What is to be done, checked against the device's size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation<'a> {
    Identify,
    Read(Bytes),
    /// Read, and told whether it can be.
    Verify(Bytes),
    Write(Bytes, &'a [u8]),
    Trim(Vec<Bytes>),
    Flush,
    /// There is nothing to do; with this count in the answer.
    Nothing(u8),
}

/// Why an ATA command is not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The frame contradicts itself: AoE's "bad argument", and nothing is done.
    BadArgument,
    /// Beyond the end.
    IdNotFound,
    /// A command or a parameter of it that this device does not have.
    Abort,
}

/// What the frame asks for. `sectors_max`: in one command, by this interface's frames.
pub fn operation<'a>(
    registers: &Registers,
    data: &'a [u8],
    size_bytes: u64,
    sectors_max: u8,
) -> Result<Operation<'a>, Refusal> {
    use command::*;
    let range = || range(registers, size_bytes, sectors_max);
    match registers.command {
        IDENTIFY_DEVICE => Ok(Operation::Identify),
        READ_SECTORS | READ_SECTORS_EXT | READ_DMA | READ_DMA_EXT | READ_MULTIPLE | READ_MULTIPLE_EXT => {
            reads(registers)?;
            Ok(Operation::Read(range()?))
        }
        READ_VERIFY_SECTORS | READ_VERIFY_SECTORS_EXT => {
            reads(registers)?;
            Ok(Operation::Verify(range()?))
        }
        WRITE_SECTORS
        | WRITE_SECTORS_EXT
        | WRITE_DMA
        | WRITE_DMA_EXT
        | WRITE_MULTIPLE
        | WRITE_MULTIPLE_EXT
        | WRITE_DMA_FUA_EXT
        | WRITE_MULTIPLE_FUA_EXT => {
            let data = written(registers, data, sectors_max)?;
            Ok(Operation::Write(range()?, data))
        }
        DATA_SET_MANAGEMENT if registers.feature == FEATURE_TRIM => {
            Ok(Operation::Trim(trimmed(written(registers, data, sectors_max)?, size_bytes)?))
        }
        FLUSH_CACHE | FLUSH_CACHE_EXT => Ok(Operation::Flush),
        CHECK_POWER_MODE => Ok(Operation::Nothing(POWER_ACTIVE)),
        STANDBY | STANDBY_IMMEDIATE | IDLE | IDLE_IMMEDIATE => Ok(Operation::Nothing(registers.count)),
        SET_FEATURES if matches!(registers.feature, SET_TRANSFER_MODE | DISABLE_WRITE_CACHE) => {
            Ok(Operation::Nothing(registers.count))
        }
        _ => Err(Refusal::Abort),
    }
}

fn is_extended(registers: &Registers) -> bool {
    registers.flags & Registers::EXTENDED != 0
}

/// Data may follow all the same: the Linux driver's probe is a read with a frame's worth of zeros behind it.
fn reads(registers: &Registers) -> Result<(), Refusal> {
    match registers.flags & Registers::WRITE {
        0 => Ok(()),
        _ => Err(Refusal::BadArgument),
    }
}

/// The data that belongs to the command; what is behind it is padding.
fn written<'a>(registers: &Registers, data: &'a [u8], sectors_max: u8) -> Result<&'a [u8], Refusal> {
    if registers.flags & Registers::WRITE == 0 || !(1..=sectors_max).contains(&registers.count) {
        return Err(Refusal::BadArgument);
    }
    data.get(..usize::from(registers.count) * SECTOR_BYTES).ok_or(Refusal::BadArgument)
}

fn range(registers: &Registers, size_bytes: u64, sectors_max: u8) -> Result<Bytes, Refusal> {
    use command::*;
    let is_extended_command = matches!(
        registers.command,
        READ_SECTORS_EXT
            | READ_DMA_EXT
            | READ_MULTIPLE_EXT
            | READ_VERIFY_SECTORS_EXT
            | WRITE_SECTORS_EXT
            | WRITE_DMA_EXT
            | WRITE_MULTIPLE_EXT
            | WRITE_DMA_FUA_EXT
            | WRITE_MULTIPLE_FUA_EXT
    );
    // A flag and a command that disagree name two different sectors. A count of zero would mean 256 or 65,536.
    if is_extended(registers) != is_extended_command || !(1..=sectors_max).contains(&registers.count) {
        return Err(Refusal::BadArgument);
    }
    let [lba0, lba1, lba2, lba3, lba4, lba5] = registers.lba.map(u64::from);
    let low = lba0 | lba1 << 8 | lba2 << 16;
    let first = if is_extended_command {
        low | lba3 << 24 | lba4 << 32 | lba5 << 40
    } else if registers.lba[3] & DEVICE_LBA != 0 {
        low | (lba3 & 0x0f) << 24
    } else {
        return Err(Refusal::Abort);
    };
    bytes_of(first, u64::from(registers.count), size_bytes)
}

fn bytes_of(first: u64, sectors: u64, size_bytes: u64) -> Result<Bytes, Refusal> {
    // 48 and 16 bits of sectors: no sum of them comes near 64 bits.
    let range = first * SECTOR_BYTES as u64..(first + sectors) * SECTOR_BYTES as u64;
    if range.end > size_bytes { Err(Refusal::IdNotFound) } else { Ok(range) }
}

/// Entries of 48 bits of LBA and 16 of length, little endian; "if the Range Length is zero, the entry shall be
/// discarded as padding" (4.18.3.1). Either all of them can be trimmed, or none is.
fn trimmed(data: &[u8], size_bytes: u64) -> Result<Vec<Bytes>, Refusal> {
    let mut ranges = Vec::new();
    for entry in data.chunks_exact(LBA_ENTRY_BYTES) {
        let mut bytes = [0; LBA_ENTRY_BYTES];
        bytes.copy_from_slice(entry);
        let entry = u64::from_le_bytes(bytes);
        let (first, sectors) = (entry & 0xffff_ffff_ffff, entry >> 48);
        if sectors > 0 {
            ranges.push(bytes_of(first, sectors, size_bytes)?);
        }
    }
    Ok(ranges)
}

/// The registers of a command that was carried out.
pub fn done(asked: &Registers, count: u8) -> Registers {
    Registers { feature: 0, count, command: STATUS_READY, ..*asked }
}

/// The registers of a command that was refused; a bad argument has AoE's answer instead.
pub fn refused(asked: &Registers, refusal: Refusal) -> Registers {
    let error = match refusal {
        Refusal::IdNotFound => ERROR_ID_NOT_FOUND,
        Refusal::Abort | Refusal::BadArgument => ERROR_ABORT,
    };
    Registers { feature: error, command: STATUS_READY | STATUS_ERROR, ..*asked }
}

/// The one table from a volume's errors to ATA's. `None`: no answer, the initiator asks again, and finds us or another
/// target then; it gives up after minutes (180 s in Linux).
pub fn failed(asked: &Registers, error: &VolumeError) -> Option<Registers> {
    let (status, error) = match error {
        VolumeError::OutOfRange { .. } => (STATUS_ERROR, ERROR_ID_NOT_FOUND),
        VolumeError::ReadOnly => (STATUS_ERROR, ERROR_ABORT),
        VolumeError::Unreadable { .. } => (STATUS_ERROR, ERROR_UNCORRECTABLE),
        // Waiting would not help before somebody makes room; ATA has no word for it but a write fault.
        VolumeError::NoSpace { .. } => (STATUS_DEVICE_FAULT | STATUS_ERROR, ERROR_ABORT),
        // Whoever asked for a time limit wants to hear of it.
        VolumeError::TimedOut { .. } => (STATUS_ERROR, ERROR_ABORT),
        VolumeError::SessionEnded { .. }
        | VolumeError::NotFound { .. }
        | VolumeError::Attached { .. }
        | VolumeError::NotReady { .. }
        | VolumeError::Metadata { .. } => return None,
    };
    Some(Registers { feature: error, command: STATUS_READY | status, ..*asked })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;
    const SECTORS: u64 = SIZE / 512;

    fn registers(command: u8, flags: u8, count: u8, lba: u64) -> Registers {
        let mut bytes = [0; 6];
        bytes.copy_from_slice(&lba.to_le_bytes()[..6]);
        Registers { flags, feature: 0, count, command, lba: bytes }
    }

    fn asked(registers: &Registers, data: &[u8]) -> Result<Operation<'static>, Refusal> {
        operation(registers, data, SIZE, 2).map(|operation| match operation {
            Operation::Write(range, data) => {
                assert_eq!(data.len() as u64, range.end - range.start);
                Operation::Write(range, &[])
            }
            Operation::Trim(ranges) => Operation::Trim(ranges),
            Operation::Read(range) => Operation::Read(range),
            Operation::Verify(range) => Operation::Verify(range),
            Operation::Identify => Operation::Identify,
            Operation::Flush => Operation::Flush,
            Operation::Nothing(count) => Operation::Nothing(count),
        })
    }

    #[test]
    fn every_form_of_read_and_write_names_its_sectors() {
        for command in [0x24, 0x25, 0x29] {
            assert_eq!(asked(&registers(command, 0x40, 2, 3), &[]), Ok(Operation::Read(1536..2560)), "{command:x}");
        }
        assert_eq!(asked(&registers(0x42, 0x40, 2, 3), &[]), Ok(Operation::Verify(1536..2560)));
        for command in [0x20, 0xc4, 0xc8] {
            let read = registers(command, 0, 2, 0xe000_0003);
            assert_eq!(asked(&read, &[]), Ok(Operation::Read(1536..2560)), "{command:x}");
        }
        for command in [0x34, 0x35, 0x39, 0x3d, 0xce] {
            let write = registers(command, 0x41, 1, 3);
            assert_eq!(asked(&write, &[0; 600]), Ok(Operation::Write(1536..2048, &[])), "{command:x}");
        }
        for command in [0x30, 0xca, 0xc5] {
            let write = registers(command, 0x01, 1, 0x4000_0003);
            assert_eq!(asked(&write, &[0; 512]), Ok(Operation::Write(1536..2048, &[])), "{command:x}");
        }
    }

    #[test]
    fn the_last_sector_can_be_had_and_nothing_behind_it() {
        assert!(asked(&registers(0x24, 0x40, 1, SECTORS - 1), &[]).is_ok());
        for (count, lba) in [(2, SECTORS - 1), (1, SECTORS), (1, (1 << 48) - 1)] {
            assert_eq!(asked(&registers(0x24, 0x40, count, lba), &[]), Err(Refusal::IdNotFound), "{lba}");
            assert_eq!(asked(&registers(0x34, 0x41, count, lba), &[0; 1024]), Err(Refusal::IdNotFound), "{lba}");
        }
    }

    #[test]
    fn frames_that_contradict_themselves_do_nothing() {
        let bad = [
            ("no sectors", registers(0x24, 0x40, 0, 0), 0),
            ("more than a frame carries", registers(0x24, 0x40, 3, 0), 0),
            ("48 bits, not flagged", registers(0x24, 0x00, 1, 0), 0),
            ("28 bits, flagged as 48", registers(0x20, 0x40, 1, 0xe000_0000), 0),
            ("a read that says it writes", registers(0x24, 0x41, 1, 0), 512),
            ("a write that says it reads", registers(0x34, 0x40, 1, 0), 512),
            ("a write of no sectors", registers(0x34, 0x41, 0, 0), 512),
            ("a write without its data", registers(0x34, 0x41, 1, 0), 0),
            ("a write cut short", registers(0x34, 0x41, 2, 0), 1023),
            ("a trim cut short", Registers { feature: 1, ..registers(0x06, 0x41, 1, 0) }, 511),
        ];
        for (what, registers, bytes) in bad {
            assert_eq!(asked(&registers, &vec![0; bytes]), Err(Refusal::BadArgument), "{what}");
        }
    }

    #[test]
    fn a_drives_other_commands_are_aborted() {
        assert_eq!(asked(&registers(0x20, 0, 1, 0xa000_0003), &[]), Err(Refusal::Abort), "cylinder, head, sector");
        assert_eq!(asked(&registers(0x06, 0x41, 1, 0), &[0; 512]), Err(Refusal::Abort), "not a trim");
        let served = [
            0x06, 0x20, 0x24, 0x25, 0x29, 0x30, 0x34, 0x35, 0x39, 0x3d, 0x40, 0x42, 0xc4, 0xc5, 0xc8, 0xca, 0xce, 0xe0,
            0xe1, 0xe2, 0xe3, 0xe5, 0xe7, 0xea, 0xec,
        ];
        for command in (0..=0xff).filter(|command| !served.contains(command)) {
            assert_eq!(asked(&registers(command, 0x40, 1, 0), &[]), Err(Refusal::Abort), "{command:x}");
        }
        let aborted = refused(&registers(0xb0, 0, 1, 7), Refusal::Abort);
        assert_eq!((aborted.command, aborted.feature, aborted.lba[0]), (0x41, 0x04, 7));
    }

    #[test]
    fn what_needs_no_work_is_answered_all_the_same() {
        assert_eq!(asked(&registers(0xe5, 0, 0, 0), &[]), Ok(Operation::Nothing(0xff)));
        assert_eq!(asked(&registers(0xe0, 0, 0, 0), &[]), Ok(Operation::Nothing(0)));
        assert_eq!(asked(&registers(0xe7, 0, 0, 0), &[]), Ok(Operation::Flush));
        assert_eq!(asked(&registers(0xea, 0x40, 0, 0), &[]), Ok(Operation::Flush));
        let off = Registers { feature: 0x82, ..registers(0xef, 0, 0, 0) };
        assert_eq!(asked(&off, &[]), Ok(Operation::Nothing(0)));
        let on = Registers { feature: 0x02, ..registers(0xef, 0, 0, 0) };
        assert_eq!(asked(&on, &[]), Err(Refusal::Abort), "there is no cache to switch on");
        assert_eq!(done(&on, 3).command, 0x40);
    }

    #[test]
    fn a_trim_is_of_all_its_ranges_or_of_none() {
        let trim = Registers { feature: 1, ..registers(0x06, 0x41, 1, 0) };
        let mut data = vec![0; 512];
        data[..8].copy_from_slice(&(8u64 | 16 << 48).to_le_bytes());
        data[16..24].copy_from_slice(&(64u64 | 1 << 48).to_le_bytes());
        assert_eq!(asked(&trim, &data), Ok(Operation::Trim(vec![4096..12288, 32768..33280])));
        data[24..32].copy_from_slice(&(SECTORS | 1 << 48).to_le_bytes());
        assert_eq!(asked(&trim, &data), Err(Refusal::IdNotFound));
    }

    #[test]
    fn what_another_target_may_do_better_is_not_answered() {
        let read = registers(0x24, 0x40, 1, 0);
        let ended = VolumeError::SessionEnded { because: "fenced".into() };
        assert_eq!(failed(&read, &ended), None);
        assert_eq!(failed(&read, &VolumeError::NotReady { because: "starting".into() }), None);
        let lost = failed(&read, &VolumeError::Unreadable { block: 0, because: "damaged".into() }).unwrap();
        assert_eq!((lost.command, lost.feature), (0x41, 0x40));
        let full = failed(&read, &VolumeError::NoSpace { shard: "a".into() }).unwrap();
        assert_eq!(full.command & 0xa9, 0x21, "the bits that Linux looks at");
    }
}
