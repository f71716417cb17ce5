//! One property test for each promise of the planner.

use super::*;
use crate::ids::ShardIndex;
use crate::limits::SLICES_DEFAULT;
use proptest::prelude::*;

pub(in crate::ring) fn node(id: u16, host: &str, shards: u16, weight_bytes: u64) -> PlanNode {
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&id.to_be_bytes());
    PlanNode {
        id: NodeId::from_bytes(bytes),
        host: host.into(),
        zone: String::new(),
        rack: String::new(),
        shards: (0..shards).map(|index| RingShard { index: ShardIndex(index), weight_bytes }).collect(),
    }
}

/// `count` nodes with a host each.
fn uniform(count: u16, shards: u16) -> Vec<PlanNode> {
    (0..count).map(|id| node(id, &format!("h{id}"), shards, 1 << 40)).collect()
}

fn ring(previous: &Ring, nodes: &[PlanNode]) -> Ring {
    Ring::from_record(plan(previous, nodes)).expect("the planner makes valid rings")
}

fn counts<K: Ord>(ring: &Ring, replicas: usize, key: impl Fn(&ShardId) -> K) -> BTreeMap<K, u32> {
    let mut counts = BTreeMap::new();
    for (shard, slices) in ring.slices_per_shard(replicas as u8) {
        *counts.entry(key(&shard)).or_default() += slices;
    }
    counts
}

fn spread<K: Ord>(counts: &BTreeMap<K, u32>) -> u32 {
    counts.values().max().unwrap() - counts.values().min().unwrap()
}

fn domain(ring: &Ring, shard: &ShardId, level: usize) -> Vec<String> {
    let node = ring.node(shard.node).unwrap();
    [&node.zone, &node.rack, &node.host][..=level].iter().map(|name| name.to_string()).collect()
}

/// Replicas that have to be copied to a node or shard that did not hold the slice for `replicas` before.
fn moved<K: PartialEq>(before: &Ring, after: &Ring, replicas: usize, key: impl Fn(&ShardId) -> K) -> u32 {
    let mut moved = 0;
    for slice in (0..after.slices()).map(SliceId) {
        let old = before.replicas(slice, before.replicas_max().min(replicas) as u8);
        let new = after.replicas(slice, replicas as u8);
        moved += new.iter().filter(|shard| !old.iter().any(|known| key(known) == key(shard))).count() as u32;
    }
    moved
}

fn check_distinct(ring: &Ring) {
    for level in 0..3 {
        let domains: std::collections::BTreeSet<_> = ring
            .nodes()
            .iter()
            .map(|node| domain(ring, &ShardId { node: node.number, shard: ShardIndex(0) }, level))
            .collect();
        let enough = ring.replicas_max().min(domains.len());
        for slice in (0..ring.slices()).map(SliceId) {
            let used: std::collections::BTreeSet<_> =
                ring.replicas(slice, enough as u8).iter().map(|shard| domain(ring, shard, level)).collect();
            assert_eq!(used.len(), enough, "level {level}, slice {slice}: {:?}", ring.replicas(slice, enough as u8));
        }
    }
}

fn check_balance(ring: &Ring) {
    for replicas in 1..=ring.replicas_max() {
        let shards = counts(ring, replicas, |shard| *shard);
        assert!(spread(&shards) <= 1, "{replicas} replicas by shard: {shards:?}");
        let nodes = counts(ring, replicas, |shard| shard.node);
        assert!(spread(&nodes) <= 1, "{replicas} replicas by node: {nodes:?}");
        for level in 0..3 {
            let domains = counts(ring, replicas, |shard| domain(ring, shard, level));
            assert!(spread(&domains) <= 1, "{replicas} replicas on level {level}: {domains:?}");
        }
    }
}

#[test]
fn three_nodes_of_one_host_are_three_replicas() {
    let nodes = [node(1, "here", 1, 100), node(2, "here", 1, 100), node(3, "here", 1, 100)];
    let ring = ring(&Ring::empty(64), &nodes);
    assert_eq!(ring.replicas_max(), 3);
    check_balance(&ring);
}

#[test]
fn the_largest_cluster_we_plan_for_fits_into_one_value_of_the_metadata_store() {
    let mut nodes = uniform(300, 16);
    for (index, node) in nodes.iter_mut().enumerate() {
        node.rack = format!("r{}", index / 20);
        node.zone = format!("z{}", index / 100);
    }
    let record = plan(&Ring::empty(SLICES_DEFAULT), &nodes);
    let bytes = crate::records::encode(&record).len();
    assert!(bytes < 1024 * 1024, "{bytes} bytes");
    let ring = Ring::from_record(record).unwrap();
    check_balance(&ring);
    check_distinct(&ring);
}

#[test]
fn a_ring_that_loses_its_last_node_is_empty_and_numbers_are_not_given_again() {
    let full = ring(&Ring::empty(16), &uniform(2, 1));
    let empty = ring(&full, &[]);
    assert_eq!(empty.replicas_max(), 0);
    let again = ring(&empty, &uniform(1, 1));
    assert_eq!(again.nodes()[0].number, NodeNumber(2));
    assert_eq!(again.generation(), RingGeneration(4));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn equal_weights_are_balanced_within_one_slice_for_every_number_of_replicas(
        nodes in 1_u16..24, shards in 1_u16..5, bits in 3_u32..9
    ) {
        check_balance(&ring(&Ring::empty(1 << bits), &uniform(nodes, shards)));
    }

    #[test]
    fn equal_domains_are_balanced_within_one_slice_and_never_hold_a_slice_twice_where_there_are_enough(
        zones in 1_u16..5, racks in 1_u16..4, hosts in 1_u16..3, per_host in 1_u16..3, bits in 4_u32..9
    ) {
        let mut nodes = uniform(zones * racks * hosts * per_host, 2);
        for (index, node) in nodes.iter_mut().enumerate() {
            let index = index as u16;
            node.host = format!("h{}", index / per_host);
            node.rack = format!("r{}", index / (per_host * hosts));
            node.zone = format!("z{}", index / (per_host * hosts * racks));
        }
        let ring = ring(&Ring::empty(1 << bits), &nodes);
        check_balance(&ring);
        check_distinct(&ring);
    }

    #[test]
    fn replicas_are_on_distinct_domains_however_unequal_the_cluster_is(
        cluster in proptest::collection::vec((0_u8..4, 0_u8..3, 0_u8..4, 1_u16..4, 1_u64..1000), 1..20)
    ) {
        let nodes: Vec<PlanNode> = cluster.iter().enumerate().map(|(id, (zone, rack, host, shards, weight))| PlanNode {
            zone: format!("z{zone}"),
            rack: format!("r{rack}"),
            ..node(id as u16, &format!("h{host}"), *shards, *weight)
        }).collect();
        check_distinct(&ring(&Ring::empty(128), &nodes));
    }

    #[test]
    fn slices_follow_capacity_where_no_node_is_too_large_for_it(
        weights in proptest::collection::vec(50_u64..100, 6..20)
    ) {
        let nodes: Vec<PlanNode> =
            weights.iter().enumerate().map(|(id, weight)| node(id as u16, &format!("h{id}"), 2, *weight)).collect();
        let ring = ring(&Ring::empty(1024), &nodes);
        // Six nodes of at most twice the weight of another: nobody's share passes 1/3 of the entries.
        for replicas in 1..=3 {
            let total: u64 = weights.iter().sum();
            for (number, slices) in counts(&ring, replicas, |shard| shard.node) {
                let share = 1024.0 * replicas as f64 * weights[number.0 as usize] as f64 / total as f64;
                prop_assert!((f64::from(slices) - share).abs() <= 1.0, "{replicas}: {slices} of {share}");
            }
        }
    }

    #[test]
    fn the_same_nodes_give_the_same_table(nodes in 1_u16..16, shards in 1_u16..4) {
        let first = ring(&Ring::empty(256), &uniform(nodes, shards));
        let second = ring(&first, &uniform(nodes, shards));
        prop_assert_eq!(&first.record().table, &second.record().table);
        prop_assert_eq!(second.generation().0, first.generation().0 + 1);
    }

    #[test]
    fn a_node_that_comes_takes_its_share_and_moves_nothing_else(nodes in 3_u16..16, shards in 1_u16..4) {
        let before = ring(&Ring::empty(512), &uniform(nodes, shards));
        let after = ring(&before, &uniform(nodes + 1, shards));
        check_balance(&after);
        for replicas in 1..=before.replicas_max() {
            let share = counts(&after, replicas, |shard| shard.node)[&NodeNumber(u32::from(nodes))];
            let moved = moved(&before, &after, replicas, |shard| shard.node);
            prop_assert_eq!(moved, share, "{} replicas by node", replicas);
            let by_shard = self::moved(&before, &after, replicas, |shard| *shard);
            prop_assert!(by_shard <= share + share / 4 + 8, "{replicas} replicas by shard: {by_shard} of {share}");
        }
    }

    #[test]
    fn a_node_that_goes_gives_up_its_share_and_moves_nothing_else(nodes in 4_u16..16, shards in 1_u16..4, gone in 0_u16..4) {
        let before = ring(&Ring::empty(512), &uniform(nodes, shards));
        let mut rest = uniform(nodes, shards);
        rest.remove(usize::from(gone));
        let after = ring(&before, &rest);
        check_balance(&after);
        for replicas in 1..=after.replicas_max().min(before.replicas_max()) {
            let share = counts(&before, replicas, |shard| shard.node)[&NodeNumber(u32::from(gone))];
            let moved = moved(&before, &after, replicas, |shard| shard.node);
            // What is left is balanced again to within one slice, which can take a few slices more.
            prop_assert!(moved <= share + share / 20 + 8, "{replicas} replicas by node: {moved} of {share}");
            let by_shard = self::moved(&before, &after, replicas, |shard| *shard);
            prop_assert!(by_shard <= share + share / 4 + 8, "{replicas} replicas by shard: {by_shard} of {share}");
        }
    }
}
