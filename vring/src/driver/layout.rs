//! Where a test puts a ring.

use vm_memory::GuestAddress;

use crate::base::RingBase;
use crate::config::{QueueSize, RingAddresses, RingFeatures, StartError};
use crate::packed::layout::{
    DESCRIPTOR_RING_ALIGNMENT, EVENT_SUPPRESSION_LEN, descriptor_ring_len,
};
use crate::split::layout::{
    AVAILABLE_RING_ALIGNMENT, DESCRIPTOR_TABLE_ALIGNMENT, available_ring_len, descriptor_table_len,
    used_ring_len,
};

/// Alignment given to what the device writes, and in a packed ring to either event suppression
/// structure: a cache line instead of the 4 bytes the specification asks for, so that words one side
/// writes and polls share no line with those the other side writes.
const CACHE_LINE: u64 = 64;

/// Where a split ring goes when it is laid out in one piece.
///
/// ```
/// use vm_memory::GuestAddress;
/// use vring::QueueSize;
/// use vring::driver::SplitLayout;
///
/// let layout = SplitLayout::new(GuestAddress(0x1000), QueueSize::new(256)?)?;
/// assert_eq!(layout.addresses().descriptor_area, GuestAddress(0x1000));
/// assert_eq!(layout.addresses().driver_area, GuestAddress(0x2000));
/// assert!(layout.total_len() < 0x2000);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SplitLayout {
    base: GuestAddress,
    addresses: RingAddresses,
    end: u64,
}

impl SplitLayout {
    /// Lays a ring of `size` entries out from `base` on, rounded up to 16 bytes.
    ///
    /// # Errors
    ///
    /// [`DriverError::LayoutOverflow`] if the ring would wrap the address space.
    pub fn new(base: GuestAddress, size: QueueSize) -> Result<Self, DriverError> {
        Self::lay_out(base, size).ok_or(DriverError::LayoutOverflow { base: base.0 })
    }

    fn lay_out(base: GuestAddress, size: QueueSize) -> Option<Self> {
        let entries = size.get();
        let after = |start: u64, len: usize| start.checked_add(u64::try_from(len).ok()?);
        let descriptor_table = base
            .0
            .checked_next_multiple_of(u64::try_from(DESCRIPTOR_TABLE_ALIGNMENT).ok()?)?;
        let available_ring = after(descriptor_table, descriptor_table_len(entries))?
            .checked_next_multiple_of(u64::try_from(AVAILABLE_RING_ALIGNMENT).ok()?)?;
        let used_ring = after(available_ring, available_ring_len(entries))?
            .checked_next_multiple_of(CACHE_LINE)?;
        Some(Self {
            base,
            addresses: RingAddresses {
                descriptor_area: GuestAddress(descriptor_table),
                driver_area: GuestAddress(available_ring),
                device_area: GuestAddress(used_ring),
            },
            end: after(used_ring, used_ring_len(entries))?,
        })
    }

    /// The addresses of the three areas.
    pub const fn addresses(&self) -> RingAddresses {
        self.addresses
    }

    /// Bytes from the base to the end of the ring.
    pub const fn total_len(&self) -> u64 {
        self.end - self.base.0
    }
}

/// Where a packed ring goes when it is laid out in one piece.
///
/// ```
/// use vm_memory::GuestAddress;
/// use vring::QueueSize;
/// use vring::driver::PackedLayout;
///
/// let layout = PackedLayout::new(GuestAddress(0x1000), QueueSize::new(256)?)?;
/// assert_eq!(layout.addresses().descriptor_area, GuestAddress(0x1000));
/// assert_eq!(layout.addresses().driver_area, GuestAddress(0x2000));
/// assert_eq!(layout.addresses().device_area, GuestAddress(0x2040));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PackedLayout {
    base: GuestAddress,
    addresses: RingAddresses,
    end: u64,
}

impl PackedLayout {
    /// Lays a ring of `size` entries out from `base` on, rounded up to 16 bytes.
    ///
    /// # Errors
    ///
    /// [`DriverError::LayoutOverflow`] if the ring would wrap the address space.
    pub fn new(base: GuestAddress, size: QueueSize) -> Result<Self, DriverError> {
        Self::lay_out(base, size).ok_or(DriverError::LayoutOverflow { base: base.0 })
    }

    fn lay_out(base: GuestAddress, size: QueueSize) -> Option<Self> {
        let after = |start: u64, len: usize| start.checked_add(u64::try_from(len).ok()?);
        let alignment = u64::try_from(DESCRIPTOR_RING_ALIGNMENT).ok()?;
        let ring = base.0.checked_next_multiple_of(alignment)?;
        let driver_event =
            after(ring, descriptor_ring_len(size.get()))?.checked_next_multiple_of(CACHE_LINE)?;
        let device_event = driver_event.checked_add(CACHE_LINE)?;
        Some(Self {
            base,
            addresses: RingAddresses {
                descriptor_area: GuestAddress(ring),
                driver_area: GuestAddress(driver_event),
                device_area: GuestAddress(device_event),
            },
            end: after(device_event, EVENT_SUPPRESSION_LEN)?,
        })
    }

    /// The addresses of the three areas.
    pub const fn addresses(&self) -> RingAddresses {
        self.addresses
    }

    /// Bytes from the base to the end of the ring.
    pub const fn total_len(&self) -> u64 {
        self.end - self.base.0
    }
}

/// Where a ring of either format goes when it is laid out in one piece.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Layout {
    /// Of a packed ring.
    Packed(PackedLayout),
    /// Of a split ring.
    Split(SplitLayout),
}

impl Layout {
    /// Lays a ring of `size` entries, of the format negotiated, out from `base` on, rounded up to
    /// 16 bytes.
    ///
    /// # Errors
    ///
    /// [`DriverError::LayoutOverflow`] if the ring would wrap the address space.
    pub fn new(
        base: GuestAddress,
        size: QueueSize,
        features: RingFeatures,
    ) -> Result<Self, DriverError> {
        if features.packed {
            PackedLayout::new(base, size).map(Self::Packed)
        } else {
            SplitLayout::new(base, size).map(Self::Split)
        }
    }

    /// The addresses of the three areas.
    pub const fn addresses(&self) -> RingAddresses {
        match self {
            Self::Packed(layout) => layout.addresses(),
            Self::Split(layout) => layout.addresses(),
        }
    }

    /// Bytes from the base to the end of the ring.
    pub const fn total_len(&self) -> u64 {
        match self {
            Self::Packed(layout) => layout.total_len(),
            Self::Split(layout) => layout.total_len(),
        }
    }
}

/// Why a ring cannot be set up: always the test's own configuration.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DriverError {
    /// The base is that of the other format, or of a packed ring with chains in flight, which a new
    /// driver knows nothing of: its two positions differ, or are not in the ring.
    #[error("a driver cannot start a ring at {base:?}")]
    Base {
        /// The base asked for.
        base: RingBase,
    },
    /// The ring would pass the end of the address space.
    #[error("a ring at {base:#x} wraps the address space")]
    LayoutOverflow {
        /// The base asked for.
        base: u64,
    },
    /// The memory does not hold the ring.
    #[error(transparent)]
    Ring(#[from] StartError),
}
