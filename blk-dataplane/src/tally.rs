//! The counters of a device over all data planes that run it, one after another or at the same time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::counters::{CounterSnapshot, Counters, QueueCounters, QueueSnapshot};

/// What is being counted now, and the sums of what has ended. Touched when a data thread starts or ends and
/// when somebody asks, never for a request.
#[derive(Debug, Default)]
pub(crate) struct Tally(Mutex<Sums>);

#[derive(Debug, Default)]
struct Sums {
    ended: CounterSnapshot,
    /// By queue; as long as any data plane's.
    ended_queues: Vec<QueueSnapshot>,
    threads: Vec<Arc<Counters>>,
    queues: Vec<Arc<[QueueCounters]>>,
}

impl Tally {
    fn sums(&self) -> MutexGuard<'_, Sums> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add_thread(&self, counters: &Arc<Counters>) {
        self.sums().threads.push(Arc::clone(counters));
    }

    pub(crate) fn add_queues(&self, counters: &Arc<[QueueCounters]>) {
        self.sums().queues.push(Arc::clone(counters));
    }

    /// Of a thread that has ended.
    pub(crate) fn end_thread(&self, counters: &Arc<Counters>) {
        let mut sums = self.sums();
        let before = sums.threads.len();
        sums.threads.retain(|other| !Arc::ptr_eq(other, counters));
        if sums.threads.len() < before {
            sums.ended = sums.ended.plus(&counters.snapshot());
        }
    }

    /// Of queues whose threads have ended.
    pub(crate) fn end_queues(&self, counters: &Arc<[QueueCounters]>) {
        let mut sums = self.sums();
        let before = sums.queues.len();
        sums.queues.retain(|other| !Arc::ptr_eq(other, counters));
        if sums.queues.len() == before {
            return;
        }
        if sums.ended_queues.len() < counters.len() {
            sums.ended_queues
                .resize(counters.len(), QueueSnapshot::default());
        }
        for (sum, queue) in sums.ended_queues.iter_mut().zip(counters.iter()) {
            *sum = sum.plus(&queue.snapshot());
        }
    }

    pub(crate) fn counters(&self) -> CounterSnapshot {
        let sums = self.sums();
        let running = sums.threads.iter();
        running.fold(sums.ended, |sum, thread| sum.plus(&thread.snapshot()))
    }

    pub(crate) fn queue(&self, index: usize) -> QueueSnapshot {
        let sums = self.sums();
        let ended = sums.ended_queues.get(index).copied().unwrap_or_default();
        let running = sums.queues.iter().filter_map(|queues| queues.get(index));
        running.fold(ended, |sum, queue| sum.plus(&queue.snapshot()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_lost_or_counted_twice_when_a_thread_or_queue_ends() {
        let tally = Tally::default();
        let threads = [(); 2].map(|()| Arc::new(Counters::default()));
        let queues: [Arc<[QueueCounters]>; 2] =
            [1usize, 3].map(|count| (0..count).map(|_| QueueCounters::default()).collect());
        for (number, (thread, queues)) in threads.iter().zip(&queues).enumerate() {
            tally.add_thread(thread);
            tally.add_queues(queues);
            thread.requests.add(10 + number as u64);
            queues[0].requests.reads.add(5 + number as u64);
            queues[0].took(crate::counters::RequestKind::Read, 100);
        }
        queues[1][2].requests.writes.add(1);
        let read = || {
            let first = tally.queue(0);
            (
                tally.counters().requests,
                first.requests.reads,
                first.read_latency.count(),
                tally.queue(2).requests.writes,
                tally.queue(3).requests.writes,
            )
        };
        let expected = (21, 11, 2, 1, 0);
        assert_eq!(read(), expected);
        for (thread, queues) in threads.iter().zip(&queues) {
            // Twice: as after a stop that failed.
            for _ in 0..2 {
                tally.end_thread(thread);
                tally.end_queues(queues);
                assert_eq!(read(), expected);
            }
        }
        threads[0].requests.add(1);
        assert_eq!(read(), expected, "ended");
    }
}
