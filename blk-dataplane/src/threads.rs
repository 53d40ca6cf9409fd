//! Which data threads a device has, and which of its queues each serves.

use std::sync::Arc;

use crate::data_thread::peers;
use crate::device::DeviceError;

/// Most data threads one device takes.
#[expect(clippy::cast_possible_truncation, reason = "64")]
pub const MAX_THREADS: u16 = peers::MAX_THREADS as u16;

/// Processors that an affinity mask has room for (glibc's `CPU_SETSIZE`).
pub(crate) const CPUS_MAX: u16 = 1024;

/// Data threads, and which of them serves which queue.
///
/// Threads share nothing per request: each has rings, an I/O queue and buffers of its own. One is started
/// with the first queue that it serves.
///
/// ```
/// use blk_dataplane::{Backing, Device, DeviceOptions, ThreadOptions};
///
/// let threads = ThreadOptions {
///     count: Some(2),
///     queues: vec![0, 0, 1], // and then in turn
///     cpus: vec![2, 3],
/// };
/// let options = DeviceOptions { num_queues: 4, threads, ..DeviceOptions::default() };
/// let device = Device::new(Backing::null(1 << 30), &options)?;
/// assert_eq!((0..4).map(|queue| device.thread_of(queue).unwrap()).collect::<Vec<_>>(), [0, 0, 1, 1]);
/// assert_eq!(device.cpu_of(1), Some(3));
/// # Ok::<(), blk_dataplane::DeviceError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ThreadOptions {
    /// How many, 1 to [`MAX_THREADS`] and at most one per queue. `None`: one per processor that this
    /// process may use, within these limits.
    pub count: Option<u16>,
    /// The thread of each queue, counted from 0. Queues past its end are served in turn: queue *i* by
    /// thread *i* modulo the number of threads.
    pub queues: Vec<u16>,
    /// The processor that each thread is bound to; past its end from the beginning again. Empty: threads
    /// run where the host lets them.
    pub cpus: Vec<u16>,
}

impl ThreadOptions {
    pub(crate) fn check(&self, num_queues: u16) -> Result<(), DeviceError> {
        if let Some(count) = self.count
            && !(1..=MAX_THREADS.min(num_queues)).contains(&count)
        {
            return Err(DeviceError::Threads { count, num_queues });
        }
        let threads = self.count(num_queues);
        for (queue, &thread) in self.queues.iter().enumerate() {
            if thread >= threads || queue >= usize::from(num_queues) {
                return Err(DeviceError::QueueThread {
                    queue,
                    thread,
                    num_queues,
                    threads,
                });
            }
        }
        match self.cpus.iter().find(|&&cpu| cpu >= CPUS_MAX) {
            Some(&cpu) => Err(DeviceError::Cpu(cpu)),
            None => Ok(()),
        }
    }

    pub(crate) fn count(&self, num_queues: u16) -> u16 {
        self.count.unwrap_or_else(|| {
            let cpus = std::thread::available_parallelism()
                .map_or(1, |cpus| u16::try_from(cpus.get()).unwrap_or(u16::MAX));
            cpus.min(num_queues).min(MAX_THREADS)
        })
    }

    pub(crate) fn of_queues(&self, num_queues: u16) -> Arc<[u16]> {
        let count = self.count(num_queues);
        let chosen = self.queues.iter().copied();
        let in_turn = (0..num_queues).map(|queue| queue % count);
        let rest = in_turn.skip(self.queues.len());
        chosen.chain(rest).collect()
    }
}
