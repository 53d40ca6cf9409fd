//! Layers: which requests have to come out after which.

use crate::request::{Op, Request};
use crate::steps::step;

/// A request in sorted order, packed into one number so that sorting compares without branches. From
/// the highest bits down:
///
/// * 31 bits, its layer: all of one layer come out before any of the next.
/// * 1 bit, that it may not be merged: sorted behind those of its layer that may.
/// * 64 bits, its offset.
/// * 32 bits, its arrival: the position in the piece of the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key(u128);

impl Key {
    const OFFSET: u32 = 32;
    const ALONE: u128 = 1 << 96;
    const LAYER: u32 = 97;

    /// In layer 0, and mergeable.
    pub(crate) fn new(offset: u64, index: u32) -> Self {
        Self(u128::from(offset) << Self::OFFSET | u128::from(index))
    }

    /// Takes note of the layer, of which there are fewer than 2^17.
    pub(crate) fn set_layer(&mut self, layer: u32) {
        self.0 |= u128::from(layer) << Self::LAYER;
    }

    pub(crate) fn set_alone(&mut self) {
        self.0 |= Self::ALONE;
    }

    #[expect(clippy::cast_possible_truncation, reason = "the field's 64 bits")]
    pub(crate) fn offset(self) -> u64 {
        (self.0 >> Self::OFFSET) as u64
    }

    #[expect(clippy::cast_possible_truncation, reason = "the field's 32 bits")]
    pub(crate) fn index(self) -> usize {
        self.0 as u32 as usize
    }

    /// Same layer, and both mergeable or neither.
    pub(crate) fn is_with(self, other: Self) -> bool {
        (self.0 ^ other.0) & !(Self::ALONE - 1) == 0
    }
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
            arrival[key.index()] = position;
        }
        for (request, &position) in requests.iter().zip(arrival.iter()) {
            let Some(last) = request.last() else { continue };
            let begin = keys.partition_point(|key| {
                step();
                key.offset() < request.offset
            });
            let end = keys.partition_point(|key| {
                step();
                key.offset() <= last
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
            keys[position as usize].set_layer(layer);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_by_layer_then_mergeable_first_then_offset_then_arrival() {
        let key = |layer, alone, offset, index| {
            let mut key = Key::new(offset, index);
            key.set_layer(layer);
            if alone {
                key.set_alone();
            }
            assert_eq!((key.offset(), key.index()), (offset, index as usize));
            key
        };
        let sorted = [
            key(0, false, 0, u32::MAX),
            key(0, false, u64::MAX, 0),
            key(0, true, 0, 0),
            key(1, false, 0, 0),
            key(1, false, 0, 1),
            key(70_000, true, u64::MAX, u32::MAX),
        ];
        assert!(sorted.is_sorted_by(|a, b| a < b));
        assert!(sorted[0].is_with(sorted[1]) && sorted[3].is_with(sorted[4]));
        assert!(!sorted[1].is_with(sorted[2]) && !sorted[1].is_with(sorted[3]));
    }
}
