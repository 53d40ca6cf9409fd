//! A device over a disk that a test writes: one that has faults, or loses power.
//!
//! ```
//! use std::sync::Arc;
//! use blk_dataplane::testing::TestDisk;
//! use blk_dataplane::{Backing, DataPlane, Device, DeviceOptions};
//! use ioq::testing::PowerLossDisk;
//! use vm_memory::{GuestAddress, GuestMemoryMmap};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let disk = PowerLossDisk::new(vec![0; 1 << 20], 1);
//! let backing = Backing::Testing(TestDisk::from(&disk));
//! let device = Device::new(backing, &DeviceOptions::default())?;
//! let memory: Arc<GuestMemoryMmap> =
//!     Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)])?);
//! let plane = DataPlane::start(&device, memory)?;
//! // Queues, requests, disk.step(), and at some moment:
//! let found = disk.lose_power();
//! assert_eq!(found.len(), 1 << 20);
//! assert!(plane.stop().is_err(), "nothing can be written out any more");
//! # Ok(())
//! # }
//! ```

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use ioq::testing::{Disk, PowerLossDisk, Waker, queue_over};
use ioq::{Config, IoQueue, SetupError};

/// Makes a data thread's end of a disk.
type MakeEnd = dyn Fn(Waker) -> Box<dyn Disk> + Send + Sync;

/// A disk of a test's own. Clones are the same disk.
#[derive(Clone)]
pub struct TestDisk {
    capacity: u64,
    alignment: u32,
    buffered: bool,
    make_end: Arc<MakeEnd>,
}

impl fmt::Debug for TestDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestDisk")
            .field("capacity", &self.capacity)
            .field("alignment", &self.alignment)
            .finish_non_exhaustive()
    }
}

impl TestDisk {
    /// A disk of `capacity` bytes. Each data thread puts its I/O queue on an end that `make_end` makes for it.
    pub fn new(
        capacity: u64,
        make_end: impl Fn(Waker) -> Box<dyn Disk> + Send + Sync + 'static,
    ) -> Self {
        Self {
            capacity,
            alignment: 1,
            buffered: false,
            make_end: Arc::new(make_end),
        }
    }

    /// The same disk, whose addresses and lengths of memory must be multiples of `alignment` bytes, a power
    /// of two: as direct I/O demands.
    #[must_use]
    pub fn aligned(mut self, alignment: u32) -> Self {
        self.alignment = alignment;
        self
    }

    /// The same disk behind a page cache: what a failed fdatasync should have written may be forgotten.
    #[must_use]
    pub fn buffered(mut self) -> Self {
        self.buffered = true;
        self
    }

    pub(crate) fn is_buffered(&self) -> bool {
        self.buffered
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.capacity
    }

    pub(crate) fn alignment(&self) -> u32 {
        self.alignment
    }

    pub(crate) fn queue<O>(&self, config: &Config) -> Result<IoQueue<O>, SetupError> {
        queue_over(|waker| (self.make_end)(waker), config)
    }

    /// An fdatasync from start to end.
    pub(crate) fn sync(&self) -> io::Result<()> {
        let config = Config {
            depth: 1,
            max_segments: 1,
        };
        let mut queue = self.queue(&config).map_err(io::Error::other)?;
        queue
            .queue_fdatasync(())
            .map_err(|error| io::Error::other(error.to_string()))?;
        let mut done = None;
        while done.is_none() {
            queue.submit();
            queue.reap(|(), result| done = Some(result));
            // Whoever moves the disk on is another thread.
            std::thread::sleep(Duration::from_micros(100));
        }
        match done {
            Some(Err(error)) => Err(io::Error::other(error)),
            Some(Ok(_)) | None => Ok(()),
        }
    }
}

impl From<&PowerLossDisk> for TestDisk {
    fn from(disk: &PowerLossDisk) -> Self {
        let end = disk.clone();
        Self::new(disk.capacity(), move |waker| Box::new(end.end(waker)))
    }
}
