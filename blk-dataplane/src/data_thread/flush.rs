//! Which writes a flush waits for.
//!
//! A flush completes only after every write popped before it is on stable storage (design.md; more
//! than virtio 1.3 §5.2.6.2 asks, which covers only writes completed before it). So the device
//! issues no `fdatasync` before those writes have completed.
//!
//! Flushes cut the stream of writes into epochs. A write belongs to the epoch open when it was
//! popped; a flush closes that epoch and is ready once it is the oldest and its epoch has no write
//! left. No flush waits for a write that came after it.

use std::collections::VecDeque;

/// The epoch a write belongs to; given back when the write completes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Epoch(u64);

/// A flush that waits, and the writes of the epoch it closed.
#[derive(Debug)]
struct Waiting<T> {
    flush: T,
    writes: usize,
}

/// Orders flushes behind the writes popped before them. `T` names a flush.
#[derive(Debug)]
pub(super) struct FlushTracker<T> {
    waiting: VecDeque<Waiting<T>>,
    /// Number of the epoch that the oldest waiting flush closed.
    first: u64,
    /// Writes in flight in the open epoch.
    open_writes: usize,
}

impl<T> FlushTracker<T> {
    /// A tracker that never allocates while at most `capacity` flushes wait.
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self {
            waiting: VecDeque::with_capacity(capacity),
            first: 0,
            open_writes: 0,
        }
    }

    /// Counts a write in.
    pub(super) fn write_started(&mut self) -> Epoch {
        self.open_writes += 1;
        Epoch(self.first + self.waiting.len() as u64)
    }

    /// Counts it out: it has completed, well or not.
    pub(super) fn write_finished(&mut self, Epoch(epoch): Epoch) {
        debug_assert!(
            epoch >= self.first,
            "an epoch with writes in flight was retired"
        );
        let index = usize::try_from(epoch - self.first).unwrap_or(usize::MAX);
        let writes = match self.waiting.get_mut(index) {
            Some(waiting) => &mut waiting.writes,
            None => &mut self.open_writes,
        };
        debug_assert!(*writes > 0, "more writes finished than started");
        *writes -= 1;
    }

    /// Puts a flush behind every write counted in so far.
    pub(super) fn push(&mut self, flush: T) {
        let writes = std::mem::take(&mut self.open_writes);
        self.waiting.push_back(Waiting { flush, writes });
    }

    /// The oldest flush, once nothing it waits for is in flight.
    pub(super) fn pop_ready(&mut self) -> Option<T> {
        let ready = self.waiting.pop_front_if(|oldest| oldest.writes == 0)?;
        self.first += 1;
        Some(ready.flush)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn b29_flush_waits_for_writes_before_it_and_not_for_those_after() {
        let mut tracker = FlushTracker::with_capacity(4);
        let before = tracker.write_started();
        tracker.push('f');
        let after = tracker.write_started();
        assert_eq!(tracker.pop_ready(), None);
        tracker.write_finished(before);
        assert_eq!(tracker.pop_ready(), Some('f'));
        tracker.write_finished(after);
        tracker.push('g');
        assert_eq!(tracker.pop_ready(), Some('g'));
    }

    proptest! {
        /// Against the definition: a flush may go when every write started before it has finished
        /// and every earlier flush has gone.
        #[test]
        fn flush_order_matches_the_definition(steps in prop::collection::vec(0u8..3, 1..200)) {
            let mut tracker = FlushTracker::with_capacity(steps.len());
            let mut writes: Vec<(usize, Epoch)> = Vec::new();
            let mut flushes: VecDeque<usize> = VecDeque::new();
            for (time, step) in steps.iter().enumerate() {
                match step {
                    0 => writes.push((time, tracker.write_started())),
                    1 => {
                        tracker.push(time);
                        flushes.push_back(time);
                    }
                    _ if writes.is_empty() => {}
                    // Any write may finish next; pick one that is neither first nor last for long.
                    _ => {
                        let (_, epoch) = writes.swap_remove(time % writes.len());
                        tracker.write_finished(epoch);
                    }
                }
                while let Some(flush) = tracker.pop_ready() {
                    prop_assert_eq!(Some(flush), flushes.pop_front());
                    prop_assert!(writes.iter().all(|&(started, _)| started > flush));
                }
                if let Some(&oldest) = flushes.front() {
                    prop_assert!(writes.iter().any(|&(started, _)| started < oldest));
                }
            }
        }
    }
}
