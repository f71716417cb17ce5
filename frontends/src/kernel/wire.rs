//! Generic netlink as the kernel's nbd driver speaks it (linux/netlink.h, linux/genetlink.h, linux/nbd-netlink.h), without
//! I/O. Numbers are in the machine's byte order.
//!
//! A message:
//!
//! | bytes | what |
//! |---|---|
//! | 4 | length of it all |
//! | 2 | type: the family's number; 2: how a request ended |
//! | 2 | flags: 1 request, 4 acknowledge |
//! | 4 | sequence, the same in the answer |
//! | 4 | port, 0 for the kernel |
//! | 1 | command |
//! | 1 | version of the family |
//! | 2 | zero |
//! | … | attributes |
//!
//! An attribute: 2 bytes its length with these four, 2 bytes its type (the highest bit set where attributes are
//! inside), the value, zeros to a multiple of 4.
//!
//! Written by hand: the messages are five and flat but for a list, less than the crates for them would bring.

const HEADER_BYTES: usize = 16;
const GENERIC_BYTES: usize = 4;
const ATTRIBUTE_BYTES: usize = 4;
const ALIGNMENT: usize = 4;
const TYPE_ENDED: u16 = 2;
/// Of the family that tells the numbers of the others.
pub const CONTROLLER: u16 = 16;
const FLAG_REQUEST: u16 = 1;
const FLAG_ACKNOWLEDGE: u16 = 4;
const NESTED: u16 = 1 << 15;
const VERSION: u8 = 1;

const CONTROLLER_GET_FAMILY: u8 = 3;
const CONTROLLER_FAMILY_ID: u16 = 1;
const CONTROLLER_FAMILY_NAME: u16 = 2;

const COMMAND_CONNECT: u8 = 1;
const COMMAND_DISCONNECT: u8 = 2;
const COMMAND_RECONFIGURE: u8 = 3;
const COMMAND_STATUS: u8 = 5;

const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const BLOCK_SIZE_BYTES: u16 = 3;
const TIMEOUT: u16 = 4;
const SERVER_FLAGS: u16 = 5;
const SOCKETS: u16 = 7;
const DEAD_CONNECTION_TIMEOUT: u16 = 8;
const DEVICE_LIST: u16 = 9;
const BACKEND_IDENTIFIER: u16 = 10;
/// Inside `SOCKETS`, and inside that.
const SOCKET_ITEM: u16 = 1;
const SOCKET_DESCRIPTOR: u16 = 1;
/// Inside `DEVICE_LIST`, and inside that.
const DEVICE_ITEM: u16 = 1;
const DEVICE_INDEX: u16 = 1;
const DEVICE_CONNECTED: u16 = 2;

/// What the driver is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    Family,
    Connect(Connect),
    Reconfigure { index: u32, size_bytes: Option<u64>, sockets: Vec<i32>, backend: String },
    Disconnect { index: u32 },
    Status,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connect {
    /// `None`: the first free one.
    pub index: Option<u32>,
    pub size_bytes: u64,
    pub block_bytes: u64,
    /// A connection on which one request takes longer is taken for dead.
    pub timeout_s: u64,
    /// How long requests wait when no connection is left, until they fail.
    pub dead_connection_timeout_s: u64,
    /// The transmission flags of NBD.
    pub server_flags: u64,
    pub sockets: Vec<i32>,
    pub backend: String,
}

/// What the kernel says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Family(u16),
    Index(u32),
    Devices(Vec<Device>),
    /// 0, or an errno: nothing more follows.
    Ended(i32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    pub index: u32,
    pub connected: bool,
}

impl Request {
    /// `family`: the driver's number; not looked at for `Family` itself.
    pub fn encode(&self, family: u16, sequence: u32) -> Vec<u8> {
        let (command, attributes) = match self {
            Self::Family => (CONTROLLER_GET_FAMILY, attribute(CONTROLLER_FAMILY_NAME, b"nbd\0")),
            Self::Connect(connect) => (COMMAND_CONNECT, connect.encode()),
            Self::Reconfigure { index, size_bytes, sockets, backend } => {
                let mut all = attribute(INDEX, &index.to_ne_bytes());
                all.extend(size_bytes.iter().flat_map(|bytes| attribute(SIZE_BYTES, &bytes.to_ne_bytes())));
                all.extend(text(BACKEND_IDENTIFIER, backend));
                if !sockets.is_empty() {
                    all.extend(socket_list(sockets));
                }
                (COMMAND_RECONFIGURE, all)
            }
            Self::Disconnect { index } => (COMMAND_DISCONNECT, attribute(INDEX, &index.to_ne_bytes())),
            Self::Status => (COMMAND_STATUS, vec![]),
        };
        let family = if *self == Self::Family { CONTROLLER } else { family };
        let length = HEADER_BYTES + GENERIC_BYTES + attributes.len();
        let mut out = u32::try_from(length).expect("a few sockets and a name").to_ne_bytes().to_vec();
        out.extend(family.to_ne_bytes());
        out.extend((FLAG_REQUEST | FLAG_ACKNOWLEDGE).to_ne_bytes());
        out.extend(sequence.to_ne_bytes());
        out.extend(0u32.to_ne_bytes());
        out.extend([command, VERSION, 0, 0]);
        out.extend(attributes);
        out
    }
}

impl Connect {
    fn encode(&self) -> Vec<u8> {
        let mut all = Vec::new();
        if let Some(index) = self.index {
            all.extend(attribute(INDEX, &index.to_ne_bytes()));
        }
        for (kind, value) in [
            (SIZE_BYTES, self.size_bytes),
            (BLOCK_SIZE_BYTES, self.block_bytes),
            (TIMEOUT, self.timeout_s),
            (DEAD_CONNECTION_TIMEOUT, self.dead_connection_timeout_s),
            (SERVER_FLAGS, self.server_flags),
        ] {
            all.extend(attribute(kind, &value.to_ne_bytes()));
        }
        all.extend(text(BACKEND_IDENTIFIER, &self.backend));
        all.extend(socket_list(&self.sockets));
        all
    }
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(ATTRIBUTE_BYTES + value.len()).expect("values of ours are short");
    let mut out = length.to_ne_bytes().to_vec();
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    out
}

/// C's strings end with a zero.
fn text(kind: u16, value: &str) -> Vec<u8> {
    attribute(kind, &[value.as_bytes(), &[0]].concat())
}

fn socket_list(sockets: &[i32]) -> Vec<u8> {
    let items = sockets.iter().flat_map(|descriptor| {
        let descriptor = u32::try_from(*descriptor).expect("an open descriptor is not negative");
        attribute(SOCKET_ITEM | NESTED, &attribute(SOCKET_DESCRIPTOR, &descriptor.to_ne_bytes()))
    });
    attribute(SOCKETS | NESTED, &items.collect::<Vec<u8>>())
}

/// The answers in one datagram to the request with this sequence, in order. What is not understood is left out: the
/// kernel may say more than we ask for.
pub fn parse(datagram: &[u8], family: u16, sequence: u32) -> Vec<Answer> {
    let mut answers = Vec::new();
    let mut rest = datagram;
    while let Some(length) = number(rest, 0).map(u32::from_ne_bytes) {
        let length = length as usize;
        let Some(message) = rest.get(..length).filter(|message| message.len() >= HEADER_BYTES) else { break };
        if number(message, 8).map(u32::from_ne_bytes) == Some(sequence) {
            answers.extend(parse_message(message, family));
        }
        rest = rest.get(length.next_multiple_of(ALIGNMENT)..).unwrap_or_default();
    }
    answers
}

fn parse_message(message: &[u8], family: u16) -> Option<Answer> {
    let kind = u16::from_ne_bytes(number(message, 4)?);
    if kind == TYPE_ENDED {
        return Some(Answer::Ended(i32::from_ne_bytes(number(message, HEADER_BYTES)?).wrapping_neg()));
    }
    let command = *message.get(HEADER_BYTES)?;
    let attributes = message.get(HEADER_BYTES + GENERIC_BYTES..)?;
    if kind == CONTROLLER {
        let value = find(attributes, CONTROLLER_FAMILY_ID)?;
        return Some(Answer::Family(u16::from_ne_bytes(number(value, 0)?)));
    }
    match command {
        _ if kind != family => None,
        COMMAND_CONNECT => Some(Answer::Index(u32::from_ne_bytes(number(find(attributes, INDEX)?, 0)?))),
        COMMAND_STATUS => {
            let items = split(find(attributes, DEVICE_LIST)?).filter(|(kind, _)| *kind == DEVICE_ITEM);
            Some(Answer::Devices(items.filter_map(|(_, item)| parse_device(item)).collect()))
        }
        _ => None,
    }
}

fn parse_device(item: &[u8]) -> Option<Device> {
    let index = u32::from_ne_bytes(number(find(item, DEVICE_INDEX)?, 0)?);
    let connected = find(item, DEVICE_CONNECTED)?.first().is_some_and(|connected| *connected != 0);
    Some(Device { index, connected })
}

fn number<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset + N)?.try_into().ok()
}

fn find(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    split(attributes).find_map(|(kind, value)| (kind == wanted).then_some(value))
}

/// Type and value of each attribute; ends where a length does not fit.
fn split(mut attributes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(number(attributes, 0)?));
        let kind = u16::from_ne_bytes(number(attributes, 2)?) & !NESTED;
        let value = attributes.get(ATTRIBUTE_BYTES..length)?;
        attributes = attributes.get(length.next_multiple_of(ALIGNMENT)..).unwrap_or_default();
        Some((kind, value))
    })
}

#[cfg(test)]
#[cfg(target_endian = "little")]
mod tests {
    use super::*;

    #[test]
    fn a_reconfigure_is_these_bytes() {
        let request =
            Request::Reconfigure { index: 3, size_bytes: Some(1 << 32), sockets: vec![7, 9], backend: "ab".into() };
        let bytes = request.encode(0x1d, 5);
        let expected = "4c000000 1d000500 05000000 00000000 03010000 \
                        08000100 03000000 \
                        0c000200 0000000001000000 \
                        07000a00 61620000 \
                        1c000780 0c000180 08000100 07000000 0c000180 08000100 09000000";
        let expected: String = expected.split_whitespace().collect();
        let found: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn a_connect_names_its_device_only_if_asked() {
        let connect = Connect {
            index: None,
            size_bytes: 1 << 20,
            block_bytes: 4096,
            timeout_s: 9,
            dead_connection_timeout_s: 8,
            server_flags: 0x15,
            sockets: vec![4],
            backend: "x".into(),
        };
        let without = Request::Connect(connect.clone()).encode(1, 1);
        let attributes = &without[HEADER_BYTES + GENERIC_BYTES..];
        assert_eq!(find(attributes, INDEX), None);
        assert_eq!(find(attributes, SERVER_FLAGS), Some(&0x15u64.to_ne_bytes()[..]));
        assert_eq!(find(attributes, TIMEOUT), Some(&9u64.to_ne_bytes()[..]));
        let with = Request::Connect(Connect { index: Some(2), ..connect }).encode(1, 1);
        assert_eq!(find(&with[HEADER_BYTES + GENERIC_BYTES..], INDEX), Some(&2u32.to_ne_bytes()[..]));
        assert_eq!(u32::from_ne_bytes(number(&with, 0).unwrap()) as usize, with.len());
    }

    fn message(kind: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
        let mut out = ((HEADER_BYTES + body.len()) as u32).to_ne_bytes().to_vec();
        out.extend(kind.to_ne_bytes());
        out.extend([0, 0]);
        out.extend(sequence.to_ne_bytes());
        out.extend([0; 4]);
        out.extend(body);
        out
    }

    #[test]
    fn answers_are_found_one_behind_the_other_and_those_to_others_are_not() {
        let device = |index: u32, connected: u8| {
            let inside = [attribute(DEVICE_INDEX, &index.to_ne_bytes()), attribute(DEVICE_CONNECTED, &[connected])];
            attribute(DEVICE_ITEM | NESTED, &inside.concat())
        };
        let list = attribute(DEVICE_LIST | NESTED, &[device(0, 1), device(5, 0)].concat());
        let status = [&[COMMAND_STATUS, VERSION, 0, 0][..], &list].concat();
        let mut datagram = message(30, 4, &status);
        datagram.extend(message(30, 3, &status));
        datagram.extend(message(TYPE_ENDED, 4, &(-22i32).to_ne_bytes()));
        let devices = vec![Device { index: 0, connected: true }, Device { index: 5, connected: false }];
        assert_eq!(parse(&datagram, 30, 4), vec![Answer::Devices(devices), Answer::Ended(22)]);
    }

    #[test]
    fn no_cut_and_no_length_makes_it_read_beyond_the_end() {
        let id = attribute(CONTROLLER_FAMILY_ID, &7u16.to_ne_bytes());
        let whole = message(CONTROLLER, 1, &[&[1, 2, 0, 0][..], &id].concat());
        assert_eq!(parse(&whole, 0, 1), vec![Answer::Family(7)]);
        for cut in 0..whole.len() {
            parse(&whole[..cut], 0, 1);
        }
        for at in 0..whole.len() {
            for value in [0, 1, 3, 0x7f, 0xff] {
                let mut bent = whole.clone();
                bent[at] = value;
                parse(&bent, 0, 1);
            }
        }
    }
}
