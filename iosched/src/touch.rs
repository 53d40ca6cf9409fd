//! Does any request begin where another of its direction ends? If not, nothing can merge and the
//! sort is saved. This is all that merging costs a random load, so a filter answers first, and what
//! it cannot tell goes to a hash table.

use crate::request::{Op, Request};
use crate::steps::step;

/// Slots per request. At a quarter full a probe seldom meets another entry.
const SLOTS_PER_REQUEST: usize = 4;

/// Words of the filter per request: two bits for each of them in one word, and 128 to have them in, so
/// that the filter is wrong about an end once in more than a thousand times.
const WORDS_PER_REQUEST: usize = 2;

/// Most words of the filter: 4 KiB. A batch beyond 256 requests has fewer per request, is passed on
/// the more often, and can bear it.
const FILTER_WORDS: usize = 512;

/// Longest probe. The hash is known, so a guest can aim all its offsets at one slot; past this the
/// answer is "perhaps", which costs the sort and no more.
const MAX_PROBES: usize = 8;

/// The beginnings of a batch's requests, as a filter and as an open-addressing hash table.
#[derive(Debug)]
pub(crate) struct TouchTable {
    /// A Bloom filter of the offsets, whatever their direction.
    filter: Box<[u64; FILTER_WORDS]>,
    /// Index of the request plus one; 0 is free. Power of two long.
    slots: Vec<u32>,
}

impl TouchTable {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            filter: Box::new([0; FILTER_WORDS]),
            slots: vec![0; (capacity * SLOTS_PER_REQUEST).next_power_of_two()],
        }
    }

    /// Whether a mergeable request of `requests` may begin where another mergeable one of the same
    /// direction ends. Never wrong when it says no. O(n).
    pub(crate) fn may_touch(&mut self, requests: &[Request]) -> bool {
        self.filter_may_touch(requests) && self.table_may_touch(requests)
    }

    fn filter_may_touch(&mut self, requests: &[Request]) -> bool {
        let len = (requests.len() * WORDS_PER_REQUEST)
            .next_power_of_two()
            .min(FILTER_WORDS);
        let filter = &mut *self.filter;
        filter[..len].fill(0);
        // The second mask spares the check of the bounds.
        let word = |hash| word(hash, len) & (FILTER_WORDS - 1);
        // One that cannot merge is taken in too, and an end that wraps is looked for: the table knows
        // better.
        for request in requests {
            step();
            let hash = hash(request.offset);
            filter[word(hash)] |= bits(hash);
        }
        requests.iter().any(|request| {
            step();
            let hash = hash(request.offset.wrapping_add(request.len));
            filter[word(hash)] & bits(hash) == bits(hash)
        })
    }

    fn table_may_touch(&mut self, requests: &[Request]) -> bool {
        // A small batch clears, and fits, a small part of the table.
        let len = (requests.len() * SLOTS_PER_REQUEST)
            .next_power_of_two()
            .min(self.slots.len());
        self.slots[..len].fill(0);
        for (index, request) in requests.iter().enumerate() {
            if request.mergeable_end().is_some()
                && !self.insert(len, requests, index, request.op, request.offset)
            {
                return true;
            }
        }
        requests.iter().any(|request| {
            request
                .mergeable_end()
                .is_some_and(|end| self.find(len, requests, request.op, end))
        })
    }

    /// `false` if there was no room near its slot.
    fn insert(
        &mut self,
        len: usize,
        requests: &[Request],
        index: usize,
        op: Op,
        offset: u64,
    ) -> bool {
        for slot in probes(len, op, offset) {
            match self.slots[slot] {
                0 => {
                    // The merger's capacity fits u32 with room for the one.
                    self.slots[slot] = u32::try_from(index + 1).unwrap_or(u32::MAX);
                    return true;
                }
                taken if begins(requests, taken, op, offset) => return true,
                _ => {}
            }
        }
        false
    }

    /// Exact: an entry is never more than [`MAX_PROBES`] from its slot, and none is removed.
    fn find(&self, len: usize, requests: &[Request], op: Op, offset: u64) -> bool {
        for slot in probes(len, op, offset) {
            match self.slots[slot] {
                0 => return false,
                taken if begins(requests, taken, op, offset) => return true,
                _ => {}
            }
        }
        false
    }
}

fn begins(requests: &[Request], slot: u32, op: Op, offset: u64) -> bool {
    requests
        .get(slot as usize - 1)
        .is_some_and(|request| request.offset == offset && request.op == op)
}

fn probes(len: usize, op: Op, offset: u64) -> impl Iterator<Item = usize> {
    let start = word(hash(offset ^ u64::from(op == Op::Write)), len);
    (0..MAX_PROBES).map(move |probe| {
        step();
        (start + probe) & (len - 1)
    })
}

/// Fibonacci hashing: the high bits of the product depend on all bits of the offset, of which the
/// low nine are zero as a rule.
#[inline]
fn hash(offset: u64) -> u64 {
    const GOLDEN_RATIO: u64 = 0x9e37_79b9_7f4a_7c15;
    offset.wrapping_mul(GOLDEN_RATIO)
}

/// The hash's place among `len`, a power of two of at most 2^18.
#[inline]
fn word(hash: u64, len: usize) -> usize {
    // 32 bits.
    (hash >> 32) as usize & (len - 1)
}

/// Two bits out of 64, by the hash's 12 highest: [`word`] takes its bits, of the filter at most 11,
/// from the other end of the same half.
#[inline]
fn bits(hash: u64) -> u64 {
    1 << (hash >> 58) | 1 << (hash >> 52 & 63)
}

/// Whether a read of a batch of `requests` at `offset` has the first slot of the table and the first
/// word of the filter.
#[cfg(test)]
pub(crate) fn aims_at_the_first_slot(requests: usize, offset: u64) -> bool {
    // The filter's place is the low bits of the table's.
    let slots = (requests * SLOTS_PER_REQUEST).next_power_of_two();
    word(hash(offset), slots) == 0 && probes(slots, Op::Read, offset).next() == Some(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(op: Op, offset: u64, len: u64) -> Request {
        Request {
            op,
            offset,
            len,
            segments: 1,
            tag: 0,
        }
    }

    fn writes(offsets: impl IntoIterator<Item = u64>) -> Vec<Request> {
        offsets
            .into_iter()
            .map(|offset| request(Op::Write, offset, 512))
            .collect()
    }

    fn may_touch(requests: &[Request]) -> bool {
        TouchTable::new(requests.len()).may_touch(requests)
    }

    #[test]
    fn touching_requests_are_found_in_either_order() {
        assert!(may_touch(&writes([0, 9000, 512])));
        assert!(may_touch(&writes([512, 9000, 0])));
    }

    #[test]
    fn requests_with_gaps_between_them_save_the_sort() {
        let scattered = writes((0..1000).map(|index| (index * 7919 % 1000) * 1024));
        assert!(!may_touch(&scattered));
    }

    #[test]
    fn the_same_block_over_and_over_saves_the_sort() {
        assert!(!may_touch(&writes([4096; 1000])));
    }

    #[test]
    fn opposite_directions_save_the_sort() {
        assert!(!may_touch(&[
            request(Op::Read, 0, 512),
            request(Op::Write, 512, 512)
        ]));
        // A write that begins there as well hides no read.
        let both = [
            request(Op::Write, 512, 512),
            request(Op::Read, 0, 512),
            request(Op::Read, 512, 512),
        ];
        assert!(may_touch(&both));
    }

    #[test]
    fn requests_that_can_not_merge_are_not_looked_at() {
        let requests = [
            request(Op::Write, 0, 512),
            request(Op::Write, 512, 0),
            request(Op::Barrier, 512, 512),
            request(Op::Write, u64::MAX, 512),
        ];
        assert!(!may_touch(&requests));
    }

    #[test]
    fn a_batch_sees_nothing_of_the_one_before() {
        let mut table = TouchTable::new(4);
        assert!(!table.may_touch(&writes([512, 5120])));
        assert!(!table.may_touch(&writes([0, 9216])));
    }

    #[test]
    fn the_filter_alone_passes_most_random_batches() {
        let mut random = 1u64;
        let mut next = || {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (random >> 33) * 4096
        };
        let mut table = TouchTable::new(32);
        let passed = (0..1000)
            .filter(|_| {
                let batch: Vec<_> = (0..32).map(|_| request(Op::Read, next(), 4096)).collect();
                !table.filter_may_touch(&batch)
            })
            .count();
        assert!(passed > 950, "{passed}");
    }

    #[test]
    fn offsets_aimed_at_one_slot_give_up_after_a_few_probes() {
        // More than fit within reach of the slot, none of them touching another.
        let len = (64 * SLOTS_PER_REQUEST).next_power_of_two();
        let target = probes(len, Op::Write, 0).next();
        let aimed: Vec<u64> = (0..)
            .map(|sector| sector * 1024)
            .filter(|&offset| probes(len, Op::Write, offset).next() == target)
            .take(64)
            .collect();
        let table =
            |requests: &[Request]| TouchTable::new(requests.len()).table_may_touch(requests);
        assert!(!table(&writes(aimed[..MAX_PROBES].iter().copied())));
        assert!(table(&writes(aimed)), "perhaps");
    }
}
