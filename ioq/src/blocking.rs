//! What no engine does without blocking, for the workers: ranges discarded or made zero, and
//! fdatasync where the kernel has no asynchronous one.

// UNSAFETY: fdatasync, fallocate, ioctl and pwrite are foreign calls.
#![expect(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::backend::{BlockingFile, INTERRUPTED_TRIES_MAX};
use crate::buffer::AlignedBuf;
use crate::op::{Durability, Op, Opcode, Unmap};

/// Bytes of a range given to the kernel in one call. A device may take seconds for that much, and
/// whoever drops the queue waits for the call the worker is in.
const RANGE_PIECE: u64 = 1 << 30;

/// Bytes written at a time where zeroes must be written: memory a worker holds meanwhile. Disks
/// gain nothing from larger writes.
const ZEROES_PIECE: usize = 1 << 20;

/// Alignment of the zeroes written: a page, enough for any `O_DIRECT`.
const ZEROES_ALIGN: usize = 4096;

/// `BLKDISCARD` of `linux/fs.h`: `_IO(0x12, 119)`.
const BLKDISCARD: u64 = 0x1277;
/// `BLKSECDISCARD` of `linux/fs.h`: `_IO(0x12, 125)`.
const BLKSECDISCARD: u64 = 0x127d;
/// `BLKZEROOUT` of `linux/fs.h`: `_IO(0x12, 127)`. Keeps the blocks' storage.
const BLKZEROOUT: u64 = 0x127f;

/// An error number.
type Errno = i32;

/// One way to do a piece of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    PunchHole,
    ZeroRange,
    BlkDiscard,
    BlkSecureErase,
    BlkZeroOut,
    WriteZeroes,
}

/// A file, and what it is.
#[derive(Debug)]
pub(crate) struct Blocking {
    file: Arc<File>,
    block_device: bool,
}

impl Blocking {
    pub(crate) fn new(file: Arc<File>) -> io::Result<Self> {
        let block_device = file.metadata()?.file_type().is_block_device();
        Ok(Self { file, block_device })
    }

    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn fdatasync(&self) -> Result<(), Errno> {
        // SAFETY: no pointer is passed.
        uninterrupted(|| unsafe { libc::fdatasync(self.fd()) })
    }

    /// Does a range by the first method that the file has.
    fn by(&self, methods: &[Method], op: &Op, stop: &AtomicBool) -> Result<(), Errno> {
        let mut at = op.offset;
        let mut end = op.offset + op.remaining;
        if !self.block_device {
            // Zeroes beyond the end of a file would make it longer, and there is nothing to
            // discard.
            let size = self
                .file
                .metadata()
                .map_err(|error| errno_of(&error))?
                .len();
            end = end.min(size);
        }
        let mut methods = methods.iter();
        let mut method = *methods.next().ok_or(libc::EOPNOTSUPP)?;
        while at < end {
            if stop.load(Ordering::Relaxed) {
                return Err(libc::ECANCELED);
            }
            let piece = RANGE_PIECE.min(end - at);
            match self.piece(method, at, piece, stop) {
                Ok(()) => at += piece,
                Err(errno @ (libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY)) => {
                    method = *methods.next().ok_or(errno)?;
                }
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn piece(&self, method: Method, at: u64, len: u64, stop: &AtomicBool) -> Result<(), Errno> {
        match method {
            Method::PunchHole => self.fallocate(libc::FALLOC_FL_PUNCH_HOLE, at, len),
            Method::ZeroRange => self.fallocate(libc::FALLOC_FL_ZERO_RANGE, at, len),
            Method::BlkDiscard => self.ioctl(BLKDISCARD, at, len),
            Method::BlkSecureErase => self.ioctl(BLKSECDISCARD, at, len),
            Method::BlkZeroOut => self.ioctl(BLKZEROOUT, at, len),
            Method::WriteZeroes => self.write_zeroes(at, len, stop),
        }
    }

    fn fallocate(&self, mode: libc::c_int, at: u64, len: u64) -> Result<(), Errno> {
        let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
        // The end is at most i64::MAX (`Table::prepare_range`).
        let (at, len) = (at.cast_signed(), len.cast_signed());
        // SAFETY: no pointer is passed.
        uninterrupted(|| unsafe { libc::fallocate(self.fd(), mode, at, len) })
    }

    fn ioctl(&self, request: u64, at: u64, len: u64) -> Result<(), Errno> {
        let range = [at, len];
        // SAFETY: each of these requests reads two 64-bit integers, which outlive the call.
        uninterrupted(|| unsafe { libc::ioctl(self.fd(), request, range.as_ptr()) })
    }

    fn write_zeroes(&self, mut at: u64, mut len: u64, stop: &AtomicBool) -> Result<(), Errno> {
        let size = usize::try_from(len).map_or(ZEROES_PIECE, |len| len.min(ZEROES_PIECE));
        let zeroes = AlignedBuf::new(size, ZEROES_ALIGN).ok_or(libc::ENOMEM)?;
        while len > 0 {
            if stop.load(Ordering::Relaxed) {
                return Err(libc::ECANCELED);
            }
            let piece = usize::try_from(len).map_or(size, |len| len.min(size));
            let mut wrote = 0;
            uninterrupted(|| {
                // SAFETY: `piece` is at most the buffer's length.
                let rc = unsafe {
                    libc::pwrite(self.fd(), zeroes.as_ptr().cast(), piece, at.cast_signed())
                };
                wrote = u64::try_from(rc).unwrap_or(0);
                if rc < 0 { -1 } else { 0 }
            })?;
            if wrote == 0 {
                // Trying again could go on for ever.
                return Err(libc::ENOSPC);
            }
            at += wrote;
            len -= wrote;
        }
        Ok(())
    }
}

impl BlockingFile for Blocking {
    fn run(&self, op: &Op, stop: &AtomicBool) -> i64 {
        use Method::{BlkDiscard, BlkSecureErase, BlkZeroOut, PunchHole, WriteZeroes, ZeroRange};
        let result = match op.opcode {
            Opcode::Fdatasync => self.fdatasync(),
            // A discard is a request, not an order, but whether it can be had is the caller's to
            // know: nothing stands in for it.
            Opcode::Discard if self.block_device => self.by(&[BlkDiscard], op, stop),
            Opcode::Discard => self.by(&[PunchHole], op, stop),
            // A file system may keep copies that nobody knows of: of a file it cannot be promised.
            Opcode::SecureErase if self.block_device => self.by(&[BlkSecureErase], op, stop),
            Opcode::SecureErase => Err(libc::EOPNOTSUPP),
            Opcode::WriteZeroes(unmap, durability) => {
                // A hole punched into a block device reads as zeroes too (blkdev_fallocate).
                let methods: &[Method] = match (self.block_device, unmap) {
                    (false, Unmap::Allowed) => &[PunchHole, ZeroRange, WriteZeroes],
                    (false, Unmap::Forbidden) => &[ZeroRange, WriteZeroes],
                    (true, Unmap::Allowed) => &[PunchHole, BlkZeroOut, WriteZeroes],
                    (true, Unmap::Forbidden) => &[BlkZeroOut, WriteZeroes],
                };
                self.by(methods, op, stop).and_then(|()| match durability {
                    Durability::WriteBack => Ok(()),
                    Durability::WriteThrough => self.fdatasync(),
                })
            }
            // No engine passes reads and writes on.
            Opcode::Read | Opcode::Write(_) => Err(libc::EOPNOTSUPP),
        };
        match result {
            Ok(()) => i64::try_from(op.remaining).unwrap_or(i64::MAX),
            Err(errno) => -i64::from(errno),
        }
    }
}

fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// Calls until the answer is not `EINTR`, or it has been so too often.
fn uninterrupted(mut call: impl FnMut() -> libc::c_int) -> Result<(), Errno> {
    for _ in 0..INTERRUPTED_TRIES_MAX {
        if call() >= 0 {
            return Ok(());
        }
        let errno = errno_of(&io::Error::last_os_error());
        if errno != libc::EINTR {
            return Err(errno);
        }
    }
    Err(libc::EINTR)
}
