//! The state machine behind the messages.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use event_poll::EventNotifier;
use hostmem::{MAX_REGIONS, MemoryMap, RegionConfig};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vm_memory::GuestAddress;
use vring::{RingBase, RingFeatures};

use super::config_channel::ConfigChannel;
use super::handed::{Handed, Listed};
use super::vring_state::{FrontendAddresses, VringState};
use crate::capacity::ConfigSubscription;
use crate::dataplane::{DataPlane, Gone, QueueSetup, StopError};
use crate::notifier::Notifier;

/// Offered: each is served in full.
const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);

/// One front-end's device.
#[derive(Debug)]
pub(super) struct Backend {
    plane: DataPlane<MemoryMap>,
    memory: Arc<MemoryMap>,
    vrings: Box<[VringState]>,
    /// Call and err descriptors that the data thread has.
    handed: Arc<Handed>,
    /// Tells the front-end of a new capacity, if it has given a socket to do so.
    told: Option<ConfigSubscription>,
    /// Negotiated feature bits.
    features: u64,
    /// A message that must be answered could not be: the connection is of no more use.
    must_close: bool,
}

/// Refuses a message.
fn refuse(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(why))
}

impl From<Gone> for Error {
    fn from(gone: Gone) -> Self {
        refuse(gone)
    }
}

fn notifier(fd: File) -> Result<EventNotifier> {
    EventNotifier::from_fd(OwnedFd::from(fd)).map_err(refuse)
}

fn duplicate(of: Option<&Listed>) -> Result<Option<Box<dyn Notifier>>> {
    let Some(of) = of else {
        return Ok(None);
    };
    Ok(Some(Box::new(of.notifier().try_clone().map_err(refuse)?)))
}

impl Backend {
    /// A device whose front-end has said nothing yet. `plane` has no queue and an empty memory map.
    pub(super) fn new(
        plane: DataPlane<MemoryMap>,
        memory: Arc<MemoryMap>,
        handed: Arc<Handed>,
    ) -> Self {
        let vrings = (0..plane.device().num_queues())
            .map(|_| VringState::default())
            .collect();
        Self {
            plane,
            memory,
            vrings,
            handed,
            told: None,
            features: 0,
            must_close: false,
        }
    }

    /// Whether the connection is of no more use.
    pub(super) fn must_close(&self) -> bool {
        self.must_close || !self.plane.is_alive()
    }

    /// Tells the front-end through `channel` of changes from now on, and no longer through one before it.
    pub(super) fn tell_of_changes(&mut self, channel: ConfigChannel) {
        self.told = Some(self.plane.device().on_config_change(Box::new(channel)));
    }

    /// Drains and stops the device.
    pub(super) fn end(self) -> std::result::Result<(), StopError> {
        let Self {
            plane,
            vrings,
            told,
            ..
        } = self;
        drop(told);
        let stopped = plane.stop();
        // Listed until nobody writes to their descriptors any more.
        drop(vrings);
        stopped
    }

    fn listed(&self, fd: Option<File>) -> Result<Option<Listed>> {
        let Some(fd) = fd else {
            return Ok(None);
        };
        self.handed.list(notifier(fd)?).map(Some).map_err(refuse)
    }

    fn offered(&self) -> u64 {
        self.plane.device().features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    /// The ring and its checked index (hostile-inputs R13: compared before it is narrowed).
    fn vring(&mut self, index: u32) -> Result<(u16, &mut VringState)> {
        let num_queues = self.vrings.len();
        let narrow = u16::try_from(index).ok();
        narrow
            .and_then(|narrow| Some((narrow, self.vrings.get_mut(usize::from(narrow))?)))
            .ok_or_else(|| refuse(format!("vring {index} of a device with {num_queues}")))
    }

    fn is_running(&self, index: u16) -> bool {
        self.plane.is_running(index).unwrap_or(false)
    }

    fn any_running(&self) -> bool {
        (0..self.plane.device().num_queues()).any(|index| self.is_running(index))
    }

    /// A ring's configuration cannot change under it (hostile-inputs R9, CVE-2026-5747).
    fn stopped_vring(&mut self, index: u32) -> Result<&mut VringState> {
        let (narrow, _) = self.vring(index)?;
        if self.is_running(narrow) {
            return Err(refuse(format!("vring {index} is running")));
        }
        Ok(self.vring(index)?.1)
    }

    fn start(&mut self, index: u16, kick: EventNotifier) -> Result<()> {
        let enabled_at_once =
            self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
        let features = self.features;
        let memory = Arc::clone(&self.memory);
        let (_, vring) = self.vring(u32::from(index))?;
        let Some(size) = vring.size else {
            return Err(refuse(format!("vring {index} has no size yet")));
        };
        let Some(addresses) = vring.addresses else {
            return Err(refuse(format!("vring {index} has no addresses yet")));
        };
        let addresses = addresses
            .to_guest(&memory)
            .ok_or_else(|| refuse(format!("vring {index} is not in the memory table")))?;
        let setup = QueueSetup {
            size,
            addresses,
            base: vring.base(features).map_err(refuse)?,
            features,
            kick,
            call: duplicate(vring.call.as_ref())?,
            err: duplicate(vring.err.as_ref())?,
            enabled: vring.enabled || enabled_at_once,
        };
        self.plane.start_queue(index, setup).map_err(refuse)?;
        tracing::debug!(vring = index, size, "started");
        Ok(())
    }

    fn stop(&mut self, index: u16) -> Result<()> {
        if self.is_running(index) {
            let base = self.plane.stop_queue(index).map_err(refuse)?;
            self.vring(u32::from(index))?.1.base = Some(base.to_vhost_user());
            tracing::debug!(vring = index, ?base, "stopped");
        }
        Ok(())
    }

    fn replace_memory(&mut self, memory: MemoryMap) -> Result<()> {
        let memory = Arc::new(memory);
        let vrings = &self.vrings;
        self.plane.update_memory(Arc::clone(&memory), |index| {
            vrings.get(usize::from(index))?.addresses?.to_guest(&memory)
        })?;
        self.memory = memory;
        Ok(())
    }
}

impl VhostUserBackendReqHandlerMut for Backend {
    /// Idempotent (hostile-inputs C2): a front-end that reconnects through a proxy repeats it.
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    /// Deprecated by the specification; stops every ring (C3).
    fn reset_owner(&mut self) -> Result<()> {
        for index in 0..self.plane.device().num_queues() {
            self.stop(index)?;
            self.vring(u32::from(index))?.1.enabled = false;
        }
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("RESET_DEVICE is not offered"))
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.offered();
        if unknown != 0 {
            return Err(refuse(format!(
                "feature bits {unknown:#x} were not offered"
            )));
        }
        // Rings were set up under the old bits (C5). Repeating them is harmless.
        if features != self.features && self.any_running() {
            return Err(refuse("features cannot change while rings run"));
        }
        self.plane.accept_features(features)?;
        self.features = features;
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<vhost::VhostUserMemoryRegionBase>>> {
        let regions = regions
            .iter()
            .zip(files)
            .map(|(region, file)| RegionConfig {
                guest_addr: GuestAddress(region.guest_phys_addr),
                size: region.memory_size,
                frontend_addr: region.user_addr,
                file,
                mmap_offset: region.mmap_offset,
            })
            .collect();
        self.replace_memory(self.memory.with_regions(regions).map_err(refuse)?)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let max = u32::from(self.plane.device().max_queue_size().get());
        let vring = self.stopped_vring(index)?;
        // virtio 1.3 §2.7: a power of two. R1: 0 must be refused aloud, not silently kept away.
        if !num.is_power_of_two() || num > max {
            return Err(refuse(format!(
                "vring {index}: size {num}, not a power of two up to {max}"
            )));
        }
        vring.size = Some(num);
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let memory = Arc::clone(&self.memory);
        let vring = self.stopped_vring(index)?;
        // R12: logging was not offered.
        if !flags.is_empty() {
            return Err(refuse(format!("vring {index}: logging was not offered")));
        }
        let addresses = FrontendAddresses {
            descriptor,
            available,
            used,
        };
        if addresses.to_guest(&memory).is_none() {
            return Err(refuse(format!("vring {index} is not in the memory table")));
        }
        vring.addresses = Some(addresses);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let features = RingFeatures::from_virtio(self.features);
        let vring = self.stopped_vring(index)?;
        // R10: a split ring's index has 16 bits; cutting off the rest would start elsewhere.
        RingBase::from_vhost_user(base, features)
            .map_err(|error| refuse(format!("vring {index}: {error}")))?;
        vring.base = Some(base);
        Ok(())
    }

    /// Stops the ring, drains it, publishes what was in flight, and only then replies (X1).
    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let stopped = self
            .vring(index)
            .map(|(narrow, _)| narrow)
            .and_then(|narrow| {
                self.stop(narrow)?;
                let features = self.features;
                let base = self.vring(index)?.1.base(features).map_err(refuse)?;
                Ok(base.to_vhost_user())
            });
        // There is no way to say no: the reply is the base.
        self.must_close |= stopped.is_err();
        Ok(VhostUserVringState::new(index, stopped?))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (index, _) = self.vring(u32::from(index))?;
        // F4: a back-end may poll instead; this one does not spin on a ring nobody announces.
        let fd = fd.ok_or_else(|| refuse(format!("vring {index}: a kick descriptor is needed")))?;
        let kick = notifier(fd)?;
        if self.is_running(index) {
            return self.plane.set_kick(index, kick).map_err(refuse);
        }
        self.start(index, kick)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (index, _) = self.vring(u32::from(index))?;
        let call = self.listed(fd)?;
        if self.is_running(index) {
            self.plane
                .set_call(index, duplicate(call.as_ref())?)
                .map_err(refuse)?;
        }
        self.vring(u32::from(index))?.1.call = call;
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (index, _) = self.vring(u32::from(index))?;
        let err = self.listed(fd)?;
        if self.is_running(index) {
            self.plane
                .set_err(index, duplicate(err.as_ref())?)
                .map_err(refuse)?;
        }
        self.vring(u32::from(index))?.1.err = err;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(PROTOCOL_FEATURES)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !PROTOCOL_FEATURES.bits();
        if unknown != 0 {
            return Err(refuse(format!(
                "protocol features {unknown:#x} were not offered"
            )));
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(self.plane.device().num_queues()))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let (index, vring) = self.vring(index)?;
        vring.enabled = enable;
        if self.is_running(index) {
            self.plane.enable_queue(index, enable).map_err(refuse)?;
        }
        Ok(())
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let config = self.plane.config_space();
        // The error becomes a reply of zero length (C11).
        config
            .read(offset, size)
            .map(<[u8]>::to_vec)
            .ok_or_else(|| refuse(format!("config space {offset}+{size} is out of bounds")))
    }

    /// Only `writeback` can be written (C13).
    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.plane.write_config(offset, buf).map_err(refuse)
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("this is no GPU"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("SHARED_OBJECT is not offered"))
    }

    fn get_inflight_fd(
        &mut self,
        _inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("INFLIGHT_SHMFD is not offered"))
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("INFLIGHT_SHMFD is not offered"))
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<vhost::VhostUserMemoryRegionBase>> {
        let region = RegionConfig {
            guest_addr: GuestAddress(region.guest_phys_addr),
            size: region.memory_size,
            frontend_addr: region.user_addr,
            file: fd,
            mmap_offset: region.mmap_offset,
        };
        self.replace_memory(self.memory.with_region(region).map_err(refuse)?)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let (addr, size) = (GuestAddress(region.guest_phys_addr), region.memory_size);
        let user_addr = region.user_addr;
        let memory = self
            .memory
            .without_region(addr, size, user_addr)
            .map_err(refuse)?;
        self.replace_memory(memory)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("DEVICE_STATE is not offered"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("DEVICE_STATE is not offered"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("SHMEM is not offered"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("LOG_SHMFD is not offered"))
    }
}
