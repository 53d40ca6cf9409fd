//! The requests in flight: a fixed table with a free list.

use vm_memory::GuestAddress;
use vring::Head;

use super::buffers::MemoryRef;
use super::flush::Epoch;
use crate::counters::RequestKind;

/// Index of a request in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlotId(u16);

impl SlotId {
    pub(super) fn index(self) -> usize {
        usize::from(self.0)
    }

    /// As a merger's tag.
    pub(super) fn tag(self) -> u32 {
        u32::from(self.0)
    }

    /// From a tag made by [`tag`](Self::tag).
    pub(super) fn from_tag(tag: u32) -> Option<Self> {
        u16::try_from(tag).ok().map(Self)
    }
}

/// What a request in flight does.
#[derive(Clone, Copy, Debug)]
pub(super) enum Work {
    Read,
    Write(Epoch),
    /// A write that the disk has done and that is to be made stable.
    UnstableWrite,
    Flush,
}

/// A request in flight, from pop to push.
#[derive(Debug)]
pub(super) struct Request<M> {
    /// Which queue it came from, and its token there.
    pub(super) queue: u16,
    pub(super) head: Head,
    pub(super) work: Work,
    /// Byte offset in the image.
    pub(super) offset: u64,
    /// Bytes of data.
    pub(super) len: u64,
    /// Where the status byte goes, in the map that was in force when it was popped.
    pub(super) status: GuestAddress,
    pub(super) memory: MemoryRef<M>,
    /// Device-writable bytes before the status byte.
    pub(super) writable_data: u64,
    /// Losses of memory in this process when its buffers were looked up.
    pub(super) losses: usize,
    pub(super) kind: RequestKind,
    /// When it was popped, if that is measured.
    pub(super) popped: Option<u64>,
    /// The next request of the same operation.
    pub(super) next: Option<SlotId>,
}

impl<M> Request<M> {
    /// A flush, unless `work`, `kind`, `offset` and `len` are set to something else.
    pub(super) fn new(
        queue: u16,
        head: Head,
        status: GuestAddress,
        memory: &MemoryRef<M>,
        writable_data: u64,
    ) -> Self {
        Self {
            queue,
            head,
            work: Work::Flush,
            offset: 0,
            len: 0,
            status,
            memory: memory.clone(),
            writable_data,
            losses: 0,
            kind: RequestKind::Flush,
            popped: None,
            next: None,
        }
    }
}

/// The table. `capacity` requests, allocated once.
#[derive(Debug)]
pub(super) struct Slots<M> {
    requests: Box<[Option<Request<M>>]>,
    free: Vec<SlotId>,
}

impl<M> Slots<M> {
    pub(super) fn new(capacity: u16) -> Self {
        Self {
            requests: (0..capacity).map(|_| None).collect(),
            // Low numbers first: a shallow load stays in few cache lines.
            free: (0..capacity).rev().map(SlotId).collect(),
        }
    }

    pub(super) fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// Claims a free slot, to be filled or unclaimed.
    pub(super) fn claim(&mut self) -> Option<SlotId> {
        self.free.pop()
    }

    /// Gives back a slot claimed and never filled.
    pub(super) fn unclaim(&mut self, slot: SlotId) {
        debug_assert!(self.requests[slot.index()].is_none());
        self.free.push(slot);
    }

    pub(super) fn fill(&mut self, slot: SlotId, request: Request<M>) {
        debug_assert!(self.requests[slot.index()].is_none());
        self.requests[slot.index()] = Some(request);
    }

    pub(super) fn get(&self, slot: SlotId) -> Option<&Request<M>> {
        self.requests[slot.index()].as_ref()
    }

    pub(super) fn get_mut(&mut self, slot: SlotId) -> Option<&mut Request<M>> {
        self.requests[slot.index()].as_mut()
    }

    /// Takes a finished request out and frees its slot.
    pub(super) fn release(&mut self, slot: SlotId) -> Option<Request<M>> {
        let request = self.requests[slot.index()].take();
        if request.is_some() {
            self.free.push(slot);
        }
        request
    }

    /// Requests in flight.
    pub(super) fn in_use(&self) -> usize {
        self.requests.len() - self.free.len()
    }
}
