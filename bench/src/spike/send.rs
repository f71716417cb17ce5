//! What zero-copy sends cost the sender beside plain ones, of payloads as they go between client and node, by TCP on the
//! loopback interface. The kernel copies there in either case: this is the price of trying, not what a network card gives.

use crate::error::{BenchError, Result};
use crate::report::table;
use crate::statistics::{Spread, ratio};
use bytes::Bytes;
use glommio::net::TcpStream;
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;
use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::rc::Rc;
use std::time::{Duration, Instant};
use torus_rpc::outbox::{Batch, Outbox};
use torus_rpc::send::Sender;

const PAYLOADS: [usize; 3] = [32 << 10, 128 << 10, 1 << 20];
/// Sent and not released yet.
const UNDER_WAY_BYTES: usize = 4 << 20;
const MIB: f64 = (1 << 20) as f64;

#[derive(Serialize)]
pub struct Row {
    payload_bytes: usize,
    /// CPU of the sending thread per MiB.
    plain_us: Spread,
    zero_copy_us: Spread,
    zero_copy_to_plain: Spread,
    /// Of the zero-copy sends, those that were copied after all: lowest of the rounds.
    copied_share: f64,
}

#[derive(Clone, Copy)]
struct Sample {
    cpu_us: f64,
    copied_share: f64,
}

pub fn measure(rounds: usize, run: Duration) -> Result<Vec<Row>> {
    let row = |payload_bytes| {
        eprintln!("bench: sends of {} KiB", payload_bytes >> 10);
        let (mut plain, mut zero_copy) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            plain.push(sample(payload_bytes, 0, run)?);
            zero_copy.push(sample(payload_bytes, u32::MAX, run)?);
        }
        let cpu = |samples: &[Sample]| samples.iter().map(|sample| sample.cpu_us).collect::<Vec<f64>>();
        let no_rounds = || BenchError::Failed { what: "sends".to_string(), because: "no rounds".to_string() };
        Ok(Row {
            payload_bytes,
            plain_us: Spread::of(cpu(&plain)).ok_or_else(no_rounds)?,
            zero_copy_us: Spread::of(cpu(&zero_copy)).ok_or_else(no_rounds)?,
            zero_copy_to_plain: ratio(&cpu(&zero_copy), &cpu(&plain)).ok_or_else(no_rounds)?,
            copied_share: zero_copy.iter().map(|sample| sample.copied_share).fold(1.0, f64::min),
        })
    };
    PAYLOADS.into_iter().map(row).collect()
}

/// Each side on a thread of its own.
fn sample(payload_bytes: usize, copies_max: u32, run: Duration) -> Result<Sample> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(BenchError::wrap("a port"))?;
    let address = listener.local_addr().map_err(BenchError::wrap("a port"))?;
    let sending = std::thread::spawn(move || {
        let work = send(address, payload_bytes, copies_max, run);
        torus_rpc::runtime::glommio::run("send", None, work).map_err(BenchError::wrap("an executor"))?
    });
    let (mut peer, _) = listener.accept().map_err(BenchError::wrap("a connection"))?;
    let mut received = vec![0; 256 << 10];
    while peer.read(&mut received).map_err(BenchError::wrap("receiving"))? > 0 {}
    sending.join().map_err(|_| BenchError::Failed {
        what: "the sending thread".to_string(),
        because: "it panicked; its message is above".to_string(),
    })?
}

async fn send(address: SocketAddr, payload_bytes: usize, copies_max: u32, run: Duration) -> Result<Sample> {
    let stream = TcpStream::connect(address).await.map_err(BenchError::wrap("a connection"))?;
    stream.set_nodelay(true).map_err(BenchError::wrap("a connection"))?;
    let mut sender = Sender::giving_up_after(copies_max, stream);
    let outbox = Rc::new(Outbox::default());
    // Several, so that what is sent is not in the nearest cache.
    let payloads: Vec<Bytes> = (0..32 << 20 >> payload_bytes.ilog2()).map(|_| vec![7; payload_bytes].into()).collect();
    let (mut sent_bytes, mut batch) = (0, Batch::default());
    let (before, end) = (own_cpu()?, Instant::now() + run);
    for payload in payloads.iter().cycle().take_while(|_| Instant::now() < end) {
        outbox.at_most(UNDER_WAY_BYTES).await;
        outbox.push(|_| {}, [payload.clone()]);
        outbox.take(&mut batch).await;
        sender.send(&mut batch, &outbox).await.map_err(BenchError::wrap("sending"))?;
        sent_bytes += payload_bytes;
    }
    outbox.at_most(0).await;
    let cpu_us = own_cpu()?.saturating_sub(before).as_secs_f64() * 1e6 / (sent_bytes as f64 / MIB);
    let counts = sender.zero_copy().clone();
    sender.shut_down().await;
    let copied_share = counts.copied.get() as f64 / (counts.tried.get() as f64).max(1.0);
    Ok(Sample { cpu_us, copied_share })
}

/// Of this thread: the receiver's is not the sender's.
fn own_cpu() -> Result<Duration> {
    let used = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_err(BenchError::wrap("the thread's CPU time"))?;
    Ok(Duration::from(used))
}

pub fn print(rows: &[Row]) {
    let cells = |row: &Row| {
        vec![
            format!("{} KiB", row.payload_bytes >> 10),
            row.plain_us.with_range(0),
            row.zero_copy_us.with_range(0),
            row.zero_copy_to_plain.with_range(2),
            format!("{:.0} %", row.copied_share * 100.0),
        ]
    };
    let header = ["TCP on loopback, sender", "plain CPU µs/MiB", "zero-copy CPU µs/MiB", "zero-copy ÷ plain", "copied"];
    println!("{}", table(&header, rows.iter().map(cells)));
}
