//! What is measured: written files, and clusters in the build folder.

use crate::error::{BenchError, Result};
use crate::fio::{self, Target};
use crate::processes::Watched;
use std::fs::File;
use std::path::{Path, PathBuf};
use torus_schema::limits::GIB;
use torus_tests::cluster::{Cluster, ClusterOptions, NbdServer};
use torus_tests::store::StoreKind;

/// Larger than any cache on the way, small enough to be written in a few seconds.
pub const REGION_BYTES: u64 = GIB;
const REGION: &str = "1GiB";
/// Of each of three: a third of it is live with both volumes in it, so that cleaning is cheap but not absent.
pub const NODE_SIZE: &str = "4GiB";
pub const NODES: usize = 3;

/// Nodes on free ports, in the build folder, joined to a ring.
pub fn start_cluster(name: &'static str, nodes: usize) -> Cluster {
    let store = StoreKind::Embedded;
    Cluster::start(ClusterOptions { store, size: NODE_SIZE, ..ClusterOptions::new(name, nodes) })
}

pub fn create_volume(cluster: &Cluster, name: &str, replicas: u32) {
    cluster.torusblk(&["volume", "create", name, REGION, "--replicas", &replicas.to_string()]).ok();
}

/// Every process of the cluster.
pub fn watch(cluster: &mut Cluster, server: Option<&NbdServer>) -> Vec<Watched> {
    let mut processes = vec![Watched::new("metadata", cluster.store.pid())];
    for node in 0..NODES {
        processes.push(Watched::new(format!("node {}", node + 1), cluster.node(node).pid()));
    }
    processes.extend(server.map(|server| Watched::new("torusblk", server.process.pid())));
    processes
}

pub fn written_file(folder: &Path, name: &str) -> Result<PathBuf> {
    written_file_of(folder, name, REGION_BYTES)
}

/// Preallocated in one piece, and every block of it really written: a read of an extent that was never written needs
/// no disk, and the first write to one is not like the others.
pub fn written_file_of(folder: &Path, name: &str, bytes: u64) -> Result<PathBuf> {
    let path = folder.join(name);
    let wrap = |because: String| BenchError::Failed { what: format!("preallocation of {}", path.display()), because };
    let file = File::create_new(&path).map_err(|error| wrap(error.to_string()))?;
    nix::fcntl::posix_fallocate(&file, 0, bytes as i64).map_err(|error| wrap(error.to_string()))?;
    drop(file);
    fio::fill(&Target::File(path.clone()), bytes, 1)?;
    Ok(path)
}
