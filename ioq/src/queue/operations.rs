//! Queueing operations: what they are, and which are refused at once.

// UNSAFETY: `queue_readv` and `queue_writev` take addresses the kernel will use later, a promise
// only their caller can make.
#![expect(unsafe_code)]

use libc::iovec;

use super::IoQueue;
use crate::buffer::IoBuf;
use crate::error::QueueError;
use crate::op::{Durability, Opcode, PrepareError, Unmap};

impl<O> IoQueue<O> {
    /// Queues a read of the file from byte `offset` into `segments`, filled in order.
    ///
    /// The segments are copied out; neighbours that touch in host memory are joined, empty ones dropped.
    /// Nothing happens before [`IoQueue::submit`]. The result is the segments' whole length:
    /// short reads are continued, and the end of the file is
    /// [`IoErrorKind::UnexpectedEof`](crate::IoErrorKind::UnexpectedEof).
    ///
    /// # Errors
    /// See [`QueueError`]; each gives `owner` back.
    ///
    /// # Safety
    /// - Each segment is valid for writes of its length until `owner` has come back from
    ///   [`IoQueue::reap`] or the queue was dropped; moving `owner` does not change that. (If the
    ///   queue is leaked, the memory must stay valid for ever, as `owner` then does.)
    /// - No Rust reference to that memory is used meanwhile: the kernel writes it at any time.
    pub unsafe fn queue_readv(
        &mut self,
        offset: u64,
        segments: impl IntoIterator<Item = iovec>,
        owner: O,
    ) -> Result<(), QueueError<O>> {
        self.queue_transfer(Opcode::Read, offset, segments, owner)
    }

    /// Queues a write of `segments`, in order, to the file from byte `offset` on.
    ///
    /// As [`IoQueue::queue_readv`]; the result is the segments' whole length.
    ///
    /// # Errors
    /// See [`QueueError`]; each gives `owner` back.
    ///
    /// # Safety
    /// - Each segment is valid for reads of its length until `owner` has come back from
    ///   [`IoQueue::reap`] or the queue was dropped; moving `owner` does not change that. (If the
    ///   queue is leaked, the memory must stay valid for ever, as `owner` then does.)
    /// - No mutable Rust reference to that memory is used meanwhile.
    pub unsafe fn queue_writev(
        &mut self,
        offset: u64,
        segments: impl IntoIterator<Item = iovec>,
        durability: Durability,
        owner: O,
    ) -> Result<(), QueueError<O>> {
        self.queue_transfer(Opcode::Write(durability), offset, segments, owner)
    }

    /// As [`IoQueue::queue_readv`] with one segment, and quicker.
    ///
    /// # Errors
    /// See [`QueueError`]; each gives `owner` back.
    ///
    /// # Safety
    /// As for [`IoQueue::queue_readv`].
    #[inline(always)]
    pub unsafe fn queue_pread(
        &mut self,
        offset: u64,
        segment: iovec,
        owner: O,
    ) -> Result<(), QueueError<O>> {
        self.queue_single(Opcode::Read, offset, segment, owner)
    }

    /// As [`IoQueue::queue_writev`] with one segment, and quicker.
    ///
    /// # Errors
    /// See [`QueueError`]; each gives `owner` back.
    ///
    /// # Safety
    /// As for [`IoQueue::queue_writev`].
    #[inline(always)]
    pub unsafe fn queue_pwrite(
        &mut self,
        offset: u64,
        segment: iovec,
        durability: Durability,
        owner: O,
    ) -> Result<(), QueueError<O>> {
        self.queue_single(Opcode::Write(durability), offset, segment, owner)
    }

    // Called, it would be given an owner in memory, just written in parts and then read as a whole, which stalls.
    #[inline(always)]
    fn queue_single(
        &mut self,
        opcode: Opcode,
        offset: u64,
        segment: iovec,
        owner: O,
    ) -> Result<(), QueueError<O>> {
        debug_assert!(
            segment.iov_len == 0 || !segment.iov_base.is_null(),
            "a segment must be valid memory"
        );
        let Some(&slot) = self.free.last() else {
            return Err(QueueError::Full { owner });
        };
        if self
            .table
            .prepare_single(slot, opcode, offset, segment)
            .is_err()
        {
            return Err(QueueError::OffsetTooLarge { owner, offset });
        }
        self.enqueue(slot, owner);
        Ok(())
    }

    #[inline]
    fn queue_transfer(
        &mut self,
        opcode: Opcode,
        offset: u64,
        segments: impl IntoIterator<Item = iovec>,
        owner: O,
    ) -> Result<(), QueueError<O>> {
        let Some(&slot) = self.free.last() else {
            return Err(QueueError::Full { owner });
        };
        let segments = segments.into_iter().inspect(|segment| {
            debug_assert!(
                segment.iov_len == 0 || !segment.iov_base.is_null(),
                "a segment must be valid memory"
            );
        });
        match self.table.prepare_transfer(slot, opcode, offset, segments) {
            Ok(()) => {
                self.enqueue(slot, owner);
                Ok(())
            }
            Err(PrepareError::OffsetTooLarge) => Err(QueueError::OffsetTooLarge { owner, offset }),
            Err(PrepareError::TooManySegments) => Err(QueueError::TooManySegments {
                owner,
                limit: self.table.max_segments(),
            }),
        }
    }

    /// Queues an fdatasync of the file; its result is 0 bytes.
    ///
    /// It covers writes whose completion was reaped before this call, and promises nothing
    /// about others: the kernel runs operations in any order. Its error is delivered as it is
    /// and never retried, because a kernel that has reported lost writes once calls the next
    /// fdatasync a success.
    ///
    /// # Errors
    /// [`QueueError::Full`] only.
    pub fn queue_fdatasync(&mut self, owner: O) -> Result<(), QueueError<O>> {
        self.queue_range(Opcode::Fdatasync, 0, 0, owner)
    }

    /// Queues a discard: the `len` bytes from `offset` on are of no use any more. What they read as
    /// afterwards is undefined; the result is `len`.
    ///
    /// A file gets a hole (`FALLOC_FL_PUNCH_HOLE`), what of the range lies beyond its end being left
    /// out; a block device is told (`BLKDISCARD`), and wants a range in whole blocks. Runs on a
    /// worker thread. Where the file system or device cannot do it, the error is
    /// [`IoErrorKind::Unsupported`](crate::IoErrorKind::Unsupported).
    ///
    /// # Errors
    /// [`QueueError::Full`] and [`QueueError::OffsetTooLarge`].
    ///
    /// ```
    /// use std::os::unix::fs::MetadataExt;
    /// use std::sync::Arc;
    /// use ioq::{Config, Durability, IoQueue, Unmap};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let path = std::path::Path::new("/dev/shm").join(format!("ioq-doc-discard-{}", std::process::id()));
    /// # std::fs::write(&path, vec![1; 65536])?;
    /// let file = Arc::new(std::fs::File::options().read(true).write(true).open(&path)?);
    /// # std::fs::remove_file(&path)?;
    /// let mut queue = IoQueue::linux_aio(Arc::clone(&file), &Config::default())?;
    /// queue.queue_discard(0, 32768, "discard")?;
    /// queue.queue_write_zeroes(32768, 4096, Unmap::Forbidden, Durability::WriteBack, "zeroes")?;
    /// queue.submit();
    /// while !queue.is_idle() {
    ///     queue.reap(|what, result| println!("{what}: {result:?}"));
    /// }
    /// assert_eq!(file.metadata()?.blocks() * 512, 32768);
    /// # Ok(())
    /// # }
    /// ```
    pub fn queue_discard(&mut self, offset: u64, len: u64, owner: O) -> Result<(), QueueError<O>> {
        self.queue_range(Opcode::Discard, offset, len, owner)
    }

    /// Queues the secure erasure of the `len` bytes from `offset` on (`BLKSECDISCARD`): when it is done no copy
    /// of them is left on the device, not even in blocks that it had replaced. The result is `len`. Block
    /// devices whose hardware can do it only (eMMC, mostly); anything else fails with
    /// [`IoErrorKind::Unsupported`](crate::IoErrorKind::Unsupported). Runs on a worker thread, and may take
    /// long.
    ///
    /// # Errors
    /// [`QueueError::Full`] and [`QueueError::OffsetTooLarge`].
    ///
    /// ```
    /// use ioq::{Config, IoErrorKind, IoQueue};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let path = std::path::Path::new("/dev/shm").join(format!("ioq-doc-erase-{}", std::process::id()));
    /// # std::fs::write(&path, vec![1; 4096])?;
    /// let file = std::fs::File::options().read(true).write(true).open(&path)?;
    /// # std::fs::remove_file(&path)?;
    /// let mut queue = IoQueue::linux_aio(file.into(), &Config::default())?;
    /// queue.queue_secure_erase(0, 4096, ())?;
    /// queue.submit();
    /// while !queue.is_idle() {
    ///     // A file: nobody can promise that.
    ///     queue.reap(|(), result| assert_eq!(result.unwrap_err().kind(), IoErrorKind::Unsupported));
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn queue_secure_erase(
        &mut self,
        offset: u64,
        len: u64,
        owner: O,
    ) -> Result<(), QueueError<O>> {
        self.queue_range(Opcode::SecureErase, offset, len, owner)
    }

    /// Queues making the `len` bytes from `offset` on read as zeroes; the result is `len`.
    ///
    /// With [`Unmap::Allowed`] the range becomes a hole where that can be had; otherwise, and with
    /// [`Unmap::Forbidden`], it keeps its storage (`FALLOC_FL_ZERO_RANGE`, `BLKZEROOUT`). Where the
    /// file system has neither (tmpfs has no `FALLOC_FL_ZERO_RANGE`), zeroes are written. What of the
    /// range lies beyond a file's end is left out. Runs on a worker thread, with an fdatasync after it
    /// for [`Durability::WriteThrough`].
    ///
    /// # Errors
    /// [`QueueError::Full`] and [`QueueError::OffsetTooLarge`].
    pub fn queue_write_zeroes(
        &mut self,
        offset: u64,
        len: u64,
        unmap: Unmap,
        durability: Durability,
        owner: O,
    ) -> Result<(), QueueError<O>> {
        self.queue_range(Opcode::WriteZeroes(unmap, durability), offset, len, owner)
    }

    fn queue_range(
        &mut self,
        opcode: Opcode,
        offset: u64,
        len: u64,
        owner: O,
    ) -> Result<(), QueueError<O>> {
        let Some(&slot) = self.free.last() else {
            return Err(QueueError::Full { owner });
        };
        if self.table.prepare_range(slot, opcode, offset, len).is_err() {
            return Err(QueueError::OffsetTooLarge { owner, offset });
        }
        self.enqueue(slot, owner);
        Ok(())
    }

    #[inline(always)]
    fn enqueue(&mut self, slot: u16, owner: O) {
        debug_assert_eq!(self.free.last(), Some(&slot));
        self.free.pop();
        let before = self.owners[usize::from(slot)].replace(owner);
        debug_assert!(before.is_none(), "a free slot has no owner");
        // Spares the code that would drop one.
        std::mem::forget(before);
        self.pending.push_back(slot);
    }
}

impl<B: IoBuf> IoQueue<B> {
    /// Queues a read that fills `buf` from byte `offset` of the file; `buf` comes back from
    /// [`IoQueue::reap`]. As [`IoQueue::queue_readv`].
    ///
    /// # Errors
    /// See [`QueueError`]; each gives `buf` back.
    pub fn read(&mut self, offset: u64, mut buf: B) -> Result<(), QueueError<B>> {
        let segment = buf.segment();
        // SAFETY: `IoBuf` promises that the memory is valid wherever `buf` is moved and that
        // nobody else uses it; the queue keeps `buf` until the operation is done.
        unsafe { self.queue_pread(offset, segment, buf) }
    }

    /// Queues a write of all of `buf` to the file from byte `offset` on; `buf` comes back from
    /// [`IoQueue::reap`]. As [`IoQueue::queue_writev`].
    ///
    /// # Errors
    /// See [`QueueError`]; each gives `buf` back.
    pub fn write(
        &mut self,
        offset: u64,
        mut buf: B,
        durability: Durability,
    ) -> Result<(), QueueError<B>> {
        let segment = buf.segment();
        // SAFETY: as in `read`.
        unsafe { self.queue_pwrite(offset, segment, durability, buf) }
    }
}
