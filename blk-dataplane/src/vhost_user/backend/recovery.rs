//! What outlives this process or this host: the log of written pages for a live migration, and the record of
//! requests in flight for a restart.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hostmem::{DirtyLog, LogError};
use vm_memory::GuestMemoryBackend;

use super::{Answer, Backend, Refused, Result};
use crate::device::Backing;
use crate::inflight::{InflightQueue, InflightRegion};
use crate::notifier::Notifier;
use crate::vhost_user::message::{InflightArea, Reply, feature};
use crate::vhost_user::request::LogArea;

impl Backend {
    /// Takes the log over in the place of one before it (row C18). Written to while VHOST_F_LOG_ALL is negotiated,
    /// which a front-end may do before and after.
    ///
    /// The specification wants a reply and does not say which. The log's description as it came is what rust-vmm's
    /// front-end takes; QEMU takes anything.
    pub(super) fn set_log_base(&mut self, area: LogArea, fd: OwnedFd) -> Result<Answer> {
        let LogArea { size, offset } = area;
        let log = DirtyLog::shared(File::from(fd), offset, size).map_err(Refused::because)?;
        let last = self.memory.last_addr();
        // CVE-2019-14835. Asked again when it is put in force, and of memory that is added then.
        if self.memory.num_regions() > 0 && !log.covers(last) {
            return Err(Refused::because(LogError::TooSmall { size, last }));
        }
        let log = Arc::new(log);
        if self.features & feature::LOG_ALL != 0 {
            self.start_log(&log)?;
        }
        self.log = Some(log);
        Ok(Reply::Log { size, offset }.into())
    }

    /// Puts the log in force or out of it, as the features say, while rings run or not.
    pub(super) fn log_as(&mut self, features: u64) -> Result<()> {
        match (self.log.clone(), features & feature::LOG_ALL != 0) {
            (Some(log), true) => self.start_log(&log),
            (None, true) => Ok(()),
            (_, false) => {
                drop(self.memory.stop_log());
                self.plane.signal_dirty(None)?;
                Ok(self.plane.mark_dirty_pages(false)?)
            }
        }
    }

    fn start_log(&mut self, log: &Arc<DirtyLog>) -> Result<()> {
        // First: what a read in flight writes from the moment on at which the log is in force must be marked.
        self.plane.mark_dirty_pages(true)?;
        self.memory
            .start_log(Arc::clone(log))
            .map_err(Refused::because)?;
        self.signal_log()
    }

    fn signal_log(&mut self) -> Result<()> {
        let notifier = self.log_signal.clone();
        let notifier = notifier.map(|listed| -> Arc<dyn Notifier + Sync> { listed });
        Ok(self.plane.signal_dirty(notifier)?)
    }

    /// The descriptor is signalled when something has been logged. For front-ends that wait for that: those that
    /// copy a guest round by round, as QEMU does, have no use for it.
    pub(super) fn set_log_fd(&mut self, fd: OwnedFd) -> Result<()> {
        self.log_signal = self.listed(Some(fd))?.map(Arc::new);
        if self.memory.log().is_some() {
            self.signal_log()?;
        }
        Ok(())
    }

    /// Keeps others off the image while rings run. At most once: it was taken when it was opened, but for a guest that
    /// comes from elsewhere.
    pub(super) fn acquire_image(&self) -> Result<()> {
        match self.plane.device().backing() {
            Backing::Image(image) => image.acquire().map_err(|error| {
                tracing::error!(%error, "the image cannot be served");
                Refused::because(error)
            }),
            _ => Ok(()),
        }
    }

    /// The last ring has stopped. If what it wrote was logged, the guest is leaving: it goes on elsewhere, and whoever
    /// serves it there may have the image by the time that the front-end is told (a front-end whose migration fails
    /// starts the rings again, which takes it back).
    pub(super) fn hand_over(&self) {
        let leaving = self.features & feature::LOG_ALL != 0 && self.log.is_some();
        let Backing::Image(image) = self.plane.device().backing() else {
            return;
        };
        if !leaving || self.any_running() {
            return;
        }
        match self.plane.sync() {
            Ok(()) => {
                image.release();
                tracing::info!("the guest is leaving: its image is not locked any more");
            }
            // Nobody is to read it elsewhere before it is there.
            Err(error) => {
                tracing::error!(%error, "the image cannot be written out, and stays locked");
            }
        }
    }

    /// Makes memory for the requests in flight of `num_queues` rings of at most `queue_size` entries. The front-end
    /// keeps it, and says with SET_INFLIGHT_FD that it is to be used.
    pub(super) fn get_inflight_fd(
        &mut self,
        num_queues: u16,
        queue_size: u16,
        padded: bool,
    ) -> Result<Answer> {
        self.check_inflight(num_queues, queue_size)?;
        let (file, size) =
            InflightRegion::create(num_queues, queue_size).map_err(Refused::because)?;
        let area = InflightArea {
            size,
            offset: 0,
            num_queues,
            queue_size,
        };
        Ok(Answer {
            reply: Reply::Inflight { area, padded },
            fd: Some(file.into()),
        })
    }

    /// Takes memory over in which a predecessor may have left what was in flight (rows K1, K2). Rings that start
    /// from then on serve that first, and record what is in flight.
    pub(super) fn set_inflight_fd(&mut self, area: InflightArea, fd: OwnedFd) -> Result<()> {
        if self.any_running() {
            return Err(Refused::because(
                "the record of requests in flight cannot change while rings run",
            ));
        }
        self.check_inflight(area.num_queues, area.queue_size)?;
        let region = InflightRegion::map(
            File::from(fd),
            area.offset,
            area.size,
            area.num_queues,
            area.queue_size,
        );
        self.inflight = Some(region.map_err(Refused::because)?);
        Ok(())
    }

    /// CVE-2021-3839: more queues than there are, or larger ones.
    fn check_inflight(&self, num_queues: u16, queue_size: u16) -> Result<()> {
        let device = self.plane.device();
        let (queues, entries) = (device.num_queues(), device.max_queue_size().get());
        if num_queues > queues || queue_size > entries {
            return Err(Refused::because(format!(
                "requests in flight of {num_queues} queues of {queue_size} entries, of a device with {queues} of \
                 {entries}"
            )));
        }
        Ok(())
    }

    /// The record of ring `index`, if records are kept. Those of rings that it has no place for would be lost.
    pub(super) fn inflight_of(&self, index: u16) -> Result<Option<InflightQueue>> {
        let Some(region) = &self.inflight else {
            return Ok(None);
        };
        let queue = region.queue(index).ok_or_else(|| {
            Refused::because(format!(
                "the record of requests in flight has no place for vring {index}"
            ))
        })?;
        Ok(Some(queue))
    }
}
