//! What a target keeps for its clients beside the data: the config string, the MAC mask list and the reserve list
//! (AoEr11 sections 3.2 to 3.4). Pure: what a request makes of them, and what it is answered. They are stored in the
//! metadata store, so that they hold whichever process serves the address.

use super::wire::{self, Config, Directive, Header, Mask, MaskError, Reserve};
use pnet::util::MacAddr;
use torus_schema::limits::{AOE_MASKS_MAX, AOE_RESERVATIONS_MAX};
use wire::ErrorCode;

/// An address's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lists {
    pub config: Vec<u8>,
    /// Empty: everybody is heard.
    pub masks: Vec<MacAddr>,
    /// Empty: nobody has the target to themselves.
    pub reserved: Vec<MacAddr>,
}

impl Lists {
    pub fn hears(&self, source: MacAddr) -> bool {
        self.masks.is_empty() || self.masks.contains(&source)
    }

    pub fn lets_use(&self, source: MacAddr) -> bool {
        self.reserved.is_empty() || self.reserved.contains(&source)
    }
}

/// A request that reads or changes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    Config { command: u8, string: Vec<u8> },
    Mask(Mask),
    Reserve(Reserve),
}

/// What is told of the target in every answer to a query config.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offered {
    pub buffers: u16,
    pub firmware: u16,
    pub sectors: u8,
}

/// What a request comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// To be stored before it is answered.
    pub changed: Option<Lists>,
    pub answer: Option<Answer>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub error: Option<ErrorCode>,
    pub argument: Vec<u8>,
}

impl Outcome {
    fn told(argument: Vec<u8>) -> Self {
        Self { changed: None, answer: Some(Answer { error: None, argument }) }
    }

    fn error(error: ErrorCode, argument: Vec<u8>) -> Self {
        Self { changed: None, answer: Some(Answer { error: Some(error), argument }) }
    }

    const SILENCE: Self = Self { changed: None, answer: None };

    fn changing(self, lists: Lists, before: &Lists) -> Self {
        Self { changed: Some(lists).filter(|lists| lists != before), ..self }
    }
}

impl Request {
    /// `None`: the argument is not what its command takes.
    pub fn parse(header: &Header, argument: &[u8]) -> Option<Self> {
        match header.command {
            wire::COMMAND_CONFIG => {
                let Config { command, string, .. } = Config::parse(argument)?;
                (command <= wire::CONFIG_FORCE_SET).then(|| Self::Config { command, string: string.to_vec() })
            }
            wire::COMMAND_MASK => {
                let mask = Mask::parse(argument)?;
                (mask.command <= wire::MASK_EDIT).then_some(Self::Mask(mask))
            }
            wire::COMMAND_RESERVE => {
                let reserve = Reserve::parse(argument)?;
                let known = reserve.command <= wire::RESERVE_FORCE_SET && reserve.macs.len() <= AOE_RESERVATIONS_MAX;
                known.then_some(Self::Reserve(reserve))
            }
            _ => None,
        }
    }

    /// Of `lists` as they are; it may be asked again if they were changed meanwhile.
    pub fn outcome(&self, lists: &Lists, source: MacAddr, offered: Offered) -> Outcome {
        match self {
            Self::Config { command, string } => config(lists, *command, string, offered),
            Self::Mask(mask) => mask_list(lists, mask),
            Self::Reserve(reserve) => reserve_list(lists, source, reserve),
        }
    }
}

/// The argument of an answer to a query config.
pub fn told(command: u8, string: &[u8], offered: Offered) -> Vec<u8> {
    let Offered { buffers, firmware, sectors } = offered;
    let mut argument = Vec::new();
    Config { buffers, firmware, sectors, command, string }.put(&mut argument);
    argument
}

fn config(lists: &Lists, command: u8, string: &[u8], offered: Offered) -> Outcome {
    let now = |string: &[u8]| Outcome::told(told(command, string, offered));
    let set = || {
        let changed = Lists { config: string.to_vec(), ..lists.clone() };
        now(string).changing(changed, lists)
    };
    match command {
        // "respond if and only if the argument string exactly matches", or is a prefix of it.
        wire::CONFIG_TEST if lists.config != string => Outcome::SILENCE,
        wire::CONFIG_TEST_PREFIX if !lists.config.starts_with(string) => Outcome::SILENCE,
        wire::CONFIG_SET if lists.config.is_empty() => set(),
        wire::CONFIG_SET => Outcome::error(ErrorCode::ConfigStringPresent, told(command, &lists.config, offered)),
        wire::CONFIG_FORCE_SET => set(),
        _ => now(&lists.config),
    }
}

/// Directives are carried out in their order, all or none; the answer has the list, or says which directive failed.
fn mask_list(lists: &Lists, asked: &Mask) -> Outcome {
    let mut masks = lists.masks.clone();
    if asked.command == wire::MASK_EDIT {
        for (index, directive) in asked.directives.iter().enumerate() {
            if let Err(error) = edit(&mut masks, directive) {
                let mut argument = Vec::new();
                // Counted from one: zero would say that none was wrong.
                asked.put(Some(error), index as u8 + 1, &mut argument);
                return Outcome::told(argument);
            }
        }
    }
    let entries = masks.iter().map(|mac| Directive { command: wire::DIRECTIVE_NONE, mac: *mac });
    let told = Mask { command: asked.command, directives: entries.collect() };
    let mut argument = Vec::new();
    told.put(None, told.directives.len() as u8, &mut argument);
    Outcome::told(argument).changing(Lists { masks, ..lists.clone() }, lists)
}

fn edit(masks: &mut Vec<MacAddr>, directive: &Directive) -> Result<(), MaskError> {
    match directive.command {
        wire::DIRECTIVE_NONE => {}
        wire::DIRECTIVE_ADD if masks.contains(&directive.mac) => {}
        wire::DIRECTIVE_ADD if masks.len() >= AOE_MASKS_MAX => return Err(MaskError::Full),
        wire::DIRECTIVE_ADD => masks.push(directive.mac),
        wire::DIRECTIVE_DELETE => masks.retain(|mac| *mac != directive.mac),
        _ => return Err(MaskError::BadDirective),
    }
    Ok(())
}

/// Every answer has the list as it is then. Who is not on it may set it only by force; an empty one releases.
fn reserve_list(lists: &Lists, source: MacAddr, asked: &Reserve) -> Outcome {
    let tell = |macs: &[MacAddr]| {
        let mut argument = Vec::new();
        Reserve { command: asked.command, macs: macs.to_vec() }.put(&mut argument);
        argument
    };
    match asked.command {
        wire::RESERVE_SET if !lists.lets_use(source) => Outcome::error(ErrorCode::Reserved, tell(&lists.reserved)),
        wire::RESERVE_SET | wire::RESERVE_FORCE_SET => {
            let changed = Lists { reserved: asked.macs.clone(), ..lists.clone() };
            Outcome::told(tell(&asked.macs)).changing(changed, lists)
        }
        _ => Outcome::told(tell(&lists.reserved)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: MacAddr = MacAddr(2, 0, 0, 0, 0, 1);
    const B: MacAddr = MacAddr(2, 0, 0, 0, 0, 2);
    const OFFERED: Offered = Offered { buffers: 64, firmware: 1, sectors: 2 };

    fn config_of(lists: &mut Lists, command: u8, string: &[u8]) -> Option<(Option<ErrorCode>, Vec<u8>)> {
        let outcome = Request::Config { command, string: string.to_vec() }.outcome(lists, A, OFFERED);
        *lists = outcome.changed.unwrap_or_else(|| lists.clone());
        outcome.answer.map(|answer| (answer.error, answer.argument[wire::CONFIG_BYTES..].to_vec()))
    }

    #[test]
    fn a_config_string_is_set_once_tested_and_forced() {
        let mut lists = Lists::default();
        assert_eq!(config_of(&mut lists, wire::CONFIG_READ, b""), Some((None, vec![])));
        assert_eq!(config_of(&mut lists, wire::CONFIG_SET, b"db-1"), Some((None, b"db-1".to_vec())));
        let present = Some((Some(ErrorCode::ConfigStringPresent), b"db-1".to_vec()));
        assert_eq!(config_of(&mut lists, wire::CONFIG_SET, b"other"), present);
        assert_eq!(config_of(&mut lists, wire::CONFIG_TEST, b"db-1"), Some((None, b"db-1".to_vec())));
        assert_eq!(config_of(&mut lists, wire::CONFIG_TEST, b"db"), None);
        assert_eq!(config_of(&mut lists, wire::CONFIG_TEST_PREFIX, b"db"), Some((None, b"db-1".to_vec())));
        assert_eq!(config_of(&mut lists, wire::CONFIG_TEST_PREFIX, b"x"), None);
        assert_eq!(config_of(&mut lists, wire::CONFIG_FORCE_SET, b"y"), Some((None, b"y".to_vec())));
        assert_eq!(lists.config, b"y");
    }

    #[test]
    fn a_mask_list_is_edited_in_order_and_wholly_or_not_at_all() {
        let add = |mac| Directive { command: wire::DIRECTIVE_ADD, mac };
        let delete = |mac| Directive { command: wire::DIRECTIVE_DELETE, mac };
        let edit = |lists: &Lists, directives| {
            Request::Mask(Mask { command: wire::MASK_EDIT, directives }).outcome(lists, A, OFFERED)
        };
        let outcome = edit(&Lists::default(), vec![add(A), add(B), add(A), delete(B)]);
        let lists = outcome.changed.unwrap();
        assert_eq!(lists.masks, [A]);
        assert!(lists.hears(A) && !lists.hears(B) && Lists::default().hears(B));
        assert_eq!(outcome.answer.unwrap().argument, [0, 1, 0, 1, 0, 0, 2, 0, 0, 0, 0, 1]);
        let outcome = edit(&lists, vec![add(B), Directive { command: 9, mac: B }]);
        assert_eq!(outcome.changed, None);
        assert_eq!(outcome.answer.unwrap().argument[..4], [0, 1, 2, 2], "the second is bad");
        let full = Lists { masks: (0..255).map(|n| MacAddr(2, 0, 0, 0, 1, n)).collect(), ..Lists::default() };
        let outcome = edit(&full, vec![add(A)]);
        assert_eq!((outcome.changed, outcome.answer.unwrap().argument[..4].to_vec()), (None, vec![0, 1, 3, 1]));
    }

    #[test]
    fn a_reservation_is_the_holders_until_it_is_released_or_taken_by_force() {
        let reserve = |lists: &mut Lists, from, command, macs: &[MacAddr]| {
            let outcome = Request::Reserve(Reserve { command, macs: macs.to_vec() }).outcome(lists, from, OFFERED);
            *lists = outcome.changed.unwrap_or_else(|| lists.clone());
            let answer = outcome.answer.unwrap();
            (answer.error, Reserve::parse(&answer.argument).unwrap().macs)
        };
        let mut lists = Lists::default();
        assert_eq!(reserve(&mut lists, A, wire::RESERVE_SET, &[A]), (None, vec![A]));
        assert!(lists.lets_use(A) && !lists.lets_use(B));
        assert_eq!(reserve(&mut lists, B, wire::RESERVE_SET, &[B]), (Some(ErrorCode::Reserved), vec![A]));
        assert_eq!(reserve(&mut lists, B, wire::RESERVE_READ, &[]), (None, vec![A]));
        assert_eq!(reserve(&mut lists, B, wire::RESERVE_FORCE_SET, &[B]), (None, vec![B]));
        assert_eq!(reserve(&mut lists, B, wire::RESERVE_SET, &[]), (None, vec![]));
        assert!(lists.lets_use(A));
    }
}
