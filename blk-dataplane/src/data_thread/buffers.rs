//! Guest buffers as the kernel sees them: the host addresses behind each request's data, and the
//! only place where they are handed to the I/O queue.
//!
//! Soundness in one paragraph: a slot's iovecs are made here, by translating through a memory map,
//! and the slot keeps that map with them; they are private, so nothing else can be in a slot. An
//! operation is queued with an [`Owner`] that holds the same map, its slot's own or one more reference (or the bounce buffer the iovec
//! points into), and the I/O queue keeps the owner until the kernel is done with the operation. A
//! map replaced meanwhile therefore stays mapped for as long as an operation points into it.

// UNSAFETY: the I/O queue takes raw iovecs; that they stay valid is this module's promise.
#![expect(unsafe_code)]

use std::ops::Range;
use std::ptr;
use std::rc::Rc;
use std::slice;
use std::sync::Arc;

use hostmem::SigbusGuard;
use ioq::{AlignedBuf, Durability, IoQueue};
use libc::iovec;
use vm_memory::bitmap::{Bitmap, MS};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError, VolatileSlice};
use vring::Segment;

use super::SlotId;
use super::hot_region::HotRegion;

/// Segments a request may have to be submitted in place. One with more (twice what `seg_max` tells
/// the driver leaves room for buffers that cross memory regions) goes through a bounce buffer.
pub(super) const MAX_SEGMENTS_PER_REQUEST: usize = 252;

/// Distance between the iovecs of two slots. An odd number of cache lines: with a multiple of 4096
/// bytes every slot's first iovec would fall into the same set of the L1 cache.
const SLOT_STRIDE: usize = MAX_SEGMENTS_PER_REQUEST;
const _: () = assert!((SLOT_STRIDE * size_of::<iovec>()) / 64 % 2 == 1);
const _: () = assert!((SLOT_STRIDE * size_of::<iovec>()).is_multiple_of(64));

const NO_IOVEC: iovec = iovec {
    iov_base: ptr::null_mut(),
    iov_len: 0,
};

/// A memory map shared by everything in flight that points into it. `Rc` in front of the `Arc`: a
/// request's references are counted on the data thread without a locked instruction.
#[derive(Debug)]
#[expect(
    clippy::redundant_allocation,
    reason = "the Rc is there for its unlocked count"
)]
pub(super) struct MemoryRef<M>(Rc<Arc<M>>);

impl<M> MemoryRef<M> {
    pub(super) fn new(memory: Arc<M>) -> Self {
        Self(Rc::new(memory))
    }

    #[inline]
    pub(super) fn map(&self) -> &M {
        &self.0
    }

    /// Whether both are references to the same map in force, not only to equal ones.
    #[inline]
    pub(super) fn is(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }
}

impl<M> Clone for MemoryRef<M> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

/// What an operation in flight owns, and whose operation it is.
#[derive(Debug)]
pub(super) enum Owner<M> {
    /// Data straight from or to guest memory, for the request `first` and those linked to it.
    Guest {
        first: SlotId,
        /// Keeps the memory that the iovecs point into mapped. Of the first request it is its slot's, to be given
        /// back ([`GuestBuffers::give_back`]).
        memory: MemoryRef<M>,
    },
    /// Data in a bounce buffer, for one request. Boxed, so that owners are small: every operation moves one.
    Bounce {
        slot: SlotId,
        buffer: Box<AlignedBuf>,
    },
    /// No data: a discard or write-zeroes of one range of the request `slot`.
    Range { slot: SlotId },
    /// No data: an fdatasync for the request `first` and those linked to it, flushes and writes.
    Sync { first: SlotId },
}

// Two registers.
const _: () = assert!(size_of::<Owner<()>>() == 16);

/// Why a request's data cannot be submitted where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotInPlace {
    /// An address is outside guest memory. The guest's fault.
    Unmapped,
    /// The memory has gone since it was mapped. The front-end's or the host's fault.
    Lost,
    /// Direct I/O demands an alignment that the buffers do not have, or there are too many of them.
    Bounce,
}

/// What direct I/O demands of every iovec, in bytes, powers of two; 1 and 1 where nothing is demanded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Alignment {
    pub(super) address: usize,
    pub(super) len: usize,
}

impl Alignment {
    #[inline]
    fn suits(self, base: *mut u8, len: usize) -> bool {
        (base.addr() & (self.address - 1)) | (len & (self.len - 1)) == 0
    }
}

#[derive(Debug)]
struct Slot<M> {
    count: usize,
    /// The iovec and its guest address if there is one only, which is the rule: then the tables are not touched.
    single: iovec,
    address: u64,
    memory: Option<MemoryRef<M>>,
}

/// The iovecs of every request in flight, in storage allocated once.
#[derive(Debug)]
pub(super) struct GuestBuffers<M> {
    iovecs: Box<[iovec]>,
    /// The guest address of each iovec, to mark what the kernel has written as dirty.
    addresses: Box<[u64]>,
    slots: Box<[Slot<M>]>,
    alignment: Alignment,
}

impl<M: GuestMemoryBackend> GuestBuffers<M> {
    pub(super) fn new(slots: usize, alignment: Alignment) -> Self {
        debug_assert!(alignment.address.is_power_of_two() && alignment.len.is_power_of_two());
        // Zeroed by the allocator, so that the pages of slots never used take no memory.
        let iovecs = Box::<[iovec]>::new_zeroed_slice(slots * SLOT_STRIDE);
        Self {
            // SAFETY: all zeroes is a valid iovec: a null pointer and length 0.
            iovecs: unsafe { iovecs.assume_init() },
            addresses: vec![0; slots * SLOT_STRIDE].into_boxed_slice(),
            slots: (0..slots)
                .map(|_| Slot {
                    count: 0,
                    single: NO_IOVEC,
                    address: 0,
                    memory: None,
                })
                .collect(),
            alignment,
        }
    }

    /// Fills a slot with the host addresses of `bytes` of the data that `segments` describe, and
    /// returns how many iovecs that took. A range that crosses into an adjacent region is split.
    #[inline]
    pub(super) fn fill(
        &mut self,
        slot: SlotId,
        memory: &mut HotRegion<'_, M>,
        segments: &[Segment],
        bytes: Range<u64>,
    ) -> Result<usize, NotInPlace> {
        // Nearly always the header is one segment and the data is one.
        let data = match segments {
            [data, ..] if bytes.start == 0 => Some(data),
            [header, data, ..] if u64::from(header.len) == bytes.start => Some(data),
            _ => None,
        };
        if let Some(data) = data
            && u64::from(data.len) == bytes.end - bytes.start
            && let Ok(slice) = memory.slice(data.addr, data.len as usize)
        {
            let iov_base = slice.ptr_guard_mut().as_ptr();
            if self.alignment.suits(iov_base, slice.len()) {
                // Field by field: a whole one would be put together elsewhere and copied, which stalls.
                let entry = &mut self.slots[slot.index()];
                entry.count = 1;
                entry.single.iov_base = iov_base.cast();
                entry.single.iov_len = slice.len();
                entry.address = data.addr.0;
                entry.memory = Some(memory.memory().clone());
                return Ok(1);
            }
        }
        self.fill_parts(slot, memory, segments, bytes)
    }

    #[inline(never)]
    fn fill_parts(
        &mut self,
        slot: SlotId,
        memory: &mut HotRegion<'_, M>,
        segments: &[Segment],
        bytes: Range<u64>,
    ) -> Result<usize, NotInPlace> {
        let base = slot.index() * SLOT_STRIDE;
        let alignment = self.alignment;
        let iovecs = &mut self.iovecs[base..base + MAX_SEGMENTS_PER_REQUEST];
        let addresses = &mut self.addresses[base..base + MAX_SEGMENTS_PER_REQUEST];
        let entry = &mut self.slots[slot.index()];
        entry.count = 0;
        let (mut skip, mut left) = (bytes.start, bytes.end - bytes.start);
        let mut count = 0;
        let mut in_place = true;
        for segment in segments {
            let len = u64::from(segment.len);
            if skip >= len {
                skip -= len;
                continue;
            }
            if left == 0 {
                break;
            }
            let addr = segment
                .addr
                .0
                .checked_add(skip)
                .ok_or(NotInPlace::Unmapped)?;
            let take = (len - skip).min(left);
            skip = 0;
            left -= take;
            // A u32 length fits usize on the 64-bit hosts this runs on.
            let take = usize::try_from(take).map_err(|_| NotInPlace::Unmapped)?;
            // Every segment is translated even when the request will bounce: one that is not
            // mapped makes the chain bad, however its neighbours lie.
            let mut place = |addr: u64, slice: VolatileSlice<'_, MS<'_, M>>| {
                let iov_base = slice.ptr_guard_mut().as_ptr();
                let suits = alignment.suits(iov_base, slice.len());
                in_place &= suits && count < MAX_SEGMENTS_PER_REQUEST;
                if in_place {
                    iovecs[count] = iovec {
                        iov_base: iov_base.cast(),
                        iov_len: slice.len(),
                    };
                    addresses[count] = addr;
                    count += 1;
                }
            };
            if let Ok(slice) = memory.slice(GuestAddress(addr), take) {
                place(addr, slice);
                continue;
            }
            let mut addr = addr;
            for slice in memory.map().get_slices(GuestAddress(addr), take) {
                let slice = slice.map_err(|error| match error {
                    GuestMemoryError::IOError(_) => NotInPlace::Lost,
                    _ => NotInPlace::Unmapped,
                })?;
                let len = slice.len();
                place(addr, slice);
                // No overflow: the slices are parts of a range that was found.
                addr = addr.wrapping_add(len as u64);
            }
        }
        debug_assert_eq!(left, 0, "the range goes past the segments");
        if !in_place {
            return Err(NotInPlace::Bounce);
        }
        entry.count = count;
        (entry.single, entry.address) = (iovecs[0], addresses[0]);
        entry.memory = Some(memory.memory().clone());
        Ok(count)
    }

    /// A slot's iovecs and their guest addresses.
    #[inline]
    fn parts(&self, slot: SlotId) -> (&[iovec], &[u64]) {
        let entry = &self.slots[slot.index()];
        if entry.count == 1 {
            return (
                slice::from_ref(&entry.single),
                slice::from_ref(&entry.address),
            );
        }
        let base = slot.index() * SLOT_STRIDE;
        let parts = base..base + entry.count;
        (&self.iovecs[parts.clone()], &self.addresses[parts])
    }

    /// Keeps the map that a request without data of its own in a slot was popped under.
    pub(super) fn hold(&mut self, slot: SlotId, memory: &MemoryRef<M>) {
        let entry = &mut self.slots[slot.index()];
        entry.count = 0;
        entry.memory = Some(memory.clone());
    }

    /// The map that a request in a slot was popped under.
    #[inline]
    pub(super) fn memory(&self, slot: SlotId) -> Option<&MemoryRef<M>> {
        self.slots[slot.index()].memory.as_ref()
    }

    /// Whether any of a slot's memory has gone since it was filled. Slow: asked only after a loss.
    #[cold]
    pub(super) fn is_lost(&self, slot: SlotId) -> bool {
        self.parts(slot)
            .0
            .iter()
            .any(|iovec| SigbusGuard::is_lost(iovec.iov_base.cast(), iovec.iov_len))
    }

    /// Marks a slot's memory as written to, where its map keeps account of that. To be called after the
    /// kernel is done and before the guest is told. `hot` is of the slot's own map.
    #[inline]
    pub(super) fn mark_dirty(&self, slot: SlotId, hot: &mut HotRegion<'_, M>) {
        // A map without a bitmap has one of no size, and then this compiles to nothing.
        if size_of::<MS<'_, M>>() == 0 {
            return;
        }
        let entry = &self.slots[slot.index()];
        debug_assert!(
            entry
                .memory
                .as_ref()
                .is_none_or(|memory| memory.is(hot.memory()))
        );
        let (iovecs, addresses) = self.parts(slot);
        for (iovec, &addr) in iovecs.iter().zip(addresses) {
            // Found before, and gone only if it was lost.
            if let Ok(slice) = hot.slice(GuestAddress(addr), iovec.iov_len) {
                slice.bitmap().mark_dirty(0, iovec.iov_len);
            }
        }
    }

    /// Lets go of a slot's memory map.
    pub(super) fn clear(&mut self, slot: SlotId) {
        let entry = &mut self.slots[slot.index()];
        entry.count = 0;
        entry.memory = None;
    }

    /// As [`queue`](Self::queue) for one slot.
    #[inline(always)]
    pub(super) fn queue_one(
        &mut self,
        queue: &mut IoQueue<Owner<M>>,
        transfer: Transfer,
        offset: u64,
        slot: SlotId,
    ) -> bool {
        let entry = &mut self.slots[slot.index()];
        if entry.count != 1 {
            return self.queue(queue, transfer, offset, std::iter::once(slot));
        }
        // Moved and not cloned: every request would count the map's users up and down once more.
        let Some(memory) = entry.memory.take() else {
            return false;
        };
        let owner = Owner::Guest {
            first: slot,
            memory,
        };
        let segment = entry.single;
        // SAFETY: as in `queue`.
        let queued = unsafe {
            match transfer {
                Transfer::Read => queue.queue_pread(offset, segment, owner),
                Transfer::Write => queue.queue_pwrite(offset, segment, WRITE, owner),
            }
        };
        match queued {
            Ok(()) => true,
            Err(error) => {
                if let Owner::Guest { memory, .. } = error.into_owner() {
                    self.give_back(slot, memory);
                }
                false
            }
        }
    }

    /// Puts the map back that an operation has owned.
    #[inline]
    pub(super) fn give_back(&mut self, slot: SlotId, memory: MemoryRef<M>) {
        self.slots[slot.index()].memory = Some(memory);
    }

    /// Queues one operation for the data of `slots`, back to back in the file from `offset`. The
    /// first slot names it. False if it could not be queued; nothing has happened then.
    pub(super) fn queue<I>(
        &self,
        queue: &mut IoQueue<Owner<M>>,
        transfer: Transfer,
        offset: u64,
        slots: I,
    ) -> bool
    where
        I: Iterator<Item = SlotId> + Clone,
    {
        let Some(first) = slots.clone().next() else {
            return false;
        };
        let Some(memory) = &self.slots[first.index()].memory else {
            return false;
        };
        // One owner keeps one map alive, so all parts must point into that one.
        let same_map = slots.clone().all(|slot| {
            let part = self.slots[slot.index()].memory.as_ref();
            part.is_some_and(|part| part.is(memory))
        });
        if !same_map {
            return false;
        }
        let owner = Owner::Guest {
            first,
            memory: memory.clone(),
        };
        let iovecs = slots.flat_map(|slot| self.parts(slot).0.iter().copied());
        // SAFETY: `fill` translated each iovec through the map that the owner holds, so it stays
        // mapped, readable and writable until the owner is dropped, whatever happens to this table.
        // The guest may write to it at any time; the kernel copies, and nothing here reads it.
        let queued = unsafe {
            match transfer {
                Transfer::Read => queue.queue_readv(offset, iovecs, owner),
                Transfer::Write => queue.queue_writev(offset, iovecs, WRITE, owner),
            }
        };
        queued.is_ok()
    }
}

/// How every write is made. Where it must be stable before it completes, one fdatasync follows for all that
/// have completed together.
const WRITE: Durability = Durability::WriteBack;

/// Direction of a transfer, seen from the guest.
#[derive(Clone, Copy, Debug)]
pub(super) enum Transfer {
    Read,
    Write,
}

/// Queues the first `len` bytes of a bounce buffer. Gives the buffer back if it cannot be queued.
pub(super) fn queue_bounce<M>(
    queue: &mut IoQueue<Owner<M>>,
    transfer: Transfer,
    offset: u64,
    slot: SlotId,
    mut buffer: Box<AlignedBuf>,
    len: usize,
) -> Result<(), Box<AlignedBuf>> {
    let chunk = &mut buffer[..len];
    let segment = iovec {
        iov_base: chunk.as_mut_ptr().cast(),
        iov_len: chunk.len(),
    };
    let owner = Owner::Bounce { slot, buffer };
    // SAFETY: the iovec lies in the owner's buffer, which is on the heap: moving the owner does not
    // move it, and the owner comes back only when the kernel is done.
    let queued = unsafe {
        match transfer {
            Transfer::Read => queue.queue_pread(offset, segment, owner),
            Transfer::Write => queue.queue_pwrite(offset, segment, WRITE, owner),
        }
    };
    queued.map_err(|error| match error.into_owner() {
        Owner::Bounce { buffer, .. } => buffer,
        Owner::Guest { .. } | Owner::Range { .. } | Owner::Sync { .. } => {
            unreachable!("the owner made above")
        }
    })
}
