//! The command line of `torus-engine`: parsed and checked before anything is touched, so that a wrong setting costs
//! nothing but its message.

use crate::node::serving::{NEED_NBD, NEED_VOLUMES, ServingArguments};
use clap::{ArgGroup, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use torus_rpc::http::HttpAddress;
use torus_schema::cpus::CpuList;
use torus_schema::ids::{BlockIndex, ShardIndex, VolumeId};
use torus_schema::limits;
use torus_schema::spin::Spin;

/// Cores at or below which a node has one shard and runs unpinned: the kernel, the clients and the other nodes of a
/// demo need them too.
const FEW_CORES: usize = 4;

#[derive(Debug, Parser)]
#[command(
    name = "torus-engine",
    version,
    about = "A Torus storage node: pools the disk under DATA_DIR into a cluster's replicated volumes",
    after_help = "Examples:\n  \
        torus-engine --metadata etcd://10.0.0.1:2379 --data-dir /var/lib/torus --size 80% --listen 10.0.0.7:7000\n  \
        torus-engine --metadata torus://127.0.0.1:7900 --data-dir ./node-1 --size 20GiB --listen 127.0.0.1:0\n  \
        torus-engine --metadata etcd://10.0.0.1:2379 --data-dir /var/lib/torus --device /dev/disk/by-id/nvme-A \\\n    \
        --device /dev/disk/by-id/nvme-B --listen 10.0.0.7:7000\n  \
        torus-engine --metadata etcd://10.0.0.1:2379 --data-dir /var/lib/torus --listen 10.0.0.7:7000 \\\n    \
        --nbd unix:/run/torus/nbd.sock --export db-1\n  \
        torus-engine metadata --dir ./metadata --listen 127.0.0.1:7900\n\n\
        A cluster is made once by `torusadm init`; a started node joins it by `torusadm peer add`.\n\
        SIGTERM and SIGINT stop a node cleanly; kill -9 loses nothing that was flushed.",
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    args_override_self = true,
    arg_required_else_help = true
)]
pub struct CommandLine {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub node: Option<NodeArguments>,
    #[command(flatten, next_help_heading = "Volumes over NBD and AoE")]
    pub serving: ServingArguments,
}

impl CommandLine {
    /// What the derived parser does, with two rules that its attributes cannot say.
    pub fn read(words: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let words: Vec<OsString> = words.into_iter().collect();
        let mut command = Self::command();
        for option in NEED_NBD {
            command = command.mut_arg(option, |option| option.requires("nbd"));
        }
        command = command.group(ArgGroup::new("volumes").args(["nbd", "aoe"]).multiple(true));
        for option in NEED_VOLUMES {
            command = command.mut_arg(option, |option| option.requires("volumes"));
        }
        // A node's setting in the environment would count as one of its options beside the subcommand.
        if words.get(1).is_some_and(|word| command.find_subcommand(word).is_some()) {
            command = command.mut_arg("metadata", |metadata| metadata.env(None::<&'static str>));
        }
        let matches = command.clone().try_get_matches_from(words)?;
        Self::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a metadata store for one machine, as a process of its own: nodes and tools reach it as torus://HOST:PORT
    Metadata(MetadataArguments),
    /// Show what stands on the disks of a node that does not run; writes nothing
    Inspect(InspectArguments),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum InspectOutput {
    Text,
    Json,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    torus-engine inspect /var/lib/torus\n  \
    torus-engine inspect /var/lib/torus --verify --output json\n  \
    torus-engine inspect /var/lib/torus --block 6ba7b810-9dad-11d1-80b4-00c04fd430c8 4096\n  \
    torus-engine inspect --device /dev/nvme0n1\n\n\
    `torusblk volume info` gives the id of a volume; a block is 4 KiB. Exits with 1 if --verify finds damage.")]
pub struct InspectArguments {
    /// The node's data dir
    pub dir: Option<PathBuf>,

    /// Where its devices are now; without DIR: show what is on these
    #[arg(long = "device", value_name = "PATH", action = clap::ArgAction::Append)]
    pub devices: Vec<PathBuf>,

    /// Only this one
    #[arg(long, value_name = "N")]
    pub shard: Option<u16>,

    /// Show all records of one block of a volume, whether they still count or not
    #[arg(long, num_args = 2, value_names = ["VOLUME", "BLOCK"], value_parser = parse_number_or_id)]
    pub block: Vec<VolumeOrBlock>,

    /// Read everything and compare checksums; progress goes to stderr if that is a terminal
    #[arg(long)]
    pub verify: bool,

    #[arg(long, value_enum, default_value_t = InspectOutput::Text)]
    pub output: InspectOutput,

    /// What is logged to stderr: error, warn, info, debug, trace, or a filter such as torus_engine=debug
    #[arg(long, value_name = "LEVEL", default_value = "error")]
    pub log: String,
}

impl InspectArguments {
    pub fn block(&self) -> Option<(VolumeId, BlockIndex)> {
        match self.block.as_slice() {
            [VolumeOrBlock::Volume(volume), VolumeOrBlock::Block(block)] => Some((*volume, *block)),
            _ => None,
        }
    }

    /// What the parser cannot say.
    pub fn check(&self) -> Result<(), String> {
        if !self.block.is_empty() && self.block().is_none() {
            return Err(format!("--block: found {:?}, expected a volume's id and then a block's number", self.block));
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VolumeOrBlock {
    Volume(VolumeId),
    Block(BlockIndex),
}

fn parse_number_or_id(text: &str) -> Result<VolumeOrBlock, String> {
    let wrong = || format!("found {text:?}, expected the id of a volume, or the number of a block");
    match text.parse::<u64>() {
        Ok(number) => Ok(VolumeOrBlock::Block(BlockIndex(number))),
        Err(_) => text.parse().map(VolumeOrBlock::Volume).map_err(|_| wrong()),
    }
}

#[derive(Debug, Args)]
pub struct MetadataArguments {
    /// Where the store is kept; made if it is not there
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// Address to serve on; port 0 takes a free one and prints it
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:7900")]
    pub listen: SocketAddr,
    /// What is logged to stderr: error, warn, info, debug, trace, or a filter such as torus_engine=debug
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log: String,
}

#[derive(Clone, Debug, Args)]
pub struct NodeArguments {
    /// Where the cluster's metadata is: etcd://HOST:PORT[,HOST:PORT…], torus://HOST:PORT, or `embedded` to hold it
    /// inside this node (a lone node; in DATA_DIR/metadata)
    #[arg(short = 'C', long, value_name = "URL", env = "TORUS_METADATA")]
    pub metadata: String,
    /// Where `--metadata embedded` serves
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:7900")]
    pub metadata_listen: SocketAddr,
    /// The node's own directory: block files, identity, lock. Formatted when it is empty, never otherwise
    #[arg(long, value_name = "DIR")]
    pub data_dir: PathBuf,
    /// Space to take, all shards together: 20GiB, 1.5TiB, or N% of the file system (with --device: of the devices,
    /// and all of them by default). Needed when the data dir is formatted; afterwards it may be left out, or be larger:
    /// then the node grows at its start. It never shrinks. A percentage is computed when it is first given, and anew
    /// only when it differs
    #[arg(long, value_name = "SIZE|N%")]
    pub size: Option<NodeSize>,
    /// A raw disk or partition for the shards instead of files in DATA_DIR; more than one: name the option again.
    /// Shard i is on device i mod n. Taken when the data dir is formatted, and only if it is empty; afterwards the
    /// devices are known by what stands on them, and the option may be left out
    #[arg(long = "device", value_name = "PATH", action = clap::ArgAction::Append)]
    pub devices: Vec<PathBuf>,

    /// Format devices that hold something: it is lost. Never for a device that is mounted or otherwise in use. Not
    /// for scripts and unit files
    #[arg(long)]
    pub force: bool,

    /// Address to serve on. Control is on the port given, shard i on the port + 1 + i; port 0 takes free ports for all
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// Host name or address under which others reach this node, where it is not the one of --listen
    #[arg(long, value_name = "HOST")]
    pub advertise: Option<String>,
    /// Shards, each with an executor, a block file and a port of its own; fixed when the data dir is formatted.
    /// Default: one per core, or one where there are 4 cores or fewer; at least one per device
    #[arg(long, value_name = "N")]
    pub shards: Option<u16>,
    /// Cores to pin the shards to: 0,2,4 or 0-3. Nodes that share a machine are given different ones. Default: a core for
    /// each shard, near its disk where there are several NUMA nodes; none where there are 4 cores or fewer, or fewer than
    /// shards
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<CpuList>,
    /// So long each shard's executor looks for work before it sleeps; 0: not at all. Saves a client that sends one request
    /// at a time two wakes for each, and costs CPU time that other programs on these cores could have had
    #[arg(long, value_name = "MICROSECONDS", default_value_t)]
    pub spin: Spin,
    /// Failure domain: what stands in one zone falls together
    #[arg(long, default_value = "")]
    pub zone: String,
    /// Failure domain inside the zone
    #[arg(long, default_value = "")]
    pub rack: String,
    /// Failure domain inside the rack. Default: this machine's host name
    #[arg(long)]
    pub host: Option<String>,
    /// Bytes a second that scrubbing reads, all shards together: 20MiB, 1GiB, or 0 for no scrub but by order. Default: a
    /// node of 1 TiB or less takes what reads 1 TiB in 24 hours (12.1 MiB), a larger one what reads it all in 24 hours
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub scrub_rate: Option<u64>,
    /// Bytes a second that resyncs write to each shard at most; less while clients would wait for them
    #[arg(long, value_name = "SIZE", default_value = "200MiB", value_parser = parse_rate)]
    pub resync_rate: u64,
    /// Tell counters, latencies and health over HTTP: PORT of this host, or ADDRESS:PORT; /metrics, /health
    #[arg(long, value_name = "ADDRESS")]
    pub http: Option<HttpAddress>,
    /// For tests: which disk operations fail now, see `disk::faulty`
    #[arg(long, value_name = "PATH", hide = true)]
    pub fault_file: Option<PathBuf>,
    /// Join the ring by itself, where no volume exists yet
    #[arg(long)]
    pub auto_join: bool,
    /// Seconds after which a start gives up on a metadata store that does not answer
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = parse_deadline)]
    pub deadline: Duration,
    /// What is logged to stderr: error, warn, info, debug, trace, or a filter such as torus_engine=debug
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log: String,
}

impl NodeArguments {
    pub fn is_metadata_embedded(&self) -> bool {
        self.metadata == "embedded"
    }

    /// Shards of a data dir that is formatted now.
    pub fn shards_for_format(&self, cores: usize) -> u16 {
        let by_cores = if cores <= FEW_CORES { 1 } else { u16::try_from(cores).unwrap_or(limits::SHARDS_PER_NODE_MAX) };
        let by_devices = u16::try_from(self.devices.len()).unwrap_or(limits::SHARDS_PER_NODE_MAX);
        self.shards.unwrap_or(by_cores.max(by_devices)).clamp(1, limits::SHARDS_PER_NODE_MAX)
    }

    /// The core of each shard, of those that this process may use, or `None` for all: with fewer cores than shards pinning
    /// would only stack them up.
    pub fn pinning(&self, shards: u16, usable: &[usize]) -> Option<Vec<usize>> {
        let list = match &self.cpus {
            Some(list) => list.0.clone(),
            None if usable.len() <= FEW_CORES => return None,
            None => usable.to_vec(),
        };
        (list.len() >= usize::from(shards)).then(|| list[..usize::from(shards)].to_vec())
    }

    /// What the shard listens on; port 0 stays 0.
    pub fn shard_listen(&self, shard: ShardIndex) -> Result<SocketAddr, String> {
        let control = self.listen.port();
        let port = if control == 0 { Some(0) } else { control.checked_add(1 + shard.0) };
        let port = port.ok_or_else(|| {
            format!("shard {shard} would listen on port {control} + 1 + {shard}, above 65535; choose a lower --listen")
        })?;
        Ok(SocketAddr::new(self.listen.ip(), port))
    }

    /// The host part of the addresses in the node's record. An unspecified address reaches nobody.
    pub fn advertised_host(&self) -> Result<String, String> {
        match (&self.advertise, self.listen.ip()) {
            (Some(host), _) => Ok(host.clone()),
            (None, ip) if ip.is_unspecified() => {
                Err(format!("--listen {} is every address of this host; say with --advertise which one others use", ip))
            }
            (None, IpAddr::V6(ip)) => Ok(format!("[{ip}]")),
            (None, IpAddr::V4(ip)) => Ok(ip.to_string()),
        }
    }
}

fn parse_rate(text: &str) -> Result<u64, String> {
    if text.trim() == "0" {
        return Ok(0);
    }
    torus_schema::size::parse(text).map_err(|error| format!("{error}; expected bytes a second such as 20MiB, or 0"))
}

fn parse_deadline(text: &str) -> Result<Duration, String> {
    let seconds: f64 =
        text.trim_end_matches('s').parse().map_err(|_| format!("found {text:?}, expected seconds such as 5"))?;
    if !(0.1..=3600.0).contains(&seconds) {
        return Err(format!("found {text}, expected 0.1 to 3600 seconds"));
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// As asked for: a percentage is of the file system's size, and compared as such at the next start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeSize {
    Bytes(u64),
    /// 1 to 100.
    Percent(u8),
}

impl FromStr for NodeSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = "expected a size such as 20GiB or a share of the disk such as 80%";
        if let Some(percent) = text.strip_suffix('%') {
            return match percent.trim().parse::<u8>() {
                Ok(percent @ 1..=100) => Ok(NodeSize::Percent(percent)),
                _ => Err(format!("found {text:?}, {expected} (1% to 100%)")),
            };
        }
        torus_schema::size::parse(text).map(NodeSize::Bytes).map_err(|error| format!("{error}; {expected}"))
    }
}

impl std::fmt::Display for NodeSize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            NodeSize::Bytes(bytes) => write!(f, "{bytes}"),
            NodeSize::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<'a>(words: impl IntoIterator<Item = &'a &'a str>) -> Result<CommandLine, clap::Error> {
        CommandLine::read(words.into_iter().map(OsString::from))
    }

    fn node(extra: &[&str]) -> NodeArguments {
        let base = ["torus-engine", "--metadata", "torus://127.0.0.1:1", "--data-dir", "d"];
        let line = read(base.iter().chain(extra)).unwrap();
        assert!(line.command.is_none());
        line.node.unwrap()
    }

    #[test]
    fn shards_take_the_ports_behind_control() {
        let node = node(&["--listen", "127.0.0.1:7000"]);
        assert_eq!(node.shard_listen(ShardIndex(2)).unwrap(), "127.0.0.1:7003".parse().unwrap());
    }

    #[test]
    fn a_port_beyond_the_last_is_refused() {
        let error = node(&["--listen", "127.0.0.1:65535"]).shard_listen(ShardIndex(0)).unwrap_err();
        assert!(error.contains("65535"), "{error}");
    }

    #[test]
    fn an_unspecified_address_needs_another_to_be_advertised() {
        assert!(node(&["--listen", "0.0.0.0:7000"]).advertised_host().unwrap_err().contains("--advertise"));
        let advertised = node(&["--listen", "0.0.0.0:7000", "--advertise", "db7"]).advertised_host();
        assert_eq!(advertised, Ok("db7".to_string()));
    }

    #[test]
    fn sizes_are_bytes_or_a_share_of_the_disk() {
        assert_eq!("20GiB".parse(), Ok(NodeSize::Bytes(20 << 30)));
        assert_eq!("80%".parse(), Ok(NodeSize::Percent(80)));
        for wrong in ["0%", "101%", "%", "much", "-1GiB", ""] {
            assert!(wrong.parse::<NodeSize>().unwrap_err().contains("20GiB"), "{wrong}");
        }
    }

    #[test]
    fn shards_are_pinned_only_where_each_gets_a_core_of_its_own() {
        let usable: Vec<usize> = (4..20).collect();
        assert_eq!(node(&["--cpus", "1,3"]).pinning(2, &usable), Some(vec![1, 3]));
        assert_eq!(node(&["--cpus", "1"]).pinning(2, &usable), None);
        assert_eq!(node(&[]).pinning(2, &usable[..4]), None);
        assert_eq!(node(&[]).pinning(2, &usable[..8]), Some(vec![4, 5]), "of those that may be used");
        assert_eq!(node(&[]).pinning(9, &usable[..8]), None);
    }

    #[test]
    fn devices_are_named_one_by_one_and_have_a_shard_each() {
        let node = node(&["--device", "/dev/sdb", "--device", "/dev/sdc"]);
        assert_eq!(node.devices, ["/dev/sdb", "/dev/sdc"].map(PathBuf::from));
        assert_eq!(node.shards_for_format(4), 2);
    }

    #[test]
    fn a_small_machine_has_one_shard() {
        assert_eq!(node(&[]).shards_for_format(4), 1);
        assert_eq!(node(&[]).shards_for_format(8), 8);
        assert_eq!(node(&["--shards", "2"]).shards_for_format(4), 2);
    }

    #[test]
    fn volumes_that_are_exported_need_an_address_for_their_clients() {
        let base = ["torus-engine", "--metadata", "torus://127.0.0.1:1", "--data-dir", "d", "--export", "a"];
        let more = ["--nbd", "unix:/s", "--nbd", "127.0.0.1:0", "--export", "b", "--read-only"];
        let line = read(base.iter().chain(&more)).unwrap();
        let ServingArguments { nbd, export, options, .. } = line.serving;
        assert_eq!((line.node.is_some(), nbd.len(), export.len(), options.read_only), (true, 2, 2, true));
        let refused = |more: &[&str]| read(base.iter().chain(more)).unwrap().serving.exports().unwrap_err();
        assert!(refused(&[]).contains("--nbd"));
        assert!(refused(&["--aoe", "eth1"]).contains("a=SHELF.SLOT"));
    }

    #[test]
    fn an_export_with_an_address_is_served_over_aoe() {
        let base = ["torus-engine", "--metadata", "torus://127.0.0.1:1", "--data-dir", "d"];
        let line = |more: &[&str]| read(base.iter().chain(more)).unwrap().serving;
        let both = line(&["--nbd", "unix:/s", "--aoe", "eth1,eth2", "--export", "a", "--export", "b=1.2"]);
        let (nbd, aoe) = both.exports().unwrap();
        assert_eq!((nbd, aoe.len(), aoe[0].address.to_string()), (vec!["a".to_string()], 1, "e1.2".to_string()));
        assert!(line(&["--export", "b=1.2"]).exports().unwrap_err().contains("--aoe"));
        assert!(line(&["--aoe", "eth1"]).exports().unwrap_err().contains("--export"));
        assert!(line(&["--aoe", "eth1", "--export", "a=1.2", "--export", "b=1.2"]).exports().is_err());
    }

    #[test]
    fn how_nbd_is_served_is_no_question_where_it_is_not() {
        let base = ["torus-engine", "--metadata", "torus://127.0.0.1:1", "--data-dir", "d"];
        for words in [
            &["--tls", "require", "--tls-certificates", "c"][..],
            &["--tls-clients", "optional"],
            &["--read-only"],
            &["--insecure"],
            &["--io-timeout", "5"],
            &["--lease-ttl", "20"],
            &["--clock-drift", "100"],
            &["--stats", "f"],
        ] {
            let error = read(base.iter().chain(words)).expect_err(words[0]).to_string();
            assert!(error.contains("--nbd"), "{words:?}: {error}");
            assert!(read(base.iter().chain(&["--nbd", "unix:/s"]).chain(words)).is_ok(), "{words:?}");
        }
    }

    #[test]
    fn the_metadata_store_is_a_command_of_its_own() {
        let line = read(&["torus-engine", "metadata", "--dir", "m"]).unwrap();
        assert!(matches!(line.command, Some(Command::Metadata(_))));
        assert!(read(&["torus-engine", "--data-dir", "d"]).is_err());
    }
}
