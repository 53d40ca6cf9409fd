use std::io;

use vm_memory::GuestAddress;

use crate::MAX_REGIONS;

/// Why a memory map was refused.
///
/// Nothing has changed when one of these is returned: the map asked for does not exist, every
/// region mapped on the way to it is unmapped again, every file handed in is closed, and the map
/// in force stays in force. A vhost-user back-end answers the message with a negative
/// acknowledgement.
///
/// `index` is the position of the region in the list given to
/// [`MemoryMap::new`](crate::MemoryMap::new), and 0 for
/// [`MemoryMap::with_region`](crate::MemoryMap::with_region), which is given one region only.
///
/// "The front-end" below is whoever described the region: a vhost-user front-end over its socket,
/// or the VMM that embeds this crate. It is trusted less than the host, and more than the guest,
/// which has no way to cause any of these.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// `guest_addr + size`, `frontend_addr + size` or `mmap_offset + size` does not fit 64 bits.
    ///
    /// The front-end's fault. Such a region would wrap round to address 0.
    #[error("region {index}: {field} {addr:#x} + size {size:#x} does not fit 64 bits")]
    AddressOverflow {
        /// The region.
        index: usize,
        /// Which of the three sums: the name of the field of
        /// [`RegionConfig`](crate::RegionConfig).
        field: &'static str,
        /// Value of that field.
        addr: u64,
        /// Size of the region, in bytes.
        size: u64,
    },

    /// A dirty log is in force, and has no bit for the region's memory.
    ///
    /// The front-end's fault: the log must be enlarged before memory is added
    /// ([`MemoryMap::start_log`](crate::MemoryMap::start_log) with a larger one). Writes to the
    /// region would be lost on the way to where the guest is migrated.
    #[error("region {index}: the dirty log has no bit for guest address {:#x}", .last.0)]
    BeyondLog {
        /// The region.
        index: usize,
        /// The region's last guest address.
        last: GuestAddress,
    },

    /// The file is open for reading only or writing only, or as a mere reference (`O_PATH`).
    ///
    /// The front-end's fault: guest memory is read and written through a shared mapping, which
    /// takes a descriptor opened with `O_RDWR`.
    #[error("region {index}: the file is not open for reading and writing (flags {flags:#o})")]
    FileAccess {
        /// The region.
        index: usize,
        /// The file's status flags, as `fcntl(F_GETFL)` gives them.
        flags: i32,
    },

    /// The kernel would not say what the file is (`fstat`, `fstatfs` or `fcntl` failed).
    ///
    /// The host's fault (a network file system that went away, say).
    #[error("region {index}: cannot examine the file")]
    FileExamine {
        /// The region.
        index: usize,
        /// What the kernel answered.
        source: io::Error,
    },

    /// The file is not a regular file: a directory, device, pipe or socket.
    ///
    /// The front-end's fault. Memory files, `/dev/shm`, `hugetlbfs` and plain files are all regular
    /// files. Devices that could be mapped (`/dev/mem`, device DAX) are refused too, because their
    /// length cannot be learnt with `fstat`, and a mapping past the end of the memory behind them
    /// is a fault at the first touch.
    #[error("region {index}: not a regular file (mode {mode:#o})")]
    FileType {
        /// The region.
        index: usize,
        /// The file's mode, as `fstat` gives it.
        mode: u32,
    },

    /// The file ends before `mmap_offset + size`.
    ///
    /// The front-end's fault. The kernel would map such a region, and kill this process with
    /// `SIGBUS` at the first touch of a page past the end.
    #[error(
        "region {index}: offset {mmap_offset:#x} + size {size:#x} is past the end of its file of \
         {file_size:#x} bytes"
    )]
    FileTooShort {
        /// The region.
        index: usize,
        /// Where in the file the region was to start, in bytes.
        mmap_offset: u64,
        /// Size of the region, in bytes.
        size: u64,
        /// Size of the file, in bytes.
        file_size: u64,
    },

    /// Two regions share a front-end address.
    ///
    /// The front-end's fault: such an address would have two meanings.
    #[error(
        "region {index}: front-end addresses {frontend_addr:#x} + {size:#x} overlap the region at \
         {other_frontend_addr:#x} + {other_size:#x}"
    )]
    FrontendOverlap {
        /// The region.
        index: usize,
        /// Where it starts in the front-end's address space.
        frontend_addr: u64,
        /// Its size, in bytes.
        size: u64,
        /// Where the region it overlaps starts in the front-end's address space.
        other_frontend_addr: u64,
        /// Size of the region it overlaps, in bytes.
        other_size: u64,
    },

    /// Two regions share a guest-physical address.
    ///
    /// The front-end's fault: such an address would have two meanings. Adding a region that the
    /// map already has is the same error.
    #[error(
        "region {index}: guest addresses {:#x} + {size:#x} overlap the region at {:#x} + \
         {other_size:#x}", .guest_addr.0, .other_guest_addr.0
    )]
    GuestOverlap {
        /// The region.
        index: usize,
        /// Where it starts in guest-physical memory.
        guest_addr: GuestAddress,
        /// Its size, in bytes.
        size: u64,
        /// Where the region it overlaps starts in guest-physical memory.
        other_guest_addr: GuestAddress,
        /// Size of the region it overlaps, in bytes.
        other_size: u64,
    },

    /// The kernel refused the mapping.
    ///
    /// The front-end's fault if the size is absurd (`ENOMEM`), the memory file is sealed against
    /// writing (`EPERM`) or its file system cannot map (`ENODEV`). The host's fault if this process
    /// is out of address space, mappings (`vm.max_map_count`) or kernel memory (`ENOMEM` too).
    #[error("region {index}: cannot map {size:#x} bytes at offset {mmap_offset:#x} of its file")]
    Mmap {
        /// The region.
        index: usize,
        /// Where in the file the region was to start, in bytes.
        mmap_offset: u64,
        /// Size of the region, in bytes.
        size: u64,
        /// What the kernel answered.
        source: io::Error,
    },

    /// Guest address and file offset differ modulo [`HOST_ALIGNMENT`](crate::HOST_ALIGNMENT).
    ///
    /// The front-end's fault. An aligned guest address would be a misaligned host address, and no
    /// virtqueue could be used in such a region.
    #[error(
        "region {index}: guest address {:#x} and file offset {mmap_offset:#x} are not aligned alike",
        .guest_addr.0
    )]
    OffsetAlignment {
        /// The region.
        index: usize,
        /// Where the region starts in guest-physical memory.
        guest_addr: GuestAddress,
        /// Where in the file it was to start, in bytes.
        mmap_offset: u64,
    },

    /// More than [`MAX_REGIONS`] regions.
    ///
    /// The front-end's fault: it was told the limit.
    #[error("{count} regions, of at most {MAX_REGIONS}")]
    TooManyRegions {
        /// How many there would have been.
        count: usize,
    },

    /// No region has this guest address, this size and this front-end address.
    ///
    /// The front-end's fault. All three must match: a region that agrees in one of them is not the
    /// one that was meant.
    #[error(
        "no region at guest address {:#x} with size {size:#x} and front-end address \
         {frontend_addr:#x}", .guest_addr.0
    )]
    UnknownRegion {
        /// Guest address asked for.
        guest_addr: GuestAddress,
        /// Size asked for, in bytes.
        size: u64,
        /// Front-end address asked for.
        frontend_addr: u64,
    },

    /// A region of no bytes.
    ///
    /// The front-end's fault.
    #[error("region {index}: size 0 at guest address {:#x}", .guest_addr.0)]
    ZeroSize {
        /// The region.
        index: usize,
        /// Where the region was to start in guest-physical memory.
        guest_addr: GuestAddress,
    },
}

/// Memory of a map has gone while it was in use. See [`SigbusGuard`](crate::SigbusGuard).
///
/// The front-end's fault (it truncated the file), or the host's (no memory left for a page that was
/// never touched).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{size:#x} bytes of memory at guest address {:#x} have gone", .guest_addr.0)]
#[non_exhaustive]
pub struct MemoryLost {
    /// Where the first region that is lost starts in guest-physical memory.
    pub guest_addr: GuestAddress,
    /// Its size, in bytes.
    pub size: u64,
}
