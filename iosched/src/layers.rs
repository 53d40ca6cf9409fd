//! Layers: which requests have to come out after which.

use crate::request::{Op, Request};
use crate::steps::step;

/// A request in sorted order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    /// All of one layer come out before any of the next.
    pub(crate) layer: u32,
    /// May not be merged: sorted behind those of its layer that may.
    pub(crate) alone: bool,
    pub(crate) offset: u64,
    /// Arrival: position in the piece of the batch.
    pub(crate) index: u32,
}

/// Whether any two of the requests, given in the order of their offsets, overlap and one of them
/// writes. O(n).
pub(crate) fn any_conflict<'a>(sorted: impl Iterator<Item = &'a Request>) -> bool {
    // Last bytes of the requests so far that reach farthest. One that begins at or before such a
    // byte overlaps its request, which begins no later.
    let mut last_read = None;
    let mut last_write = None;
    for request in sorted {
        step();
        let Some(last) = request.last() else { continue };
        let overlaps = |other: Option<u64>| other.is_some_and(|other| request.offset <= other);
        let farthest = match request.op {
            _ if overlaps(last_write) => return true,
            Op::Write if overlaps(last_read) => return true,
            Op::Write => &mut last_write,
            _ => &mut last_read,
        };
        *farthest = (*farthest).max(Some(last));
    }
    false
}

/// The highest layer of reads and of writes over every stretch of the disk, as two segment trees.
///
/// The leaves are the positions of the requests sorted by offset, and a request covers those that
/// begin within it. That is enough: of two requests that overlap, one begins within the other, and
/// its position is covered by both.
#[derive(Debug)]
pub(crate) struct Layers {
    reads: MaxTree,
    writes: MaxTree,
}

impl Layers {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            reads: MaxTree::new(capacity),
            writes: MaxTree::new(capacity),
        }
    }

    /// Fills in the layers of `keys`, which are sorted by offset and hold each of `requests` once.
    /// `arrival` is scratch storage with room for all of them. O(n log n).
    pub(crate) fn assign(
        &mut self,
        keys: &mut [Key],
        requests: &[Request],
        arrival: &mut Vec<u32>,
    ) {
        self.reads.clear(keys.len());
        self.writes.clear(keys.len());
        // Position in `keys` by order of arrival.
        arrival.clear();
        arrival.resize(keys.len(), 0);
        for (position, key) in (0u32..).zip(keys.iter()) {
            arrival[key.index as usize] = position;
        }
        for (request, &position) in requests.iter().zip(arrival.iter()) {
            let Some(last) = request.last() else { continue };
            let begin = keys.partition_point(|key| {
                step();
                key.offset < request.offset
            });
            let end = keys.partition_point(|key| {
                step();
                key.offset <= last
            });
            // A tree holds layers plus one, so that 0 means none: the layer above is the value.
            let after_writes = self.writes.max(begin, end);
            let (layer, tree) = match request.op {
                Op::Write => (
                    after_writes.max(self.reads.max(begin, end)),
                    &mut self.writes,
                ),
                _ => (after_writes, &mut self.reads),
            };
            tree.raise(begin, end, layer + 1);
            keys[position as usize].layer = layer;
        }
    }
}

/// A segment tree over `0..len`: raise every value of a range to at least something, and find the
/// highest of a range, each in O(log n).
///
/// Node 1 is the root, 2i and 2i+1 are the children of i, the leaves are the second half.
#[derive(Debug)]
struct MaxTree {
    nodes: Vec<Node>,
    /// Number of leaves in use, a power of two.
    leaves: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Node {
    /// Every leaf below is at least this.
    floor: u32,
    /// The highest below, as far as raised at or below this node.
    highest: u32,
}

impl MaxTree {
    fn new(capacity: usize) -> Self {
        Self {
            nodes: vec![Node::default(); 2 * capacity.next_power_of_two()],
            leaves: 1,
        }
    }

    /// All zero, with room for `len` leaves.
    fn clear(&mut self, len: usize) {
        self.leaves = len.next_power_of_two();
        self.nodes[..2 * self.leaves].fill(Node::default());
    }

    fn raise(&mut self, begin: usize, end: usize, value: u32) {
        debug_assert!(begin < end && end <= self.leaves);
        let (mut left, mut right) = (begin + self.leaves, end + self.leaves);
        while left < right {
            step();
            if left % 2 == 1 {
                self.raise_node(left, value);
                left += 1;
            }
            if right % 2 == 1 {
                right -= 1;
                self.raise_node(right, value);
            }
            left /= 2;
            right /= 2;
        }
        for leaf in [begin + self.leaves, end - 1 + self.leaves] {
            for node in ancestors(leaf) {
                step();
                self.nodes[node].highest = self.nodes[node].highest.max(value);
            }
        }
    }

    fn raise_node(&mut self, node: usize, value: u32) {
        let node = &mut self.nodes[node];
        node.floor = node.floor.max(value);
        node.highest = node.highest.max(value);
    }

    fn max(&self, begin: usize, end: usize) -> u32 {
        debug_assert!(begin < end && end <= self.leaves);
        let mut max = 0;
        let (mut left, mut right) = (begin + self.leaves, end + self.leaves);
        while left < right {
            step();
            if left % 2 == 1 {
                max = max.max(self.nodes[left].highest);
                left += 1;
            }
            if right % 2 == 1 {
                right -= 1;
                max = max.max(self.nodes[right].highest);
            }
            left /= 2;
            right /= 2;
        }
        // Raises that stopped above the range's nodes.
        for leaf in [begin + self.leaves, end - 1 + self.leaves] {
            for node in ancestors(leaf) {
                step();
                max = max.max(self.nodes[node].floor);
            }
        }
        max
    }
}

/// The nodes above `node`, up to the root.
fn ancestors(node: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(node / 2), |node| Some(node / 2)).take_while(|node| *node > 0)
}
