//! Requests in guest memory: header, status, data.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vm_memory::{
    Bytes, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, VolatileMemory, VolatileSlice,
};

use crate::SECTOR_SIZE;
use crate::load::guest::{LINE, Places, STATUS_OFFSET};
use crate::load::ring::Kind;
use crate::load::workload::Step;

/// Status before the device has written one: none that there is (virtio 1.3 §5.2.6).
const NO_STATUS: u8 = 0xff;
const STATUS_OK: u8 = 0;

/// Types, by [`Kind::index`].
const TYPES: [u32; 3] = [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH];

/// Slices of guest memory that [`Requests`] are made of.
pub(in crate::load) struct Slices<'m> {
    lines: Vec<VolatileSlice<'m>>,
    buffers: Vec<VolatileSlice<'m>>,
}

impl<'m> Slices<'m> {
    /// Of requests whose data have `block` bytes.
    pub(in crate::load) fn new(
        memory: &'m GuestMemoryMmap,
        places: &[Places],
        block: u64,
    ) -> Result<Self, GuestMemoryError> {
        let line_len = usize::try_from(LINE).unwrap_or(usize::MAX);
        let block = usize::try_from(block).unwrap_or(usize::MAX);
        let lines = places
            .iter()
            .map(|place| memory.get_slice(place.line, line_len));
        let buffers = places
            .iter()
            .map(|place| memory.get_slice(place.data, block));
        Ok(Self {
            lines: lines.collect::<Result<_, _>>()?,
            buffers: buffers.collect::<Result<_, _>>()?,
        })
    }
}

/// A request.
pub(super) struct Slot<'m> {
    /// Type, and the reserved word (virtio 1.3 §5.2.6).
    kind_word: &'m AtomicU64,
    sector_word: &'m AtomicU64,
    status: &'m AtomicU8,
    /// When it was made, or due.
    pub(super) started: u64,
    pub(super) kind: Kind,
    pub(super) block: u64,
}

impl Slot<'_> {
    /// Whether the device says that it has done it.
    #[inline]
    pub(super) fn is_done(&self) -> bool {
        // Relaxed: written before the used index, which was loaded with acquire.
        self.status.load(Ordering::Relaxed) == STATUS_OK
    }
}

/// All requests of a queue, and where on the device their blocks are.
pub(super) struct Requests<'m> {
    pub(super) slots: Vec<Slot<'m>>,
    buffers: &'m [VolatileSlice<'m>],
    first_sector: u64,
    sectors_per_block: u64,
}

impl<'m> Requests<'m> {
    /// `None` if a line has no room for what belongs there.
    pub(super) fn new(
        slices: &'m Slices<'m>,
        first_sector: u64,
        sectors_per_block: u64,
    ) -> Option<Self> {
        let status = usize::try_from(STATUS_OFFSET).ok()?;
        let slot = |line: &'m VolatileSlice<'m>| {
            Some(Slot {
                kind_word: line.get_atomic_ref(0).ok()?,
                sector_word: line.get_atomic_ref(size_of::<u64>()).ok()?,
                status: line.get_atomic_ref(status).ok()?,
                started: 0,
                kind: Kind::Read,
                block: 0,
            })
        };
        Some(Self {
            slots: slices.lines.iter().map(slot).collect::<Option<_>>()?,
            buffers: &slices.buffers,
            first_sector,
            sectors_per_block,
        })
    }

    /// Writes what the device reads, and what it is to write over.
    #[inline]
    pub(super) fn write(&mut self, request: u16, step: Step, started: u64) {
        let sector = match step.kind {
            // §5.2.6.1: a flush has 0.
            Kind::Flush => 0,
            // Within the capacity, whose bytes are a u64.
            Kind::Read | Kind::Write => {
                let sectors = step.block.wrapping_mul(self.sectors_per_block);
                self.first_sector.wrapping_add(sectors)
            }
        };
        let slot = &mut self.slots[usize::from(request)];
        // Relaxed: published by the release store of the ring's index.
        let kind = u64::from(TYPES[step.kind.index()]);
        slot.kind_word.store(kind.to_le(), Ordering::Relaxed);
        slot.sector_word.store(sector.to_le(), Ordering::Relaxed);
        slot.status.store(NO_STATUS, Ordering::Relaxed);
        slot.started = started;
        slot.kind = step.kind;
        slot.block = step.block;
    }

    /// Puts `content` into the request's buffer.
    pub(super) fn put(&self, request: u16, content: &[u8]) {
        self.buffers[usize::from(request)].copy_from(content);
    }

    /// Copies the request's buffer.
    pub(super) fn get(&self, request: u16, content: &mut [u8]) {
        self.buffers[usize::from(request)].copy_to(content);
    }

    /// Leaves nothing in the buffer that could be taken for what a read should put there.
    pub(super) fn wipe(&self, request: u16) {
        let buffer = &self.buffers[usize::from(request)];
        let sector_len = usize::try_from(SECTOR_SIZE).unwrap_or(usize::MAX);
        for sector in (0..buffer.len()).step_by(sector_len) {
            // Within the buffer.
            let wiped = buffer.write_slice(&[0; 8], sector);
            debug_assert!(wiped.is_ok());
        }
    }
}
