//! The device a guest sees: what backs it, its features, its configuration space.

mod options;
mod topology;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

pub use self::options::{DeviceError, DeviceOptions};
use self::topology::topology;
pub use event_poll::{DEFAULT_POLL_MAX, POLL_MAX_LIMIT};
use ioq::{Engine, Fallback};
use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_config::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vring::QueueSize;

use crate::SECTOR_SIZE;
use crate::capacity::{Capacity, ConfigSubscription};
use crate::config_space::{ConfigFields, ConfigSpace, Topology};
use crate::counters::{CounterSnapshot, QueueSnapshot};
use crate::image::{Caching, Discard, Image, ImageError, IoHints};
use crate::lifetime::Lifetime;
use crate::notifier::Notifier;
use crate::ranges::{
    DISCARD_SECTORS_MAX, RangeLimit, RangeLimits, SECURE_ERASE_SECTORS_MAX,
    WRITE_ZEROES_SECTORS_MAX,
};
use crate::request::{Geometry, ID_LEN, VIRTIO_BLK_F_LIFETIME};
use crate::tally::Tally;
use crate::write_back::WriteBack;

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

/// Largest discard alignment a guest is told: one that its largest discard is a multiple of.
const DISCARD_ALIGNMENT_MAX: u32 = 1 << 30;

const SECTOR_SIZE_U32: u32 = 512;
const _: () = assert!(SECTOR_SIZE_U32 as u64 == SECTOR_SIZE);

/// What stores the disk's content.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Backing {
    /// A file or block device.
    Image(Image),
    /// Nothing: writes vanish, reads give what `read_zeroes` says, all at once. Measures everything else.
    Null {
        /// Size in bytes, a multiple of 512.
        capacity: u64,
        /// Whether reads give zeroes. If not they leave the guest's memory as it is, and say so with a used
        /// length of 0.
        read_zeroes: bool,
    },
    /// A disk that a test writes.
    #[cfg(feature = "testing")]
    Testing(crate::testing::TestDisk),
}

impl Backing {
    /// A null device of `size` bytes, rounded down to whole sectors. Its reads leave the guest's memory as it
    /// is, as those of other backends' null devices do.
    #[must_use]
    pub fn null(size: u64) -> Self {
        Self::Null {
            capacity: size - size % SECTOR_SIZE,
            read_zeroes: false,
        }
    }

    /// A null device of `size` bytes, rounded down to whole sectors, whose reads give zeroes.
    #[must_use]
    pub fn null_zeroes(size: u64) -> Self {
        Self::Null {
            capacity: size - size % SECTOR_SIZE,
            read_zeroes: true,
        }
    }
}

/// Why the size could not be read anew; the old one stays in force.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResizeError {
    /// The host does not say. The host's fault.
    #[error(transparent)]
    Image(#[from] ImageError),
}

/// What reading the size anew has found, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resized {
    /// The capacity until now.
    pub old: u64,
    /// The capacity from now on.
    pub new: u64,
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
    block_size: u32,
    ranges: RangeLimits,
    lifetime: Option<Arc<Lifetime>>,
    merge: bool,
    latencies: bool,
    engine: Engine,
    /// Whether it has been said that another engine runs than was wanted.
    fallback_told: Arc<AtomicBool>,
    capacity: Arc<Capacity>,
    tally: Arc<Tally>,
    write_back: Arc<WriteBack>,
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
        let (size, needed) = match &backing {
            Backing::Image(image) => (image.capacity(), image.block_size()),
            Backing::Null { capacity, .. } => (*capacity, SECTOR_SIZE_U32),
            #[cfg(feature = "testing")]
            Backing::Testing(disk) => (disk.capacity(), SECTOR_SIZE_U32),
        };
        let block_size = options.block_size.unwrap_or(needed);
        if block_size < needed {
            return Err(DeviceError::BlockTooSmall {
                asked: block_size,
                needed,
            });
        }
        let ranges = range_limits(&backing, block_size, options.discard);
        let capacity = whole_blocks(size, block_size);
        if capacity == 0 {
            return Err(DeviceError::Empty);
        }
        let forgets = match &backing {
            Backing::Image(image) => matches!(image.caching(), Caching::Buffered(_)),
            Backing::Null { .. } => false,
            #[cfg(feature = "testing")]
            Backing::Testing(disk) => disk.is_buffered(),
        };
        let lifetime = match &backing {
            Backing::Image(image) => image.wear().cloned(),
            Backing::Null { .. } => None,
            #[cfg(feature = "testing")]
            Backing::Testing(_) => None,
        };
        Ok(Self {
            backing,
            serial,
            num_queues: options.num_queues,
            max_queue_size,
            poll_max: options.poll_max,
            queue_threads: options.threads.of_queues(options.num_queues),
            num_threads: options.threads.count(options.num_queues),
            cpus: options.threads.cpus.as_slice().into(),
            block_size,
            ranges,
            lifetime: lifetime.map(|files| Arc::new(Lifetime::new(files))),
            merge: options.merge,
            latencies: options.latencies,
            engine: options.engine,
            fallback_told: Arc::default(),
            capacity: Arc::new(Capacity::new(capacity)),
            tally: Arc::default(),
            write_back: Arc::new(WriteBack::new(forgets)),
        })
    }

    /// Feature bits offered (virtio 1.3 §5.2.3, §6). Each stands for something the device does.
    #[must_use]
    pub fn features(&self) -> u64 {
        let mut features = bit(VIRTIO_F_VERSION_1)
            | bit(VIRTIO_RING_F_INDIRECT_DESC)
            | bit(VIRTIO_RING_F_EVENT_IDX)
            | bit(VIRTIO_F_RING_PACKED)
            | bit(blk::VIRTIO_BLK_F_SEG_MAX)
            | bit(blk::VIRTIO_BLK_F_BLK_SIZE)
            | bit(blk::VIRTIO_BLK_F_TOPOLOGY)
            | bit(blk::VIRTIO_BLK_F_FLUSH)
            | bit(blk::VIRTIO_BLK_F_MQ);
        features |= if self.is_read_only() {
            bit(blk::VIRTIO_BLK_F_RO)
        } else {
            bit(blk::VIRTIO_BLK_F_CONFIG_WCE)
        };
        // Read-only devices have no limits, since they do none of these.
        for (limit, feature) in [
            (self.ranges.discard, blk::VIRTIO_BLK_F_DISCARD),
            (self.ranges.write_zeroes, blk::VIRTIO_BLK_F_WRITE_ZEROES),
            (self.ranges.secure_erase, blk::VIRTIO_BLK_F_SECURE_ERASE),
        ] {
            if limit.is_some() {
                features |= bit(feature);
            }
        }
        if self.lifetime.is_some() {
            features |= bit(VIRTIO_BLK_F_LIFETIME);
        }
        features
    }

    /// The configuration space as it is now, in a device with its write cache on. That of one that runs is
    /// [`DataPlane::config_space`](crate::DataPlane::config_space).
    #[must_use]
    pub fn config_space(&self) -> ConfigSpace {
        self.config_space_with(true)
    }

    pub(crate) fn config_space_with(&self, writeback: bool) -> ConfigSpace {
        let max_segments = u32::from(self.max_queue_size.get()).saturating_sub(2);
        ConfigSpace::new(&ConfigFields {
            capacity_sectors: self.capacity() / SECTOR_SIZE,
            seg_max: SEG_MAX.min(max_segments.max(1)),
            blk_size: self.block_size,
            topology: self.topology(),
            writeback,
            num_queues: self.num_queues,
            ranges: self.ranges,
        })
    }

    fn topology(&self) -> Topology {
        match &self.backing {
            Backing::Image(image) => topology(&image.io_hints(), self.block_size),
            Backing::Null { .. } => topology(&IoHints::NONE, self.block_size),
            #[cfg(feature = "testing")]
            Backing::Testing(_) => topology(&IoHints::NONE, self.block_size),
        }
    }

    /// Size in bytes, a multiple of [`block_size`](Self::block_size). Changes with [`resize`](Self::resize).
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity.get()
    }

    /// Logical block size in bytes.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Reads the size of the image anew, which may have grown or shrunk. What is popped from then on is
    /// checked against the new one; if it has changed, all who
    /// [want to know](Self::on_config_change) are told before this returns. Concerns every clone of the device
    /// and whatever runs it. From any thread.
    ///
    /// An image that is to shrink is best shrunk with the device paused: a write in flight beyond the new
    /// end makes a file grow again.
    ///
    /// # Errors
    /// See [`ResizeError`].
    pub fn resize(&self) -> Result<Resized, ResizeError> {
        self.capacity.set_from(|| match &self.backing {
            Backing::Image(image) => Ok(whole_blocks(image.current_size()?, self.block_size)),
            Backing::Null { capacity, .. } => Ok(whole_blocks(*capacity, self.block_size)),
            #[cfg(feature = "testing")]
            Backing::Testing(disk) => Ok(whole_blocks(disk.capacity(), self.block_size)),
        })
    }

    /// Has `notifier` called each time the configuration space has changed by itself, that is, by
    /// [`resize`](Self::resize), until the subscription is dropped. A VMM raises the device's
    /// configuration interrupt then (virtio 1.3 §5.2.5). It is called by whoever resizes, and must not
    /// resize itself.
    pub fn on_config_change(&self, notifier: Box<dyn Notifier>) -> ConfigSubscription {
        ConfigSubscription::new(&self.capacity, notifier)
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

    /// Whether neighbouring requests of a batch become one operation.
    #[must_use]
    pub fn merges(&self) -> bool {
        self.merge
    }

    /// What stores the content.
    #[must_use]
    pub fn backing(&self) -> &Backing {
        &self.backing
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        match &self.backing {
            Backing::Image(image) => image.is_read_only(),
            Backing::Null { .. } => false,
            #[cfg(feature = "testing")]
            Backing::Testing(_) => false,
        }
    }

    /// A reading of the counters of whatever runs this device or any clone of it, added to those of what has run
    /// it before. From any thread.
    #[must_use]
    pub fn counters(&self) -> CounterSnapshot {
        self.tally.counters()
    }

    /// The same of queue `index`; `None` if there is no such queue.
    #[must_use]
    pub fn queue_counters(&self, index: u16) -> Option<QueueSnapshot> {
        (index < self.num_queues).then(|| self.tally.queue(usize::from(index)))
    }

    pub(crate) fn engine(&self) -> Engine {
        self.engine
    }

    /// Says that `Engine::Auto` could not have its choice, once: each data thread finds it out again.
    pub(crate) fn tell_fallback(&self, fallback: &Fallback) {
        if !self.fallback_told.swap(true, Ordering::Relaxed) {
            tracing::warn!("{fallback}");
        }
    }

    pub(crate) fn tally(&self) -> &Tally {
        &self.tally
    }

    pub(crate) fn lifetime(&self) -> Option<&Arc<Lifetime>> {
        self.lifetime.as_ref()
    }

    pub(crate) fn write_back(&self) -> &Arc<WriteBack> {
        &self.write_back
    }

    pub(crate) fn latencies(&self) -> bool {
        self.latencies
    }

    pub(crate) fn serial(&self) -> &[u8; ID_LEN] {
        &self.serial
    }

    /// What the data threads check requests against: the capacity changes while they run.
    pub(crate) fn capacity_in_force(&self) -> Arc<Capacity> {
        Arc::clone(&self.capacity)
    }

    pub(crate) fn geometry(&self) -> Geometry {
        Geometry {
            capacity: self.capacity(),
            block_size: self.block_size,
            read_only: self.is_read_only(),
            ranges: self.ranges,
        }
    }
}

/// What a device does to ranges. `discard`: storage may be given back.
fn range_limits(backing: &Backing, block_size: u32, discard: bool) -> RangeLimits {
    let (host, erases) = match backing {
        Backing::Image(image) if image.is_read_only() => return RangeLimits::NONE,
        Backing::Image(image) => (image.discard(), image.can_erase_securely()),
        // What stores nothing leaves no copies either.
        Backing::Null { .. } => (Some(Discard::anything(block_size)), true),
        #[cfg(feature = "testing")]
        Backing::Testing(_) => (Some(Discard::anything(block_size)), false),
    };
    let host = host.filter(|_| discard);
    let alignment = host.map_or(block_size, |host| alignment(host.granularity, block_size));
    RangeLimits {
        discard: host.map(|host| RangeLimit {
            max_sectors: whole_units(DISCARD_SECTORS_MAX, host.max_bytes, alignment),
            alignment: alignment / SECTOR_SIZE_U32,
        }),
        // Where the host has no better way, zeroes are written, so it sets no limit.
        write_zeroes: Some(RangeLimit {
            max_sectors: WRITE_ZEROES_SECTORS_MAX,
            alignment: block_size / SECTOR_SIZE_U32,
        }),
        may_unmap: host.is_some(),
        // It gives storage back too. The kernel cuts what is too much for the device at once.
        secure_erase: (erases && discard).then(|| RangeLimit {
            max_sectors: whole_units(SECURE_ERASE_SECTORS_MAX, u64::MAX, alignment),
            alignment: alignment / SECTOR_SIZE_U32,
        }),
    }
}

/// The alignment that a guest is told, in bytes: whole blocks. Odd ones (some arrays have them) are a matter of
/// efficiency only.
fn alignment(granularity: u32, block_size: u32) -> u32 {
    let bytes = granularity.min(DISCARD_ALIGNMENT_MAX).max(block_size);
    bytes - bytes % block_size
}

/// `sectors`, or what the host takes at a time if that is less: in whole units of `alignment` bytes, at least
/// one, since 0 says that there is nothing to be had (and crashes drivers).
fn whole_units(sectors: u32, max_bytes: u64, alignment: u32) -> u32 {
    let unit = alignment / SECTOR_SIZE_U32;
    let sectors = u32::try_from(max_bytes / SECTOR_SIZE).map_or(sectors, |host| host.min(sectors));
    (sectors - sectors % unit).max(unit)
}

/// `size` without an odd tail (hostile-inputs I8).
fn whole_blocks(size: u64, block_size: u32) -> u64 {
    size - size % u64::from(block_size)
}

/// The mask of a feature bit number.
pub(crate) const fn bit(number: u32) -> u64 {
    1 << number
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_limit_of_a_discard_is_told_in_whole_units_and_never_as_zero() {
        const MAX: u32 = DISCARD_SECTORS_MAX;
        for (max_bytes, granularity, block_size, told) in [
            (u64::MAX, 4096, 512, (MAX, 8)),
            (1 << 20, 4096, 512, (2048, 8)),
            ((1 << 20) + 512, 4096, 512, (2048, 8)),
            // As arrays have them, or nonsense.
            (1 << 20, 1000, 512, (2048, 1)),
            (1 << 20, 1, 4096, (2048, 8)),
            (512, 4096, 4096, (8, 8)),
            (1, 1, 512, (1, 1)),
            (u64::MAX, u32::MAX, 512, (MAX, 1 << 21)),
            (1 << 40, 3 << 20, 4096, (MAX - MAX % (3 << 11), 3 << 11)),
        ] {
            let alignment = alignment(granularity, block_size);
            let sectors = whole_units(MAX, max_bytes, alignment);
            let case = format!("{max_bytes} {granularity} {block_size}");
            assert_eq!((sectors, alignment / 512), told, "{case}");
        }
    }
}
