//! The whole system from one seed: several nodes of one or two shards, several clients that take volumes from each
//! other, repair owners, deletions, and everything that may go wrong at once; then quiet, in which all has to become
//! well again without help.
//!
//! * `profile`   what one seed is like: how large, which troubles
//! * `people`    clients that attach, work, let go, are killed and come again
//! * `nodes`     what runs on a node beside its shards
//! * `troubles`  what goes wrong
//! * `moments`   what goes wrong at the moment at which it matters most
//! * `holders`   what may be lost when the power fails
//! * `rest`      what must hold when nothing is wrong any more
//! * `volumes`   creation and deletion while all this goes on
//!
//! A seed that fails is run again with a trace of what happened, which stands in the report.

mod holders;
mod moments;
mod nodes;
mod people;
mod profile;
mod rest;
mod troubles;
mod volumes;

pub use profile::Profile;

use super::cluster::Cluster;
use super::workload::Workload;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::runtime::simulated::{ProcessId, World};
use torus_schema::ids::VolumeId;
use torus_schema::limits::BLOCKS_PER_EXTENT;

/// Events of the trace of a failed seed, unless SIMULATION_EVENTS says more.
const TRACE_EVENTS: usize = 400;
/// Of two courses of one seed, before they part.
const EVENTS_BEFORE: usize = 40;
const VOLUME_BYTES: u64 = 64 << 20;
/// First blocks of the areas that are worked on, one worker each: extents of different slices.
const AREAS: [u64; 3] = [0, 5 * BLOCKS_PER_EXTENT - 6, 11 * BLOCKS_PER_EXTENT + 1000];
const AREA_BLOCKS: u64 = 12;

/// What a clean run was.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    pub virtual_time: Duration,
    pub reads_checked: u64,
    pub troubles: u64,
    /// Until every replica was in sync, once nothing was wrong any more.
    pub whole_after: Duration,
    /// Tasks that were left at rest beside those that run all the time.
    pub tasks: usize,
    /// The same for two runs that went the same way.
    pub course: u64,
}

#[derive(Clone, Debug)]
pub struct Failure {
    pub seed: u64,
    pub because: String,
    /// Empty if it did not fail when it was run again: then something in it is not decided by the seed.
    pub story: Vec<String>,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let seed = self.seed;
        let again = format!(
            "SIMULATION_SEEDS={seed}..{} cargo test -p torus-tests --test simulation_whole -- --nocapture",
            seed + 1
        );
        match self.story.is_empty() {
            true => writeln!(f, "seed {seed} failed once and not when it was run again: {}", self.because)?,
            false => {
                writeln!(f, "--- the last {} events of seed {seed}; times in seconds ---", self.story.len())?;
                self.story.iter().try_for_each(|line| writeln!(f, "{line}"))?;
                writeln!(f, "--- seed {seed}: {}", self.because)?;
            }
        }
        write!(f, "--- again: {again}")
    }
}

/// One seed, and once more with a trace if it fails.
pub fn run_seed(seed: u64) -> Result<Figures, Box<Failure>> {
    super::scenario::tell_by_environment();
    attempt(seed, 0).map_err(|(because, _)| {
        let asked = std::env::var("SIMULATION_EVENTS").ok().and_then(|text| text.parse().ok());
        let story = attempt(seed, asked.unwrap_or(TRACE_EVENTS)).err().map(|(_, story)| story).unwrap_or_default();
        Box::new(Failure { seed, because, story })
    })
}

/// Where two runs of a seed part, if they do: the events before, and what came next in each.
pub fn two_courses(seed: u64) -> Option<[Vec<String>; 2]> {
    let [mut one, mut other] = [0; 2].map(|_| {
        let again = std::thread::spawn(move || attempt_told(seed, usize::MAX));
        again.join().expect("its panics are caught").1
    });
    let same = one.iter().zip(&other).take_while(|(one, other)| one == other).count();
    (same < one.len().max(other.len())).then(|| {
        for story in [&mut one, &mut other] {
            story.truncate(same + 1);
            story.drain(..same.saturating_sub(EVENTS_BEFORE));
        }
        [one, other]
    })
}

fn attempt(seed: u64, trace: usize) -> Result<Figures, (String, Vec<String>)> {
    let (result, story) = attempt_told(seed, trace);
    result.map_err(|because| (because, story))
}

fn attempt_told(seed: u64, trace: usize) -> (Result<Figures, String>, Vec<String>) {
    let world = World::new(seed);
    world.keep_trace(trace);
    let here = world.clone();
    let result = catch_unwind(AssertUnwindSafe(|| world.block_on(whole(here))));
    let (story, course) = (world.story(), world.course());
    world.close();
    let result = result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()));
        Err(text.unwrap_or_else(|| "a panic without words".to_string()))
    });
    (result.map(|figures| Figures { course, ..figures }), story)
}

/// One run.
pub struct Whole {
    pub world: World,
    pub cluster: Cluster,
    pub profile: Profile,
    /// Reports of all volumes come together here.
    workload: Workload,
    volumes: RefCell<BTreeMap<String, Volume>>,
    /// Deleted ones, which must not be seen again.
    deleted: RefCell<Vec<VolumeId>>,
    people: RefCell<Vec<people::Person>>,
    names_given: Cell<u64>,
    /// Clients that have a volume, or are about to.
    busy: Rc<Cell<usize>>,
    troubles: Cell<u64>,
    /// Of clients, up to now.
    attaches: Cell<u64>,
    /// Troubles that still last.
    lasting: Cell<usize>,
    /// They are to end now.
    healing: Cell<bool>,
    ailing: holders::Ailing,
    /// A node is being started or stopped.
    starting: Cell<bool>,
    /// Nodes of which a segment's opening or footer was damaged.
    ends_damaged: RefCell<BTreeSet<usize>>,
    /// Whose tasks the troubles are.
    operator: ProcessId,
    /// Names of volumes that were deleted and come again.
    missing: RefCell<Vec<String>>,
    /// A volume without a record, and how many shards had it at first.
    orphan: Cell<Option<VolumeId>>,
    orphans_at_first: Cell<usize>,
    tasks_at_first: Cell<usize>,
}

#[derive(Clone)]
struct Volume {
    id: VolumeId,
    workload: Workload,
    /// Nodes whose power failed since the last attach, which makes durable what it finds: they take with them what was
    /// answered and not flushed.
    powerless: Rc<RefCell<BTreeSet<usize>>>,
    /// Nodes that were in sync at the last attach and have been well since.
    holders: Rc<RefCell<BTreeSet<usize>>>,
    places: Rc<holders::Places>,
    /// The epoch of the last writer that attached.
    newest: Rc<Cell<u64>>,
    /// About to be deleted: nobody attaches it any more.
    closed: bool,
}

async fn whole(world: World) -> Result<Figures, String> {
    let began = world.now();
    let profile = Profile::draw(&world);
    world.note(|| format!("{profile:?}"));
    let run = Whole::start(world.clone(), profile).await;
    let mut figures = Figures::default();
    for _ in 0..run.profile.rounds {
        run.open_for_work();
        run.make_trouble().await;
        run.heal().await;
        run.come_to_rest().await?;
        let whole_after = run.become_whole().await?;
        figures.whole_after = figures.whole_after.max(whole_after);
        run.check_everything().await?;
        figures.tasks = figures.tasks.max(run.check_memory().await?);
        run.verdict()?;
        run.recreate().await;
    }
    let volumes = run.volumes.borrow();
    figures.reads_checked = volumes.values().map(|volume| volume.workload.history.borrow().reads_checked).sum();
    figures.virtual_time = world.now().since(began);
    figures.troubles = run.troubles.get();
    Ok(figures)
}

impl Whole {
    async fn start(world: World, profile: Profile) -> Rc<Self> {
        let cluster = Cluster::start_shaped(&world, profile.shape()).await;
        let operator = world.start_process();
        let mut workload = Workload::new(&world);
        workload.pause = profile.pause;
        let run = Rc::new(Self {
            world,
            cluster,
            profile,
            workload,
            volumes: RefCell::default(),
            deleted: RefCell::default(),
            people: RefCell::default(),
            names_given: Cell::new(0),
            busy: Rc::default(),
            troubles: Cell::new(0),
            attaches: Cell::new(0),
            lasting: Cell::new(0),
            healing: Cell::new(false),
            ailing: Rc::default(),
            starting: Cell::new(false),
            ends_damaged: RefCell::default(),
            operator,
            missing: RefCell::default(),
            orphan: Cell::default(),
            orphans_at_first: Cell::new(0),
            tasks_at_first: Cell::new(0),
        });
        for node in 0..run.cluster.nodes.len() {
            run.equip(node);
        }
        run.leave_orphan().await;
        for number in 0..run.profile.volumes {
            run.create(&format!("volume-{number}")).await;
        }
        // Messages that are under way are tasks too.
        run.world.sleep(Duration::from_secs(1)).await;
        run.tasks_at_first.set(run.world.task_count());
        run
    }

    fn verdict(&self) -> Result<(), String> {
        self.workload.failed.borrow().clone().map_or(Ok(()), Err)
    }
}
