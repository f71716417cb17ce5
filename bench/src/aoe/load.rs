//! Frames to one target, so many unanswered at a time, and what comes back: an initiator that costs little itself and is
//! the same for every target.

use crate::error::{BenchError, Result};
use crate::fio::Measured;
use crate::processes::own_cpu;
use crate::random::Random;
use hdrhistogram::Histogram;
use std::time::{Duration, Instant};
use torus_tests::ether::{BROADCAST, ETHERTYPE, Mac, Port};

const HEADERS: usize = 36;
const SECTOR: u64 = 512;
/// Then everything that is unanswered is sent again.
const LOST_AFTER: Duration = Duration::from_millis(500);
/// What took longer counts as this.
const LATENCY_NANOS_MAX: u64 = 60_000_000_000;
/// A target that was just started takes no write for a while.
const FOUND_WITHIN: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub name: &'static str,
    pub is_write: bool,
    pub sectors: u8,
    pub outstanding: usize,
}

/// One target, as one port reaches it.
#[derive(Clone, Copy, Debug)]
pub struct Address {
    pub shelf: u16,
    pub slot: u8,
}

struct Under {
    lba: u64,
    tag: u32,
    since: Instant,
}

pub struct Initiator {
    port: Port,
    started: Instant,
    count: u32,
}

fn failed(because: String) -> BenchError {
    BenchError::Failed { what: "frames to an AoE target".to_string(), because }
}

impl Initiator {
    pub fn open(interface: &str) -> Result<Self> {
        let port = Port::open(interface).map_err(|error| failed(format!("{interface}: {error}")))?;
        Ok(Self { port, started: Instant::now(), count: 0 })
    }

    /// A tick of 4 ms and a counter, as Linux makes them.
    fn tag(&mut self) -> u32 {
        self.count = (self.count + 1) & 0x7fff;
        self.count << 16 | (self.started.elapsed().as_millis() / 4) as u32 & 0xffff
    }

    fn frame(&self, to: Mac, address: Address, command: u8, tag: u32) -> Vec<u8> {
        let mut frame = [to, self.port.mac].concat();
        frame.extend(ETHERTYPE.to_be_bytes());
        frame.extend([0x10, 0]);
        frame.extend(address.shelf.to_be_bytes());
        frame.extend([address.slot, command]);
        frame.extend(tag.to_be_bytes());
        frame
    }

    /// Until the target answers, and takes a write.
    pub fn find(&mut self, address: Address) -> Result<Mac> {
        let began = Instant::now();
        while began.elapsed() < FOUND_WITHIN {
            let tag = self.tag();
            let mut asked = self.frame(BROADCAST, address, 1, tag);
            asked.extend([0; 8]);
            self.send(&asked)?;
            if let Some(from) = self.answer(tag)?.map(|frame| frame[6..12].try_into().expect("six bytes")) {
                let probe = Load { name: "", is_write: true, sectors: 1, outstanding: 1 };
                let tag = self.tag();
                let write = self.request(from, address, probe, 0, tag);
                self.send(&write)?;
                if self.answer(tag)?.is_some() {
                    return Ok(from);
                }
            }
        }
        Err(failed(format!("e{}.{} did not answer within {FOUND_WITHIN:?}", address.shelf, address.slot)))
    }

    fn answer(&mut self, tag: u32) -> Result<Option<Vec<u8>>> {
        let until = Instant::now() + LOST_AFTER;
        while Instant::now() < until {
            let frame = self.port.receive(LOST_AFTER).map_err(|error| failed(error.to_string()))?;
            if let Some(frame) = frame.filter(|frame| tag_of(frame) == Some(tag)) {
                return Ok(Some(frame.to_vec()));
            }
        }
        Ok(None)
    }

    fn send(&self, frame: &[u8]) -> Result<()> {
        self.port.send(frame).map_err(|error| failed(error.to_string()))
    }

    fn request(&self, to: Mac, address: Address, load: Load, lba: u64, tag: u32) -> Vec<u8> {
        let mut frame = self.frame(to, address, 0, tag);
        let (flags, command) = if load.is_write { (0x41, 0x34) } else { (0x40, 0x24) };
        frame.extend([flags, 0, load.sectors, command]);
        frame.extend(&lba.to_le_bytes()[..6]);
        frame.extend([0, 0]);
        if load.is_write {
            frame.resize(HEADERS + usize::from(load.sectors) * SECTOR as usize, 0xa5);
        }
        frame
    }

    /// Every place in the first `bytes`, one after the other.
    pub fn fill(&mut self, to: Mac, address: Address, load: Load, bytes: u64) -> Result<()> {
        let places = bytes / SECTOR / u64::from(load.sectors);
        let mut next = 0..places;
        self.drive(to, address, load, |_| next.next()).map(drop)
    }

    /// Random places in the first `bytes`, none twice at a time.
    pub fn run(&mut self, to: Mac, address: Address, load: Load, bytes: u64, run: Duration) -> Result<Measured> {
        let places = bytes / SECTOR / u64::from(load.sectors);
        let mut random = Random::new(places);
        self.drive(to, address, load, |elapsed| (elapsed < run).then(|| random.below(places)))
    }

    /// Until `place` gives none any more and everything is answered. `place` is told how long it took so far.
    fn drive(
        &mut self,
        to: Mac,
        address: Address,
        load: Load,
        mut place: impl FnMut(Duration) -> Option<u64>,
    ) -> Result<Measured> {
        let (mut under, mut is_over): (Vec<Under>, bool) = (Vec::new(), false);
        let bounded = Histogram::<u64>::new_with_bounds(1, LATENCY_NANOS_MAX, 3);
        let mut latencies = bounded.map_err(|error| failed(error.to_string()))?;
        let (began, cpu) = (Instant::now(), own_cpu()?);
        while !is_over || !under.is_empty() {
            while !is_over && under.len() < load.outstanding {
                let Some(place) = place(began.elapsed()) else {
                    is_over = true;
                    break;
                };
                let lba = place * u64::from(load.sectors);
                if under.iter().all(|other| other.lba != lba) {
                    let tag = self.tag();
                    self.send(&self.request(to, address, load, lba, tag))?;
                    under.push(Under { lba, tag, since: Instant::now() });
                }
            }
            if under.is_empty() {
                break;
            }
            let found = {
                let frame = self.port.receive(LOST_AFTER).map_err(|error| failed(error.to_string()))?;
                frame.and_then(|frame| Some((tag_of(frame)?, frame[HEADERS - 9] & 0x01, frame[14] & 0x04)))
            };
            match found {
                Some((tag, ata, aoe)) => {
                    let Some(at) = under.iter().position(|under| under.tag == tag) else { continue };
                    if ata != 0 || aoe != 0 {
                        return Err(failed(format!("an error was answered at sector {}", under[at].lba)));
                    }
                    let took = under.swap_remove(at).since.elapsed();
                    latencies.saturating_record(took.as_nanos() as u64);
                }
                None => self.send_again(to, address, load, &mut under)?,
            }
        }
        let operations = latencies.len();
        let client_cpu = own_cpu()?.saturating_sub(cpu);
        Ok(Measured {
            iops: operations as f64 / began.elapsed().as_secs_f64(),
            operations,
            mean_us: latencies.mean() / 1e3,
            p99_us: latencies.value_at_quantile(0.99) as f64 / 1e3,
            client_cpu_us: client_cpu.as_secs_f64() * 1e6 / operations as f64,
        })
    }

    fn send_again(&mut self, to: Mac, address: Address, load: Load, under: &mut [Under]) -> Result<()> {
        for lost in under {
            lost.tag = self.tag();
            self.send(&self.request(to, address, load, lost.lba, lost.tag))?;
        }
        Ok(())
    }
}

/// Of a response.
fn tag_of(frame: &[u8]) -> Option<u32> {
    let is_response = frame.len() >= 24 && frame[14] & 0x08 != 0;
    is_response.then(|| u32::from_be_bytes([frame[20], frame[21], frame[22], frame[23]]))
}
