//! What a queue's thread counts, at the cost of a few instructions a request.

use std::time::Instant;

use hdrhistogram::Histogram;

use super::ring::Kind;

/// Longest latency that is told apart, in nanoseconds: an hour.
const LATENCY_MAX: u64 = 3_600_000_000_000;
/// Digits of a latency that are kept.
const DIGITS: u8 = 3;

/// Time in nanoseconds since the load began, the same for all threads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock(Instant);

impl Clock {
    pub(super) fn start() -> Self {
        Self(Instant::now())
    }

    #[inline]
    pub(super) fn now(self) -> u64 {
        let elapsed = self.0.elapsed();
        elapsed.as_secs() * 1_000_000_000 + u64::from(elapsed.subsec_nanos())
    }
}

/// Requests of one kind.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    /// Requests that succeeded.
    pub(super) ios: u64,
    /// Requests that failed, or whose status is none.
    pub(super) errors: u64,
    /// How long those that succeeded took, in nanoseconds.
    pub(super) latencies: Histogram<u64>,
}

impl Tally {
    pub(super) fn new() -> Self {
        let latencies = Histogram::new_with_bounds(1, LATENCY_MAX, DIGITS);
        Self {
            ios: 0,
            errors: 0,
            // The bounds are constants that it takes.
            latencies: latencies.unwrap_or_else(|_| unreachable!("bounds are constants")),
        }
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.ios += other.ios;
        self.errors += other.errors;
        // Bounds are the same.
        let added = self.latencies.add(&other.latencies);
        debug_assert!(added.is_ok());
    }
}

/// Requests of all kinds.
#[derive(Clone, Debug)]
pub(super) struct Tallies {
    of: [Tally; 3],
    /// Completions of this harvest that began at the same time, which is most of them: one step of a histogram for
    /// all.
    run: Run,
}

#[derive(Clone, Copy, Debug, Default)]
struct Run {
    started: u64,
    counts: [u64; 3],
}

impl Tallies {
    pub(super) fn new() -> Self {
        Self {
            of: [(); 3].map(|()| Tally::new()),
            run: Run::default(),
        }
    }

    pub(super) fn of(&self, kind: Kind) -> &Tally {
        &self.of[kind.index()]
    }

    pub(super) fn clear(&mut self) {
        for tally in &mut self.of {
            tally.ios = 0;
            tally.errors = 0;
            tally.latencies.reset();
        }
    }

    /// A request that began at `started` has succeeded at `now`.
    #[inline]
    pub(super) fn success(&mut self, kind: Kind, started: u64, now: u64) {
        if self.run.started != started {
            self.settle(now);
            self.run.started = started;
        }
        self.run.counts[kind.index()] += 1;
    }

    #[cold]
    pub(super) fn error(&mut self, kind: Kind) {
        self.of[kind.index()].errors += 1;
    }

    /// What `success` has gathered; at the end of a harvest.
    #[inline]
    pub(super) fn settle(&mut self, now: u64) {
        let latency = now.saturating_sub(self.run.started).max(1);
        for (count, tally) in self.run.counts.iter_mut().zip(&mut self.of) {
            let count = std::mem::take(count);
            if count != 0 {
                tally.ios += count;
                tally.latencies.saturating_record_n(latency, count);
            }
        }
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (tally, other) in self.of.iter_mut().zip(&other.of) {
            tally.add(other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_latency_is_counted_once_whatever_came_between() {
        let mut tallies = Tallies::new();
        for (kind, started) in [
            (Kind::Read, 10),
            (Kind::Read, 10),
            (Kind::Write, 10),
            (Kind::Read, 30),
        ] {
            tallies.success(kind, started, 110);
        }
        tallies.settle(110);
        tallies.settle(500);
        tallies.success(Kind::Read, 400, 500);
        tallies.settle(500);
        tallies.error(Kind::Flush);
        let reads = tallies.of(Kind::Read);
        assert_eq!(reads.ios, 4);
        assert_eq!(reads.latencies.count_at(100), 3);
        assert_eq!(reads.latencies.count_at(80), 1);
        assert_eq!(tallies.of(Kind::Write).latencies.count_at(100), 1);
        assert_eq!(tallies.of(Kind::Flush).errors, 1);
        let mut sum = tallies.clone();
        sum.add(&tallies);
        assert_eq!(sum.of(Kind::Read).ios, 8);
        tallies.clear();
        assert_eq!(tallies.of(Kind::Read).latencies.len(), 0);
    }
}
