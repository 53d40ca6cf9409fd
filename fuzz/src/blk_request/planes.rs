//! The devices that run in this process, each with its data thread, started when first asked for.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex};

use blk_dataplane::{Backing, Caching, DataPlane, Device, DeviceOptions, Image, ImageOptions};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::input::DeviceKind;
use crate::naive_memory::NaiveMemory;

/// Size of every disk.
pub(super) const SECTORS: u64 = 64;
/// In bytes.
pub(super) const CAPACITY: usize = 512 * 64;
const _: () = assert!(CAPACITY as u64 == 512 * SECTORS);

/// Bytes of the image after its last whole sector, which are not part of the disk
/// (hostile-inputs I8).
const TAIL: usize = 100;

/// Start and length of guest memory's regions, which are neighbours.
pub(super) const REGIONS: [(u64, usize); 2] = [(0, 0x1_0000), (0x1_0000, 0x8000)];

/// Twenty bytes: no NUL.
pub(super) const SERIAL: &str = "serial-of-20-bytes!!";

pub(super) type Memory = GuestMemoryMmap<()>;

/// Everything that outlives an input.
#[derive(Debug)]
pub(super) struct World {
    pub(super) memory: Arc<Memory>,
    pub(super) naive: NaiveMemory,
    planes: BTreeMap<DeviceKind, Served>,
}

pub(super) static WORLD: LazyLock<Mutex<World>> = LazyLock::new(|| {
    let ranges = REGIONS.map(|(at, len)| (GuestAddress(at), len));
    Mutex::new(World {
        memory: Arc::new(Memory::from_ranges(&ranges).unwrap()),
        naive: NaiveMemory::new(&REGIONS),
        planes: BTreeMap::new(),
    })
});

impl World {
    pub(super) fn device(&mut self, kind: DeviceKind) -> (&mut Served, &mut NaiveMemory) {
        let served = self
            .planes
            .entry(kind)
            .or_insert_with(|| Served::new(kind, Arc::clone(&self.memory)));
        (served, &mut self.naive)
    }
}

/// A running device and the file behind it.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) plane: DataPlane<Memory>,
    /// None for the null device.
    file: Option<File>,
    /// What the file should hold, its tail included.
    pub(super) disk: Vec<u8>,
    pub(super) read_only: bool,
    /// What direct I/O demands of sectors and lengths.
    pub(super) block_size: u64,
}

impl Served {
    fn new(kind: DeviceKind, memory: Arc<Memory>) -> Self {
        let read_only = kind == DeviceKind::ReadOnly;
        let mut file = None;
        let mut block_size = 512;
        let backing = if kind == DeviceKind::Null {
            Backing::null_zeroes((CAPACITY + 100) as u64)
        } else {
            let memfd = File::from(memfd_create("fuzz-image", MFdFlags::MFD_CLOEXEC).unwrap());
            memfd.write_all_at(&fresh(kind), 0).unwrap();
            let path = format!("/proc/self/fd/{}", memfd.as_raw_fd());
            let buffered = kind != DeviceKind::Direct;
            let options = ImageOptions {
                read_only,
                buffered,
                ..ImageOptions::default()
            };
            let image = Image::open(Path::new(&path), &options).unwrap();
            if kind == DeviceKind::Direct && *image.caching() != Caching::Direct {
                eprintln!("no direct I/O on tmpfs here: {:?}", image.caching());
            }
            block_size = u64::from(image.block_size());
            file = Some(memfd);
            Backing::Image(image)
        };
        let options = DeviceOptions {
            serial: SERIAL.into(),
            ..DeviceOptions::default()
        };
        let device = Device::new(backing, &options).unwrap();
        Self {
            plane: DataPlane::start(&device, memory).unwrap(),
            file,
            disk: fresh(kind),
            read_only,
            block_size,
        }
    }

    pub(super) fn stores(&self) -> bool {
        self.file.is_some() && !self.read_only
    }

    /// The content every input begins with.
    pub(super) fn reset(&mut self, kind: DeviceKind) {
        let fresh = fresh(kind);
        if self.disk != fresh {
            if let Some(file) = &self.file {
                file.write_all_at(&fresh, 0).unwrap();
            }
            self.disk = fresh;
        }
    }

    /// What the file holds, or what it should hold if there is none.
    pub(super) fn content(&self) -> Vec<u8> {
        let mut found = self.disk.clone();
        if let Some(file) = &self.file {
            file.read_exact_at(&mut found, 0).unwrap();
        }
        found
    }
}

/// No two sectors alike; the null device has zeroes.
fn fresh(kind: DeviceKind) -> Vec<u8> {
    let byte = |at: usize| match kind {
        DeviceKind::Null => 0,
        _ => (at ^ (at >> 9)).to_le_bytes()[0],
    };
    (0..CAPACITY + TAIL).map(byte).collect()
}
