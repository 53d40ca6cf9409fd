//! What a ring is started from, checked by construction, and why a start is refused.

use std::fmt;

use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddress;

use crate::base::RingBase;

/// Number of entries of a virtqueue: a power of two in `1..=32768` (virtio 1.3 §2.7).
///
/// A packed ring may have any number up to 32768 (§2.8.10.1) unless the transport asks for a power
/// of two; drivers and front-ends use one for both formats, and so does this crate.
///
/// The bound and the power of two hold for every value of this type, so ring arithmetic masks
/// instead of dividing, and nothing later has to ask again.
///
/// ```
/// use vring::{ConfigError, QueueSize};
///
/// assert_eq!(QueueSize::new(256)?.get(), 256);
/// assert_eq!(QueueSize::new(0), Err(ConfigError::SizeZero));
/// assert_eq!(QueueSize::new(3), Err(ConfigError::SizeNotPowerOfTwo { size: 3 }));
/// # Ok::<(), ConfigError>(())
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct QueueSize(u16);

impl QueueSize {
    /// The largest queue a split ring can have: free-running 16-bit indices must be able to tell
    /// a full ring from an empty one (virtio 1.3 §2.7).
    pub const MAX: Self = Self(32768);

    /// Checks `size`, in entries, as it came from the wire.
    ///
    /// # Errors
    ///
    /// [`ConfigError::SizeZero`], [`ConfigError::SizeNotPowerOfTwo`] or
    /// [`ConfigError::SizeTooLarge`].
    pub fn new(size: u32) -> Result<Self, ConfigError> {
        if size == 0 {
            return Err(ConfigError::SizeZero);
        }
        match u16::try_from(size) {
            Ok(entries) if entries > Self::MAX.0 => Err(ConfigError::SizeTooLarge { size }),
            Ok(entries) if entries.is_power_of_two() => Ok(Self(entries)),
            Ok(_) => Err(ConfigError::SizeNotPowerOfTwo { size }),
            Err(_) => Err(ConfigError::SizeTooLarge { size }),
        }
    }

    /// The number of entries.
    #[inline]
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<u32> for QueueSize {
    type Error = ConfigError;

    fn try_from(size: u32) -> Result<Self, ConfigError> {
        Self::new(size)
    }
}

impl TryFrom<u16> for QueueSize {
    type Error = ConfigError;

    fn try_from(size: u16) -> Result<Self, ConfigError> {
        Self::new(u32::from(size))
    }
}

impl From<QueueSize> for u16 {
    fn from(size: QueueSize) -> Self {
        size.0
    }
}

impl fmt::Display for QueueSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Guest-physical addresses of the three areas of a ring (virtio 1.3 §2.6).
///
/// What lies in each depends on the format; the alignments are those of virtio 1.3 §2.7 and
/// §2.8. Unchecked: starting a queue checks them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RingAddresses {
    /// Split: the descriptor table, read only by the device. Packed: the descriptor ring, written
    /// by both sides. 16 bytes per entry; must be 16-aligned.
    pub descriptor_area: GuestAddress,
    /// Split: the available ring; must be 2-aligned. Packed: the driver event suppression
    /// structure; must be 4-aligned. Written by the guest.
    pub driver_area: GuestAddress,
    /// Split: the used ring. Packed: the device event suppression structure. Written by the
    /// device; must be 4-aligned.
    pub device_area: GuestAddress,
}

/// The negotiated features that change how a ring is read.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RingFeatures {
    /// `VIRTIO_F_INDIRECT_DESC`: a descriptor may point to a table of descriptors.
    pub indirect_desc: bool,
    /// `VIRTIO_F_EVENT_IDX`: notifications are suppressed by index instead of by flag.
    pub event_idx: bool,
    /// `VIRTIO_F_IN_ORDER`: the device gives chains back in the order they were made available
    /// (virtio 1.3 §2.7.9, §2.8.8).
    pub in_order: bool,
    /// `VIRTIO_F_RING_PACKED`: the ring has the packed format (virtio 1.3 §2.8).
    pub packed: bool,
}

impl RingFeatures {
    /// Picks the ring features out of the 64 negotiated virtio feature bits.
    ///
    /// ```
    /// let features = vring::RingFeatures::from_virtio(1 << 28 | 1 << 32);
    /// assert!(features.indirect_desc && !features.event_idx);
    /// ```
    pub const fn from_virtio(negotiated: u64) -> Self {
        Self {
            indirect_desc: negotiated & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0,
            event_idx: negotiated & (1 << VIRTIO_RING_F_EVENT_IDX) != 0,
            in_order: negotiated & (1 << VIRTIO_F_IN_ORDER) != 0,
            packed: negotiated & (1 << VIRTIO_F_RING_PACKED) != 0,
        }
    }
}

/// Everything a ring is started from. A started ring has no setter for any of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct QueueConfig {
    /// Number of entries.
    pub size: QueueSize,
    /// Where the three areas are.
    pub addresses: RingAddresses,
    /// Negotiated ring features.
    pub features: RingFeatures,
    /// Where to start: [`RingBase::fresh`], or where another device stopped.
    pub base: RingBase,
}

/// A value of the configuration that no ring can have. The guest or the front-end sent it.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The base of a split ring has more than 16 bits (row R10). The front-end's fault.
    #[error("base {base:#x} has more than the 16 bits of a split ring's index")]
    BaseTooLarge {
        /// The refused base.
        base: u32,
    },
    /// The queue size is not a power of two (virtio 1.3 §2.7).
    #[error("queue size {size} is not a power of two")]
    SizeNotPowerOfTwo {
        /// The refused size, in entries.
        size: u32,
    },
    /// The queue size is beyond [`QueueSize::MAX`].
    #[error("queue size {size} is larger than 32768")]
    SizeTooLarge {
        /// The refused size, in entries.
        size: u32,
    },
    /// The queue size is zero: "queue not available" in virtio's language, never a ring.
    #[error("queue size is zero")]
    SizeZero,
}

/// One of the three areas of a ring, for error messages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RingArea {
    /// Split: the descriptor table. Packed: the descriptor ring.
    DescriptorArea,
    /// Split: the used ring. Packed: the device event suppression structure.
    DeviceArea,
    /// Split: the available ring. Packed: the driver event suppression structure.
    DriverArea,
}

impl fmt::Display for RingArea {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DescriptorArea => "descriptor area",
            Self::DeviceArea => "device area",
            Self::DriverArea => "driver area",
        })
    }
}

/// Why a ring was not started, or not moved to a new memory map. Nothing was written to guest
/// memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// An area runs past the end of the 64-bit address space. The guest's fault, or the
    /// front-end's.
    #[error("{area} of {len} bytes at {address:#x} wraps the address space")]
    AddressOverflow {
        /// Which area.
        area: RingArea,
        /// Its guest-physical address.
        address: u64,
        /// Its length in bytes.
        len: usize,
    },
    /// The guest address is aligned but the host mapping behind it is not, so ring words cannot
    /// be read atomically. The fault of whoever mapped guest memory (the host, or a front-end
    /// that gave an odd file offset).
    #[error("{area} at {address:#x} is not aligned in the host's mapping")]
    HostMisaligned {
        /// Which area.
        area: RingArea,
        /// Its guest-physical address.
        address: u64,
    },
    /// An area violates its alignment (virtio 1.3 §2.7, §2.8.10.1). The guest's fault, or the
    /// front-end's.
    #[error("{area} at {address:#x} is not {alignment}-aligned")]
    Misaligned {
        /// Which area.
        area: RingArea,
        /// Its guest-physical address.
        address: u64,
        /// The alignment required, in bytes.
        alignment: usize,
    },
    /// An area is not wholly inside one region of guest memory, or an IOMMU does not let the device
    /// use it. The guest's fault, or the front-end's (wrong address, or a memory table without the
    /// ring).
    #[error("{area} of {len} bytes at {address:#x} is not inside one memory region")]
    NotMapped {
        /// Which area.
        area: RingArea,
        /// Its guest-physical address.
        address: u64,
        /// Its length in bytes.
        len: usize,
    },
    /// The format of the base, or that negotiated, is not that of the queue. The caller's fault,
    /// or that of a front-end which relays a base of the other format.
    #[error(
        "the ring's format (split or packed) differs between the features, the base and the queue"
    )]
    FormatMismatch,
    /// The base of a packed ring is not below the queue size (virtio 1.3 §2.8.1). The front-end's
    /// fault.
    #[error("base {index} is not below the queue size {size}")]
    BaseOutOfRange {
        /// The position refused.
        index: u16,
        /// The queue size, in entries.
        size: u16,
    },
    /// The available position of a packed ring's base, or of a saved split ring's, is further ahead
    /// of the used one than the ring is long, so more would be outstanding than there are
    /// descriptors. The front-end's fault.
    #[error("base is {outstanding} descriptors ahead of the used one, in a ring of {size}")]
    BaseTooFarAhead {
        /// Descriptors from the used position to the available one.
        outstanding: u16,
        /// The queue size, in entries.
        size: u16,
    },
    /// The queue lost its memory in an earlier [`set_memory`](crate::SplitQueue::set_memory) and
    /// stays stopped until started anew. The caller's fault.
    #[error("the ring's memory was lost earlier; start the queue anew")]
    RingLost,
}
