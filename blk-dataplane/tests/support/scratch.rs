//! What backs the devices under test.

use std::fs;
use std::path::PathBuf;

use blk_dataplane::{Backing, Device, DeviceOptions, Engine, Image, ImageOptions, ThreadOptions};
use tempfile::TempDir;

/// Where the device's content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// In the target directory, with direct I/O where its file system takes it.
    Disk,
    /// On a tmpfs.
    Shm,
    /// In the target directory, through the page cache.
    Buffered,
}

pub(crate) const KINDS: [Kind; 3] = [Kind::Disk, Kind::Shm, Kind::Buffered];

/// An image that vanishes with the test.
#[derive(Debug)]
pub(crate) struct Scratch {
    _dir: TempDir,
    pub(crate) path: PathBuf,
    kind: Kind,
}

impl Scratch {
    pub(crate) fn new(kind: Kind, content: &[u8]) -> Self {
        let parent = match kind {
            Kind::Disk | Kind::Buffered => env!("CARGO_TARGET_TMPDIR"),
            Kind::Shm => "/dev/shm",
        };
        let dir = TempDir::with_prefix_in("blk", parent).unwrap();
        let path = dir.path().join("disk.img");
        fs::write(&path, content).unwrap();
        Self {
            _dir: dir,
            path,
            kind,
        }
    }

    /// Of zeroes.
    pub(crate) fn zeroed(kind: Kind, len: usize) -> Self {
        Self::new(kind, &vec![0; len])
    }

    pub(crate) fn image(&self) -> Image {
        let options = ImageOptions {
            buffered: self.kind == Kind::Buffered,
            // A test may open its image several times.
            force_share: true,
            ..ImageOptions::default()
        };
        Image::open(&self.path, &options).unwrap()
    }

    pub(crate) fn device(&self) -> Device {
        Device::new(Backing::Image(self.image()), &options()).unwrap()
    }

    pub(crate) fn device_through(&self, engine: Engine) -> Device {
        let options = DeviceOptions {
            engine,
            ..options()
        };
        Device::new(Backing::Image(self.image()), &options).unwrap()
    }

    pub(crate) fn read_only_device(&self) -> Device {
        let image_options = ImageOptions {
            read_only: true,
            force_share: true,
            ..ImageOptions::default()
        };
        let image = Image::open(&self.path, &image_options).unwrap();
        Device::new(Backing::Image(image), &options()).unwrap()
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        fs::read(&self.path).unwrap()
    }

    pub(crate) fn truncate(&self, len: u64) {
        let file = fs::OpenOptions::new().write(true).open(&self.path).unwrap();
        file.set_len(len).unwrap();
    }
}

pub(crate) const SERIAL: &str = "serial-of-20-bytes!!";

pub(crate) fn options() -> DeviceOptions {
    DeviceOptions {
        serial: SERIAL.to_owned(),
        num_queues: 4,
        ..DeviceOptions::default()
    }
}

/// A device with 4 queues on `count` data threads.
pub(crate) fn on_threads(backing: Backing, count: u16) -> Device {
    let threads = ThreadOptions {
        count: Some(count),
        ..ThreadOptions::default()
    };
    let options = DeviceOptions {
        threads,
        ..options()
    };
    Device::new(backing, &options).unwrap()
}

pub(crate) fn null_device(capacity: u64) -> Device {
    Device::new(Backing::null_zeroes(capacity), &options()).unwrap()
}
