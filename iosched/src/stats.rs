//! What the merger has done, in numbers.

use std::ops::RangeInclusive;

use crate::merger::MAX_CAPACITY;
use crate::request::Op;

/// Buckets of the histogram: one for each power of two up to the largest batch.
const BUCKETS: usize = MAX_CAPACITY.ilog2() as usize + 1;

/// Counters since the merger was made. They stop at their maximum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Batches unplugged, empty ones not counted.
    pub batches: u64,
    /// Requests that went in.
    pub requests_in: u64,
    /// Merged requests that came out: `requests_in - requests_out` submissions were saved.
    pub requests_out: u64,
    /// Bytes of the reads and writes.
    pub bytes: u64,
    /// Parts of the largest merged request so far.
    pub largest_merge: u64,
    merge_sizes: [u64; BUCKETS],
}

impl Stats {
    /// Histogram of the merged requests by their number of parts: 1, 2 to 3, 4 to 7, and so on, with
    /// how many had that many. Buckets above [`largest_merge`](Self::largest_merge) are left out,
    /// empty ones below are not.
    ///
    /// # Example
    ///
    /// ```
    /// use iosched::{Limits, Merger, Op, Request};
    ///
    /// let mut merger = Merger::new(8, Limits { max_segments: 8, max_bytes: 1 << 20 });
    /// for (tag, sector) in [(0, 0), (1, 8), (2, 16), (3, 100)] {
    ///     let request =
    ///         Request { op: Op::Read, offset: sector * 512, len: 4096, segments: 1, tag };
    ///     merger.plug(request).unwrap();
    /// }
    /// merger.unplug(|_| ());
    /// let sizes: Vec<_> = merger.stats().merge_sizes().collect();
    /// assert_eq!(sizes, [(1..=1, 1), (2..=3, 1)]);
    /// ```
    pub fn merge_sizes(&self) -> impl ExactSizeIterator<Item = (RangeInclusive<u64>, u64)> {
        let used = match self.largest_merge {
            0 => 0,
            largest => bucket(largest) + 1,
        };
        self.merge_sizes[..used]
            .iter()
            .enumerate()
            .map(|(index, &count)| ((1 << index)..=((2 << index) - 1), count))
    }

    pub(crate) fn count_batch(&mut self, requests: usize) {
        add(&mut self.batches, 1);
        add(&mut self.requests_in, requests as u64);
    }

    /// Counts one merged request.
    pub(crate) fn count_merged(&mut self, op: Op, len: u64, parts: usize) {
        let parts = parts as u64;
        add(&mut self.requests_out, 1);
        self.largest_merge = self.largest_merge.max(parts);
        add(&mut self.merge_sizes[bucket(parts)], 1);
        if op.moves_data() {
            add(&mut self.bytes, len);
        }
    }

    /// Counts requests that come out as they came in, at least one, and the bytes they move.
    pub(crate) fn count_alone(&mut self, requests: usize, bytes: u64) {
        let requests = requests as u64;
        add(&mut self.requests_out, requests);
        self.largest_merge = self.largest_merge.max(1);
        add(&mut self.merge_sizes[0], requests);
        add(&mut self.bytes, bytes);
    }
}

fn add(counter: &mut u64, more: u64) {
    *counter = counter.saturating_add(more);
}

/// A merged request has at least one part and at most a whole batch.
fn bucket(parts: u64) -> usize {
    (parts.max(1).ilog2() as usize).min(BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_is_in_the_bucket_that_says_so() {
        for parts in [1, 2, 3, 4, 7, 8, 126, 1024, MAX_CAPACITY] {
            let mut stats = Stats::default();
            stats.count_merged(Op::Read, 512, parts);
            let (range, count) = stats.merge_sizes().last().unwrap();
            assert_eq!(count, 1);
            assert!(range.contains(&(parts as u64)), "{parts} in {range:?}");
            assert_eq!(stats.merge_sizes().map(|(_, count)| count).sum::<u64>(), 1);
        }
    }

    #[test]
    fn buckets_follow_one_another_without_a_gap() {
        let stats = Stats {
            largest_merge: MAX_CAPACITY as u64,
            ..Stats::default()
        };
        let mut next = 1;
        for (range, _) in stats.merge_sizes() {
            assert_eq!(*range.start(), next);
            next = range.end() + 1;
        }
        assert!(next > MAX_CAPACITY as u64);
        assert_eq!(Stats::default().merge_sizes().len(), 0);
    }

    #[test]
    fn counters_stop_at_their_maximum() {
        let mut stats = Stats {
            requests_out: u64::MAX,
            bytes: u64::MAX - 1,
            ..Stats::default()
        };
        stats.count_merged(Op::Write, 512, 1);
        assert_eq!((stats.requests_out, stats.bytes), (u64::MAX, u64::MAX));
    }
}
