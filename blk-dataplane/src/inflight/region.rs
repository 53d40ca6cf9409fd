//! The shared buffer: made for a front-end to keep, and mapped when it hands it over.

use std::fs::File;
use std::io;
use std::sync::Arc;

use hostmem::{MapError, MemoryMap, RegionConfig};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vring::{QueueConfig, QueueSize};

use super::packed::{self, PackedTracker};
use super::split::{self, SplitTracker};
use super::words::Words;
use super::{Recovered, Tracker};
use crate::device::MAX_NUM_QUEUES;

/// Queue regions start on a cache line of their own: each is written by one data thread.
const QUEUE_ALIGNMENT: u64 = 64;

/// What the widest word of the layout must be aligned to.
const WORD_ALIGNMENT: u64 = 8;

/// Why a buffer for requests in flight was refused. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InflightError {
    /// The kernel gives no memory file. The host's fault.
    #[error("cannot make a buffer for requests in flight: {0}")]
    Create(#[source] io::Error),
    /// More queues than a device can have, or none. The front-end's fault.
    #[error("a buffer for {num_queues} queues; 1 to {max} are possible")]
    NumQueues {
        /// Queues asked for.
        num_queues: u16,
        /// Most a device has.
        max: u16,
    },
    /// The queue size is no power of two up to 32768. The front-end's fault.
    #[error("a buffer for queues of {queue_size} entries")]
    QueueSize {
        /// Entries asked for.
        queue_size: u16,
    },
    /// The buffer does not hold what its description says. The front-end's fault (CVE-2021-3839).
    #[error("a buffer of {size} bytes where {needed} are needed")]
    TooSmall {
        /// Bytes there are.
        size: u64,
        /// Bytes needed.
        needed: u64,
    },
    /// The buffer does not begin at a multiple of 8 in its file. The front-end's fault.
    #[error("a buffer at offset {offset:#x} of its file, no multiple of 8")]
    Misaligned {
        /// Where it begins.
        offset: u64,
    },
    /// The file cannot be mapped so: it is too short, or none that can be. The front-end's fault, or the
    /// host's.
    #[error("cannot map the buffer for requests in flight: {0}")]
    Map(#[from] MapError),
    /// The ring has more entries than the buffer has room for. The front-end's fault.
    #[error("a ring of {ring} entries and a buffer for {buffer}")]
    RingTooLarge {
        /// Entries of the ring.
        ring: u16,
        /// Entries there is room for.
        buffer: u16,
    },
    /// The buffer was written by a back-end that lays it out in another way. Starting all the same would
    /// lose what is in flight. The front-end's fault.
    #[error(
        "the buffer's layout has version {version}, and {entries} entries where {expected} were expected"
    )]
    Foreign {
        /// The version found; 1 is known.
        version: u16,
        /// The number of entries found.
        entries: u16,
        /// The number of entries of the description.
        expected: u16,
    },
    /// The ring gives chains back in order (`VIRTIO_F_IN_ORDER`), which is not recorded. The caller's fault.
    #[error("requests in flight cannot be recorded for a ring with IN_ORDER")]
    InOrder,
    /// The buffer's memory has gone since it was mapped. The front-end's fault.
    #[error("the buffer for requests in flight has been taken away")]
    Lost,
    /// The ring does not lie in guest memory. The guest's or front-end's fault.
    #[error("the ring is not in guest memory")]
    RingUnmapped,
}

/// A mapped buffer for the requests in flight of all queues of a device: the memory behind vhost-user's
/// `GET_INFLIGHT_FD` and `SET_INFLIGHT_FD`.
///
/// The buffer holds a queue region for each queue, one behind the other, each on a multiple of 64 bytes. How
/// long one is depends on the format of the ring; a buffer that [`create`](Self::create) makes has room for
/// either.
///
/// If the file is truncated under it, [`SigbusGuard`](crate::SigbusGuard) keeps the process alive; the record
/// is then lost, and the queues go on without. A file made here cannot be: it is sealed.
///
/// ```
/// use blk_dataplane::InflightRegion;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// // Once, for the front-end to keep; then at each start, with the file it has kept.
/// let (file, size) = InflightRegion::create(2, 128)?;
/// let region = InflightRegion::map(file, 0, size, 2, 128)?;
/// assert!(region.queue(1).is_some() && region.queue(2).is_none());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct InflightRegion {
    /// One region, from [`origin`](Self::origin) on.
    map: Arc<MemoryMap>,
    origin: GuestAddress,
    size: u64,
    num_queues: u16,
    queue_size: QueueSize,
}

impl InflightRegion {
    /// Makes a zeroed file for `num_queues` queues of up to `queue_size` entries, and says how many bytes of
    /// it, from the first on, are the buffer. The file cannot be resized.
    ///
    /// # Errors
    /// [`InflightError::NumQueues`], [`InflightError::QueueSize`], [`InflightError::Create`].
    pub fn create(num_queues: u16, queue_size: u16) -> Result<(File, u64), InflightError> {
        let queue_size = check(num_queues, queue_size)?;
        // Of either format, as this may be asked before the features are known.
        let size = u64::from(num_queues) * stride(queue_size, true);
        let create = |errno: Errno| InflightError::Create(errno.into());
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create("blk-inflight", flags).map_err(create)?);
        file.set_len(size).map_err(InflightError::Create)?;
        // So that nobody who has it can take the memory away from the others.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(create)?;
        Ok((file, size))
    }

    /// Maps a buffer of `size` bytes at `offset` of `file`: one that [`create`](Self::create) has made, new
    /// or with what an earlier process has left in it.
    ///
    /// # Errors
    /// See [`InflightError`].
    pub fn map(
        file: File,
        offset: u64,
        size: u64,
        num_queues: u16,
        queue_size: u16,
    ) -> Result<Self, InflightError> {
        let queue_size = check(num_queues, queue_size)?;
        let needed = u64::from(num_queues) * stride(queue_size, false);
        if size < needed {
            return Err(InflightError::TooSmall { size, needed });
        }
        if !offset.is_multiple_of(WORD_ALIGNMENT) {
            return Err(InflightError::Misaligned { offset });
        }
        // hostmem wants addresses and offsets to agree modulo 16.
        let origin = GuestAddress(offset % hostmem::HOST_ALIGNMENT);
        // Not more than is used: a front-end may say any size.
        let size = size.min(u64::from(num_queues) * stride(queue_size, true));
        let map = MemoryMap::new(vec![RegionConfig {
            guest_addr: origin,
            size,
            // Nothing is looked up by it.
            frontend_addr: 0,
            file,
            mmap_offset: offset,
        }])?;
        Ok(Self {
            map: Arc::new(map),
            origin,
            size,
            num_queues,
            queue_size,
        })
    }

    /// The record of queue `index`; `None` if there is no such queue.
    #[must_use]
    pub fn queue(&self, index: u16) -> Option<InflightQueue> {
        (index < self.num_queues).then(|| InflightQueue {
            region: self.clone(),
            index,
        })
    }

    /// Whether the buffer's memory has gone. Only with [`SigbusGuard`](crate::SigbusGuard).
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.map.check_intact().is_err()
    }
}

fn check(num_queues: u16, queue_size: u16) -> Result<QueueSize, InflightError> {
    let max = MAX_NUM_QUEUES;
    if !(1..=max).contains(&num_queues) {
        return Err(InflightError::NumQueues { num_queues, max });
    }
    QueueSize::try_from(queue_size).map_err(|_| InflightError::QueueSize { queue_size })
}

/// Bytes from one queue region to the next: at most 1 MiB, so that those of all queues fit 64 bits by far.
fn stride(queue_size: QueueSize, packed: bool) -> u64 {
    let len = if packed {
        packed::region_len(queue_size.get())
    } else {
        split::region_len(queue_size.get())
    };
    (len as u64).next_multiple_of(QUEUE_ALIGNMENT)
}

/// The record of one queue, in a mapped buffer. Handed to
/// [`DataPlane::start_queue`](crate::DataPlane::start_queue), which serves what is in it first.
#[derive(Clone, Debug)]
pub struct InflightQueue {
    region: InflightRegion,
    index: u16,
}

impl InflightQueue {
    /// Finds out where a ring stands, and begins to record. Repairs the record where the predecessor has died
    /// in the middle of an update; may itself be interrupted and done again.
    pub(super) fn recover<M: GuestMemoryBackend>(
        &self,
        memory: &M,
        config: &QueueConfig,
    ) -> Result<Recovered, InflightError> {
        if config.features.in_order {
            return Err(InflightError::InOrder);
        }
        let InflightRegion {
            map,
            origin,
            size,
            queue_size,
            ..
        } = &self.region;
        let (ring, buffer) = (config.size.get(), queue_size.get());
        if ring > buffer {
            return Err(InflightError::RingTooLarge { ring, buffer });
        }
        let packed = config.features.packed;
        let stride = stride(*queue_size, packed);
        let start = u64::from(self.index) * stride;
        let needed = start + stride;
        if needed > *size {
            return Err(InflightError::TooSmall {
                size: *size,
                needed,
            });
        }
        let len = if packed {
            packed::region_len(buffer)
        } else {
            split::region_len(buffer)
        };
        // No overflow: within the region, which was mapped.
        let words = Words::new(Arc::clone(map), GuestAddress(origin.0 + start), len)
            .ok_or(InflightError::Lost)?;
        if packed {
            let (tracker, base, left) = PackedTracker::recover(words, buffer, memory, config)?;
            Ok(Recovered {
                tracker: Tracker::Packed(tracker),
                base,
                left,
            })
        } else {
            let (tracker, base, left) = SplitTracker::recover(words, buffer, memory, config)?;
            Ok(Recovered {
                tracker: Tracker::Split(tracker),
                base,
                left,
            })
        }
    }
}
