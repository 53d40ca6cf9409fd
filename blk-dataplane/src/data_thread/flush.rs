//! Which writes a flush waits for.
//!
//! A flush completes only after every write popped before it is on stable storage (design.md; more
//! than virtio 1.3 §5.2.6.2 asks, which covers only writes completed before it). So the device
//! issues no `fdatasync` before those writes have completed.
//!
//! Marks cut the stream of writes into epochs. A write belongs to the epoch open when it was popped; a
//! mark closes that epoch and is reached once it is the oldest and its epoch has no write left. No mark
//! waits for a write that came after it. A flush is a mark, and so is another thread's question whether
//! the writes popped here have completed (see `peers.rs`): it waits for writes only and never for a
//! flush, so that two threads that ask each other both get their answer.
//!
//! A flush whose mark is reached then waits for the answers of the other threads. They are asked in
//! rounds, one at a time: what is flushed while a round is under way goes with the next one.

use std::collections::VecDeque;

use super::peers::{MAX_THREADS, Peer, Seat, Wake, lowest};

/// The epoch a write belongs to; given back when the write completes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Epoch(u64);

/// A mark that waits, and the writes of the epoch it closed.
#[derive(Debug)]
struct Waiting<T> {
    mark: T,
    writes: usize,
}

/// Orders marks behind the writes popped before them. `T` names a mark.
#[derive(Debug)]
pub(super) struct FlushTracker<T> {
    waiting: VecDeque<Waiting<T>>,
    /// Number of the epoch that the oldest waiting mark closed.
    first: u64,
    /// Writes in flight in the open epoch.
    open_writes: usize,
    /// And in all epochs.
    writes: usize,
}

impl<T> FlushTracker<T> {
    /// A tracker that never allocates while at most `capacity` marks wait.
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self {
            waiting: VecDeque::with_capacity(capacity),
            first: 0,
            open_writes: 0,
            writes: 0,
        }
    }

    /// Counts a write in.
    pub(super) fn write_started(&mut self) -> Epoch {
        self.open_writes += 1;
        self.writes += 1;
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
        self.writes -= 1;
    }

    /// Writes counted in and not out.
    pub(super) fn writes(&self) -> usize {
        self.writes
    }

    /// Puts a mark behind every write counted in so far.
    pub(super) fn push(&mut self, mark: T) {
        let writes = std::mem::take(&mut self.open_writes);
        self.waiting.push_back(Waiting { mark, writes });
    }

    /// The oldest mark, once nothing it waits for is in flight.
    pub(super) fn pop_reached(&mut self) -> Option<T> {
        let reached = self.waiting.pop_front_if(|oldest| oldest.writes == 0)?;
        self.first += 1;
        Some(reached.mark)
    }
}

/// What a mark in the stream of writes is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark<T> {
    /// A flush of this thread's.
    Flush(RoundOf<T>),
    /// A peer's question.
    Asked(Peer),
}

/// A flush, and the round of questions it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RoundOf<T> {
    flush: T,
    round: u64,
}

/// The flushes of a thread, from pop to the fdatasync behind all writes of all threads popped before.
#[derive(Debug)]
pub(super) struct Flushes<T> {
    tracker: FlushTracker<Mark<T>>,
    /// Whose own writes have completed, oldest first.
    settled: VecDeque<RoundOf<T>>,
    /// The round under way, or else the last one.
    round: u64,
    /// Peers that have not answered in it.
    waiting_for: u64,
    /// A flush has come that needs a round after it.
    round_needed: bool,
}

impl<T: Copy> Flushes<T> {
    /// Never allocates while at most `capacity` flushes wait.
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self {
            // Each peer asks once at a time.
            tracker: FlushTracker::with_capacity(capacity + MAX_THREADS),
            settled: VecDeque::with_capacity(capacity),
            round: 0,
            waiting_for: 0,
            round_needed: false,
        }
    }

    /// See [`FlushTracker::write_started`].
    pub(super) fn write_started(&mut self) -> Epoch {
        self.tracker.write_started()
    }

    /// See [`FlushTracker::write_finished`].
    pub(super) fn write_finished(&mut self, epoch: Epoch) {
        self.tracker.write_finished(epoch);
    }

    /// Puts a flush behind every write counted in so far, here and on the other threads.
    pub(super) fn push(&mut self, flush: T) {
        self.round_needed = true;
        let round = self.round + 1;
        self.tracker.push(Mark::Flush(RoundOf { flush, round }));
    }

    /// Deals with the other threads: once per pass, after the batch was popped.
    pub(super) fn confer<W: Wake>(&mut self, seat: &mut Seat<W>) {
        seat.note_writing(self.tracker.writes() > 0);
        let mut asked = seat.take_asked();
        while asked != 0 {
            self.tracker.push(Mark::Asked(lowest(asked)));
            asked &= asked - 1;
        }
        self.waiting_for &= !seat.take_answered();
        if self.round_needed && self.waiting_for == 0 {
            self.round_needed = false;
            self.round += 1;
            self.waiting_for = seat.ask();
        }
        while let Some(mark) = self.tracker.pop_reached() {
            match mark {
                Mark::Flush(flush) => self.settled.push_back(flush),
                Mark::Asked(peer) => seat.answer(peer),
            }
        }
    }

    /// The oldest flush, once nothing it waits for is in flight anywhere.
    pub(super) fn pop_ready(&mut self) -> Option<T> {
        let answered = self.round - u64::from(self.waiting_for != 0);
        let ready = self
            .settled
            .pop_front_if(|oldest| oldest.round <= answered)?;
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
        assert_eq!(tracker.pop_reached(), None);
        tracker.write_finished(before);
        assert_eq!(tracker.pop_reached(), Some('f'));
        tracker.write_finished(after);
        tracker.push('g');
        assert_eq!(tracker.pop_reached(), Some('g'));
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
                while let Some(flush) = tracker.pop_reached() {
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
