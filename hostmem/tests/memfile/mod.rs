//! Memory files, and what of them this process has mapped and open.

use std::fs::{self, File};

use hostmem::RegionConfig;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::GuestAddress;

/// A memory file with a name of its own, by which it is found in `/proc/self`.
pub(crate) struct MemFile {
    file: File,
    name: String,
}

impl MemFile {
    pub(crate) fn new(name: &str, size: u64) -> Self {
        Self::with_flags(name, size, MFdFlags::MFD_ALLOW_SEALING)
    }

    pub(crate) fn with_flags(name: &str, size: u64, flags: MFdFlags) -> Self {
        let file = File::from(memfd_create(name, flags | MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(size).unwrap();
        Self {
            file,
            name: format!("/memfd:{name} (deleted)"),
        }
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn region(
        &self,
        guest_addr: u64,
        size: u64,
        frontend_addr: u64,
        mmap_offset: u64,
    ) -> RegionConfig {
        RegionConfig {
            guest_addr: GuestAddress(guest_addr),
            size,
            frontend_addr,
            file: self.file.try_clone().unwrap(),
            mmap_offset,
        }
    }

    /// How much of the file is mapped. Bytes, not mappings: the kernel merges neighbours.
    pub(crate) fn mapped_bytes(&self) -> u64 {
        fs::read_to_string("/proc/self/maps")
            .unwrap()
            .lines()
            .filter(|line| line.ends_with(&self.name))
            .map(|line| {
                let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
                u64::from_str_radix(end, 16).unwrap() - u64::from_str_radix(start, 16).unwrap()
            })
            .sum()
    }

    /// How many descriptors of the file are open, not counting its own.
    pub(crate) fn other_descriptors(&self) -> usize {
        fs::read_dir("/proc/self/fd")
            .unwrap()
            // One that was closed since the directory was read has no link any more.
            .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
            .filter(|target| target.as_os_str() == self.name.as_str())
            .count()
            - 1
    }
}
