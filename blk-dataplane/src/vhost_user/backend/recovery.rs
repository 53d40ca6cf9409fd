//! What outlives this process or this host: the log of written pages for a live migration, and the record of
//! requests in flight for a restart.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hostmem::{DirtyLog, LogError};
use vm_memory::GuestMemoryBackend;

use super::{Answer, Backend, Refused, Result};
use crate::inflight::InflightRegion;
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
            self.start_log(Arc::clone(&log))?;
        }
        self.log = Some(log);
        Ok(Reply::Log { size, offset }.into())
    }

    /// Puts the log in force or out of it, as the features say.
    pub(super) fn log_as(&mut self, features: u64) -> Result<()> {
        match (&self.log, features & feature::LOG_ALL != 0) {
            (Some(log), true) => self.start_log(Arc::clone(log)),
            (_, false) => {
                self.memory.stop_log();
                // Last: what is marked without a log goes nowhere.
                Ok(self.plane.mark_dirty_pages(false)?)
            }
            (None, true) => Ok(()),
        }
    }

    /// Between two batches of a data thread is not needed: see [`hostmem::MemoryMap::start_log`].
    fn start_log(&mut self, log: Arc<DirtyLog>) -> Result<()> {
        // First: a read that completes once there is a log is in it.
        self.plane.mark_dirty_pages(true)?;
        self.memory.start_log(log).map_err(Refused::because)?;
        Ok(())
    }

    /// The descriptor is to be signalled when something has been logged. No front-end known sends one: the log is read
    /// when a pass over memory is due.
    pub(super) fn set_log_fd(&mut self, _fd: OwnedFd) -> Result<()> {
        Err(Refused::because(
            "nothing is signalled when pages are logged; the log is to be read",
        ))
    }

    /// Makes a region for `num_queues` rings of at most `queue_size` entries. `padded` goes into the reply.
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

    /// Takes a region over (rows K1, K2), before the rings start. Nothing in it is looked at before they do.
    pub(super) fn set_inflight_fd(&mut self, area: InflightArea, fd: OwnedFd) -> Result<()> {
        let InflightArea {
            size,
            offset,
            num_queues,
            queue_size,
        } = area;
        self.check_inflight(num_queues, queue_size)?;
        if self.any_running() {
            return Err(Refused::because(
                "a record of requests in flight cannot be replaced while rings run",
            ));
        }
        let region = InflightRegion::map(File::from(fd), offset, size, num_queues, queue_size);
        self.inflight = Some(region.map_err(Refused::because)?);
        Ok(())
    }

    /// CVE-2021-3839: more queues than there are, or larger ones.
    fn check_inflight(&self, num_queues: u16, queue_size: u16) -> Result<()> {
        let device = self.plane.device();
        if num_queues > device.num_queues() || queue_size > device.max_queue_size().get() {
            return Err(Refused::because(format!(
                "a record for {num_queues} queues of {queue_size} entries of a device with {} of {}",
                device.num_queues(),
                device.max_queue_size()
            )));
        }
        Ok(())
    }
}
