//! What outlives this process or this host: the log of written pages for a live migration, and the record of
//! requests in flight for a restart.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hostmem::DirtyLog;

use super::{Answer, Backend, Refused, Result};
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
        let log = Arc::new(log);
        if self.features & feature::LOG_ALL != 0 {
            self.memory
                .start_log(Arc::clone(&log))
                .map_err(Refused::because)?;
        }
        self.log = Some(log);
        Ok(Reply::Log { size, offset }.into())
    }

    /// Puts the log in force or out of it, as the features say. Between two batches of a data thread is not needed:
    /// see [`hostmem::MemoryMap::start_log`].
    pub(super) fn log_as(&mut self, features: u64) -> Result<()> {
        match (&self.log, features & feature::LOG_ALL != 0) {
            (Some(log), true) => {
                self.memory
                    .start_log(Arc::clone(log))
                    .map_err(Refused::because)?;
            }
            (_, false) => drop(self.memory.stop_log()),
            (None, true) => {}
        }
        Ok(())
    }

    /// The descriptor is to be signalled when something has been logged.
    pub(super) fn set_log_fd(&mut self, _fd: OwnedFd) -> Result<()> {
        Err(Refused::because("logging of written pages is not offered"))
    }

    /// Makes a region for `num_queues` rings of at most `queue_size` entries. `padded` goes into the reply.
    pub(super) fn get_inflight_fd(
        &mut self,
        _num_queues: u16,
        _queue_size: u16,
        _padded: bool,
    ) -> Result<Answer> {
        Err(Refused::because(
            "a record of requests in flight is not offered",
        ))
    }

    /// Takes a region over (rows K1, K2), before the rings start.
    pub(super) fn set_inflight_fd(&mut self, _area: InflightArea, _fd: OwnedFd) -> Result<()> {
        Err(Refused::because(
            "a record of requests in flight is not offered",
        ))
    }
}
