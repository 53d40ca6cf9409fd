//! What a front-end has said about one ring.

use hostmem::MemoryMap;
use vring::{ConfigError, RingAddresses, RingBase, RingFeatures};

use super::handed::Listed;

/// Ring addresses as the front-end gives them: in its own address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FrontendAddresses {
    pub(super) descriptor: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

impl FrontendAddresses {
    /// Where the ring lies for the guest. `None` if an address is in no region: a guest-physical
    /// address sent by mistake ends here (hostile-inputs R8). Lengths are checked at the start.
    pub(super) fn to_guest(self, memory: &MemoryMap) -> Option<RingAddresses> {
        Some(RingAddresses {
            descriptor_area: memory.frontend_to_guest(self.descriptor)?,
            driver_area: memory.frontend_to_guest(self.available)?,
            device_area: memory.frontend_to_guest(self.used)?,
        })
    }
}

/// The raw configuration of one ring. It becomes a queue when the kick descriptor arrives.
#[derive(Debug, Default)]
pub(super) struct VringState {
    pub(super) size: Option<u32>,
    pub(super) addresses: Option<FrontendAddresses>,
    /// As `SET_VRING_BASE` had it: what it means depends on the ring's format.
    pub(super) base: Option<u32>,
    /// Where the ring stood when the device was reset. A ring that is started without a base begins anew.
    pub(super) stopped_at: Option<u32>,
    pub(super) enabled: bool,
    /// Kept for a restart; the running queue has duplicates.
    pub(super) call: Option<Listed>,
    pub(super) err: Option<Listed>,
}

impl VringState {
    /// Forgets how the ring was set up, but not by which descriptors the front-end is told, nor where it stood: QEMU
    /// 7.2 sets the device status to 0 before it asks for that.
    pub(super) fn reset(&mut self) {
        let Self {
            base,
            stopped_at,
            call,
            err,
            ..
        } = std::mem::take(self);
        *self = Self {
            stopped_at: base.or(stopped_at),
            call,
            err,
            ..Self::default()
        };
    }

    /// What GET_VRING_BASE of a ring that does not run replies.
    pub(super) fn reported_base(&self, features: u64) -> u32 {
        let fresh = || RingBase::fresh(RingFeatures::from_virtio(features)).to_vhost_user();
        self.base.or(self.stopped_at).unwrap_or_else(fresh)
    }

    /// Where the ring goes on, in the format of `features`.
    pub(super) fn base(&self, features: u64) -> Result<RingBase, ConfigError> {
        let features = RingFeatures::from_virtio(features);
        self.base.map_or_else(
            || Ok(RingBase::fresh(features)),
            |base| RingBase::from_vhost_user(base, features),
        )
    }
}
