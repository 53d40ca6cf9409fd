//! The three areas of a packed ring, translated: every load and store of a ring word.

// UNSAFETY: offsets into the translated areas are computed here, where the queue size that bounds
// them is known. Positions are masked, so no value from a guest or a caller can reach outside.
#![expect(unsafe_code)]

use std::fmt;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vm_memory::{GuestAddress, GuestMemory, Permissions};

use super::descriptor::Tail;
use super::event::EventSuppression;
use super::layout::{
    DESCRIPTOR_RING_ALIGNMENT, EVENT_SUPPRESSION_ALIGNMENT, EVENT_SUPPRESSION_LEN,
    descriptor_ring_len,
};
use crate::config::{QueueSize, RingAddresses, RingArea, StartError};
use crate::ring_memory::{Area, DESCRIPTOR_LEN, mark_dirty, tracks_writes};

/// A packed ring in memory. It has no opinion on who may write what: both sides of a queue use
/// it.
///
/// A descriptor is accessed as its two 8-byte halves, always: the address, and the rest, with the
/// flags that say whose it is. So whoever sees the flags has the length and the id of the same
/// instant with them.
pub(crate) struct PackedRings<M> {
    // The areas are declared, and so dropped, before the memory they point into.
    descriptors: Area,
    driver_event: Area,
    device_event: Area,
    size: QueueSize,
    /// The queue size less one, which masks a position: no subtraction that could overflow, and
    /// so no check, for each.
    mask: usize,
    addresses: RingAddresses,
    memory: Arc<M>,
}

// SAFETY: the raw pointers in the areas lead into memory that `memory` keeps mapped, whichever
// thread holds it; accesses are atomic and nothing is tied to a thread.
unsafe impl<M: Send + Sync> Send for PackedRings<M> {}
// SAFETY: as for `Send`; a shared reference allows atomic accesses only.
unsafe impl<M: Send + Sync> Sync for PackedRings<M> {}

impl<M> fmt::Debug for PackedRings<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PackedRings")
            .field("descriptors", &self.descriptors)
            .field("driver_event", &self.driver_event)
            .field("device_event", &self.device_event)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

impl<M: GuestMemory> PackedRings<M> {
    /// Translates the three areas. Areas that overlap one another are accepted: every access is
    /// an atomic on its own, so a guest that does this only garbles its own ring (row R7).
    pub(crate) fn translate(
        memory: Arc<M>,
        size: QueueSize,
        addresses: RingAddresses,
    ) -> Result<Self, StartError> {
        Ok(Self {
            descriptors: Area::translate(
                &*memory,
                RingArea::DescriptorArea,
                addresses.descriptor_area,
                descriptor_ring_len(size.get()),
                DESCRIPTOR_RING_ALIGNMENT,
                Permissions::ReadWrite,
            )?,
            driver_event: Area::translate(
                &*memory,
                RingArea::DriverArea,
                addresses.driver_area,
                EVENT_SUPPRESSION_LEN,
                EVENT_SUPPRESSION_ALIGNMENT,
                Permissions::Read,
            )?,
            device_event: Area::translate(
                &*memory,
                RingArea::DeviceArea,
                addresses.device_area,
                EVENT_SUPPRESSION_LEN,
                EVENT_SUPPRESSION_ALIGNMENT,
                Permissions::Write,
            )?,
            size,
            mask: usize::from(size.get()) - 1,
            addresses,
            memory,
        })
    }

    pub(crate) const fn size(&self) -> QueueSize {
        self.size
    }

    pub(crate) const fn memory(&self) -> &Arc<M> {
        &self.memory
    }

    pub(crate) const fn addresses(&self) -> RingAddresses {
        self.addresses
    }

    /// Everything but the address of the descriptor at `index` modulo the queue size. Acquire:
    /// pairs with the release of whoever handed the descriptor over (`publish_tail`): the driver
    /// after it wrote a chain (virtio 1.3 §2.8.21.1), the device after it wrote the buffers. What
    /// is loaded after it, of this descriptor or of others, is what was stored before.
    #[inline]
    pub(crate) fn tail(&self, index: u16) -> Tail {
        let [_, tail] = self.halves(index);
        Tail::from_word(tail.load(Ordering::Acquire))
    }

    /// Has the descriptor at `index` modulo the queue size brought nearer.
    #[inline]
    pub(crate) fn prefetch(&self, index: u16) {
        self.descriptors.prefetch(self.slot(index) * DESCRIPTOR_LEN);
    }

    /// The address of the descriptor at `index` modulo the queue size. Relaxed: ordered after the
    /// flags by the acquire in `tail`.
    #[inline]
    pub(crate) fn address(&self, index: u16) -> u64 {
        let [address, _] = self.halves(index);
        u64::from_le(address.load(Ordering::Relaxed))
    }

    /// The descriptor at `index` modulo the queue size, which is not the first of its chain.
    /// Relaxed: ordered after the first one's flags by the acquire in `tail`.
    #[inline]
    pub(crate) fn later(&self, index: u16) -> (Tail, u64) {
        self.table().later(index)
    }

    /// The descriptors. A value of its own, which no store to elsewhere can change, so that the
    /// compiler reads pointer and mask once for a chain.
    #[inline]
    pub(crate) const fn table(&self) -> DescriptorTable<'_> {
        DescriptorTable {
            base: self.descriptors.base(),
            mask: self.mask,
            _rings: PhantomData,
        }
    }

    /// Writes everything but the address of the descriptor at `index` modulo the queue size, to
    /// be handed over by a later [`publish_tail`](Self::publish_tail) of one that the other side
    /// looks at before this.
    #[inline]
    pub(crate) fn store_tail(&self, index: u16, tail: Tail) {
        let [_, word] = self.halves(index);
        word.store(tail.to_word(), Ordering::Relaxed);
    }

    /// Hands the descriptor at `index` modulo the queue size over, and with it everything stored
    /// before. Release: pairs with the acquire in `tail`.
    #[inline]
    pub(crate) fn publish_tail(&self, index: u16, tail: Tail) {
        let [_, word] = self.halves(index);
        word.store(tail.to_word(), Ordering::Release);
    }

    /// What the driver wants to be notified of, in one load: position and flags of two moments
    /// would be a request nobody made.
    #[inline]
    pub(crate) fn driver_event(&self) -> EventSuppression {
        EventSuppression::from_word(event_word(&self.driver_event).load(Ordering::Relaxed))
    }

    /// Says what the device wants to be notified of, in one store.
    #[inline]
    pub(crate) fn store_device_event(&self, event: EventSuppression) {
        event_word(&self.device_event).store(event.to_word(), Ordering::Relaxed);
        mark_dirty(
            &*self.memory,
            self.addresses.device_area,
            EVENT_SUPPRESSION_LEN,
        );
    }

    /// Records that the device wrote used descriptors among those from `first` up to, and without,
    /// `end`: at most the whole ring.
    ///
    /// Called after the writes: a migration that reads and clears the bitmap in between copies
    /// the page again, whereas a mark before the write could be cleared and the write missed.
    #[inline]
    pub(crate) fn mark_used_dirty(&self, first: u16, end: u16) {
        if !tracks_writes::<M>() {
            return;
        }
        let entries = usize::from(self.size.get());
        let count = usize::from(end.wrapping_sub(first)).min(entries);
        let first = self.slot(first);
        // The descriptors lie in one run, or in two around the end of the ring.
        let head = count.min(entries - first);
        for (first, count) in [(first, head), (0, count - head)] {
            if count != 0 {
                let offset = first * DESCRIPTOR_LEN;
                let address = GuestAddress(self.addresses.descriptor_area.0 + offset as u64);
                mark_dirty(&*self.memory, address, count * DESCRIPTOR_LEN);
            }
        }
    }

    /// `index` modulo the queue size.
    #[inline]
    const fn slot(&self, index: u16) -> usize {
        index as usize & self.mask
    }

    /// The descriptor at `index` modulo the queue size.
    #[inline]
    fn halves(&self, index: u16) -> &[AtomicU64; 2] {
        // SAFETY: the masked slot is below the queue size the area was translated for; entries
        // are 16 bytes in a 16-aligned ring; `self.memory` is borrowed.
        unsafe { self.descriptors.entry(self.slot(index) * DESCRIPTOR_LEN) }
    }
}

/// The descriptors of a ring, for as long as that is borrowed.
#[derive(Clone, Copy)]
pub(crate) struct DescriptorTable<'a> {
    base: NonNull<u8>,
    mask: usize,
    _rings: PhantomData<&'a ()>,
}

impl DescriptorTable<'_> {
    /// As [`PackedRings::later`].
    #[inline(always)]
    pub(crate) fn later(self, index: u16) -> (Tail, u64) {
        let offset = (usize::from(index) & self.mask) * DESCRIPTOR_LEN;
        // SAFETY: the masked slot is below the queue size the area was translated for; entries
        // are 16 bytes in a 16-aligned ring; the rings, and with them the memory, are borrowed.
        // The host side accesses the entries through atomics only.
        let [address, tail]: &[AtomicU64; 2] = unsafe { self.base.add(offset).cast().as_ref() };
        let tail = Tail::from_word(tail.load(Ordering::Relaxed));
        (tail, u64::from_le(address.load(Ordering::Relaxed)))
    }
}

/// The one word of an event suppression structure.
#[inline]
fn event_word(area: &Area) -> &AtomicU32 {
    // SAFETY: both such areas are translated as one 4-aligned word; only `PackedRings` has them,
    // beside the memory they point into.
    unsafe { area.word32(0) }
}

/// The words that only a driver writes, and those it reads of the device's.
#[cfg(feature = "driver")]
impl<M: GuestMemory> PackedRings<M> {
    #[inline]
    pub(crate) fn store_address(&self, index: u16, address: u64) {
        let [word, _] = self.halves(index);
        word.store(address.to_le(), Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn store_driver_event(&self, event: EventSuppression) {
        event_word(&self.driver_event).store(event.to_word(), Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn device_event(&self) -> EventSuppression {
        EventSuppression::from_word(event_word(&self.device_event).load(Ordering::Relaxed))
    }
}
