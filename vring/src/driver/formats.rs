//! One driver for rings of either format.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemory};

use crate::base::RingBase;
use crate::chain::Segment;
use crate::config::{QueueSize, RingAddresses, RingFeatures};
use crate::driver::chain::{AddError, Full, RawDescriptor, Used};
use crate::driver::layout::DriverError;
use crate::driver::packed::PackedDriver;
use crate::driver::split::SplitDriver;

/// The guest side of a ring of the format negotiated. What only one format has is behind the
/// variant.
///
/// ```
/// use std::sync::Arc;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vring::driver::{Driver, Layout};
/// use vring::{QueueSize, RingFeatures, Segment};
///
/// let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)])?);
/// let size = QueueSize::new(8)?;
/// for packed in [false, true] {
///     let features = RingFeatures { packed, ..RingFeatures::default() };
///     let addresses = Layout::new(GuestAddress(0), size, features)?.addresses();
///     let mut driver = Driver::new(Arc::clone(&memory), addresses, size, features)?;
///     driver.add_chain(&[Segment { addr: GuestAddress(0x4000), len: 512 }], &[])?;
///     driver.publish();
///     assert!(driver.needs_kick());
///     assert_eq!((driver.free(), driver.poll_used()), (7, None));
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub enum Driver<M> {
    /// Of a packed ring.
    Packed(PackedDriver<M>),
    /// Of a split ring.
    Split(SplitDriver<M>),
}

/// Calls the same method of whichever driver there is.
macro_rules! forward {
    ($self:ident, $driver:ident => $call:expr) => {
        match $self {
            Self::Packed($driver) => $call,
            Self::Split($driver) => $call,
        }
    };
}

impl<M: GuestMemory> Driver<M> {
    /// Sets up an empty ring at `addresses`, with all its words zero.
    ///
    /// # Errors
    ///
    /// [`DriverError::Ring`] if the memory does not hold the ring.
    pub fn new(
        memory: Arc<M>,
        addresses: RingAddresses,
        size: QueueSize,
        features: RingFeatures,
    ) -> Result<Self, DriverError> {
        let base = RingBase::fresh(features);
        Self::starting_at(memory, addresses, size, features, base)
    }

    /// Like [`new`](Self::new) as of a ring that has been running and is idle: the device's base is
    /// `base` too.
    ///
    /// # Errors
    ///
    /// [`DriverError::Ring`] if the memory does not hold the ring; [`DriverError::Base`] if `base`
    /// is that of the other format, or not of an idle ring.
    pub fn starting_at(
        memory: Arc<M>,
        addresses: RingAddresses,
        size: QueueSize,
        features: RingFeatures,
        base: RingBase,
    ) -> Result<Self, DriverError> {
        match base {
            RingBase::Packed { avail, used } if features.packed && avail == used => {
                PackedDriver::starting_at(memory, addresses, size, features, avail)
                    .map(Self::Packed)
            }
            RingBase::Split { next_avail } if !features.packed => {
                SplitDriver::starting_at(memory, addresses, size, features, next_avail)
                    .map(Self::Split)
            }
            _ => Err(DriverError::Base { base }),
        }
    }

    /// Writes a chain of direct descriptors and stages it. Returns what its completion will have as
    /// id. With no segments at all the chain is one empty readable descriptor.
    ///
    /// # Errors
    ///
    /// [`Full`]: not enough free descriptors; nothing was written.
    #[inline]
    pub fn add_chain(&mut self, readable: &[Segment], writable: &[Segment]) -> Result<u16, Full> {
        forward!(self, driver => driver.add_chain(readable, writable))
    }

    /// Writes the chain into an indirect table at `table` and stages one descriptor that points
    /// to it. Returns what its completion will have as id. The table must stay untouched until the
    /// chain is used.
    ///
    /// # Errors
    ///
    /// [`AddError`]: no free descriptor, or the table is not inside one region of memory.
    #[inline]
    pub fn add_indirect(
        &mut self,
        table: GuestAddress,
        readable: &[Segment],
        writable: &[Segment],
    ) -> Result<u16, AddError> {
        forward!(self, driver => driver.add_indirect(table, readable, writable))
    }

    /// Writes a chain of descriptors as they are, right or wrong, each the successor of the one
    /// before, and stages it. Returns what its completion will have as id.
    ///
    /// # Errors
    ///
    /// [`Full`]: more descriptors than a packed ring has, or a split one has free.
    pub fn add_raw(&mut self, descriptors: &[RawDescriptor]) -> Result<u16, Full> {
        forward!(self, driver => driver.add_raw(descriptors))
    }

    /// Makes every staged chain available, with one store, and returns how many there were.
    #[inline]
    pub fn publish(&mut self) -> usize {
        forward!(self, driver => driver.publish())
    }

    /// Decides whether to kick the device, once for everything published since the last decision.
    #[inline]
    pub fn needs_kick(&mut self) -> bool {
        forward!(self, driver => driver.needs_kick())
    }

    /// Takes the next completion, and frees its descriptors.
    #[inline]
    pub fn poll_used(&mut self) -> Option<Used> {
        forward!(self, driver => driver.poll_used())
    }

    /// Whether [`poll_used`](Self::poll_used) would return a completion: what a driver that polls looks at
    /// meanwhile.
    #[inline]
    pub fn has_used(&self) -> bool {
        forward!(self, driver => driver.has_used())
    }

    /// Asks for an interrupt at the next completion, then looks again: true if nothing has
    /// completed in between, so the caller may sleep.
    #[inline]
    pub fn enable_interrupts(&mut self) -> bool {
        forward!(self, driver => driver.enable_interrupts())
    }

    /// Asks for no interrupts.
    #[inline]
    pub fn disable_interrupts(&mut self) {
        forward!(self, driver => driver.disable_interrupts());
    }

    /// Free descriptors.
    #[inline]
    pub const fn free(&self) -> u16 {
        forward!(self, driver => driver.free())
    }

    /// Number of entries.
    #[inline]
    pub const fn size(&self) -> QueueSize {
        forward!(self, driver => driver.size())
    }
}
