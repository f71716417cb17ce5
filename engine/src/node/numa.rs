//! Executors near their disks: each shard's is pinned to a core of the NUMA node that the disk under its blocks is
//! attached to, so that what the disk writes into memory is near to who reads it there.
//!
//! ```text
//! block file ─ st_dev ──┐                              slaves/* of device mapper and md: all agree, or
//! raw device ─ st_rdev ─┴► dev/block/MAJ:MIN ─► disk ─┤                            nothing is known
//!                          (a partition: its disk)     the nearest folder above with a numa_node; -1 is unknown
//! ```
//!
//! Where nothing is known (a file system without a device of its own: btrfs, ZFS), or the NUMA node has none of the
//! cores that the process may use, a shard keeps the core it would have had. On a machine with one NUMA node all do.

use crate::disk::device::number_text;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use torus_schema::cpus::CpuList;
use torus_schema::ids::ShardIndex;

const SYSFS: &str = "/sys";

/// As the kernel counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct NumaNode(usize);

/// What sysfs knows of a machine that has several NUMA nodes.
struct Machine {
    sysfs: PathBuf,
    /// Of those that are online: the cores that this process may use, in the kernel's order.
    cores: BTreeMap<NumaNode, Vec<usize>>,
}

/// Of a shard whose disk's NUMA node is known.
struct Near<'a> {
    /// As the kernel names it.
    device: String,
    numa_node: NumaNode,
    /// At least one.
    cores: &'a [usize],
}

/// The core of each shard, by the path of its blocks; `usual` is what they would have.
pub fn near_disks(usual: Vec<usize>, paths: &[&Path]) -> Vec<usize> {
    match Machine::read(Path::new(SYSFS), &allowed_cores()) {
        Some(machine) => machine.near_disks(&usual, paths),
        None => usual,
    }
}

/// Those that this process may use, of which it can keep no more busy than that (a quota of CPU time may be less).
pub fn usable_cores() -> Vec<usize> {
    let at_once = std::thread::available_parallelism().map_or(1, usize::from);
    let allowed = allowed_cores();
    if allowed.is_empty() { (0..at_once).collect() } else { allowed.into_iter().take(at_once).collect() }
}

fn allowed_cores() -> Vec<usize> {
    match sched_getaffinity(Pid::from_raw(0)) {
        Ok(allowed) => (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false)).collect(),
        Err(error) => {
            tracing::warn!(%error, "which cores may be used is not known: shards take the first ones, and are not moved near their disks");
            Vec::new()
        }
    }
}

impl Machine {
    /// `None`: with one NUMA node, or none that is told of, there is nothing to choose.
    fn read(sysfs: &Path, allowed: &[usize]) -> Option<Self> {
        let sysfs = sysfs.canonicalize().ok()?;
        let nodes = sysfs.join("devices/system/node");
        let online = read_list(&nodes.join("online"));
        if online.len() < 2 {
            return None;
        }
        let cores_of = |node| {
            let cores = read_list(&nodes.join(format!("node{node}/cpulist")));
            (NumaNode(node), cores.into_iter().filter(|core| allowed.contains(core)).collect())
        };
        Some(Self { cores: online.into_iter().map(cores_of).collect(), sysfs })
    }

    fn near_disks(&self, usual: &[usize], paths: &[&Path]) -> Vec<usize> {
        let near: Vec<_> = paths.iter().map(|path| self.near(path)).collect();
        let wanted: Vec<_> = near.iter().map(|near| near.as_ref().map(|near| near.cores)).collect();
        let chosen = choose(usual, &wanted);
        for (((shard, path), near), core) in (0..).map(ShardIndex).zip(paths).zip(&near).zip(&chosen) {
            match near {
                Some(Near { device, numa_node, cores }) if !cores.contains(core) => {
                    tracing::info!(%shard, device, numa_node = numa_node.0, core, "pinned; no core near its disk is free");
                }
                Some(Near { device, numa_node, .. }) => {
                    tracing::info!(%shard, device, numa_node = numa_node.0, core, "pinned near its disk");
                }
                None => {
                    let path = path.display();
                    tracing::info!(%shard, %path, core, "pinned; no core near its disk is known that may be used");
                }
            }
        }
        chosen
    }

    /// Of the disk under a file, or of a device.
    fn near(&self, path: &Path) -> Option<Near<'_>> {
        let metadata = fs::metadata(path).ok()?;
        let is_device = metadata.file_type().is_block_device();
        self.near_number(if is_device { metadata.rdev() } else { metadata.dev() })
    }

    fn near_number(&self, number: u64) -> Option<Near<'_>> {
        let device = self.sysfs.join("dev/block").join(number_text(number)).canonicalize().ok()?;
        let numa_node = self.numa_node(&device)?;
        let cores = self.cores.get(&numa_node).filter(|cores| !cores.is_empty())?;
        let device = device.file_name()?.to_string_lossy().into_owned();
        Some(Near { device, numa_node, cores })
    }

    /// `device`: its folder, without symbolic links.
    fn numa_node(&self, device: &Path) -> Option<NumaNode> {
        let is_partition = device.join("partition").exists();
        let disk = if is_partition { device.parent()? } else { device };
        let below = below(disk);
        let Some(first) = below.first() else { return self.nearest_numa_node(disk) };
        let found = self.numa_node(first)?;
        below.iter().all(|device| self.numa_node(device) == Some(found)).then_some(found)
    }

    fn nearest_numa_node(&self, disk: &Path) -> Option<NumaNode> {
        let inside = disk.ancestors().take_while(|folder| folder.starts_with(&self.sysfs));
        let mut told = inside.flat_map(|folder| [folder.join("numa_node"), folder.join("device/numa_node")]);
        let text = told.find_map(|file| fs::read_to_string(file).ok())?;
        text.trim().parse().ok().map(NumaNode)
    }
}

/// What a disk is made of: the devices under device mapper or md; the controllers of an NVMe disk that may have several,
/// which lies in the folder of its subsystem, beside links to them.
fn below(disk: &Path) -> Vec<PathBuf> {
    let links = |folder: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        // Of one that leads nowhere nothing is found, as of one that is unknown.
        entries.map(|entry| entry.path().canonicalize().unwrap_or_else(|_| entry.path())).collect()
    };
    let slaves = links(&disk.join("slaves"));
    match disk.parent() {
        Some(subsystem) if slaves.is_empty() && subsystem.join("subsysnqn").exists() => {
            links(subsystem).into_iter().filter(|entry| entry.join("numa_node").exists()).collect()
        }
        _ => slaves,
    }
}

/// Empty if there is none, or none that is understood.
fn read_list(file: &Path) -> Vec<usize> {
    let list = fs::read_to_string(file).ok().and_then(|text| text.trim().parse().ok());
    list.map_or_else(Vec::new, |CpuList(list)| list)
}

/// Of each shard: a core of those that it wants and nobody else has; where there is none, one of the usual cores that is
/// free. A core far from the disk is better than half of a near one.
fn choose(usual: &[usize], wanted: &[Option<&[usize]>]) -> Vec<usize> {
    assert_eq!(usual.len(), wanted.len(), "a core and a wish for each shard");
    let stays = |(core, wanted): (&usize, &Option<&[usize]>)| wanted.is_none().then_some(*core);
    let mut chosen: Vec<Option<usize>> = usual.iter().zip(wanted).map(stays).collect();
    for shard in 0..usual.len() {
        let is_free = |core: &&usize| !chosen.contains(&Some(**core));
        let near = wanted[shard].into_iter().flatten().find(is_free).copied();
        chosen[shard] = chosen[shard].or(near);
    }
    for shard in 0..usual.len() {
        let is_free = |core: &&usize| !chosen.contains(&Some(**core));
        let far = usual.iter().find(is_free).copied();
        chosen[shard] = chosen[shard].or(far);
    }
    chosen.into_iter().map(|core| core.expect("there is a usual core for each shard")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::makedev;
    use std::os::unix::fs::symlink;

    /// Two NUMA nodes of four cores, a third without cores; a fourth that is offline, with a folder all the same.
    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Self {
            let tree = Self(tempfile::tempdir().unwrap());
            tree.write("devices/system/node/online", "0-2\n");
            for (node, cores) in ["0-3", "4-7", "", "8-9"].iter().enumerate() {
                tree.write(&format!("devices/system/node/node{node}/cpulist"), &format!("{cores}\n"));
            }
            tree
        }

        fn write(&self, file: &str, text: &str) {
            let file = self.0.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }

        fn link(&self, at: &str, to: &str) {
            let at = self.0.path().join(at);
            fs::create_dir_all(at.parent().unwrap()).unwrap();
            symlink(self.0.path().join(to), at).unwrap();
        }

        /// A block device whose folder is there or is made, as `dev/block/259:minor`.
        fn number(&self, minor: u64, folder: &str) {
            fs::create_dir_all(self.0.path().join(folder)).unwrap();
            self.link(&format!("dev/block/259:{minor}"), folder);
        }

        /// Number `10 * index`, with a partition as the next.
        fn nvme(&self, index: u64, numa_node: &str) {
            let pci = format!("devices/pci0000:{index}0/0000:{index}1:00.0");
            let disk = format!("{pci}/nvme/nvme{index}/nvme{index}n1");
            self.write(&format!("{pci}/numa_node"), numa_node);
            // Farther, so never asked.
            self.write(&format!("devices/pci0000:{index}0/numa_node"), "1\n");
            self.number(10 * index, &disk);
            self.write(&format!("{disk}/nvme{index}n1p1/partition"), "1\n");
            self.number(10 * index + 1, &format!("{disk}/nvme{index}n1p1"));
        }

        /// Of the devices with these numbers.
        fn md(&self, minor: u64, slaves: &[u64]) {
            let folder = format!("devices/virtual/block/md{minor}");
            self.number(minor, &folder);
            slaves
                .iter()
                .for_each(|slave| self.link(&format!("{folder}/slaves/{slave}"), &format!("dev/block/259:{slave}")));
        }

        fn machine(&self, allowed: &[usize]) -> Option<Machine> {
            Machine::read(self.0.path(), allowed)
        }

        fn found(&self, minor: u64) -> Option<(usize, Vec<usize>)> {
            let allowed: Vec<usize> = (0..16).collect();
            let machine = self.machine(&allowed).unwrap();
            machine.near_number(makedev(259, minor)).map(|near| (near.numa_node.0, near.cores.to_vec()))
        }
    }

    #[test]
    fn a_disk_and_its_partition_are_on_the_numa_node_of_their_controller() {
        let tree = Tree::new();
        tree.nvme(0, "0\n");
        tree.nvme(1, "1\n");
        for (minor, numa_node, cores) in
            [(0, 0, [0, 1, 2, 3]), (1, 0, [0, 1, 2, 3]), (10, 1, [4, 5, 6, 7]), (11, 1, [4, 5, 6, 7])]
        {
            assert_eq!(tree.found(minor), Some((numa_node, cores.to_vec())), "259:{minor}");
        }
        assert_eq!(tree.found(77), None, "no such device");
        let name = |minor| tree.machine(&[0]).unwrap().near_number(makedev(259, minor)).map(|near| near.device);
        assert_eq!(name(1).as_deref(), Some("nvme0n1p1"));
    }

    #[test]
    fn a_device_that_only_its_driver_knows_the_place_of_is_found() {
        let tree = Tree::new();
        tree.number(5, "devices/virtual/block/vdb");
        assert_eq!(tree.found(5), None);
        tree.write("devices/virtio5/numa_node", "1");
        tree.link("devices/virtual/block/vdb/device", "devices/virtio5");
        assert_eq!(tree.found(5).map(|(numa_node, _)| numa_node), Some(1));
    }

    #[test]
    fn what_is_made_of_several_is_where_all_of_them_are_or_nowhere() {
        let tree = Tree::new();
        [(0, "0"), (1, "1"), (2, "1"), (3, "-1")].iter().for_each(|(index, node)| tree.nvme(*index, node));
        tree.md(100, &[10, 21]);
        tree.md(101, &[0, 10]);
        tree.md(102, &[10, 30]);
        // LVM on the first of these; a partition of it.
        tree.md(103, &[100]);
        tree.write("devices/virtual/block/md100/md100p1/partition", "1");
        tree.number(104, "devices/virtual/block/md100/md100p1");
        let found = |minor| tree.found(minor).map(|(numa_node, _)| numa_node);
        assert_eq!([100, 101, 102, 103, 104].map(found), [Some(1), None, None, Some(1), Some(1)]);
    }

    #[test]
    fn an_nvme_disk_of_several_controllers_is_where_all_of_them_are() {
        let tree = Tree::new();
        let subsystem = "devices/virtual/nvme-subsystem/nvme-subsys0";
        tree.write(&format!("{subsystem}/subsysnqn"), "nqn.2014.08.org.nvmexpress");
        tree.number(50, &format!("{subsystem}/nvme0n1"));
        tree.write("devices/pci0/nvme/nvme0/numa_node", "1");
        tree.link(&format!("{subsystem}/nvme0"), "devices/pci0/nvme/nvme0");
        assert_eq!(tree.found(50).map(|(numa_node, _)| numa_node), Some(1));
        tree.write("devices/pci1/nvme/nvme1/numa_node", "0");
        tree.link(&format!("{subsystem}/nvme1"), "devices/pci1/nvme/nvme1");
        assert_eq!(tree.found(50), None);
    }

    #[test]
    fn nothing_is_known_of_numa_nodes_that_are_unknown_offline_or_without_cores() {
        let tree = Tree::new();
        for (index, numa_node) in ["-1\n", "2\n", "3\n", "9\n", "x\n"].iter().enumerate() {
            tree.nvme(index as u64, numa_node);
            assert_eq!(tree.found(10 * index as u64), None, "{numa_node}");
        }
        tree.nvme(5, "1");
        let near = |allowed: &[usize]| {
            tree.machine(allowed).unwrap().near_number(makedev(259, 50)).map(|near| near.cores.to_vec())
        };
        assert_eq!(near(&[0, 1, 5, 7]), Some(vec![5, 7]), "what may be used");
        assert_eq!(near(&[0, 1]), None, "none of them may be used");
    }

    #[test]
    fn with_one_numa_node_there_is_nothing_to_choose() {
        let tree = Tree::new();
        for online in ["0\n", "", "what"] {
            tree.write("devices/system/node/online", online);
            assert!(tree.machine(&[0, 1]).is_none(), "{online:?}");
        }
        let nowhere = tempfile::tempdir().unwrap();
        assert!(Machine::read(nowhere.path(), &[0, 1]).is_none());
    }

    #[test]
    fn the_file_of_a_shard_leads_to_the_cores_of_its_disk() {
        let tree = Tree::new();
        let file = tempfile::NamedTempFile::new().unwrap();
        let number = number_text(file.as_file().metadata().unwrap().dev());
        tree.write("devices/disk/numa_node", "1");
        tree.link(&format!("dev/block/{number}"), "devices/disk");
        let paths = [file.path(), Path::new("/nowhere"), file.path()];
        let machine = tree.machine(&[0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
        assert_eq!(machine.near_disks(&[0, 1, 2], &paths), [4, 1, 5]);
    }

    #[test]
    fn shards_of_a_disk_have_its_cores_and_then_others_that_are_free() {
        let (low, high) = (Some([0, 1].as_slice()), Some([2, 3].as_slice()));
        assert_eq!(choose(&[0, 1, 2, 3], &[high, low, high, low]), [2, 0, 3, 1]);
        assert_eq!(choose(&[0, 1, 2, 3, 4], &[high; 5]), [2, 3, 0, 1, 4]);
        assert_eq!(choose(&[0, 1, 2], &[high, high, low]), [2, 3, 0]);
        assert_eq!(choose(&[0, 1, 2], &[high, high, high]), [2, 3, 0]);
    }

    #[test]
    fn who_knows_nothing_keeps_its_core_and_others_keep_away_from_it() {
        let (low, unknown) = (Some([0, 1, 2].as_slice()), None);
        assert_eq!(choose(&[0, 1, 2, 3], &[low, unknown, low, unknown]), [0, 1, 2, 3]);
        assert_eq!(choose(&[3, 2, 0], &[low, low, unknown]), [1, 2, 0]);
        assert_eq!(choose(&[5, 3], &[unknown; 2]), [5, 3]);
    }
}
