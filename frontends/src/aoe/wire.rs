//! The numbers and byte tables of AoE, after AoEr11 (S. Hopkins, B. Coile, February 2009); nothing else knows them.
//! All of them are in network byte order, except that an LBA's lowest byte comes first.
//!
//! The header, AoEr11 section 2, behind the Ethernet header (6 bytes to, 6 from, 2 of type 0x88a2):
//!
//! | byte  | field   | meaning |
//! |-------|---------|---------|
//! | 14    | ver     | high 4 bits: version, 1; 0x08: a response (R); 0x04: with an error (E); 0x03: zero |
//! | 15    | error   | section 2.4; only with E |
//! | 16–17 | major   | shelf; 0xffff: every shelf |
//! | 18    | minor   | slot; 0xff: every slot |
//! | 19    | command | 0 ATA, 1 query config, 2 MAC mask list, 3 reserve / release; from 0xf0 on the vendors' |
//! | 20–23 | tag     | the client's; given back as it came |
//! | 24–   | arg     | the command's |

use pnet::packet::ethernet::{EtherType, EthernetPacket, MutableEthernetPacket};
use pnet::util::MacAddr;
use std::fmt;
use std::str::FromStr;

pub const ETHERTYPE: u16 = 0x88a2;
pub const VERSION: u8 = 1;
pub const ETHERNET_BYTES: usize = 14;
/// Ethernet's and AoE's.
pub const HEADER_BYTES: usize = 24;
pub const ATA_BYTES: usize = 12;
pub const CONFIG_BYTES: usize = 8;
pub const MASK_BYTES: usize = 4;
pub const DIRECTIVE_BYTES: usize = 8;
pub const RESERVE_BYTES: usize = 2;
pub const MAC_BYTES: usize = 6;
pub const SECTOR_BYTES: usize = 512;

const RESPONSE: u8 = 0x08;
const ERROR: u8 = 0x04;

pub const COMMAND_ATA: u8 = 0;
pub const COMMAND_CONFIG: u8 = 1;
pub const COMMAND_MASK: u8 = 2;
pub const COMMAND_RESERVE: u8 = 3;

/// "The Major and Minor addresses of all ones are reserved for broadcast".
pub const EVERY_SHELF: u16 = 0xffff;
pub const EVERY_SLOT: u8 = 0xff;

/// What a target is called on its segment: `e1.2` is slot 2 of shelf 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    pub shelf: u16,
    pub slot: u8,
}

impl Address {
    /// 4095 is refused too: the Linux driver takes it for switches that were set the wrong way round.
    pub fn new(shelf: u16, slot: u8) -> Result<Self, String> {
        match (shelf, slot) {
            (EVERY_SHELF, _) => Err(format!("shelf {shelf} means every shelf; expected 0 to 65534")),
            (0xfff, _) => Err(format!("Linux refuses shelf {shelf}; take another")),
            (_, EVERY_SLOT) => Err(format!("slot {slot} means every slot; expected 0 to 254")),
            _ => Ok(Self { shelf, slot }),
        }
    }

    /// Whether a frame that names `asked` is for this one.
    pub fn is_meant_by(self, asked: Address) -> bool {
        (asked.shelf == self.shelf || asked.shelf == EVERY_SHELF)
            && (asked.slot == self.slot || asked.slot == EVERY_SLOT)
    }

    pub fn is_broadcast(self) -> bool {
        self.shelf == EVERY_SHELF || self.slot == EVERY_SLOT
    }
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "e{}.{}", self.shelf, self.slot)
    }
}

impl FromStr for Address {
    type Err = String;

    /// `1.2` or `e1.2`.
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("found {text:?}, expected SHELF.SLOT, such as 1.2");
        let (shelf, slot) = text.strip_prefix('e').unwrap_or(text).split_once('.').ok_or_else(bad)?;
        Self::new(shelf.parse().map_err(|_| bad())?, slot.parse().map_err(|_| bad())?)
    }
}

/// Section 2.4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ErrorCode {
    UnrecognizedCommand = 1,
    BadArgument = 2,
    /// "the server can no longer accept ATA commands"
    DeviceUnavailable = 3,
    ConfigStringPresent = 4,
    UnsupportedVersion = 5,
    Reserved = 6,
}

/// What a request's header says; the Ethernet type and the R flag have been looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub destination: MacAddr,
    pub source: MacAddr,
    pub version: u8,
    pub address: Address,
    pub command: u8,
    pub tag: u32,
}

/// Frames that are nobody's request: they are not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoRequest {
    Short,
    OtherType,
    Response,
}

/// The header of a request and its argument, with whatever padding came behind it.
pub fn parse(frame: &[u8]) -> Result<(Header, &[u8]), NoRequest> {
    if frame.len() < HEADER_BYTES {
        return Err(NoRequest::Short);
    }
    let ethernet = EthernetPacket::new(frame).ok_or(NoRequest::Short)?;
    if ethernet.get_ethertype() != EtherType(ETHERTYPE) {
        return Err(NoRequest::OtherType);
    }
    if frame[14] & RESPONSE != 0 {
        return Err(NoRequest::Response);
    }
    let header = Header {
        destination: ethernet.get_destination(),
        source: ethernet.get_source(),
        version: frame[14] >> 4,
        address: Address { shelf: u16::from_be_bytes([frame[16], frame[17]]), slot: frame[18] },
        command: frame[19],
        tag: u32::from_be_bytes([frame[20], frame[21], frame[22], frame[23]]),
    };
    Ok((header, &frame[HEADER_BYTES..]))
}

/// A response's header: to whom it came from, by `from`, in the name of `address`, under the same tag.
pub fn response(request: &Header, from: MacAddr, address: Address, error: Option<ErrorCode>) -> Vec<u8> {
    header(request.source, from, address, request.command, request.tag, error)
}

/// "an unsolicited Query Config Information response", to all, with tag 0.
pub fn advertisement(from: MacAddr, address: Address) -> Vec<u8> {
    header(MacAddr::broadcast(), from, address, COMMAND_CONFIG, 0, None)
}

fn header(to: MacAddr, from: MacAddr, address: Address, command: u8, tag: u32, error: Option<ErrorCode>) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER_BYTES + ATA_BYTES);
    frame.resize(ETHERNET_BYTES, 0);
    let mut ethernet = MutableEthernetPacket::new(&mut frame).expect("it is as long as an Ethernet header");
    ethernet.set_destination(to);
    ethernet.set_source(from);
    ethernet.set_ethertype(EtherType(ETHERTYPE));
    let flags = RESPONSE | if error.is_some() { ERROR } else { 0 };
    frame.extend_from_slice(&[VERSION << 4 | flags, error.map_or(0, |error| error as u8)]);
    frame.extend_from_slice(&address.shelf.to_be_bytes());
    frame.extend_from_slice(&[address.slot, command]);
    frame.extend_from_slice(&tag.to_be_bytes());
    frame
}

/// The argument of an ATA command, section 3.1; both ways.
///
/// | byte  | field       | meaning |
/// |-------|-------------|---------|
/// | 24    | aflags      | 0x40: 48-bit command (E); 0x10: device register bit 4 (D); 0x02: asynchronous (A); 0x01: data follows (W) |
/// | 25    | err/feature | the feature register; the error register in a response |
/// | 26    | count       | sectors |
/// | 27    | cmd/status  | the command; the status register in a response |
/// | 28–33 | lba0–lba5   | lba0 the lowest byte; without E, lba3 is the device register |
/// | 34–35 | reserved    | zero |
/// | 36–   | data        | |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    pub flags: u8,
    pub feature: u8,
    pub count: u8,
    pub command: u8,
    pub lba: [u8; 6],
}

impl Registers {
    pub const EXTENDED: u8 = 0x40;
    pub const WRITE: u8 = 0x01;

    /// And the data, with its padding; `None`: it is too short.
    pub fn parse(argument: &[u8]) -> Option<(Self, &[u8])> {
        let (fixed, data) = argument.split_at_checked(ATA_BYTES)?;
        let mut lba = [0; 6];
        lba.copy_from_slice(&fixed[4..10]);
        Some((Self { flags: fixed[0], feature: fixed[1], count: fixed[2], command: fixed[3], lba }, data))
    }

    pub fn put(&self, frame: &mut Vec<u8>) {
        frame.extend_from_slice(&[self.flags, self.feature, self.count, self.command]);
        frame.extend_from_slice(&self.lba);
        frame.extend_from_slice(&[0, 0]);
    }
}

/// The argument of a query config, section 3.2; both ways.
///
/// | byte  | field    | meaning |
/// |-------|----------|---------|
/// | 24–25 | buffers  | how many messages the target takes at once; zero in a request |
/// | 26–27 | firmware | zero in a request |
/// | 28    | sectors  | the most in one ATA command; zero in a request |
/// | 29    | aoe/ccmd | high 4 bits: the version, zero in a request; low: what is to be done with the string |
/// | 30–31 | length   | of the string, at most 1024 |
/// | 32–   | string   | |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config<'a> {
    pub buffers: u16,
    pub firmware: u16,
    pub sectors: u8,
    pub command: u8,
    pub string: &'a [u8],
}

pub const CONFIG_READ: u8 = 0;
pub const CONFIG_TEST: u8 = 1;
pub const CONFIG_TEST_PREFIX: u8 = 2;
pub const CONFIG_SET: u8 = 3;
pub const CONFIG_FORCE_SET: u8 = 4;
pub const CONFIG_STRING_BYTES_MAX: usize = 1024;

impl<'a> Config<'a> {
    /// Of a request; `None`: too short for what it says, or a string that is too long.
    pub fn parse(argument: &'a [u8]) -> Option<Self> {
        let (fixed, rest) = argument.split_at_checked(CONFIG_BYTES)?;
        let length = usize::from(u16::from_be_bytes([fixed[6], fixed[7]]));
        if length > CONFIG_STRING_BYTES_MAX {
            return None;
        }
        let buffers = u16::from_be_bytes([fixed[0], fixed[1]]);
        let firmware = u16::from_be_bytes([fixed[2], fixed[3]]);
        Some(Self { buffers, firmware, sectors: fixed[4], command: fixed[5] & 0x0f, string: rest.get(..length)? })
    }

    pub fn put(&self, frame: &mut Vec<u8>) {
        frame.extend_from_slice(&self.buffers.to_be_bytes());
        frame.extend_from_slice(&self.firmware.to_be_bytes());
        frame.extend_from_slice(&[self.sectors, VERSION << 4 | self.command]);
        frame.extend_from_slice(&(self.string.len() as u16).to_be_bytes());
        frame.extend_from_slice(self.string);
    }
}

/// The argument of a MAC mask list, section 3.3; both ways.
///
/// | byte  | field     | meaning |
/// |-------|-----------|---------|
/// | 24    | reserved  | zero |
/// | 25    | mcmd      | 0 read, 1 edit |
/// | 26    | merror    | 1 unspecified, 2 bad directive, 3 list full; zero in a request |
/// | 27    | dir count | directives that follow; in an answer the addresses of the list, or the directive that failed |
/// | 28–   | directive | each a reserved byte, dcmd (0 none, 1 add, 2 delete) and an address |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask {
    pub command: u8,
    pub directives: Vec<Directive>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Directive {
    pub command: u8,
    pub mac: MacAddr,
}

pub const MASK_READ: u8 = 0;
pub const MASK_EDIT: u8 = 1;
pub const DIRECTIVE_NONE: u8 = 0;
pub const DIRECTIVE_ADD: u8 = 1;
pub const DIRECTIVE_DELETE: u8 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum MaskError {
    BadDirective = 2,
    Full = 3,
}

impl Mask {
    pub fn parse(argument: &[u8]) -> Option<Self> {
        let (fixed, rest) = argument.split_at_checked(MASK_BYTES)?;
        let directives = rest.get(..usize::from(fixed[3]) * DIRECTIVE_BYTES)?.chunks_exact(DIRECTIVE_BYTES);
        let directives = directives.map(|bytes| Directive { command: bytes[1], mac: mac_at(&bytes[2..]) });
        Some(Self { command: fixed[1], directives: directives.collect() })
    }

    /// `count`: how many there are, or which of them failed.
    pub fn put(&self, error: Option<MaskError>, count: u8, frame: &mut Vec<u8>) {
        frame.extend_from_slice(&[0, self.command, error.map_or(0, |error| error as u8), count]);
        for directive in &self.directives {
            frame.extend_from_slice(&[0, directive.command]);
            frame.extend_from_slice(&directive.mac.octets());
        }
    }
}

/// The argument of a reserve / release, section 3.4; both ways.
///
/// | byte | field    | meaning |
/// |------|----------|---------|
/// | 24   | rcmd     | 0 read, 1 set, 2 force set |
/// | 25   | nmacs    | addresses that follow; none releases |
/// | 26–  | address  | |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reserve {
    pub command: u8,
    pub macs: Vec<MacAddr>,
}

pub const RESERVE_READ: u8 = 0;
pub const RESERVE_SET: u8 = 1;
pub const RESERVE_FORCE_SET: u8 = 2;

impl Reserve {
    pub fn parse(argument: &[u8]) -> Option<Self> {
        let (fixed, rest) = argument.split_at_checked(RESERVE_BYTES)?;
        let macs = rest.get(..usize::from(fixed[1]) * MAC_BYTES)?.chunks_exact(MAC_BYTES);
        Some(Self { command: fixed[0], macs: macs.map(mac_at).collect() })
    }

    pub fn put(&self, frame: &mut Vec<u8>) {
        frame.extend_from_slice(&[self.command, self.macs.len() as u8]);
        self.macs.iter().for_each(|mac| frame.extend_from_slice(&mac.octets()));
    }
}

fn mac_at(bytes: &[u8]) -> MacAddr {
    MacAddr::new(bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        let pairs = digits.chunks(2).map(|pair| std::str::from_utf8(pair).unwrap());
        pairs.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect()
    }

    const CLIENT: MacAddr = MacAddr(2, 0, 0, 0, 0, 1);
    const TARGET: MacAddr = MacAddr(2, 0, 0, 0, 0, 2);
    const E1_2: Address = Address { shelf: 1, slot: 2 };

    /// As `aoecmd_cfg_pkts` of the Linux driver builds it.
    const DISCOVER: &str = "ffffffffffff 020000000001 88a2 10 00 ffff ff 01 00000000 0000 0000 00 00 0000";
    /// As its `ata_rw_frameinit` builds it: WRITE SECTORS EXT of two sectors at 0x0102030405, third frame, tick 0x1234.
    const WRITE: &str = "020000000002 020000000001 88a2 10 00 0001 02 00 00031234 41 00 02 34 05 04 03 02 01 00 00 00";

    #[test]
    fn what_linux_sends_is_read_as_it_means_it() {
        let frame = bytes(DISCOVER);
        let (header, argument) = parse(&frame).unwrap();
        assert_eq!((header.source, header.version, header.command, header.tag), (CLIENT, 1, COMMAND_CONFIG, 0));
        assert!(E1_2.is_meant_by(header.address) && header.address.is_broadcast());
        assert_eq!(Config::parse(argument).unwrap().command, CONFIG_READ);
        let mut frame = bytes(WRITE);
        frame.extend_from_slice(&[7; 1024]);
        let (header, argument) = parse(&frame).unwrap();
        assert_eq!((header.address, header.tag, header.command), (E1_2, 0x0003_1234, COMMAND_ATA));
        let (registers, data) = Registers::parse(argument).unwrap();
        assert_eq!(registers, Registers { flags: 0x41, feature: 0, count: 2, command: 0x34, lba: [5, 4, 3, 2, 1, 0] });
        assert_eq!(data, [7; 1024]);
    }

    #[test]
    fn responses_are_these_bytes() {
        let frame = bytes(WRITE);
        let (request, _) = parse(&frame).unwrap();
        let mut answer = response(&request, TARGET, E1_2, None);
        Registers { flags: 0x41, feature: 0, count: 2, command: 0x40, lba: [5, 4, 3, 2, 1, 0] }.put(&mut answer);
        let expected = "020000000001 020000000002 88a2 18 00 0001 02 00 00031234 41 00 02 40 05 04 03 02 01 00 0000";
        assert_eq!(answer, bytes(expected));
        let refused = response(&request, TARGET, E1_2, Some(ErrorCode::Reserved));
        assert_eq!(refused, bytes("020000000001 020000000002 88a2 1c 06 0001 02 00 00031234"));
        let mut told = advertisement(TARGET, E1_2);
        Config { buffers: 64, firmware: 1, sectors: 2, command: 0, string: b"db" }.put(&mut told);
        let expected = "ffffffffffff 020000000002 88a2 18 00 0001 02 01 00000000 0040 0001 02 10 0002 6462";
        assert_eq!(told, bytes(expected));
    }

    #[test]
    fn lists_are_these_bytes() {
        let asked = bytes("00 01 00 02 00 01 020000000001 00 02 020000000002 ee");
        let mask = Mask::parse(&asked).unwrap();
        let directives = vec![Directive { command: 1, mac: CLIENT }, Directive { command: 2, mac: TARGET }];
        assert_eq!(mask, Mask { command: MASK_EDIT, directives });
        let mut out = Vec::new();
        mask.put(Some(MaskError::Full), 1, &mut out);
        assert_eq!(out, bytes("00 01 03 01 00 01 020000000001 00 02 020000000002"));
        let reserve = Reserve::parse(&bytes("01 01 020000000001")).unwrap();
        assert_eq!(reserve, Reserve { command: RESERVE_SET, macs: vec![CLIENT] });
        let mut out = Vec::new();
        reserve.put(&mut out);
        assert_eq!(out, bytes("01 01 020000000001"));
    }

    #[test]
    fn what_is_cut_off_anywhere_is_refused() {
        let asked = bytes("00 01 00 02 00 01 020000000001 00 02 020000000002");
        (0..asked.len()).for_each(|cut| assert_eq!(Mask::parse(&asked[..cut]), None, "{cut}"));
        let asked = bytes("01 02 020000000001 020000000002");
        (0..asked.len()).for_each(|cut| assert_eq!(Reserve::parse(&asked[..cut]), None, "{cut}"));
        let asked = bytes("0000 0000 00 01 0003 616263");
        (0..asked.len()).for_each(|cut| assert_eq!(Config::parse(&asked[..cut]), None, "{cut}"));
        assert_eq!(Config::parse(&[&[0, 0, 0, 0, 0, 0, 4, 1][..], &[b'a'; 1025]].concat()), None, "over 1024 bytes");
        let frame = bytes(DISCOVER);
        (0..HEADER_BYTES).for_each(|cut| assert_eq!(parse(&frame[..cut]), Err(NoRequest::Short), "{cut}"));
    }

    #[test]
    fn addresses_that_mean_all_are_nobodys() {
        assert_eq!("e1.2".parse(), Ok(E1_2));
        assert_eq!("1.2".parse(), Ok(E1_2));
        for refused in ["65535.0", "4095.0", "1.255", "1", "a.b", "70000.1", ""] {
            assert!(refused.parse::<Address>().is_err(), "{refused}");
        }
        assert!(!E1_2.is_meant_by(Address { shelf: 1, slot: 3 }));
        assert!(E1_2.is_meant_by(Address { shelf: 1, slot: EVERY_SLOT }));
    }

    proptest! {
        #[test]
        fn no_frame_makes_a_parser_panic(frame in proptest::collection::vec(any::<u8>(), 0..1600)) {
            if let Ok((_, argument)) = parse(&frame) {
                let _ = Registers::parse(argument);
            }
            let _ = (Registers::parse(&frame), Config::parse(&frame), Mask::parse(&frame), Reserve::parse(&frame));
        }

        #[test]
        fn a_config_comes_back_as_it_was_put(string in proptest::collection::vec(any::<u8>(), 0..=1024), command in 0u8..16) {
            let config = Config { buffers: 7, firmware: 8, sectors: 9, command, string: &string };
            let mut out = Vec::new();
            config.put(&mut out);
            prop_assert_eq!(Config::parse(&out), Some(config));
        }
    }
}
