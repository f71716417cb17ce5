//! What is told of NBD servers: each beside the best of the others over the same transport.

use super::stand::{Kind, Served, Transport};
use crate::machine::Machine;
use crate::report::table;
use crate::rounds::Sample;
use crate::statistics::{Spread, ratio};
use serde::Serialize;

/// One server under one load, all rounds.
#[derive(Serialize)]
pub struct Row {
    load: &'static str,
    transport: Transport,
    server: &'static str,
    iops: Spread,
    /// IOPS divided by those of the best of the others, with a disk or without as this one, in the same round.
    ratio_to_best: Option<Spread>,
    mean_us: Spread,
    p99_us: Spread,
    /// Of all its processes, per operation.
    server_cpu_us: Spread,
    client_cpu_us: Spread,
}

fn iops(samples: &[Sample]) -> Vec<f64> {
    samples.iter().map(|sample| sample.fio.iops).collect()
}

/// The peers that a server is to be compared with.
fn peers_of(kind: Kind) -> Kind {
    match kind {
        Kind::Raw | Kind::Peer | Kind::Ours => Kind::Peer,
        Kind::PeerNull | Kind::OurNull => Kind::PeerNull,
    }
}

pub fn rows(load: &'static str, servers: &[Served], samples: &[Vec<Sample>]) -> Vec<Row> {
    let best = |served: &Served| {
        let is_peer = |(peer, _): &(&Served, &Vec<Sample>)| {
            peer.transport == served.transport && peer.kind == peers_of(served.kind)
        };
        let peers = servers.iter().zip(samples).filter(is_peer).map(|(_, samples)| iops(samples));
        let median = |rounds: &Vec<f64>| Spread::of(rounds.clone()).map_or(0.0, |spread| spread.median);
        peers.max_by(|a, b| median(a).total_cmp(&median(b)))
    };
    let row = |(served, samples): (&Served, &Vec<Sample>)| {
        let all = |of: &dyn Fn(&Sample) -> f64| Spread::of(samples.iter().map(of).collect());
        Some(Row {
            load,
            transport: served.transport,
            server: served.name,
            iops: Spread::of(iops(samples))?,
            ratio_to_best: best(served).and_then(|best| ratio(&iops(samples), &best)),
            mean_us: all(&|sample| sample.fio.mean_us)?,
            p99_us: all(&|sample| sample.fio.p99_us)?,
            server_cpu_us: all(&|sample| sample.cpu_us.iter().map(|(_, us)| us).sum())?,
            client_cpu_us: all(&|sample| sample.fio.client_cpu_us)?,
        })
    };
    servers.iter().zip(samples).filter_map(row).collect()
}

impl Row {
    fn cells(&self) -> Vec<String> {
        vec![
            format!("{}{}", self.server, self.transport.suffix()),
            self.iops.thousands(),
            self.ratio_to_best.as_ref().map_or(String::new(), |ratio| ratio.with_range(2)),
            format!("{:.0}", self.mean_us.median),
            format!("{:.0}", self.p99_us.median),
            format!("{:.1}", self.server_cpu_us.median),
            format!("{:.1}", self.client_cpu_us.median),
        ]
    }
}

pub fn print(machine: &Machine, (rounds, seconds): (usize, f64), rows: &[Row]) {
    println!("{}, {} cores, Linux {}, {}", machine.processor, machine.cores, machine.kernel, machine.file_system);
    println!(
        "{rounds} rounds of {seconds} s, medians (lowest–highest); {}; commit {}; load before: {}",
        machine.fio, machine.commit, machine.load_average
    );
    let header = ["server", "IOPS", "× best other", "mean µs", "p99 µs", "server CPU µs/op", "fio CPU µs/op"];
    let mut loads: Vec<&str> = rows.iter().map(|row| row.load).collect();
    loads.dedup();
    for load in loads {
        let of_load = rows.iter().filter(|row| row.load == load);
        println!("\n{load}\n{}", table(&header, of_load.map(Row::cells)));
    }
}
