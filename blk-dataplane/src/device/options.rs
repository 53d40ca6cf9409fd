//! What the caller chooses about a device, and what cannot be chosen.

use std::time::Duration;

use ioq::Engine;
use vring::QueueSize;

use super::{
    DEFAULT_NUM_QUEUES, DEFAULT_POLL_MAX, DEFAULT_QUEUE_SIZE, MAX_NUM_QUEUES, POLL_MAX_LIMIT,
};
use crate::request::ID_LEN;
use crate::threads::{CPUS_MAX, MAX_THREADS, ThreadOptions};

/// Block sizes a guest may be told. Linux's drivers take none above the page size, and Windows none between.
const BLOCK_SIZES: [u32; 2] = [512, 4096];

/// What the caller chooses about a device.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// Serial that `VIRTIO_BLK_T_GET_ID` returns: at most 20 bytes of UTF-8, zero padded.
    pub serial: String,
    /// Request queues offered, 1 to [`MAX_NUM_QUEUES`].
    pub num_queues: u16,
    /// Largest ring accepted, a power of two from 2 to 32768.
    pub queue_size: u16,
    /// Logical block size the guest is told, 512 or 4096 and not below what the backing needs. `None`:
    /// what the backing needs.
    pub block_size: Option<u32>,
    /// What the image is read and written with. A null device has its own, whatever is asked for.
    ///
    /// Where another process takes over requests in flight when this one is killed, [`Engine::LinuxAio`] is the one to
    /// choose: the kernel ends its I/O before the process is gone, and io_uring's, which `Auto` may take, later.
    pub engine: Engine,
    /// Let the guest give storage back to the host, by discarding or by zeroing what it does not need, where
    /// the backing can take it. Off for an image that is to keep the space it was given.
    pub discard: bool,
    /// Join requests of a batch that are neighbours on the disk into one operation. Off to see what that gains.
    pub merge: bool,
    /// Measure how long requests take. Costs two readings of the clock per batch, some 25 ns each where the
    /// processor's own is used.
    pub latencies: bool,
    /// Data threads, and which of them serves which queue.
    pub threads: ThreadOptions,
    /// Longest time a data thread looks for work before it sleeps, at most [`POLL_MAX_LIMIT`]; zero:
    /// it sleeps at once. Within that limit it learns what pays, up to not looking at all: an idle device
    /// and one with a paced load use no more of the processor.
    pub poll_max: Duration,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            serial: String::new(),
            num_queues: DEFAULT_NUM_QUEUES,
            queue_size: DEFAULT_QUEUE_SIZE,
            block_size: None,
            engine: Engine::Auto,
            discard: true,
            merge: true,
            latencies: true,
            threads: ThreadOptions::default(),
            poll_max: DEFAULT_POLL_MAX,
        }
    }
}

impl DeviceOptions {
    /// Checks the choices that need no image to be checked, before one is opened or made.
    /// [`Device::new`](super::Device::new) does the same. Returns the ring size.
    ///
    /// # Errors
    /// See [`DeviceError`].
    pub fn check(&self) -> Result<QueueSize, DeviceError> {
        if self.serial.len() > ID_LEN {
            return Err(DeviceError::SerialTooLong {
                serial: self.serial.clone(),
            });
        }
        if self.num_queues == 0 || self.num_queues > MAX_NUM_QUEUES {
            return Err(DeviceError::NumQueues(self.num_queues));
        }
        if let Some(block_size) = self.block_size
            && !BLOCK_SIZES.contains(&block_size)
        {
            return Err(DeviceError::BlockSize(block_size));
        }
        if self.engine == Engine::Null {
            return Err(DeviceError::NullEngine);
        }
        self.threads.check(self.num_queues)?;
        if self.poll_max > POLL_MAX_LIMIT {
            return Err(DeviceError::PollMax(self.poll_max));
        }
        QueueSize::new(u32::from(self.queue_size))
            .ok()
            .filter(|size| size.get() >= 2)
            .ok_or(DeviceError::QueueSize(self.queue_size))
    }
}

/// A choice that no device can be built from. The caller's fault, all of them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The serial does not fit the 20 bytes that GET_ID has (virtio 1.3 §5.2.6).
    #[error("serial {serial:?} has {} bytes; at most {ID_LEN} fit", serial.len())]
    SerialTooLong {
        /// The serial asked for.
        serial: String,
    },
    /// No queue, or more than [`MAX_NUM_QUEUES`].
    #[error("{0} queues; 1 to {MAX_NUM_QUEUES} are possible")]
    NumQueues(u16),
    /// Not a power of two from 2 to 32768 (virtio 1.3 §2.7; a ring of 1 cannot hold header and status).
    #[error("queue size {0}; a power of two from 2 to 32768 is needed")]
    QueueSize(u16),
    /// Neither 512 nor 4096, the block sizes that drivers and their operating systems take.
    #[error("a block size of {0}; 512 and 4096 are possible")]
    BlockSize(u32),
    /// The null engine, which stores nothing: [`Backing::Null`](super::Backing::Null) is what it is for.
    #[error("the null engine keeps nothing of an image; make a null device instead")]
    NullEngine,
    /// The backing cannot be written in blocks as small as that without read-modify-write.
    #[error("a block size of {asked} on an image that needs {needed}")]
    BlockTooSmall {
        /// The block size asked for.
        asked: u32,
        /// The smallest that is possible here.
        needed: u32,
    },
    /// No thread, more than one per queue, or more than [`MAX_THREADS`].
    #[error(
        "{count} data threads; 1 to {MAX_THREADS} are possible, and at most one per queue ({num_queues})"
    )]
    Threads {
        /// Threads asked for.
        count: u16,
        /// Queues of the device.
        num_queues: u16,
    },
    /// A queue is given to a thread that there is not, or a thread is given to a queue that there is not.
    #[error("queue {queue} on thread {thread}, of {num_queues} queues and {threads} threads")]
    QueueThread {
        /// The queue.
        queue: usize,
        /// The thread it is given to.
        thread: u16,
        /// Queues of the device.
        num_queues: u16,
        /// Threads of the device.
        threads: u16,
    },
    /// A processor number that no Linux system has.
    #[error("CPU {0}; 0 to {last} are possible", last = CPUS_MAX - 1)]
    Cpu(u16),
    /// More than [`POLL_MAX_LIMIT`].
    #[error("polling for up to {0:?}; at most {POLL_MAX_LIMIT:?} are possible")]
    PollMax(Duration),
    /// A disk of no blocks.
    #[error("the device would be empty")]
    Empty,
}
