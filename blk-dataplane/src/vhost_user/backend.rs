//! What each request does to the device. The session has seen to it that it may be sent.

mod memory;
mod recovery;
mod vrings;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use hostmem::{DirtyLog, MAX_REGIONS, MemoryMap};

use super::config_channel::ConfigChannel;
use super::handed::{Handed, Listed};
use super::message::{CONFIG_MAX, Reply, feature, protocol};
use super::request::Request;
use super::vring_state::VringState;
use crate::capacity::ConfigSubscription;
use crate::data_thread::StartError;
use crate::dataplane::{DataPlane, Gone, StopError};
use crate::inflight::InflightRegion;

/// Protocol features offered: each is served in full.
const PROTOCOL_FEATURES: u64 = protocol::MQ
    | protocol::CONFIG
    | protocol::REPLY_ACK
    | protocol::BACKEND_REQ
    | protocol::LOG_SHMFD
    | protocol::INFLIGHT_SHMFD
    | protocol::RESET_DEVICE
    | protocol::CONFIGURE_MEM_SLOTS
    | protocol::STATUS;

/// Bit of the device status by which a device says that it takes the features (virtio 1.3 §2.1).
const STATUS_FEATURES_OK: u8 = 8;

/// One front-end's device.
#[derive(Debug)]
pub(super) struct Backend {
    plane: DataPlane<MemoryMap>,
    memory: Arc<MemoryMap>,
    /// Maps that were replaced while requests were in flight in them.
    retired: Vec<Arc<MemoryMap>>,
    vrings: Box<[VringState]>,
    /// Call and err descriptors that the data thread has.
    handed: Arc<Handed>,
    /// Tells the front-end of a new capacity, if it has given a socket to do so.
    told: Option<(ConfigChannel, ConfigSubscription)>,
    /// Negotiated feature bits.
    features: u64,
    /// The latest features that the front-end wanted were not to be had.
    features_refused: bool,
    /// The device status, as the driver has set it.
    status: u8,
    /// Of written pages; in force if the features say so.
    log: Option<Arc<DirtyLog>>,
    /// Signalled when something was logged.
    log_signal: Option<Arc<Listed>>,
    /// Where a record of the requests in flight is kept, if the front-end keeps it for a successor.
    inflight: Option<InflightRegion>,
}

/// A message was refused, and nothing has changed.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(super) struct Refused(Box<dyn std::error::Error + Send + Sync>);

impl Refused {
    pub(super) fn because(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self(why.into())
    }
}

impl From<super::request::Malformed> for Refused {
    fn from(malformed: super::request::Malformed) -> Self {
        Self::because(malformed)
    }
}

impl From<Gone> for Refused {
    fn from(gone: Gone) -> Self {
        Self::because(gone)
    }
}

type Result<T> = std::result::Result<T, Refused>;

/// A reply, and the descriptor that goes with it.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) reply: Reply,
    pub(super) fd: Option<OwnedFd>,
}

impl From<Reply> for Answer {
    fn from(reply: Reply) -> Self {
        Self { reply, fd: None }
    }
}

impl Backend {
    /// A device whose front-end has said nothing yet. `plane` has no queue and an empty memory map.
    ///
    /// # Errors
    /// The data thread has ended, which is a bug.
    pub(super) fn new(
        mut plane: DataPlane<MemoryMap>,
        memory: Arc<MemoryMap>,
        handed: Arc<Handed>,
    ) -> std::result::Result<Self, StartError> {
        // Nothing is logged yet.
        plane
            .mark_dirty_pages(false)
            .map_err(|Gone| StartError::Ended)?;
        let vrings = (0..plane.device().num_queues())
            .map(|_| VringState::default())
            .collect();
        Ok(Self {
            plane,
            memory,
            retired: Vec::new(),
            vrings,
            handed,
            told: None,
            features: 0,
            features_refused: false,
            status: 0,
            log: None,
            log_signal: None,
            inflight: None,
        })
    }

    /// Whether the data threads live. They end early only after a bug in this crate.
    pub(super) fn is_alive(&self) -> bool {
        self.plane.is_alive()
    }

    /// Drains and stops the device.
    pub(super) fn end(self) -> std::result::Result<(), StopError> {
        let Self {
            plane,
            vrings,
            told,
            retired,
            memory,
            log_signal,
            ..
        } = self;
        drop(told);
        let stopped = plane.stop();
        // Listed until nobody writes to their descriptors any more.
        drop((vrings, log_signal, retired, memory));
        stopped
    }

    pub(super) fn protocol_features(&self) -> u64 {
        PROTOCOL_FEATURES
    }

    fn offered(&self) -> u64 {
        self.plane.device().features() | feature::PROTOCOL_FEATURES | feature::LOG_ALL
    }

    /// Does what a message says, or nothing. Messages that concern the session alone do not come here.
    pub(super) fn carry_out(&mut self, request: Request<OwnedFd>) -> Result<Option<Answer>> {
        self.drop_retired_memory();
        let number = |number| Ok(Some(Reply::U64(number).into()));
        match request {
            Request::GetFeatures => return number(self.offered()),
            Request::SetFeatures(features) => self.set_features(features)?,
            // Idempotent (row C2): a front-end that reconnects through a proxy repeats it.
            Request::SetOwner => {}
            Request::ResetOwner => self.stop_all()?,
            Request::SetMemTable(regions) => self.set_mem_table(regions)?,
            Request::AddMemReg(region, fd) => self.add_mem_region(region, fd)?,
            Request::RemMemReg(region) => self.remove_mem_region(region)?,
            Request::GetMaxMemSlots => return number(MAX_REGIONS as u64),
            Request::SetVringNum(word) => self.set_vring_num(word)?,
            Request::SetVringAddr(address) => self.set_vring_addr(address)?,
            Request::SetVringBase(word) => self.set_vring_base(word)?,
            Request::GetVringBase(index) => {
                let num = self.get_vring_base(index)?;
                return Ok(Some(Reply::VringState { index, num }.into()));
            }
            Request::SetVringKick(ring) => self.set_vring_kick(ring)?,
            Request::SetVringCall(ring) => self.set_vring_call(ring)?,
            Request::SetVringErr(ring) => self.set_vring_err(ring)?,
            Request::SetVringEnable(word) => self.set_vring_enable(word)?,
            Request::GetQueueNum => return number(u64::from(self.plane.device().num_queues())),
            Request::SetBackendReqFd(fd) => self.set_backend_req_fd(fd)?,
            // Cloud Hypervisor counted from 0x100, where virtio-mmio has the space, from 2020 until January 2026
            // (cloud-hypervisor#7615). No other front-end can mean that by it: to the protocol the space ends there.
            Request::GetConfig {
                offset,
                size,
                flags,
            } => {
                let config = self.plane.config_space();
                let start = offset.checked_sub(CONFIG_MAX).unwrap_or(offset);
                let bytes = config.read(start, size).ok_or_else(|| {
                    Refused::because(format!("config space {offset}+{size} is out of bounds"))
                })?;
                let bytes = bytes.to_vec();
                return Ok(Some(
                    Reply::Config {
                        offset,
                        flags,
                        bytes,
                    }
                    .into(),
                ));
            }
            // Row C13: only `writeback` can be written.
            Request::SetConfig { offset, bytes } => self
                .plane
                .write_config(offset, &bytes)
                .map_err(Refused::because)?,
            Request::SetLogBase(area, fd) => return self.set_log_base(area, fd).map(Some),
            Request::SetLogFd(fd) => self.set_log_fd(fd)?,
            Request::GetInflightFd {
                num_queues,
                queue_size,
                padded,
            } => {
                return self
                    .get_inflight_fd(num_queues, queue_size, padded)
                    .map(Some);
            }
            Request::SetInflightFd(area, fd) => self.set_inflight_fd(area, fd)?,
            Request::ResetDevice => self.reset()?,
            Request::SetStatus(status) => self.set_status(status)?,
            Request::GetStatus => return number(u64::from(self.status)),
            Request::GetProtocolFeatures | Request::SetProtocolFeatures(_) => {
                return Err(Refused::because("no matter of the device"));
            }
        }
        Ok(None)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        self.features_refused = true;
        let unknown = features & !self.offered();
        if unknown != 0 {
            return Err(Refused::because(format!(
                "feature bits {unknown:#x} were not offered"
            )));
        }
        // Rings were set up under the old bits (row C5), but for logging, which is for those that run.
        let changed = features ^ self.features;
        if changed & !feature::LOG_ALL != 0 && self.any_running() {
            return Err(Refused::because("features cannot change while rings run"));
        }
        self.log_as(features)?;
        self.plane.accept_features(features)?;
        self.features = features;
        self.features_refused = false;
        Ok(())
    }

    /// The front-end is told of changes through this socket from now on, and no longer through one before it
    /// (row C15).
    fn set_backend_req_fd(&mut self, fd: OwnedFd) -> Result<()> {
        let channel = ConfigChannel::new(fd, !self.any_running())
            .ok_or_else(|| Refused::because("the descriptor is no Unix stream socket"))?;
        let device = self.plane.device();
        let subscription = device.on_config_change(Box::new(channel.clone()));
        self.told = Some((channel, subscription));
        Ok(())
    }

    /// A ring has started or stopped.
    fn rings_changed(&self) {
        if let Some((channel, _)) = &self.told {
            channel.set_suspended(!self.any_running());
        }
    }

    /// Row C17: 0 resets the device (virtio 1.3 §2.1). Any other is kept for the driver to read; rings run by
    /// SET_VRING_KICK and SET_VRING_ENABLE.
    fn set_status(&mut self, status: u64) -> Result<()> {
        let status = u8::try_from(status)
            .map_err(|_| Refused::because(format!("device status {status:#x}, of 8 bits")))?;
        if status == 0 {
            return self.reset();
        }
        self.status = if self.features_refused {
            status & !STATUS_FEATURES_OK
        } else {
            status
        };
        Ok(())
    }

    /// Back to how the device was when the front-end connected, except for what belongs to the connection: memory,
    /// and the descriptors by which the front-end is told. QEMU hands over call and err once, and expects them to
    /// outlive a reset.
    fn reset(&mut self) -> Result<()> {
        self.stop_all()?;
        for vring in &mut self.vrings {
            vring.reset();
        }
        self.plane.reset_config()?;
        self.log_as(0)?;
        self.features = 0;
        self.features_refused = false;
        self.status = 0;
        Ok(())
    }
}
