//! The smallest node there is, filled until its client is told ENOSPC, overwritten many times over, trimmed, deleted,
//! and filled again: space comes back, and no block is ever wrong.
//!
//! `TORUS_OVERWRITES=10` overwrites so many times the size of the node; without it twice, and only the part of it that
//! each round touches is large.

use torus_tests::cluster::{Cluster, ClusterOptions};
use torus_tests::nbd::{Command, Failed, NbdClient};
use torus_tests::wait;

const MIB: usize = 1 << 20;
const ENOSPC: u32 = 28;
/// Larger than the node.
const VOLUME_MIB: usize = 640;
const NODE_MIB: usize = 512;

fn overwrites() -> usize {
    let asked = std::env::var("TORUS_OVERWRITES").ok();
    asked.map_or(2, |text| text.parse().expect("TORUS_OVERWRITES is a number"))
}

fn content(unit: usize, generation: u64) -> Vec<u8> {
    let words = (0..MIB / 4096).flat_map(|block| [((unit * 256 + block) as u64) << 16 | generation; 512]);
    words.flat_map(u64::to_be_bytes).collect()
}

fn connect(server: std::net::SocketAddr, volume: &str) -> NbdClient {
    wait::until("the volume to answer", || {
        let mut client = NbdClient::connect(server, volume).ok()?;
        client.read(0, 4096).ok()?.ok()?;
        Some(client)
    })
}

/// Writes unit by unit from the start until there is no space; gives how many there was space for.
fn fill(client: &mut NbdClient, generations: &mut [u64], generation: u64) -> usize {
    for (unit, held) in generations.iter_mut().enumerate() {
        match client.call(Command::Write, (unit * MIB) as u64, &content(unit, generation)).unwrap() {
            Ok(()) => *held = generation,
            Err(failed) => {
                assert_eq!(failed, Failed(ENOSPC), "unit {unit}");
                return unit;
            }
        }
    }
    panic!("{VOLUME_MIB} MiB fit on a node of {NODE_MIB} MiB");
}

fn check(client: &mut NbdClient, generations: &[u64], units: usize) {
    for (unit, generation) in generations.iter().enumerate().take(units) {
        let found = client.read((unit * MIB) as u64, MIB as u32).unwrap().expect("what is there can be read");
        let expected = if *generation == 0 { vec![0; MIB] } else { content(unit, *generation) };
        assert!(found == expected, "unit {unit}, generation {generation}");
    }
}

#[test]
fn a_full_node_is_overwritten_trimmed_deleted_and_filled_again() {
    let mut cluster = Cluster::start(ClusterOptions::new("small-node", 1));
    cluster.torusblk(&["volume", "create", "demo", &format!("{VOLUME_MIB}MiB"), "--replicas", "1"]).ok();
    let server = cluster.serve();
    let mut client = connect(server.address, "demo");
    let mut generations = vec![0; VOLUME_MIB];
    let fits = fill(&mut client, &mut generations, 1);
    println!("{fits} MiB fit on {NODE_MIB} MiB");
    // Segments of 64 MiB, so that few are left for data on so small a node.
    assert!(fits >= NODE_MIB * 3 / 10, "only {fits} MiB fit");
    let mut random = 7u64;
    for written in 0..overwrites() * NODE_MIB {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let unit = (random >> 33) as usize % fits;
        let generation = 2 + (written as u64 % 60_000);
        let result = client.call(Command::Write, (unit * MIB) as u64, &content(unit, generation)).unwrap();
        assert_eq!(result, Ok(()), "after {written} MiB of overwriting, unit {unit}");
        generations[unit] = generation;
    }
    check(&mut client, &generations, fits);
    client.call(Command::Flush, 0, &[]).unwrap().unwrap();
    for (unit, held) in generations.iter_mut().enumerate().take(fits) {
        client.trim((unit * MIB) as u64, MIB as u32).unwrap().unwrap();
        *held = 0;
    }
    client.call(Command::Flush, 0, &[]).unwrap().unwrap();
    let again = wait::until("the space to come back", || {
        let again = fill(&mut client, &mut generations, 3);
        (again + 32 >= fits).then_some(again)
    });
    check(&mut client, &generations, again);
    drop(client);
    wait::until("the volume to be free", || {
        cluster.torusblk(&["volume", "delete", "demo"]).status.success().then_some(())
    });
    cluster.torusblk(&["volume", "create", "other", &format!("{VOLUME_MIB}MiB"), "--replicas", "1"]).ok();
    let mut client = connect(server.address, "other");
    let mut generations = vec![0; VOLUME_MIB];
    let third = wait::until("the deleted volume's space", || {
        let third = fill(&mut client, &mut generations, 4);
        (third + 32 >= fits).then_some(third)
    });
    check(&mut client, &generations, third);
}
