//! Rings: how they are set up, started, changed and stopped.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use event_poll::EventNotifier;
use vring::{RingBase, RingFeatures};

use super::{Backend, Refused, Result};
use crate::dataplane::QueueSetup;
use crate::notifier::Notifier;
use crate::vhost_user::handed::Listed;
use crate::vhost_user::message::feature;
use crate::vhost_user::request::{VringAddress, VringFd, VringWord};
use crate::vhost_user::vring_state::{FrontendAddresses, VringState};

fn notifier(fd: OwnedFd) -> Result<EventNotifier> {
    EventNotifier::from_fd(fd).map_err(Refused::because)
}

fn duplicate(of: Option<&Listed>) -> Result<Option<Box<dyn Notifier>>> {
    let Some(of) = of else {
        return Ok(None);
    };
    let duplicate = of.notifier().try_clone().map_err(Refused::because)?;
    Ok(Some(Box::new(duplicate)))
}

impl Backend {
    pub(super) fn listed(&self, fd: Option<OwnedFd>) -> Result<Option<Listed>> {
        let Some(fd) = fd else {
            return Ok(None);
        };
        let listed = self.handed.list(notifier(fd)?);
        listed.map(Some).map_err(Refused::because)
    }

    /// The ring and its checked index (row R13: compared before it is narrowed).
    fn vring(&mut self, index: u32) -> Result<(u16, &mut VringState)> {
        let num_queues = self.vrings.len();
        let narrow = u16::try_from(index).ok();
        narrow
            .and_then(|narrow| Some((narrow, self.vrings.get_mut(usize::from(narrow))?)))
            .ok_or_else(|| Refused::because(format!("vring {index} of a device with {num_queues}")))
    }

    fn is_running(&self, index: u16) -> bool {
        self.plane.is_running(index).unwrap_or(false)
    }

    pub(super) fn any_running(&self) -> bool {
        (0..self.plane.device().num_queues()).any(|index| self.is_running(index))
    }

    /// A ring's configuration cannot change under it (row R9, CVE-2026-5747).
    fn stopped_vring(&mut self, index: u32) -> Result<&mut VringState> {
        let (narrow, _) = self.vring(index)?;
        if self.is_running(narrow) {
            return Err(Refused::because(format!("vring {index} is running")));
        }
        Ok(self.vring(index)?.1)
    }

    fn has_protocol_features(&self) -> bool {
        self.features & feature::PROTOCOL_FEATURES != 0
    }

    fn start(&mut self, index: u16, kick: Option<EventNotifier>) -> Result<()> {
        // Row C6.
        let enabled_at_once = !self.has_protocol_features();
        let features = self.features;
        let memory = Arc::clone(&self.memory);
        let inflight = self.inflight_of(index)?;
        let (_, vring) = self.vring(u32::from(index))?;
        // Row R11.
        let missing = |what| Refused::because(format!("vring {index} has no {what} yet"));
        let size = vring.size.ok_or_else(|| missing("size"))?;
        let addresses = vring.addresses.ok_or_else(|| missing("addresses"))?;
        let addresses = addresses
            .to_guest(&memory)
            .ok_or_else(|| Refused::because(format!("vring {index} is not in the memory table")))?;
        let setup = QueueSetup {
            size,
            addresses,
            base: vring.base(features).map_err(Refused::because)?,
            features,
            kick,
            call: duplicate(vring.call.as_ref())?,
            err: duplicate(vring.err.as_ref())?,
            enabled: vring.enabled || enabled_at_once,
            inflight,
        };
        self.acquire_image()?;
        self.plane
            .start_queue(index, setup)
            .map_err(Refused::because)?;
        self.rings_changed();
        tracing::debug!(vring = index, size, "started");
        Ok(())
    }

    fn stop(&mut self, index: u16) -> Result<()> {
        if self.is_running(index) {
            let base = self.plane.stop_queue(index).map_err(Refused::because)?;
            self.vring(u32::from(index))?.1.base = Some(base.to_vhost_user());
            self.rings_changed();
            tracing::debug!(vring = index, ?base, "stopped");
            self.hand_over();
        }
        Ok(())
    }

    /// Stops and disables every ring. Row C3: what RESET_OWNER, which the specification deprecates, does.
    pub(super) fn stop_all(&mut self) -> Result<()> {
        for index in 0..self.plane.device().num_queues() {
            self.stop(index)?;
            self.vring(u32::from(index))?.1.enabled = false;
        }
        Ok(())
    }

    pub(super) fn set_vring_num(&mut self, VringWord { index, num }: VringWord) -> Result<()> {
        let max = u32::from(self.plane.device().max_queue_size().get());
        let vring = self.stopped_vring(index)?;
        // virtio 1.3 §2.7: a power of two. R1: 0 must be refused aloud, not silently kept away.
        if !num.is_power_of_two() || num > max {
            return Err(Refused::because(format!(
                "vring {index}: size {num}, not a power of two up to {max}"
            )));
        }
        vring.size = Some(num);
        Ok(())
    }

    pub(super) fn set_vring_addr(&mut self, address: VringAddress) -> Result<()> {
        /// VHOST_VRING_F_LOG: with the log in force, the used ring is logged like all else that is written.
        const LOG: u32 = 1;
        let index = address.index;
        let (narrow, _) = self.vring(index)?;
        // R12
        let known = if self.offered() & feature::LOG_ALL == 0 {
            0
        } else {
            LOG
        };
        if address.flags & !known != 0 {
            return Err(Refused::because(format!(
                "vring {index}: flags {:#x} were not offered",
                address.flags
            )));
        }
        let addresses = FrontendAddresses {
            descriptor: address.descriptor,
            available: address.available,
            used: address.used,
        };
        // QEMU repeats those of a running ring to set the flag.
        let running = self.is_running(narrow);
        if running && self.vring(index)?.1.addresses == Some(addresses) {
            return Ok(());
        }
        let memory = Arc::clone(&self.memory);
        let vring = self.stopped_vring(index)?;
        // R4 and R5 are for the start to find, when the size is known.
        if addresses.to_guest(&memory).is_none() {
            return Err(Refused::because(format!(
                "vring {index} is not in the memory table"
            )));
        }
        vring.addresses = Some(addresses);
        Ok(())
    }

    pub(super) fn set_vring_base(&mut self, VringWord { index, num }: VringWord) -> Result<()> {
        let features = RingFeatures::from_virtio(self.features);
        let vring = self.stopped_vring(index)?;
        // R10: a split ring's index has 16 bits; cutting off the rest would start elsewhere.
        RingBase::from_vhost_user(num, features)
            .map_err(|error| Refused::because(format!("vring {index}: {error}")))?;
        vring.base = Some(num);
        Ok(())
    }

    /// Stops the ring, drains it, publishes what was in flight, and only then says where it stands (row X1).
    pub(super) fn get_vring_base(&mut self, index: u32) -> Result<u32> {
        let (narrow, _) = self.vring(index)?;
        self.stop(narrow)?;
        let features = self.features;
        Ok(self.vring(index)?.1.reported_base(features))
    }

    pub(super) fn set_vring_kick(&mut self, ring: VringFd<OwnedFd>) -> Result<()> {
        let (index, _) = self.vring(u32::from(ring.index))?;
        // F4: without a descriptor the ring is looked at unasked.
        let kick = ring.fd.map(notifier).transpose()?;
        if self.is_running(index) {
            return self.plane.set_kick(index, kick).map_err(Refused::because);
        }
        self.start(index, kick)
    }

    /// Signalled at once, whether the ring runs or is to run later: one that was killed, or whose front-end was away,
    /// may have given requests back and not told of it, and if these were all the guest waits for, nothing else would.
    pub(super) fn set_vring_call(&mut self, ring: VringFd<OwnedFd>) -> Result<()> {
        let (index, _) = self.vring(u32::from(ring.index))?;
        let call = self.listed(ring.fd)?;
        if self.is_running(index) {
            self.plane
                .set_call(index, duplicate(call.as_ref())?)
                .map_err(Refused::because)?;
        } else if let Some(call) = &call
            && let Err(error) = call.notify()
        {
            tracing::debug!(%error, "the call descriptor cannot be signalled");
        }
        self.vring(u32::from(index))?.1.call = call;
        Ok(())
    }

    pub(super) fn set_vring_err(&mut self, ring: VringFd<OwnedFd>) -> Result<()> {
        let (index, _) = self.vring(u32::from(ring.index))?;
        let err = self.listed(ring.fd)?;
        if self.is_running(index) {
            self.plane
                .set_err(index, duplicate(err.as_ref())?)
                .map_err(Refused::because)?;
        }
        self.vring(u32::from(index))?.1.err = err;
        Ok(())
    }

    /// Row C9.
    pub(super) fn set_vring_enable(&mut self, VringWord { index, num }: VringWord) -> Result<()> {
        let enable = match num {
            0 => false,
            1 => true,
            _ => {
                return Err(Refused::because(format!(
                    "vring {index}: enable {num}, neither 0 nor 1"
                )));
            }
        };
        if !self.has_protocol_features() {
            return Err(Refused::because(
                "without VHOST_USER_F_PROTOCOL_FEATURES rings are always enabled",
            ));
        }
        let (index, vring) = self.vring(index)?;
        vring.enabled = enable;
        if self.is_running(index) {
            self.plane
                .enable_queue(index, enable)
                .map_err(Refused::because)?;
        }
        Ok(())
    }
}
