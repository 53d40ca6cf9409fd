//! The operations in the slots.

// UNSAFETY: an operation holds an address, and says that it may go to a worker thread.
#![expect(unsafe_code)]

use std::slice;

use libc::iovec;

use crate::segments::{FillError, Filled, NO_SEGMENT, Segments};

/// When a write counts as complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Durability {
    /// When the host's cache has it: lost in a power cut unless an fdatasync queued after its
    /// completion succeeds.
    WriteBack,
    /// When it is on stable storage, with what is needed to read it back (`RWF_DSYNC`).
    WriteThrough,
}

/// Whether a range that is made zero may lose its storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unmap {
    /// It may: the file gets a hole, the device may forget the blocks. A later write may find no
    /// room.
    Allowed,
    /// It keeps its storage, or gets some where it had none.
    Forbidden,
}

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opcode {
    Read,
    Write(Durability),
    Fdatasync,
    Discard,
    SecureErase,
    WriteZeroes(Unmap, Durability),
}

impl Opcode {
    /// Whether it moves bytes between memory and the file, and so may come back short.
    pub(crate) const fn is_transfer(self) -> bool {
        matches!(self, Self::Read | Self::Write(_))
    }
}

/// What is left to do of an operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Op {
    pub(crate) opcode: Opcode,
    /// Transient errors since the last progress.
    pub(crate) retries: u8,
    /// The iovecs that are left, how many and, if they are in the slot's storage, the first.
    pub(crate) first: u16,
    pub(crate) count: u16,
    /// Where the remainder starts in the file.
    pub(crate) offset: u64,
    /// Bytes left.
    pub(crate) remaining: u64,
    /// Bytes moved.
    pub(crate) done: u64,
    /// The only segment if `first` is [`SINGLE`]: most operations have one, and then neither queueing nor
    /// submitting touches the slot's storage.
    single: iovec,
}

/// [`Op::first`] of an operation whose only segment is with it.
const SINGLE: u16 = u16::MAX;

// A cache line for each operation.
const _: () = assert!(size_of::<Op>() <= 64);

// SAFETY: the segment's address is a number to this crate; the memory is the owner's.
unsafe impl Send for Op {}

impl Op {
    const fn new(opcode: Opcode, offset: u64, remaining: u64) -> Self {
        Self {
            opcode,
            retries: 0,
            first: SINGLE,
            count: 0,
            offset,
            remaining,
            done: 0,
            single: NO_SEGMENT,
        }
    }
}

/// Why a slot could not take an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PrepareError {
    OffsetTooLarge,
    TooManySegments,
}

/// Every slot's operation and segments.
#[derive(Debug)]
pub(crate) struct Table {
    ops: Box<[Op]>,
    segments: Segments,
}

impl Table {
    pub(crate) fn new(depth: u16, segments: Segments) -> Self {
        let idle = Op::new(Opcode::Fdatasync, 0, 0);
        Self {
            ops: vec![idle; usize::from(depth)].into_boxed_slice(),
            segments,
        }
    }

    pub(crate) fn max_segments(&self) -> u16 {
        self.segments.per_slot()
    }

    #[inline]
    pub(crate) fn op(&self, slot: u16) -> &Op {
        &self.ops[usize::from(slot)]
    }

    /// As `op`, for a slot number that came from outside.
    #[inline]
    pub(crate) fn get(&self, slot: u16) -> Option<&Op> {
        self.ops.get(usize::from(slot))
    }

    #[inline]
    pub(crate) fn op_mut(&mut self, slot: u16) -> &mut Op {
        &mut self.ops[usize::from(slot)]
    }

    /// The operation, and what is left of its segments. A single one may be with the
    /// operation, where the kernel does not find it: it is for the caller to take apart.
    #[inline]
    pub(crate) fn parts(&self, slot: u16) -> (&Op, &[iovec]) {
        let op = self.op(slot);
        let segments = match op.first {
            SINGLE => &slice::from_ref(&op.single)[..usize::from(op.count.min(1))],
            first => self.segments.get(slot, first, op.count),
        };
        (op, segments)
    }

    /// What is left of the operation's segments.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn segments(&self, slot: u16) -> &[iovec] {
        self.parts(slot).1
    }

    /// Puts a read or write into a free slot.
    #[inline]
    pub(crate) fn prepare_transfer(
        &mut self,
        slot: u16,
        opcode: Opcode,
        offset: u64,
        segments: impl IntoIterator<Item = iovec>,
    ) -> Result<(), PrepareError> {
        let Filled {
            count,
            total,
            single,
        } = self
            .segments
            .fill(slot, segments)
            .map_err(|error| match error {
                FillError::TooMany => PrepareError::TooManySegments,
                FillError::TooLong => PrepareError::OffsetTooLarge,
            })?;
        // The kernel's offsets are signed. Checked here once, so that no continuation overflows.
        offset
            .checked_add(total)
            .filter(|&end| i64::try_from(end).is_ok())
            .ok_or(PrepareError::OffsetTooLarge)?;
        *self.op_mut(slot) = Op {
            count,
            first: if count > 1 { 0 } else { SINGLE },
            single,
            ..Op::new(opcode, offset, total)
        };
        Ok(())
    }

    /// Puts a read or write of one segment into a free slot.
    #[inline]
    pub(crate) fn prepare_single(
        &mut self,
        slot: u16,
        opcode: Opcode,
        offset: u64,
        segment: iovec,
    ) -> Result<(), PrepareError> {
        // usize is 64 bits at most.
        let total = segment.iov_len as u64;
        // As in `prepare_transfer`: the sum is below 2⁶³, and so is each.
        offset
            .checked_add(total)
            .filter(|&end| i64::try_from(end).is_ok())
            .ok_or(PrepareError::OffsetTooLarge)?;
        *self.op_mut(slot) = Op {
            count: u16::from(total > 0),
            single: segment,
            ..Op::new(opcode, offset, total)
        };
        Ok(())
    }

    /// Puts an operation without memory into a free slot: an fdatasync (0, 0), or one on a range.
    pub(crate) fn prepare_range(
        &mut self,
        slot: u16,
        opcode: Opcode,
        offset: u64,
        len: u64,
    ) -> Result<(), PrepareError> {
        offset
            .checked_add(len)
            .filter(|&end| i64::try_from(end).is_ok())
            .ok_or(PrepareError::OffsetTooLarge)?;
        *self.op_mut(slot) = Op::new(opcode, offset, len);
        Ok(())
    }

    /// Accounts for `bytes` moved, at most what remains.
    pub(crate) fn advance(&mut self, slot: u16, bytes: u64) {
        let op = &mut self.ops[usize::from(slot)];
        debug_assert!(bytes <= op.remaining);
        if op.first == SINGLE {
            // Less than `remaining`, which is its length, or all of it.
            let part =
                usize::try_from(bytes).map_or(op.single.iov_len, |n| n.min(op.single.iov_len));
            op.single.iov_base = op.single.iov_base.wrapping_byte_add(part);
            op.single.iov_len -= part;
        } else {
            (op.first, op.count) = self.segments.advance(slot, op.first, op.count, bytes);
        }
        op.offset += bytes;
        op.remaining -= bytes;
        op.done += bytes;
        op.retries = 0;
    }
}
