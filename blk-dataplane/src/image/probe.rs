//! What the host says about an open file: size, block size, direct I/O alignment.

// UNSAFETY: statx(2) and the block ioctls have no safe wrapper in the crates this project already
// uses.
#![expect(unsafe_code)]

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::utsname::uname;

use super::sysfs::{self, Disk};

nix::ioctl_write_ptr_bad!(blksecdiscard, nix::request_code_none!(0x12, 125), [u64; 2]);
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

/// What can be given back to the host's storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Discard {
    /// In units of so many bytes.
    pub(crate) granularity: u32,
    /// So many bytes at a time at most, `u64::MAX` if the host sets no limit.
    pub(crate) max_bytes: u64,
}

impl Discard {
    /// Of what sets no limit.
    pub(crate) fn anything(granularity: u32) -> Self {
        Self {
            granularity,
            max_bytes: u64::MAX,
        }
    }
}

/// A block device as sysfs has it.
pub(super) fn disk_of(file: &File) -> io::Result<Option<Disk>> {
    Ok(Disk::of(Path::new(sysfs::ROOT), file.metadata()?.rdev()))
}

/// What a disk can discard. Its limit is also the administrator's, who lowers it where long discards get in
/// the way of everything else.
pub(super) fn disk_discard(disk: &Disk) -> Option<Discard> {
    let number = |name| disk.queue_attribute(name).filter(|&bytes| bytes > 0);
    Some(Discard {
        max_bytes: number("discard_max_bytes")?,
        granularity: u32::try_from(number("discard_granularity")?).unwrap_or(u32::MAX),
    })
}

/// Whether a block device, open for writing, can erase securely.
///
/// No attribute says so, but the kernel checks it before the range (Linux 5.19, `blk_ioctl_secure_erase`): a
/// range that no device has, since it begins within a sector, tells the two apart and erases nothing. Kernels
/// before that say EINVAL to it either way.
pub(super) fn can_erase_securely(file: &File) -> bool {
    let nowhere = [1u64, 1];
    // SAFETY: the descriptor is open for the call, which reads two 64-bit integers; they outlive it.
    let answer = unsafe { blksecdiscard(file.as_raw_fd(), nowhere.as_ptr().cast()) };
    answer == Err(nix::Error::EINVAL) && uname().is_ok_and(|name| tells_erasure(name.release()))
}

/// Whether a kernel of this release is one of those.
fn tells_erasure(release: &OsStr) -> bool {
    let Some(release) = release.to_str() else {
        return false;
    };
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|number| number.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(5), Some(19))
}

/// Whether holes can be punched into a file, and in units of how many bytes.
pub(super) fn file_discard(file: &File) -> io::Result<Option<Discard>> {
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
    Ok(possible.then(|| Discard::anything(u32::try_from(block).unwrap_or(u32::MAX))))
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
    let bytes = Disk::of(Path::new(sysfs::ROOT), device)
        .and_then(|disk| disk.queue_attribute("logical_block_size"))
        .map_or(512, |bytes| u32::try_from(bytes).unwrap_or(u32::MAX));
    Ok(DioAlignment {
        memory: bytes,
        offset: bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_tell_of_secure_erasure_are_those_from_5_19() {
        for (release, tells) in [
            ("5.19.0", true),
            ("5.19", true),
            ("6.1.0-13-amd64", true),
            ("10.0-rc1", true),
            ("5.18.19", false),
            ("5.4.0-150-generic", false),
            ("4.20.1", false),
            ("5", false),
            ("", false),
            ("custom", false),
        ] {
            assert_eq!(tells_erasure(OsStr::new(release)), tells, "{release:?}");
        }
    }
}
