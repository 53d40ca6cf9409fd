//! The device a guest sees: what backs it, its features, its configuration space.

use std::sync::Arc;
use std::time::Duration;

pub use event_poll::{DEFAULT_POLL_MAX, POLL_MAX_LIMIT};
use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vring::QueueSize;

use crate::SECTOR_SIZE;
use crate::config_space::{ConfigFields, ConfigSpace};
use crate::image::Image;
use crate::request::{Geometry, ID_LEN};
use crate::threads::{CPUS_MAX, MAX_THREADS, ThreadOptions};

/// Request queues offered unless the caller says otherwise. QEMU asks for one per vCPU and refuses
/// a backend with fewer; a queue that is never set up costs nothing.
pub const DEFAULT_NUM_QUEUES: u16 = 16;

/// Largest ring accepted unless the caller says otherwise: QEMU's own limit (`VIRTQUEUE_MAX_SIZE`).
pub const DEFAULT_QUEUE_SIZE: u16 = 1024;

/// Most queues one device takes; bounds what a control message can address.
pub const MAX_NUM_QUEUES: u16 = 256;

/// Data segments a request may have, told to the driver as `seg_max`. A ring of 128, the smallest
/// default among the front-ends (QEMU), holds this many besides header and status without indirect
/// descriptors; a larger figure makes a driver without them wait for room that never comes.
const SEG_MAX: u32 = 126;

/// What stores the disk's content.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Backing {
    /// A file or block device.
    Image(Image),
    /// Nothing: writes vanish, reads give zeroes, all at once. Measures everything else.
    Null {
        /// Size in bytes, a multiple of 512.
        capacity: u64,
    },
}

impl Backing {
    /// A null device of `size` bytes, rounded down to whole sectors.
    #[must_use]
    pub fn null(size: u64) -> Self {
        Self::Null {
            capacity: size - size % SECTOR_SIZE,
        }
    }
}

/// What the caller chooses about a device.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// Serial that `VIRTIO_BLK_T_GET_ID` returns: at most 20 bytes of UTF-8, zero padded.
    pub serial: String,
    /// Request queues offered, 1 to [`MAX_NUM_QUEUES`].
    pub num_queues: u16,
    /// Largest ring accepted, a power of two from 2 to 32768.
    pub queue_size: u16,
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
            threads: ThreadOptions::default(),
            poll_max: DEFAULT_POLL_MAX,
        }
    }
}

impl DeviceOptions {
    /// Checks the choices that need no image to be checked, before one is opened or made.
    /// [`Device::new`] does the same. Returns the ring size.
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
    /// A disk of no sectors.
    #[error("the device would be empty")]
    Empty,
}

/// A virtio-blk device, not yet running. Cheap to clone; each clone serves the same backing.
#[derive(Clone, Debug)]
pub struct Device {
    backing: Backing,
    serial: [u8; ID_LEN],
    num_queues: u16,
    max_queue_size: QueueSize,
    poll_max: Duration,
    /// Of each queue.
    queue_threads: Arc<[u16]>,
    num_threads: u16,
    cpus: Arc<[u16]>,
    config: ConfigSpace,
}

impl Device {
    /// Builds the device.
    ///
    /// # Errors
    /// See [`DeviceError`].
    pub fn new(backing: Backing, options: &DeviceOptions) -> Result<Self, DeviceError> {
        let max_queue_size = options.check()?;
        let mut serial = [0; ID_LEN];
        serial[..options.serial.len()].copy_from_slice(options.serial.as_bytes());
        let (capacity, blk_size) = match &backing {
            Backing::Image(image) => (image.capacity(), image.block_size()),
            Backing::Null { capacity } => (*capacity, 512),
        };
        if capacity < SECTOR_SIZE {
            return Err(DeviceError::Empty);
        }
        let config = ConfigSpace::new(&ConfigFields {
            capacity_sectors: capacity / SECTOR_SIZE,
            seg_max: SEG_MAX.min(u32::from(max_queue_size.get()).saturating_sub(2).max(1)),
            blk_size,
            num_queues: options.num_queues,
        });
        Ok(Self {
            backing,
            serial,
            num_queues: options.num_queues,
            max_queue_size,
            poll_max: options.poll_max,
            queue_threads: options.threads.of_queues(options.num_queues),
            num_threads: options.threads.count(options.num_queues),
            cpus: options.threads.cpus.as_slice().into(),
            config,
        })
    }

    /// Feature bits offered (virtio 1.3 §5.2.3, §6). Each stands for something the device does.
    #[must_use]
    pub fn features(&self) -> u64 {
        let mut features = bit(VIRTIO_F_VERSION_1)
            | bit(VIRTIO_RING_F_INDIRECT_DESC)
            | bit(VIRTIO_RING_F_EVENT_IDX)
            | bit(blk::VIRTIO_BLK_F_SEG_MAX)
            | bit(blk::VIRTIO_BLK_F_BLK_SIZE)
            | bit(blk::VIRTIO_BLK_F_FLUSH)
            | bit(blk::VIRTIO_BLK_F_MQ);
        if self.geometry().read_only {
            features |= bit(blk::VIRTIO_BLK_F_RO);
        }
        features
    }

    /// The configuration space.
    #[must_use]
    pub fn config_space(&self) -> &ConfigSpace {
        &self.config
    }

    /// Request queues offered.
    #[must_use]
    pub fn num_queues(&self) -> u16 {
        self.num_queues
    }

    /// Largest ring accepted.
    #[must_use]
    pub fn max_queue_size(&self) -> QueueSize {
        self.max_queue_size
    }

    /// Data threads. One that serves no running queue is not there, except the first.
    #[must_use]
    pub fn num_threads(&self) -> u16 {
        self.num_threads
    }

    /// The data thread that serves queue `index`; `None` if there is no such queue.
    #[must_use]
    pub fn thread_of(&self, index: u16) -> Option<u16> {
        self.queue_threads.get(usize::from(index)).copied()
    }

    /// The processor that data thread `thread` is bound to, if any.
    #[must_use]
    pub fn cpu_of(&self, thread: u16) -> Option<u16> {
        self.cpus.iter().cycle().nth(usize::from(thread)).copied()
    }

    /// Longest time a data thread looks for work before it sleeps.
    #[must_use]
    pub fn poll_max(&self) -> Duration {
        self.poll_max
    }

    /// What stores the content.
    #[must_use]
    pub fn backing(&self) -> &Backing {
        &self.backing
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.geometry().read_only
    }

    pub(crate) fn serial(&self) -> &[u8; ID_LEN] {
        &self.serial
    }

    pub(crate) fn geometry(&self) -> Geometry {
        match &self.backing {
            Backing::Image(image) => Geometry {
                capacity: image.capacity(),
                block_size: image.block_size(),
                read_only: image.is_read_only(),
            },
            Backing::Null { capacity } => Geometry {
                capacity: *capacity,
                block_size: 512,
                read_only: false,
            },
        }
    }
}

/// The mask of a feature bit number.
pub(crate) const fn bit(number: u32) -> u64 {
    1 << number
}
