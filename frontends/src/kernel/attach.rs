//! `torusblk nbd VOLUME [DEVICE]`: attaches a volume to the kernel and serves it until it is detached.
//!
//! What becomes of the device:
//!
//! | what happens | the device |
//! |---|---|
//! | replicas are away, fail over, come back | its requests wait: no timeout of the kernel's is shorter than our patience |
//! | a signal, and nobody uses it | flushed, detached, and this process ends |
//! | a signal, and somebody uses it | stays until nobody does; a second signal fails it under them |
//! | the volume's session ends (another writer took it) | fails at once, and so do its users |
//! | this process dies | its requests wait for a successor, `--reconnect` long |
//!
//! A successor serves the device on only where that loses nothing that the kernel was told is written (protocol rule
//! 3): no other writer had the volume in between (its epoch is the next one), and for every slice there is a replica
//! in sync that has been up since the volume was attached for the device. Then what was answered is there, flushed or
//! not, and the kernel asks again for what was not answered. Otherwise unflushed writes may be gone of which the
//! kernel believes that they are there, and a later flush must not succeed: the device fails.

use super::control::Control;
use super::drive::{Event, Former, Kernel, LOOK_AGAIN, Order};
use super::memo::Memo;
use super::{KernelError, backend_of, io, sysfs};
use crate::device::{Device, Exports, VolumeError};
use crate::nbd::{Listener, ListenerError, Offer, serve};
use crate::volume::{AttachedVolume, Attacher, VolumeExports, VolumeSettings, find};
use clap::Args;
use futures::channel::oneshot;
use futures::future::{Either, select};
use std::convert::Infallible;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;
use thiserror::Error;
use torus_rpc::metadata::MetadataError;
use torus_rpc::metadata::any::AnyMetadata;
use torus_rpc::runtime::glommio::{GlommioRuntime, StartError, Thread, run_on};
use torus_rpc::runtime::{Clock, Runtime};
use torus_schema::ids::VolumeId;
use torus_schema::limits::{LEASE_DRIFT, OWNER_LEASE_TTL};
use torus_schema::spin::Spin;

/// linux/prctl.h
const PR_SET_IO_FLUSHER: nix::libc::c_int = 57;
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// A predecessor that died owns the volume until its lease ends; the rest is for a store that is slow.
const PREDECESSOR_GONE_WITHIN: Duration = OWNER_LEASE_TTL.saturating_add(LEASE_DRIFT).saturating_mul(2);
/// What clap shows as the command's help.
#[derive(Args, Clone, Debug)]
pub struct NbdArguments {
    /// The volume to attach
    #[arg(required_unless_present_any = ["list", "detach"])]
    pub volume: Option<String>,
    /// The device to be, such as /dev/nbd0 [default: the first free one]
    pub device: Option<PathBuf>,
    /// Show the devices of this host's kernel, and which volumes they are
    #[arg(long, conflicts_with_all = ["volume", "device", "detach"])]
    pub list: bool,
    /// Flush and detach this device; the process that serves it then ends
    #[arg(long, value_name = "DEVICE", conflicts_with_all = ["volume", "device"])]
    pub detach: Option<PathBuf>,
    /// Bytes of the device's smallest request
    #[arg(long, value_name = "BYTES", default_value = "4096", value_parser = parse_block_bytes)]
    pub block_size: u64,
    /// The kernel refuses to write to the device
    #[arg(long)]
    pub read_only: bool,
    /// When this process dies, the device's requests wait so long for another `torusblk nbd` of the volume, then fail
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub reconnect: u64,
    /// So long this process looks for work before it sleeps; 0: not at all
    #[arg(long, value_name = "MICROSECONDS", default_value_t)]
    pub spin: Spin,
    /// Take the volume over from another owner; with --detach: fail the device under its users
    #[arg(long)]
    pub force: bool,
}

fn parse_block_bytes(text: &str) -> Result<u64, String> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err("expected 4096, or 512 for users that need it".to_string()),
    }
}

#[derive(Debug, Error)]
pub enum AttachError {
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Listen(#[from] ListenerError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
}

/// Prints one line `attached DEVICE` on stdout, then serves until the device is detached.
pub fn run_attached(metadata: &str, deadline: Duration, arguments: &NbdArguments) -> Result<(), AttachError> {
    let control = Control::open()?;
    let index = arguments.device.as_deref().map(sysfs::index_of).transpose()?;
    let metadata = AnyMetadata::connect(metadata, deadline)?;
    never_wait_for_ourselves();
    let (events, heard) = channel();
    on_signals(events.clone())?;
    let thread = Thread { cpu: None, spin: arguments.spin.0 };
    run_on("torusblk", thread, attached(control, index, metadata, arguments, events, heard))?
}

/// The kernel writes dirty pages out through this process: memory that it takes must not wait for that.
fn never_wait_for_ourselves() {
    // SAFETY: the call takes no pointers and changes only how this thread, and those it starts, are given memory.
    if unsafe { nix::libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } != 0 {
        let error = std::io::Error::last_os_error();
        tracing::warn!(%error, "on a machine short of memory the device may hang (PR_SET_IO_FLUSHER)");
    }
}

fn on_signals(events: Sender<Event>) -> Result<(), KernelError> {
    let signals = [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT];
    let mut signals = signal_hook::iterator::Signals::new(signals).map_err(io("signal handlers"))?;
    let pass_on = move || {
        for _ in signals.forever() {
            // If nobody listens any more the process is ending anyway.
            let _ = events.send(Event::Stop);
        }
    };
    std::thread::Builder::new().name("signals".to_string()).spawn(pass_on).map_err(io("signal handlers"))?;
    Ok(())
}

async fn attached(
    control: Control,
    index: Option<u32>,
    metadata: AnyMetadata,
    arguments: &NbdArguments,
    events: Sender<Event>,
    heard: Receiver<Event>,
) -> Result<(), AttachError> {
    let name = arguments.volume.as_deref().expect("clap asks for it");
    let runtime = GlommioRuntime::<_>::new(metadata);
    let attacher = Attacher {
        host: nix::unistd::gethostname().map_or_else(|_| "?".to_string(), |name| name.to_string_lossy().into_owned()),
        process: "torusblk nbd".to_string(),
        pid: std::process::id(),
        force: arguments.force,
        repair: false,
    };
    let volume = find(&runtime, name).await?;
    let former = former(volume, index)?;
    let exports = VolumeExports::with_settings(runtime.clone(), attacher, VolumeSettings::default());
    let served: Result<(), AttachError> = async {
        let attached = attach(&runtime, &exports, name, former.is_some()).await?;
        let order = Order {
            volume,
            name: name.to_string(),
            epoch: attached.epoch(),
            index,
            block_bytes: arguments.block_size,
            read_only: arguments.read_only,
            reconnect_s: arguments.reconnect,
        };
        let former = former.map(|former| Former { keeps_all: keeps_all(&former, &attached), ..former });
        let kernel = Kernel::new(control, order, former)?;
        serve_kernel(kernel, &runtime, &exports, attached, (events, heard)).await
    }
    .await;
    exports.end().await;
    served
}

/// Whether everything that was answered through the device is there: see the top of this file.
fn keeps_all<R: Runtime>(former: &Former, attached: &AttachedVolume<R>) -> Result<(), String> {
    let Some(memo) = &former.memo else {
        return Err("nothing is known of the process that served it".to_string());
    };
    let (before, now) = (memo.epoch, attached.epoch());
    if before.0.checked_add(1) != Some(now.0) {
        return Err(format!("it was served in epoch {before} and this is {now}: another writer had the volume"));
    }
    if !attached.keeps_all() {
        return Err("every replica of some slice was started anew, and may have lost what was not flushed".to_string());
    }
    Ok(())
}

fn former(volume: VolumeId, index: Option<u32>) -> Result<Option<Former>, KernelError> {
    if let Some(found) = sysfs::attached_to(&backend_of(volume)).first().copied() {
        let (memo, device) = (Memo::read(found), sysfs::device_path(found));
        return match memo {
            Some(memo) if memo.is_served() => Err(KernelError::Served { pid: memo.pid, device }),
            memo => Ok(Some(Former { index: found, memo, keeps_all: Err("it was not looked at".to_string()) })),
        };
    }
    match index {
        Some(index) if sysfs::is_attached(index) => {
            let to = sysfs::backend(index).map_or(String::new(), |backend| format!(" to {backend}"));
            Err(KernelError::Taken { device: sysfs::device_path(index), to })
        }
        _ => Ok(None),
    }
}

/// A predecessor that is dead is waited for, not asked for --force.
async fn attach<R: Runtime>(
    runtime: &R,
    exports: &VolumeExports<R>,
    name: &str,
    succeeds: bool,
) -> Result<AttachedVolume<R>, VolumeError> {
    let started = runtime.clock().now();
    let mut told = false;
    loop {
        match exports.attach(name).await {
            Err(VolumeError::Attached { owner, .. })
                if succeeds && runtime.clock().now().since(started) < PREDECESSOR_GONE_WITHIN =>
            {
                if !std::mem::replace(&mut told, true) {
                    tracing::info!(volume = name, %owner, "waiting for the lease of the process before us to end");
                }
                runtime.clock().sleep(RETRY_AFTER).await;
            }
            other => return other,
        }
    }
}

/// Until the thread that talks to the kernel has ended.
async fn serve_kernel<R: Runtime>(
    kernel: Kernel,
    runtime: &R,
    exports: &VolumeExports<R>,
    volume: AttachedVolume<R>,
    (events, heard): (Sender<Event>, Receiver<Event>),
) -> Result<(), AttachError> {
    let listener = Listener::unix(kernel.socket())?;
    let (done, finished) = oneshot::channel();
    let flushed = events.clone();
    let drive = move || {
        // Nobody hears it when the process is ending for another reason.
        let _ = done.send(kernel.drive(&heard, &flushed));
    };
    std::thread::Builder::new().name("kernel".to_string()).spawn(drive).map_err(io("a thread"))?;
    let mut driven = None;
    {
        let stop = async { driven = Some(finished.await) };
        let served = serve(listener, exports.clone(), Offer::default(), stop);
        match select(pin!(served), pin!(tell(runtime, &volume, &events))).await {
            Either::Left((served, _)) => served.map_err(io("the NBD server"))?,
            Either::Right((never, _)) => match never {},
        }
    }
    match driven {
        Some(Ok(driven)) => Ok(driven?),
        _ => Err(io("the kernel's thread")(std::io::Error::other("it ended without a word")).into()),
    }
}

/// What becomes of the volume, to the thread that talks to the kernel; if that has ended, so has all this soon.
async fn tell<R: Runtime>(runtime: &R, volume: &AttachedVolume<R>, events: &Sender<Event>) -> Infallible {
    let mut size_bytes = volume.size_bytes();
    loop {
        match select(pin!(volume.ended()), pin!(runtime.clock().sleep(LOOK_AGAIN))).await {
            Either::Left((because, _)) => {
                let _ = events.send(Event::Ended(because));
                return std::future::pending().await;
            }
            Either::Right(_) if volume.size_bytes() != size_bytes => {
                size_bytes = volume.size_bytes();
                let _ = events.send(Event::Resized(size_bytes));
            }
            Either::Right(_) => {}
        }
    }
}
