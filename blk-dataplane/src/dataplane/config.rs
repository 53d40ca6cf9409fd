//! The configuration space of a running device.

use virtio_bindings::virtio_blk as blk;
use vm_memory::GuestMemoryBackend;

use super::{ConfigError, DataPlane, Gone};
use crate::config_space::{ConfigSpace, written_writeback};
use crate::data_thread::{CacheFeatures, Command};
use crate::device::{Backing, ResizeError, Resized, bit};

impl<M: GuestMemoryBackend + Send + Sync + 'static> DataPlane<M> {
    /// Tells the device which features the driver has accepted, before its first queue starts. It shows in
    /// the configuration space alone: a driver that takes CONFIG_WCE and not FLUSH finds the write cache off
    /// (virtio 1.3 §5.2.5.2). [`start_queue`](Self::start_queue) does the same.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn accept_features(&mut self, features: u64) -> Result<(), Gone> {
        let CacheFeatures { flush, config_wce } = CacheFeatures::of(features);
        if config_wce && !flush && self.writeback {
            self.tell_writeback(false)?;
        }
        Ok(())
    }

    /// The configuration space as the driver reads it now.
    #[must_use]
    pub fn config_space(&self) -> ConfigSpace {
        self.device.config_space_with(self.writeback)
    }

    /// A driver's write to the configuration space. One field can be written: `writeback`, one byte at
    /// offset 32, on a device that offers `VIRTIO_BLK_F_CONFIG_WCE`. Off (0): every write of a driver that
    /// has accepted that feature is on stable storage before it completes, and so is what was written
    /// before, when this returns. Any other value: on.
    ///
    /// # Errors
    /// See [`ConfigError`]; nothing has changed then.
    pub fn write_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), ConfigError> {
        let writeback = written_writeback(offset, bytes)
            .filter(|_| self.device.features() & bit(blk::VIRTIO_BLK_F_CONFIG_WCE) != 0)
            .ok_or(ConfigError::ReadOnly {
                offset,
                len: bytes.len(),
            })?;
        let was_on = self.writeback;
        self.tell_writeback(writeback)?;
        // Nobody will flush what the cache holds: that goes out now, after the threads have learnt that
        // what completes from here on must not stay in it.
        if was_on
            && !writeback
            && let Err(error) = self.sync()
        {
            self.tell_writeback(true)?;
            return Err(ConfigError::Sync(error));
        }
        Ok(())
    }

    /// Puts the configuration space back to what it is before a driver has come (virtio 1.3 §2.4.1): the write
    /// cache on. No queue runs.
    #[cfg(feature = "vhost-user")]
    pub(crate) fn reset_config(&mut self) -> Result<(), Gone> {
        if self.writeback {
            return Ok(());
        }
        self.tell_writeback(true)
    }

    fn tell_writeback(&mut self, writeback: bool) -> Result<(), Gone> {
        self.writeback = writeback;
        self.ask_all(|reply| Command::SetWriteback { writeback, reply })
    }

    /// [`Device::resize`](crate::Device::resize) of the device that runs.
    ///
    /// # Errors
    /// See [`ResizeError`].
    pub fn resize(&self) -> Result<Resized, ResizeError> {
        self.device.resize()
    }

    /// Writes the image out.
    pub(crate) fn sync(&self) -> std::io::Result<()> {
        let synced = match self.device.backing() {
            Backing::Image(image) if !image.is_read_only() => image.file().sync_data(),
            Backing::Image(_) | Backing::Null { .. } => Ok(()),
            #[cfg(feature = "testing")]
            Backing::Testing(disk) => disk.sync(),
        };
        self.device.write_back().judge(synced)
    }
}
