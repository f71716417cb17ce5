//! What IDENTIFY DEVICE tells (ACS-2 section 7.12, table 48): 256 words of 16 bits, each little endian. A word that is
//! not named here is zero: not supported, not reported, or obsolete.

use super::wire::SECTOR_BYTES;
use torus_schema::ids::VolumeId;
use torus_schema::limits::BLOCK_BYTES;

pub const IDENTIFY_BYTES: usize = 512;

/// Addresses in 28 bits: "shall be ≤ 0FFF_FFFFh".
const LBA28_SECTORS_MAX: u64 = 0x0fff_ffff;
/// The cylinders of a disk that is larger than its cylinders can tell.
const CYLINDERS_MAX: u64 = 16_383;
const HEADS: u64 = 16;
const SECTORS_PER_TRACK: u64 = 63;
/// Of READ and WRITE MULTIPLE; it has no meaning where a command is one frame.
const SECTORS_PER_BLOCK: u16 = 16;
const LOGICAL_PER_PHYSICAL_LOG2: u16 = (BLOCK_BYTES / SECTOR_BYTES as u64).trailing_zeros() as u16;
/// In words that have to be told from all zeros and all ones: bit 15 is zero and bit 14 is one.
const VALID: u16 = 1 << 14;

/// Words 82 to 84 say what there is, 85 to 87 what is switched on: nothing of it can be switched off.
const POWER_MANAGEMENT: u16 = 1 << 3;
const FLUSH_CACHE_EXT: u16 = 1 << 13;
const FLUSH_CACHE: u16 = 1 << 12;
const LBA48: u16 = 1 << 10;
const WORLD_WIDE_NAME: u16 = 1 << 8;
const FUA: u16 = 1 << 6;
const WORDS_119_120_VALID: u16 = 1 << 15;

pub fn identify(volume: VolumeId, name: &str, size_bytes: u64) -> [u8; IDENTIFY_BYTES] {
    let sectors = size_bytes / SECTOR_BYTES as u64;
    let mut words = [0u16; 256];
    // General configuration: an ATA device (bit 15 zero); bit 6 was "not removable".
    words[0] = 0x0040;
    geometry(&mut words, sectors);
    // Serial number: 20 characters; the first of the volume's id, which no other volume has.
    put_text(&mut words[10..20], &volume.to_string().replace('-', ""));
    put_text(&mut words[23..27], env!("CARGO_PKG_VERSION"));
    put_text(&mut words[27..47], &format!("Torus volume {name}"));
    words[47] = 0x8000 | SECTORS_PER_BLOCK;
    // Capabilities: IORDY (bit 11), LBA (9), DMA (8).
    words[49] = 0x0b00;
    words[50] = VALID;
    // Words 88, 64–70 and 54–58 are valid.
    words[53] = 0x0007;
    words[59] = 0x0100 | SECTORS_PER_BLOCK;
    put_number(&mut words[60..62], sectors.min(LBA28_SECTORS_MAX));
    // Multiword DMA 0–2, PIO 3 and 4, their cycle of 120 ns, Ultra DMA 0–5 with 5 chosen: what a bus would need.
    words[63] = 0x0007;
    words[64] = 0x0003;
    words[65..=68].fill(120);
    words[88] = 0x203f;
    // Additional: what is read of trimmed sectors is the same each time (bit 14). Not zeros always: a block of 4 KiB
    // that is trimmed in part stays.
    words[69] = 1 << 14;
    // Major version: ATA/ATAPI-4 (bit 4) to ACS-2 (bit 9).
    words[80] = 0x03f0;
    words[82] = POWER_MANAGEMENT;
    words[83] = VALID | FLUSH_CACHE_EXT | FLUSH_CACHE | LBA48;
    words[84] = VALID | WORLD_WIDE_NAME | FUA;
    words[85] = POWER_MANAGEMENT;
    words[86] = WORDS_119_120_VALID | FLUSH_CACHE_EXT | FLUSH_CACHE | LBA48;
    words[87] = VALID | WORLD_WIDE_NAME | FUA;
    put_number(&mut words[100..104], sectors);
    // DATA SET MANAGEMENT takes one block of ranges: two would not fit each frame.
    words[105] = 1;
    // Several logical sectors per physical one (bit 13), their number as a power of two.
    words[106] = VALID | 1 << 13 | LOGICAL_PER_PHYSICAL_LOG2;
    world_wide_name(&mut words, volume);
    words[119] = VALID;
    words[120] = VALID;
    // TRIM.
    words[169] = 0x0001;
    // The first logical sector begins a physical one.
    words[209] = VALID;
    // Nothing rotates.
    words[217] = 0x0001;
    sealed(words)
}

/// Words 1, 3, 6 and 54–58, obsolete since ATA/ATAPI-6: cylinders, heads and sectors, for who still looks.
fn geometry(words: &mut [u16; 256], sectors: u64) {
    let cylinders = (sectors / (HEADS * SECTORS_PER_TRACK)).min(CYLINDERS_MAX);
    for first in [1, 54] {
        words[first] = cylinders as u16;
    }
    (words[3], words[55]) = (HEADS as u16, HEADS as u16);
    (words[6], words[56]) = (SECTORS_PER_TRACK as u16, SECTORS_PER_TRACK as u16);
    put_number(&mut words[57..59], cylinders * HEADS * SECTORS_PER_TRACK);
}

/// Words 108–111: NAA 3 ("locally assigned") and 60 bits of the volume's id, the most significant word first.
fn world_wide_name(words: &mut [u16; 256], volume: VolumeId) {
    let id = volume.0.as_bytes();
    let number = u64::from_be_bytes([id[0], id[1], id[2], id[3], id[4], id[5], id[6], id[7]]);
    let name = 3 << 60 | number >> 4;
    for (word, shift) in words[108..112].iter_mut().zip([48, 32, 16, 0]) {
        *word = (name >> shift) as u16;
    }
}

/// ATA strings (3.3.10): blanks behind them, and in each word the first character in the high byte.
fn put_text(words: &mut [u16], text: &str) {
    let printable = text.bytes().map(|byte| if byte.is_ascii_graphic() || byte == b' ' { byte } else { b'?' });
    let mut characters = printable.chain(std::iter::repeat(b' '));
    for word in words {
        let pair = [characters.next(), characters.next()].map(|byte| byte.unwrap_or(b' '));
        *word = u16::from_be_bytes(pair);
    }
}

fn put_number(words: &mut [u16], number: u64) {
    for (index, word) in words.iter_mut().enumerate() {
        *word = (number >> (16 * index)) as u16;
    }
}

/// Word 255: a signature, and the byte that makes the sum of all 512 zero.
fn sealed(mut words: [u16; 256]) -> [u8; IDENTIFY_BYTES] {
    words[255] = 0x00a5;
    let mut bytes = [0; IDENTIFY_BYTES];
    for (pair, word) in bytes.chunks_exact_mut(2).zip(words) {
        pair.copy_from_slice(&word.to_le_bytes());
    }
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[IDENTIFY_BYTES - 1] = sum.wrapping_neg();
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn told(size_bytes: u64) -> Vec<u16> {
        let volume = VolumeId(Uuid::from_u128(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef));
        let bytes = identify(volume, "db-1", size_bytes);
        assert_eq!(bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0, "the checksum of word 255");
        bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect()
    }

    fn text(words: &[u16]) -> String {
        words.iter().flat_map(|word| word.to_be_bytes()).map(char::from).collect()
    }

    #[test]
    fn a_volume_is_told_as_linux_reads_it() {
        let words = told(10 << 30);
        let sectors = (10u64 << 30) / 512;
        assert_ne!((words[83] | words[86]) & 1 << 10, 0, "48-bit addresses");
        let told = (0..4).map(|index| u64::from(words[100 + index]) << (16 * index)).sum::<u64>();
        assert_eq!(told, sectors);
        assert_eq!(u64::from(words[60]) | u64::from(words[61]) << 16, sectors);
        assert_eq!((words[54], words[55], words[56]), (16_383, 16, 63));
        assert_eq!(text(&words[10..20]), "0123456789abcdef0123");
        assert_eq!(text(&words[27..47]), format!("{:<40}", "Torus volume db-1"));
        assert_eq!(words[106], 0x6003, "eight sectors a block");
        assert_eq!(words[108..112], [0x3012, 0x3456, 0x789a, 0xbcde]);
        assert_eq!(words[85] & 1 << 5, 0, "no volatile write cache");
        assert_eq!(words[255] & 0xff, 0xa5);
    }

    #[test]
    fn a_large_volume_is_as_large_as_28_bits_can_tell_and_all_of_it_in_48() {
        let words = told(1 << 50);
        assert_eq!((words[60], words[61]), (0xffff, 0x0fff));
        assert_eq!(words[100..104], [0, 0, 1 << 9, 0]);
    }

    #[test]
    fn a_name_is_cut_to_its_field_and_stays_ascii() {
        let bytes = identify(VolumeId(Uuid::nil()), &"ß".repeat(100), 1 << 20);
        let model = &bytes[54..94];
        assert!(model.iter().all(u8::is_ascii_graphic) || model.contains(&b' '));
        assert!(model.iter().all(u8::is_ascii));
    }
}
