//! How worn the storage is (virtio 1.3 §5.2.6, `VIRTIO_BLK_T_GET_LIFETIME`), where it says so: eMMC and UFS.
//!
//! Reading it may wait for the device, so the data threads do not: they tell what a thread of its own has
//! read last, at most [`REFRESH_EVERY`] ago. It changes by steps of a tenth of the storage's life.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};

use crate::image::WearFiles;

/// Length of `struct virtio_blk_lifetime`: three 16-bit fields.
pub(crate) const LIFETIME_LEN: usize = 6;

/// Age at which it is read anew.
const REFRESH_EVERY: Duration = Duration::from_secs(60);

/// What the storage says, in the terms of its registers (JESD84-B50, 7.4.43 to 7.4.45), as the specification
/// wants it. 0: it does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wear {
    pre_eol: u8,
    type_a: u8,
    type_b: u8,
}

impl Wear {
    /// `pre_eol`: 1 normal, 2 warning (80 % of the reserve used), 3 urgent. `type_a`, `type_b`: tenths of the
    /// life used, begun; 11 when it has been exceeded. Other values are reserved, and mean nothing.
    pub(crate) fn new(pre_eol: u8, type_a: u8, type_b: u8) -> Self {
        let up_to = |max, value| if value <= max { value } else { 0 };
        Self {
            pre_eol: up_to(3, pre_eol),
            type_a: up_to(11, type_a),
            type_b: up_to(11, type_b),
        }
    }

    /// The structure, little endian.
    fn bytes(self) -> [u8; LIFETIME_LEN] {
        [self.pre_eol, 0, self.type_a, 0, self.type_b, 0]
    }
}

/// What was read last, for the data threads.
#[derive(Debug)]
pub(crate) struct Lifetime {
    files: WearFiles,
    /// The structure's bytes, the first the lowest.
    told: AtomicU64,
}

impl Lifetime {
    pub(crate) fn new(files: WearFiles) -> Self {
        let lifetime = Self {
            files,
            told: AtomicU64::new(0),
        };
        lifetime.refresh();
        lifetime
    }

    /// Reads it anew. If that fails, what was read before stays.
    fn refresh(&self) {
        if let Some(wear) = self.files.read() {
            let [a, b, c, d, e, f] = wear.bytes();
            let told = u64::from_le_bytes([a, b, c, d, e, f, 0, 0]);
            self.told.store(told, Ordering::Relaxed);
        } else {
            tracing::debug!("the storage no longer says how worn it is");
        }
    }

    /// `struct virtio_blk_lifetime`.
    pub(crate) fn bytes(&self) -> [u8; LIFETIME_LEN] {
        let [a, b, c, d, e, f, ..] = self.told.load(Ordering::Relaxed).to_le_bytes();
        [a, b, c, d, e, f]
    }
}

/// Reads it anew from time to time, on a thread of its own, until it is dropped.
#[derive(Debug)]
pub(crate) struct LifetimeWatch {
    /// Dropped: the thread ends, by itself, since it may be waiting for the device.
    _end: Sender<()>,
}

impl LifetimeWatch {
    pub(crate) fn start(lifetime: &Arc<Lifetime>) -> io::Result<Self> {
        Self::start_every(lifetime, REFRESH_EVERY)
    }

    fn start_every(lifetime: &Arc<Lifetime>, interval: Duration) -> io::Result<Self> {
        let (end, ended) = bounded(0);
        let lifetime = Arc::clone(lifetime);
        let watch = move || {
            // At once: the device may have been made long before it runs.
            loop {
                lifetime.refresh();
                if ended.recv_timeout(interval) != Err(RecvTimeoutError::Timeout) {
                    break;
                }
            }
        };
        std::thread::Builder::new()
            .name("blk-lifetime".into())
            .spawn(watch)?;
        Ok(Self { _end: end })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Instant;

    use super::*;

    fn write(directory: &Path, pre_eol: &str, life_time: &str) {
        std::fs::write(directory.join("pre_eol_info"), pre_eol).unwrap();
        std::fs::write(directory.join("life_time"), life_time).unwrap();
    }

    #[test]
    fn watch_follows_the_storage_until_it_is_dropped() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), "0x01", "0x01 0x02");
        let lifetime = Arc::new(Lifetime::new(WearFiles::of_mmc(directory.path())));
        assert_eq!(lifetime.bytes(), [1, 0, 1, 0, 2, 0]);
        let watch = LifetimeWatch::start_every(&lifetime, Duration::from_millis(1)).unwrap();
        write(directory.path(), "0x03", "0x0a 0x0b");
        let deadline = Instant::now() + Duration::from_secs(60);
        while lifetime.bytes() != [3, 0, 10, 0, 11, 0] {
            assert!(Instant::now() < deadline, "{:?}", lifetime.bytes());
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(watch);
        // The thread has the other.
        while Arc::strong_count(&lifetime) > 1 {
            assert!(Instant::now() < deadline, "the thread does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
        write(directory.path(), "gone", "");
        lifetime.refresh();
        assert_eq!(lifetime.bytes(), [3, 0, 10, 0, 11, 0], "what was known");
    }

    #[test]
    fn reserved_values_are_not_passed_on() {
        assert_eq!(Wear::new(4, 12, 255), Wear::default());
        assert_eq!(Wear::new(3, 11, 0).bytes(), [3, 0, 11, 0, 0, 0]);
    }
}
