//! The files that regions map, and what should be in them.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use nix::fcntl::OFlag;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::input::Kind;

const LARGE_LEN: usize = 8 * 0x1000;
const ODD_LEN: usize = 3 * 0x1000 + 0x123;

/// A file with its content as it should be.
#[derive(Debug)]
struct Shared {
    file: File,
    content: Vec<u8>,
    dirty: bool,
}

impl Shared {
    fn new(name: &str, len: usize) -> Self {
        let file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC).unwrap());
        let content = pattern(len);
        file.write_all_at(&content, 0).unwrap();
        Self {
            file,
            content,
            dirty: false,
        }
    }

    fn reset(&mut self) {
        if std::mem::take(&mut self.dirty) {
            self.content = pattern(self.content.len());
            self.file.write_all_at(&self.content, 0).unwrap();
        }
    }

    fn compare(&self) {
        if !self.dirty {
            return;
        }
        let mut found = vec![0; self.content.len()];
        self.file.read_exact_at(&mut found, 0).unwrap();
        let wrong = (0..found.len()).find(|&at| found[at] != self.content[at]);
        assert_eq!(wrong, None, "the first byte of a file that is wrong");
    }
}

/// Bytes that tell where they are, and are not the same from page to page.
fn pattern(len: usize) -> Vec<u8> {
    let byte = |at: usize| (at ^ at >> 8 ^ at >> 12 << 5).to_le_bytes()[0];
    (0..len).map(byte).collect()
}

#[derive(Debug)]
pub(super) struct Files {
    large: Shared,
    odd: Shared,
    empty: File,
    read_only: File,
    write_only: File,
    path: File,
    directory: File,
    device: File,
}

impl Files {
    pub(super) fn new() -> Self {
        let large = Shared::new("fuzz-large", LARGE_LEN);
        let again = |options: &OpenOptions| {
            options
                .open(format!("/proc/self/fd/{}", large.file.as_raw_fd()))
                .unwrap()
        };
        Self {
            read_only: again(OpenOptions::new().read(true)),
            write_only: again(OpenOptions::new().write(true)),
            path: again(
                OpenOptions::new()
                    .read(true)
                    .custom_flags(OFlag::O_PATH.bits()),
            ),
            odd: Shared::new("fuzz-odd", ODD_LEN),
            empty: Shared::new("fuzz-empty", 0).file,
            directory: File::open("/").unwrap(),
            device: OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/null")
                .unwrap(),
            large,
        }
    }

    /// A descriptor to give away.
    pub(super) fn give(&self, kind: Kind) -> File {
        let file = match kind {
            Kind::Large => &self.large.file,
            Kind::Odd => &self.odd.file,
            Kind::Empty => &self.empty,
            Kind::ReadOnly => &self.read_only,
            Kind::WriteOnly => &self.write_only,
            Kind::Path => &self.path,
            Kind::Directory => &self.directory,
            Kind::Device => &self.device,
        };
        file.try_clone().unwrap()
    }

    /// The lowest number that is free: it rises when descriptors given away are not closed.
    pub(super) fn lowest_free(&self) -> RawFd {
        self.empty.try_clone().unwrap().as_raw_fd()
    }

    pub(super) fn len(kind: Kind) -> u64 {
        match kind {
            Kind::Odd => ODD_LEN as u64,
            Kind::Empty => 0,
            _ => LARGE_LEN as u64,
        }
    }

    pub(super) fn content(&self, kind: Kind) -> &[u8] {
        match kind {
            Kind::Odd => &self.odd.content,
            _ => &self.large.content,
        }
    }

    pub(super) fn set(&mut self, kind: Kind, at: u64, byte: u8) {
        let shared = match kind {
            Kind::Odd => &mut self.odd,
            _ => &mut self.large,
        };
        shared.dirty = true;
        shared.content[usize::try_from(at).unwrap()] = byte;
    }

    pub(super) fn reset(&mut self) {
        self.large.reset();
        self.odd.reset();
    }

    pub(super) fn compare(&self) {
        self.large.compare();
        self.odd.compare();
    }
}
