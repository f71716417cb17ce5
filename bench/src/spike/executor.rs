//! The same in an executor as nodes have it: glommio's file as it is, and behind the `Disk` trait.

use super::{BLOCK, Load, Offsets};
use crate::error::{BenchError, Result};
use futures::future::join_all;
use glommio::io::{DmaFile, OpenOptions};
use std::future::Future;
use std::rc::Rc;
use std::time::Instant;
use torus_engine::disk::direct::DirectDisk;
use torus_rpc::runtime::Disk;
use torus_rpc::runtime::glommio::run;

pub fn run_raw(load: Load) -> Result<u64> {
    let cpu = Some(load.cpu);
    let work = async move {
        let opened = OpenOptions::new().read(true).write(true).dma_open(&load.file).await;
        let file = Rc::new(opened.map_err(failed(&load))?);
        let completed = workers(&load, |load, seed| raw_worker(file.clone(), load, seed)).await?;
        file.close_rc().await.map_err(failed(&load))?;
        Ok(completed)
    };
    run("spike", cpu, work).map_err(BenchError::wrap("an executor"))?
}

async fn raw_worker(file: Rc<DmaFile>, load: Load, seed: u64) -> Result<u64> {
    let mut offsets = Offsets::new(seed);
    let (mut completed, end) = (0, Instant::now() + load.run);
    while Instant::now() < end {
        let offset = offsets.next();
        let bytes = if load.is_write {
            file.write_at(file.alloc_dma_buffer(BLOCK), offset).await.map_err(failed(&load))?
        } else {
            file.read_at_aligned(offset, BLOCK).await.map_err(failed(&load))?.len()
        };
        if bytes != BLOCK {
            return Err(failed(&load)(format!("{bytes} bytes at {offset}, expected {BLOCK}")));
        }
        completed += 1;
    }
    Ok(completed)
}

pub fn run_trait(load: Load) -> Result<u64> {
    let cpu = Some(load.cpu);
    let work = async move {
        let disk = Rc::new(DirectDisk::open(&load.file).await.map_err(failed(&load))?);
        let completed = workers(&load, |load, seed| trait_worker(disk.clone(), load, seed)).await?;
        let disk = Rc::into_inner(disk).expect("the workers have ended");
        disk.close().await.map_err(failed(&load))?;
        Ok(completed)
    };
    run("spike", cpu, work).map_err(BenchError::wrap("an executor"))?
}

/// Generic as the shard is.
async fn trait_worker<D: Disk>(disk: Rc<D>, load: Load, seed: u64) -> Result<u64> {
    let mut offsets = Offsets::new(seed);
    let (mut completed, end) = (0, Instant::now() + load.run);
    while Instant::now() < end {
        let offset = offsets.next();
        if load.is_write {
            disk.write(offset, disk.allocate(BLOCK)).await.map_err(failed(&load))?;
        } else {
            disk.read(offset, BLOCK).await.map_err(failed(&load))?;
        }
        completed += 1;
    }
    Ok(completed)
}

/// One task for each request in flight.
async fn workers<F>(load: &Load, worker: impl Fn(Load, u64) -> F) -> Result<u64>
where
    F: Future<Output = Result<u64>> + 'static,
{
    let seeds = (0..load.depth as u64).map(|index| (load.seed << 32) + (index << 16));
    let tasks: Vec<_> = seeds.map(|seed| glommio::spawn_local(worker(load.clone(), seed))).collect();
    join_all(tasks).await.into_iter().sum()
}

fn failed<E: ToString>(load: &Load) -> impl FnOnce(E) -> BenchError {
    BenchError::wrap(format!("4 KiB on {}", load.file.display()))
}
