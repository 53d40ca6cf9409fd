//! What the host says about an open file: size, block size, direct I/O alignment.

// UNSAFETY: statx(2) and the block ioctls have no safe wrapper in the crates this project already
// uses.
#![expect(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use nix::fcntl::{FallocateFlags, fallocate};

nix::ioctl_read_bad!(blkgetsize64, BLKGETSIZE64, u64);
nix::ioctl_read_bad!(blksszget, nix::request_code_none!(0x12, 104), libc::c_int);

/// `BLKGETSIZE64`: its request code encodes `size_t`, not the `u64` it writes.
const BLKGETSIZE64: libc::c_ulong = nix::request_code_read!(0x12, 114, size_of::<libc::size_t>());

/// Size of a block device in bytes.
pub(super) fn block_device_size(file: &File) -> io::Result<u64> {
    let mut size = 0u64;
    // SAFETY: the descriptor is open for the call and `size` is the u64 the kernel writes.
    unsafe { blkgetsize64(file.as_raw_fd(), &raw mut size) }?;
    Ok(size)
}

/// Logical block size of a block device in bytes.
pub(super) fn logical_block_size(file: &File) -> io::Result<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: the descriptor is open for the call and `size` is the int the kernel writes.
    unsafe { blksszget(file.as_raw_fd(), &raw mut size) }?;
    u32::try_from(size).map_err(|_| io::Error::other("BLKSSZGET returned a negative size"))
}

nix::ioctl_read_bad!(blkpbszget, nix::request_code_none!(0x12, 123), libc::c_uint);
nix::ioctl_read_bad!(blkiomin, nix::request_code_none!(0x12, 120), libc::c_uint);
nix::ioctl_read_bad!(blkioopt, nix::request_code_none!(0x12, 121), libc::c_uint);
nix::ioctl_read_bad!(blkalignoff, nix::request_code_none!(0x12, 122), libc::c_int);

/// What sizes of request the host likes, in bytes. Zero: it does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IoHints {
    /// Smallest write that is no read-modify-write below.
    pub(crate) physical_block: u32,
    /// Where the first physical block begins.
    pub(crate) alignment_offset: u32,
    /// Smallest request that is efficient.
    pub(crate) min_io: u32,
    /// Best size of large requests.
    pub(crate) opt_io: u32,
}

impl IoHints {
    /// It says nothing.
    pub(crate) const NONE: Self = Self {
        physical_block: 0,
        alignment_offset: 0,
        min_io: 0,
        opt_io: 0,
    };
}

/// What a block device's driver says.
pub(super) fn block_device_hints(file: &File) -> io::Result<IoHints> {
    let fd = file.as_raw_fd();
    let (mut physical_block, mut min_io, mut opt_io) = (0, 0, 0);
    let mut offset: libc::c_int = 0;
    // SAFETY: the descriptor is open for the calls, and each variable is of the type the kernel writes.
    unsafe {
        blkpbszget(fd, &raw mut physical_block)?;
        blkiomin(fd, &raw mut min_io)?;
        blkioopt(fd, &raw mut opt_io)?;
        blkalignoff(fd, &raw mut offset)?;
    }
    Ok(IoHints {
        physical_block,
        // -1: no block is aligned, so there is nothing to tell.
        alignment_offset: u32::try_from(offset).unwrap_or(0),
        min_io,
        opt_io,
    })
}

/// What a file system says: the block it allocates by, or for some (network, striped) the size that it
/// transfers.
pub(super) fn file_hints(file: &File) -> io::Result<IoHints> {
    let preferred = u32::try_from(file.metadata()?.blksize()).unwrap_or(0);
    Ok(IoHints {
        physical_block: preferred,
        alignment_offset: 0,
        min_io: preferred,
        opt_io: preferred,
    })
}

/// Whether a block device can discard, and in units of how many bytes.
pub(super) fn block_device_discard(file: &File) -> io::Result<Option<u32>> {
    let device = file.metadata()?.rdev();
    let number = |name| queue_attribute(device, name).filter(|&bytes| bytes > 0);
    Ok(number("discard_max_bytes").and_then(|_| number("discard_granularity")))
}

/// Whether holes can be punched into a file, and in units of how many bytes.
pub(super) fn file_discard(file: &File) -> io::Result<Option<u32>> {
    let metadata = file.metadata()?;
    let block = metadata.blksize().max(1);
    // Behind the end, where nothing is: file systems that cannot do it say so all the same.
    let behind = metadata.len().next_multiple_of(block);
    let (Ok(offset), Ok(len)) = (libc::off_t::try_from(behind), libc::off_t::try_from(block))
    else {
        return Ok(None);
    };
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let possible = fallocate(file, mode, offset, len).is_ok();
    Ok(possible.then(|| u32::try_from(block).unwrap_or(u32::MAX)))
}

/// A number that the kernel tells about a block device's queue.
fn queue_attribute(device: libc::dev_t, name: &str) -> Option<u32> {
    let (major, minor) = (libc::major(device), libc::minor(device));
    // A partition has no queue of its own: its disk's is one level up.
    ["queue", "../queue"].into_iter().find_map(|queue| {
        let path = format!("/sys/dev/block/{major}:{minor}/{queue}/{name}");
        let number: u64 = std::fs::read_to_string(path).ok()?.trim().parse().ok()?;
        Some(u32::try_from(number).unwrap_or(u32::MAX))
    })
}

/// Alignment that direct I/O on a file demands, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DioAlignment {
    /// Of buffer addresses and lengths in memory.
    pub(super) memory: u32,
    /// Of file offsets and transfer lengths.
    pub(super) offset: u32,
}

/// What `statx(STATX_DIOALIGN)` answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DioAnswer {
    /// The file takes direct I/O with this alignment.
    Aligned(DioAlignment),
    /// The file system says this file takes no direct I/O.
    Refused,
    /// The kernel or file system does not report it (Linux before 6.1, tmpfs, network file systems).
    Unknown,
}

/// Asks the file system for its direct I/O alignment.
pub(super) fn dio_alignment(file: &File) -> DioAnswer {
    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty NUL-terminated string, AT_EMPTY_PATH makes the descriptor the
    // subject, and `answer` has room for one struct statx.
    let rc = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            answer.as_mut_ptr(),
        )
    };
    if rc != 0 {
        return DioAnswer::Unknown;
    }
    // SAFETY: zeroed is a valid struct statx, and the kernel wrote over it.
    let answer = unsafe { answer.assume_init() };
    if answer.stx_mask & libc::STATX_DIOALIGN == 0 {
        return DioAnswer::Unknown;
    }
    match (answer.stx_dio_mem_align, answer.stx_dio_offset_align) {
        (0, _) | (_, 0) => DioAnswer::Refused,
        (memory, offset) => DioAnswer::Aligned(DioAlignment { memory, offset }),
    }
}

/// Alignment for a file whose file system does not tell: that of the disk under it.
///
/// Trial reads would not do: holes and everything past the end take any alignment, and a new image is
/// all hole. A file system without a disk of its own (tmpfs, network, FUSE) copies or has no demands
/// beyond a sector.
pub(super) fn disk_alignment(file: &File) -> io::Result<DioAlignment> {
    let device = file.metadata()?.dev();
    let bytes = queue_attribute(device, "logical_block_size").unwrap_or(512);
    Ok(DioAlignment {
        memory: bytes,
        offset: bytes,
    })
}
