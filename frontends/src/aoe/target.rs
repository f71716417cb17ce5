//! What becomes of a frame: dropped, answered at once, or something is to be done first. Without I/O.

use super::ata::{self, Operation, Refusal};
use super::lists::{Lists, Request};
use super::wire::{self, Address, ErrorCode, Header, NoRequest, Registers};
use pnet::util::MacAddr;

/// The interface that a frame came in on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Face {
    pub mac: MacAddr,
    /// In one ATA command.
    pub sectors_max: u8,
}

/// Frames that are not answered, by the first reason there was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dropped {
    /// No whole AoE header, or cut off by the receive buffer.
    Short,
    /// Of another Ethernet type, or a response: the kernel's filter lets neither pass.
    NoRequest,
    /// To another Ethernet address, from none that can be answered, or for another target.
    NotOurs,
    /// Not on the mask list.
    Masked,
    /// ATA to every target at once.
    Broadcast,
    /// A config test that does not match: the specification's silence.
    Unmatched,
    /// We are not the volume's writer.
    Standby,
    /// A write overtaken by a newer one.
    Late,
    /// The same write is under way.
    Duplicate,
    /// A write sooner after the start than frames can still be under way.
    Quarantined,
    /// Too many are not answered yet.
    Busy,
    /// The volume waits for something, or another target has it now.
    Unanswered,
}

impl Dropped {
    pub const ALL: [Self; 12] = [
        Self::Short,
        Self::NoRequest,
        Self::NotOurs,
        Self::Masked,
        Self::Broadcast,
        Self::Unmatched,
        Self::Standby,
        Self::Late,
        Self::Duplicate,
        Self::Quarantined,
        Self::Busy,
        Self::Unanswered,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Short => "short",
            Self::NoRequest => "no_request",
            Self::NotOurs => "not_ours",
            Self::Masked => "masked",
            Self::Broadcast => "broadcast",
            Self::Unmatched => "unmatched",
            Self::Standby => "standby",
            Self::Late => "late",
            Self::Duplicate => "duplicate",
            Self::Quarantined => "quarantined",
            Self::Busy => "busy",
            Self::Unanswered => "unanswered",
        }
    }
}

/// What a frame asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision<'a> {
    Drop(Dropped),
    Answer(Vec<u8>),
    Lists(Request),
    Ata(Registers, Operation<'a>),
}

/// The part that is the same for all targets at an interface.
pub fn receive<'a>(frame: &'a [u8], face: &Face) -> Result<(Header, &'a [u8]), Dropped> {
    let (header, argument) = wire::parse(frame).map_err(|no| match no {
        NoRequest::Short => Dropped::Short,
        NoRequest::OtherType | NoRequest::Response => Dropped::NoRequest,
    })?;
    let to_us = header.destination == face.mac || header.destination == MacAddr::broadcast();
    // An answer to a group, to nobody or to ourselves would reach others than who asked.
    let from_one = !header.source.is_multicast() && !header.source.is_zero() && header.source != face.mac;
    if to_us && from_one { Ok((header, argument)) } else { Err(Dropped::NotOurs) }
}

/// Of a frame for `address`. `size_bytes`: of its volume.
pub fn decide<'a>(
    header: &Header,
    argument: &'a [u8],
    face: &Face,
    address: Address,
    lists: &Lists,
    size_bytes: u64,
) -> Decision<'a> {
    if !address.is_meant_by(header.address) {
        return Decision::Drop(Dropped::NotOurs);
    }
    if !lists.hears(header.source) {
        return Decision::Drop(Dropped::Masked);
    }
    let to_all = header.address.is_broadcast() || header.destination.is_broadcast();
    if to_all && header.command != wire::COMMAND_CONFIG {
        return Decision::Drop(Dropped::Broadcast);
    }
    let answer = |error| Decision::Answer(wire::response(header, face.mac, address, Some(error)));
    if header.version != wire::VERSION {
        return answer(ErrorCode::UnsupportedVersion);
    }
    match header.command {
        wire::COMMAND_ATA if !lists.lets_use(header.source) => answer(ErrorCode::Reserved),
        wire::COMMAND_ATA => match Registers::parse(argument) {
            Some((registers, data)) => match ata::operation(&registers, data, size_bytes, face.sectors_max) {
                Ok(operation) => Decision::Ata(registers, operation),
                Err(Refusal::BadArgument) => {
                    Decision::Answer(with(header, face, address, Some(ErrorCode::BadArgument), &registers))
                }
                Err(refusal) => Decision::Answer(with(header, face, address, None, &ata::refused(&registers, refusal))),
            },
            None => answer(ErrorCode::BadArgument),
        },
        wire::COMMAND_CONFIG | wire::COMMAND_MASK | wire::COMMAND_RESERVE => match Request::parse(header, argument) {
            Some(request) => Decision::Lists(request),
            None => answer(ErrorCode::BadArgument),
        },
        _ => answer(ErrorCode::UnrecognizedCommand),
    }
}

/// An answer to an ATA command, up to its data.
pub fn answered(header: &Header, face: &Face, address: Address, registers: &Registers) -> Vec<u8> {
    with(header, face, address, None, registers)
}

fn with(header: &Header, face: &Face, address: Address, error: Option<ErrorCode>, registers: &Registers) -> Vec<u8> {
    let mut frame = wire::response(header, face.mac, address, error);
    registers.put(&mut frame);
    frame
}

#[cfg(test)]
#[path = "target_tests.rs"]
mod tests;
