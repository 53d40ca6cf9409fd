//! The guest's end of a ring of either format.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use vm_memory::GuestAddress;
use vring::driver::{Driver, Full, SplitDriver, Used};
use vring::{QueueSize, RingAddresses, RingBase, RingFeatures, Segment};

use super::ram::Memory;

/// What both formats have is a method here; what only a split ring has is found through its [`SplitDriver`], and
/// a test that asks it of a packed ring fails.
#[derive(Debug)]
pub(crate) struct Ring {
    driver: Driver<Memory>,
    size: QueueSize,
}

impl Ring {
    pub(crate) fn starting_at(
        memory: &Arc<Memory>,
        addresses: RingAddresses,
        size: QueueSize,
        features: RingFeatures,
        base: RingBase,
    ) -> Self {
        let driver =
            Driver::starting_at(Arc::clone(memory), addresses, size, features, base).unwrap();
        Self { driver, size }
    }

    pub(crate) fn size(&self) -> QueueSize {
        self.size
    }

    pub(crate) fn free(&self) -> u16 {
        self.driver.free()
    }

    pub(crate) fn add_chain(
        &mut self,
        readable: &[Segment],
        writable: &[Segment],
    ) -> Result<u16, Full> {
        self.driver.add_chain(readable, writable)
    }

    pub(crate) fn add_indirect(
        &mut self,
        table: GuestAddress,
        readable: &[Segment],
        writable: &[Segment],
    ) -> u16 {
        self.driver.add_indirect(table, readable, writable).unwrap()
    }

    pub(crate) fn publish(&mut self) -> usize {
        self.driver.publish()
    }

    pub(crate) fn needs_kick(&mut self) -> bool {
        self.driver.needs_kick()
    }

    pub(crate) fn poll_used(&mut self) -> Option<Used> {
        self.driver.poll_used()
    }

    pub(crate) fn enable_interrupts(&mut self) -> bool {
        self.driver.enable_interrupts()
    }
}

impl Deref for Ring {
    type Target = SplitDriver<Memory>;

    fn deref(&self) -> &Self::Target {
        match &self.driver {
            Driver::Split(driver) => driver,
            Driver::Packed(_) => panic!("a packed ring has nothing of the kind"),
        }
    }
}

impl DerefMut for Ring {
    fn deref_mut(&mut self) -> &mut Self::Target {
        match &mut self.driver {
            Driver::Split(driver) => driver,
            Driver::Packed(_) => panic!("a packed ring has nothing of the kind"),
        }
    }
}
