//! The requests in flight: a fixed table with a free list.

use vm_memory::GuestAddress;
use vring::Head;

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

/// A request in flight, from pop to push. The map that was in force when it was popped is with its buffers.
#[derive(Debug)]
pub(super) struct Request {
    /// Its token in the queue it came from; `None` in a slot that is free.
    pub(super) head: Option<Head>,
    /// Which queue that is.
    pub(super) queue: u16,
    pub(super) kind: RequestKind,
    /// The next request of the same operation.
    pub(super) next: Option<SlotId>,
    pub(super) work: Work,
    /// Byte offset in the image.
    pub(super) offset: u64,
    /// Bytes of data.
    pub(super) len: u64,
    /// Where the status byte goes.
    pub(super) status: GuestAddress,
    /// Device-writable bytes before the status byte.
    pub(super) writable_data: u64,
    /// Losses of memory in this process when its buffers were looked up.
    pub(super) losses: usize,
    /// When it was popped, if that is measured.
    pub(super) popped: Option<u64>,
}

impl Request {
    /// What is in a slot that is free.
    const NONE: Self = Self {
        head: None,
        queue: 0,
        kind: RequestKind::Other,
        next: None,
        work: Work::Flush,
        offset: 0,
        len: 0,
        status: GuestAddress(0),
        writable_data: 0,
        losses: 0,
        popped: None,
    };
}

/// The table. `capacity` requests, allocated once.
#[derive(Debug)]
pub(super) struct Slots {
    requests: Box<[Request]>,
    free: Vec<SlotId>,
}

impl Slots {
    pub(super) fn new(capacity: u16) -> Self {
        Self {
            requests: (0..capacity).map(|_| Request::NONE).collect(),
            // Low numbers first: a shallow load stays in few cache lines.
            free: (0..capacity).rev().map(SlotId).collect(),
        }
    }

    #[inline]
    pub(super) fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// Claims a free slot, to be filled or unclaimed.
    #[inline]
    pub(super) fn claim(&mut self) -> Option<SlotId> {
        self.free.pop()
    }

    /// Gives back a slot claimed and never filled.
    pub(super) fn unclaim(&mut self, slot: SlotId) {
        debug_assert!(self.get(slot).is_none());
        self.free.push(slot);
    }

    #[inline]
    pub(super) fn fill(&mut self, slot: SlotId, request: Request) {
        debug_assert!(self.get(slot).is_none() && request.head.is_some());
        self.requests[slot.index()] = request;
    }

    #[inline]
    pub(super) fn get(&self, slot: SlotId) -> Option<&Request> {
        Some(&self.requests[slot.index()]).filter(|request| request.head.is_some())
    }

    #[inline]
    pub(super) fn get_mut(&mut self, slot: SlotId) -> Option<&mut Request> {
        Some(&mut self.requests[slot.index()]).filter(|request| request.head.is_some())
    }

    /// Frees the slot of a request that has come to its end.
    #[inline]
    pub(super) fn release(&mut self, slot: SlotId) -> Option<Head> {
        let head = self.requests[slot.index()].head.take();
        if head.is_some() {
            self.free.push(slot);
        }
        head
    }

    /// Requests in flight.
    pub(super) fn in_use(&self) -> usize {
        self.requests.len() - self.free.len()
    }
}
