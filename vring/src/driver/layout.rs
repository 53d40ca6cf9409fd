//! Where a test puts a ring.

use vm_memory::GuestAddress;

use crate::config::{QueueSize, RingAddresses, StartError};
use crate::split::layout::{
    AVAILABLE_RING_ALIGNMENT, DESCRIPTOR_TABLE_ALIGNMENT, available_ring_len, descriptor_table_len,
    used_ring_len,
};

/// Alignment given to the used ring: one cache line more than the specification asks (4), so that
/// the words the device writes share no line with those the driver writes.
const USED_RING_SPACING: u64 = 64;

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
            .checked_next_multiple_of(USED_RING_SPACING)?;
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

/// Why a ring cannot be set up: always the test's own configuration.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DriverError {
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
