//! How many slices each shard, node and failure domain should hold, as whole numbers: the first half of the planner.
//!
//! The cluster is a tree: root → zones → racks → hosts → nodes → shards. For each number p of replicas, p × slices
//! entries are divided from the root down in proportion to capacity, within bounds that follow from the promise
//! about failure domains: with at least p domains on a level, none may hold a slice twice; with at most p, each has
//! to hold every slice. Rounding goes down the same tree, so that every vertex is within one of its exact share.

use super::planner::PlanNode;
use std::collections::BTreeMap;

pub(super) const ZONE: usize = 1;
pub(super) const HOST: usize = 3;
const NODE: usize = 4;
const SHARD: usize = 5;
const ROOT: usize = 0;
/// Shares are computed in floating point; what is this near a whole number is one.
const EXACTNESS: f64 = 1e-6;

pub(super) struct Tree {
    /// Parents stand before their children.
    vertices: Vec<Vertex>,
    /// Vertices on each level.
    level_counts: [usize; 6],
    /// For each node its zone, rack, host and itself.
    pub paths: Vec<[usize; 4]>,
    /// For each shard, counted over all nodes, its vertex.
    pub shards: Vec<usize>,
}

struct Vertex {
    level: usize,
    weight: f64,
    children: Vec<usize>,
}

impl Tree {
    pub fn new(nodes: &[PlanNode]) -> Self {
        let root = Vertex { level: 0, weight: 0.0, children: Vec::new() };
        let mut tree = Self { vertices: vec![root], level_counts: [0; 6], paths: Vec::new(), shards: Vec::new() };
        let mut domains = BTreeMap::new();
        for node in nodes {
            let names = [node.zone.as_str(), node.rack.as_str(), node.host.as_str()];
            let mut path = [ROOT; 4];
            let mut parent = ROOT;
            for depth in 0..names.len() {
                let key = names[..=depth].to_vec();
                parent = *domains.entry(key).or_insert_with(|| tree.add(parent, depth + ZONE, 0.0));
                path[depth] = parent;
            }
            path[3] = tree.add(parent, NODE, 0.0);
            tree.paths.push(path);
            for shard in &node.shards {
                let leaf = tree.add(path[3], SHARD, shard.weight_bytes.max(1) as f64);
                tree.shards.push(leaf);
            }
        }
        // Parents stand before their children, so that going backwards every child is summed already.
        for vertex in (0..tree.vertices.len()).rev() {
            let children = tree.vertices[vertex].children.iter();
            let below: f64 = children.map(|&child| tree.vertices[child].weight).sum();
            tree.vertices[vertex].weight += below;
        }
        tree
    }

    fn add(&mut self, parent: usize, level: usize, weight: f64) -> usize {
        let vertex = self.vertices.len();
        self.vertices.push(Vertex { level, weight, children: Vec::new() });
        self.vertices[parent].children.push(vertex);
        self.level_counts[level] += 1;
        vertex
    }

    /// Entries that each vertex should hold in the first `replicas` columns. `held` are those it holds in the columns
    /// before, a lower bound; `previous` those it held in the same columns of the ring before, which decide where the
    /// remainder goes. Both by shard.
    pub fn targets(&self, slices: u32, replicas: usize, held: &[u32], previous: &[u32]) -> Vec<u32> {
        let quotas = self.quotas(f64::from(slices), replicas);
        let held = self.sum_up(held);
        let previous = self.sum_up(previous);
        let mut low = vec![0; self.vertices.len()];
        for vertex in (0..self.vertices.len()).rev() {
            let children: u32 = self.vertices[vertex].children.iter().map(|&child| low[child]).sum();
            low[vertex] = ((quotas[vertex] + EXACTNESS).floor() as u32).max(children).max(held[vertex]);
        }
        let mut targets = low.clone();
        for vertex in 0..self.vertices.len() {
            let children = &self.vertices[vertex].children;
            let mut open: Vec<usize> =
                children.iter().copied().filter(|&child| f64::from(low[child]) + EXACTNESS < quotas[child]).collect();
            open.sort_by(|&a, &b| {
                let keeps = |child: usize| previous[child] > low[child];
                let fraction = |child: usize| quotas[child] - f64::from(low[child]);
                keeps(b).cmp(&keeps(a)).then(fraction(b).total_cmp(&fraction(a)))
            });
            let given: u32 = children.iter().map(|&child| low[child]).sum();
            for &child in open.iter().take(targets[vertex].saturating_sub(given) as usize) {
                targets[child] += 1;
            }
        }
        targets
    }

    fn sum_up(&self, by_shard: &[u32]) -> Vec<u32> {
        let mut sums = vec![0; self.vertices.len()];
        for (&vertex, &count) in self.shards.iter().zip(by_shard) {
            sums[vertex] = count;
        }
        for vertex in (0..self.vertices.len()).rev() {
            sums[vertex] += self.vertices[vertex].children.iter().map(|&child| sums[child]).sum::<u32>();
        }
        sums
    }

    /// The exact share of each vertex.
    fn quotas(&self, slices: f64, replicas: usize) -> Vec<f64> {
        let mut low = vec![0.0; self.vertices.len()];
        let mut high = vec![slices; self.vertices.len()];
        for vertex in (1..self.vertices.len()).rev() {
            let Vertex { level, children, .. } = &self.vertices[vertex];
            if *level == SHARD {
                continue;
            }
            let domains = self.level_counts[*level];
            low[vertex] = children.iter().map(|&child| low[child]).sum();
            high[vertex] = children.iter().map(|&child| high[child]).sum();
            if domains <= replicas {
                low[vertex] = slices.max(low[vertex]);
            }
            if domains >= replicas {
                high[vertex] = slices.min(high[vertex]);
            }
        }
        let mut quotas = vec![0.0; self.vertices.len()];
        quotas[ROOT] = slices * replicas as f64;
        for vertex in 0..self.vertices.len() {
            let children = &self.vertices[vertex].children;
            let level = self.water_level(quotas[vertex], children, &low, &high);
            for &child in children {
                quotas[child] = (level * self.vertices[child].weight).clamp(low[child], high[child]);
            }
        }
        quotas
    }

    /// The factor between weight and share at which the shares, within their bounds, add up to `total`.
    fn water_level(&self, total: f64, children: &[usize], low: &[f64], high: &[f64]) -> f64 {
        let sum_at = |level: f64| -> f64 {
            children.iter().map(|&child| (level * self.vertices[child].weight).clamp(low[child], high[child])).sum()
        };
        let (mut below, mut above) = (0.0, total);
        // The sum grows with the level and weights are at least 1; 200 halvings exhaust the precision of a double.
        for _ in 0..200 {
            let middle = (below + above) / 2.0;
            if sum_at(middle) < total { below = middle } else { above = middle }
        }
        above
    }
}

#[cfg(test)]
mod tests {
    use super::super::planner::tests::node;
    use super::*;

    fn node_targets(nodes: &[PlanNode], slices: u32, replicas: usize) -> Vec<u32> {
        let tree = Tree::new(nodes);
        let zero = vec![0; tree.shards.len()];
        let targets = tree.targets(slices, replicas, &zero, &zero);
        tree.paths.iter().map(|path| targets[path[3]]).collect()
    }

    #[test]
    fn shares_follow_capacity() {
        let nodes = [node(1, "a", 1, 100), node(2, "b", 1, 200), node(3, "c", 1, 100)];
        assert_eq!(node_targets(&nodes, 64, 1), [16, 32, 16]);
    }

    #[test]
    fn a_node_that_is_larger_than_all_others_holds_every_slice_once_and_no_more() {
        let nodes = [node(1, "a", 1, 100), node(2, "b", 1, 9000), node(3, "c", 1, 100)];
        assert_eq!(node_targets(&nodes, 64, 2), [32, 64, 32]);
    }

    #[test]
    fn a_host_that_is_one_of_as_many_as_replicas_holds_every_slice() {
        let nodes = [node(1, "a", 1, 100), node(2, "b", 1, 100), node(3, "b", 1, 100), node(4, "b", 1, 100)];
        assert_eq!(node_targets(&nodes, 60, 2), [60, 20, 20, 20]);
    }

    #[test]
    fn the_remainder_goes_to_whom_held_it_before() {
        let tree = Tree::new(&[node(1, "a", 1, 1), node(2, "b", 1, 1), node(3, "c", 1, 1)]);
        let targets = tree.targets(16, 1, &[0, 0, 0], &[5, 5, 6]);
        assert_eq!(tree.shards.iter().map(|&shard| targets[shard]).collect::<Vec<_>>(), [5, 5, 6]);
    }
}
