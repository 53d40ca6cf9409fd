//! Bounce buffers: for requests whose memory direct I/O does not take as it lies.
//!
//! A fixed number of lanes, each with one aligned buffer. A request longer than the buffer goes
//! through its lane in rounds, so the memory is bounded whatever the guest asks for (hostile-inputs
//! I1, Z2). Without a free lane the request is not popped yet.

use ioq::AlignedBuf;
use vm_memory::{GuestMemoryBackend, GuestMemoryError};
use vring::{Chain, QueueSize};

use super::SlotId;
use super::buffers::Transfer;
use crate::request::HEADER_LEN;

/// Lanes of a data thread: enough for a few guests' worth of odd requests (they come from boot
/// loaders and tools, seldom from file systems) at 1 MiB of memory in all.
const LANES: usize = 4;

/// Bytes moved per round: past this size a disk's cost per byte no longer falls.
const LANE_BYTES: usize = 256 * 1024;

/// Alignment of the buffers: no direct I/O on Linux asks for more.
const LANE_ALIGNMENT: usize = 4096;

/// One request on its way through a lane.
#[derive(Debug)]
pub(super) struct Lane {
    /// The request's chain, swapped in for the lane's spare one.
    pub(super) chain: Chain,
    /// Here unless an operation has it.
    pub(super) buffer: Option<Box<AlignedBuf>>,
    pub(super) slot: Option<SlotId>,
    pub(super) transfer: Transfer,
    /// Where the request starts in the image.
    pub(super) offset: u64,
    pub(super) len: u64,
    /// Bytes of earlier rounds.
    pub(super) done: u64,
}

impl Lane {
    /// Bytes of the round at hand.
    pub(super) fn round_len(&self) -> usize {
        usize::try_from(self.len - self.done).map_or(LANE_BYTES, |left| left.min(LANE_BYTES))
    }

    /// Copies a write's round out of guest memory. False if the memory has gone.
    pub(super) fn copy_in<M: GuestMemoryBackend>(&self, memory: &M, buffer: &mut [u8]) -> bool {
        // Past the header, which the chain's readable part begins with however it is cut.
        let at = HEADER_LEN as u64 + self.done;
        self.chain
            .copy_from_readable(memory, at, buffer)
            .is_ok_and(|n| n == buffer.len())
    }

    /// Copies a read's round into guest memory. False if the memory has gone.
    pub(super) fn copy_out<M: GuestMemoryBackend>(&self, memory: &M, buffer: &[u8]) -> bool {
        self.chain
            .copy_to_writable(memory, self.done, buffer)
            .is_ok_and(|n| n == buffer.len())
    }
}

/// Whether any of a chain's memory has gone since it was mapped. Slow: asked only after a loss.
#[cold]
pub(super) fn is_lost<M: GuestMemoryBackend>(chain: &Chain, memory: &M) -> bool {
    chain
        .readable()
        .iter()
        .chain(chain.writable())
        .any(|segment| {
            usize::try_from(segment.len).is_ok_and(|len| {
                let mut slices = memory.get_slices(segment.addr, len);
                slices.any(|slice| matches!(slice, Err(GuestMemoryError::IOError(_))))
            })
        })
}

/// The lanes of a data thread.
#[derive(Debug)]
pub(super) struct Bounce {
    lanes: Vec<Lane>,
}

impl Bounce {
    /// `None` if there is no memory for the buffers.
    pub(super) fn new(max_queue_size: QueueSize) -> Option<Self> {
        let lane = || {
            Some(Lane {
                chain: Chain::for_queue(max_queue_size),
                buffer: Some(Box::new(AlignedBuf::new(LANE_BYTES, LANE_ALIGNMENT)?)),
                slot: None,
                transfer: Transfer::Read,
                offset: 0,
                len: 0,
                done: 0,
            })
        };
        Some(Self {
            lanes: (0..LANES).map(|_| lane()).collect::<Option<_>>()?,
        })
    }

    pub(super) fn free_lane(&mut self) -> Option<&mut Lane> {
        self.lanes.iter_mut().find(|lane| lane.slot.is_none())
    }

    /// The lane that `slot`'s request is in.
    pub(super) fn lane_of(&mut self, slot: SlotId) -> Option<&mut Lane> {
        self.lanes.iter_mut().find(|lane| lane.slot == Some(slot))
    }
}
