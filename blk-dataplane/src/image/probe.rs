//! What the host says about an open file: size, block size, direct I/O alignment.

// UNSAFETY: statx(2), the block ioctls and a pread(2) into an aligned buffer have no safe wrapper
// in the crates this project already uses.
#![expect(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

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

/// The largest alignment tried: no Linux block device has larger logical blocks.
const PROBE_MAX: usize = 4096;

/// Finds by trial reads which alignment a file opened with `O_DIRECT` takes, for file systems that
/// do not say. `None` where not even page-aligned reads are taken.
pub(super) fn probe_dio_alignment(file: &File) -> Option<DioAlignment> {
    const CANDIDATES: [usize; 4] = [512, 1024, 2048, PROBE_MAX];
    let buffer = vec![0u8; 3 * PROBE_MAX];
    let slack = buffer.as_ptr().align_offset(PROBE_MAX);
    let read_at = |memory_offset: usize, len: usize| -> bool {
        debug_assert!(slack + memory_offset + len <= buffer.len());
        // SAFETY: the destination lies inside `buffer`, which lives until after the call; nobody
        // reads what is written there.
        let rc = unsafe {
            libc::pread(
                file.as_raw_fd(),
                buffer.as_ptr().add(slack + memory_offset).cast_mut().cast(),
                len,
                libc::off_t::try_from(len).unwrap_or(0),
            )
        };
        rc >= 0
    };
    let offset = CANDIDATES.into_iter().find(|&len| read_at(0, len))?;
    let memory = CANDIDATES
        .into_iter()
        .find(|&memory| read_at(memory % PROBE_MAX, offset))
        .unwrap_or(PROBE_MAX);
    Some(DioAlignment {
        memory: u32::try_from(memory).ok()?,
        offset: u32::try_from(offset).ok()?,
    })
}
