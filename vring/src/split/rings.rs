//! The three areas of a split ring, translated: every load and store of a ring word.

// UNSAFETY: offsets into the translated areas are computed here, where the queue size that bounds
// them is known. Positions are masked, so no value from a guest or a caller can reach outside.
#![expect(unsafe_code)]

use std::fmt;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use vm_memory::{GuestAddress, GuestMemory, Permissions};

use super::descriptor::Descriptor;
use super::layout::{
    AVAILABLE_ELEMENT_LEN, AVAILABLE_RING_ALIGNMENT, DESCRIPTOR_TABLE_ALIGNMENT, FLAGS_OFFSET,
    INDEX_OFFSET, RING_OFFSET, USED_ELEMENT_LEN, USED_RING_ALIGNMENT, avail_event_offset,
    available_ring_len, descriptor_table_len, used_event_offset, used_ring_len,
};
use crate::config::{QueueSize, RingAddresses, RingArea, StartError};
use crate::ring_memory::{Area, DESCRIPTOR_LEN, mark_dirty, tracks_writes};

/// A ring in memory. It has no opinion on who may write what: both sides of a queue use it.
pub(crate) struct SplitRings<M> {
    // The areas are declared, and so dropped, before the memory they point into.
    descriptors: Area,
    available: Area,
    used: Area,
    size: QueueSize,
    /// The queue size less one, which masks an index: no subtraction that could overflow, and so no
    /// check, for each.
    mask: usize,
    addresses: RingAddresses,
    memory: Arc<M>,
}

// SAFETY: the raw pointers in the areas lead into memory that `memory` keeps mapped, whichever
// thread holds it; accesses are atomic and nothing is tied to a thread.
unsafe impl<M: Send + Sync> Send for SplitRings<M> {}
// SAFETY: as for `Send`; a shared reference allows atomic accesses only.
unsafe impl<M: Send + Sync> Sync for SplitRings<M> {}

impl<M> fmt::Debug for SplitRings<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SplitRings")
            .field("descriptors", &self.descriptors)
            .field("available", &self.available)
            .field("used", &self.used)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

impl<M: GuestMemory> SplitRings<M> {
    /// Translates the three areas. Areas that overlap one another are accepted: every access is
    /// an atomic on its own, so a guest that does this only garbles its own ring (row R7).
    pub(crate) fn translate(
        memory: Arc<M>,
        size: QueueSize,
        addresses: RingAddresses,
    ) -> Result<Self, StartError> {
        let entries = size.get();
        Ok(Self {
            descriptors: Area::translate(
                &*memory,
                RingArea::DescriptorArea,
                addresses.descriptor_area,
                descriptor_table_len(entries),
                DESCRIPTOR_TABLE_ALIGNMENT,
                Permissions::Read,
            )?,
            available: Area::translate(
                &*memory,
                RingArea::DriverArea,
                addresses.driver_area,
                available_ring_len(entries),
                AVAILABLE_RING_ALIGNMENT,
                Permissions::Read,
            )?,
            used: Area::translate(
                &*memory,
                RingArea::DeviceArea,
                addresses.device_area,
                used_ring_len(entries),
                USED_RING_ALIGNMENT,
                // Reads where a predecessor stopped.
                Permissions::ReadWrite,
            )?,
            size,
            mask: usize::from(entries) - 1,
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

    /// Has the first descriptors of the chain at `position` of the available ring brought nearer: three of them, as
    /// most requests have, are in one line or two.
    ///
    /// The head is read for this alone, and read again when the chain's turn comes: it is masked,
    /// and nothing is decided on it.
    #[inline]
    pub(crate) fn prefetch_chain(&self, position: u16) {
        let index = self.avail_entry(position);
        let first = self.slot(index) * DESCRIPTOR_LEN;
        self.descriptors.prefetch(first);
        self.descriptors.prefetch(first + 2 * DESCRIPTOR_LEN);
    }

    /// The descriptor table. A value of its own, which no store to elsewhere can change, so that the
    /// compiler reads pointer and mask once for a chain.
    #[inline]
    pub(crate) const fn table(&self) -> DescriptorTable<'_> {
        DescriptorTable {
            base: self.descriptors.base(),
            mask: self.mask,
            _rings: PhantomData,
        }
    }

    /// `avail.idx`. Acquire: pairs with the driver's release of the index after it wrote the
    /// entry and the descriptors (`publish_avail_idx`; virtio 1.3 §2.7.13.3).
    #[inline]
    pub(crate) fn avail_idx(&self) -> u16 {
        u16::from_le(self.avail_word(INDEX_OFFSET).load(Ordering::Acquire))
    }

    /// The head at position `position` modulo the queue size of the available ring.
    #[inline]
    pub(crate) fn avail_entry(&self, position: u16) -> u16 {
        let offset = RING_OFFSET + self.slot(position) * AVAILABLE_ELEMENT_LEN;
        u16::from_le(self.avail_word(offset).load(Ordering::Relaxed))
    }

    #[inline]
    pub(crate) fn avail_flags(&self) -> u16 {
        u16::from_le(self.avail_word(FLAGS_OFFSET).load(Ordering::Relaxed))
    }

    #[inline]
    pub(crate) fn used_event(&self) -> u16 {
        let offset = used_event_offset(self.size.get());
        u16::from_le(self.avail_word(offset).load(Ordering::Relaxed))
    }

    /// `used.idx`. Acquire: pairs with the release in `publish_used_idx`.
    #[inline]
    pub(crate) fn used_idx(&self) -> u16 {
        u16::from_le(self.used_word(INDEX_OFFSET).load(Ordering::Acquire))
    }

    /// Fills the used element at `position` modulo the queue size. Invisible until the index
    /// passes it.
    #[inline]
    pub(crate) fn store_used_element(&self, position: u16, id: u16, len: u32) {
        let [id_word, len_word] = self.used_element_words(position);
        id_word.store(u32::from(id).to_le(), Ordering::Relaxed);
        len_word.store(len.to_le(), Ordering::Relaxed);
    }

    /// Stores `used.idx`. Release: pairs with the driver's acquire of the index (`used_idx`),
    /// so whoever sees it sees the elements and the buffers they speak of
    /// (virtio 1.3 §2.7.8.2).
    #[inline]
    pub(crate) fn publish_used_idx(&self, index: u16) {
        self.used_word(INDEX_OFFSET)
            .store(index.to_le(), Ordering::Release);
    }

    #[inline]
    pub(crate) fn store_used_flags(&self, flags: u16) {
        self.used_word(FLAGS_OFFSET)
            .store(flags.to_le(), Ordering::Relaxed);
        self.mark_used_dirty(FLAGS_OFFSET, size_of::<u16>());
    }

    #[inline]
    pub(crate) fn store_avail_event(&self, event: u16) {
        let offset = avail_event_offset(self.size.get());
        self.used_word(offset)
            .store(event.to_le(), Ordering::Relaxed);
        self.mark_used_dirty(offset, size_of::<u16>());
    }

    /// Records that `count` used elements ending before `end`, and the index, were written.
    ///
    /// Called after the writes: a migration that reads and clears the bitmap in between copies
    /// the page again, whereas a mark before the write could be cleared and the write missed.
    #[inline]
    pub(crate) fn mark_published_dirty(&self, end: u16, count: usize) {
        if !tracks_writes::<M>() {
            return;
        }
        let entries = usize::from(self.size.get());
        let count = count.min(entries);
        let end = self.slot(end);
        // The elements lie in one run, or in two around the end of the ring.
        let tail = count.saturating_sub(end);
        let head = count - tail;
        for (first, count) in [(end - head, head), (entries - tail, tail)] {
            if count != 0 {
                self.mark_used_dirty(
                    RING_OFFSET + first * USED_ELEMENT_LEN,
                    count * USED_ELEMENT_LEN,
                );
            }
        }
        self.mark_used_dirty(INDEX_OFFSET, size_of::<u16>());
    }

    /// Marks part of the used ring in the memory's dirty bitmap.
    #[inline]
    fn mark_used_dirty(&self, offset: usize, len: usize) {
        // Within the area, whose end does not overflow.
        let address = GuestAddress(self.addresses.device_area.0 + offset as u64);
        mark_dirty(&*self.memory, address, len);
    }

    /// `index` modulo the queue size.
    #[inline]
    const fn slot(&self, index: u16) -> usize {
        index as usize & self.mask
    }

    /// A word of the available ring. `offset` is one of the layout's constants or of a masked
    /// slot.
    #[inline]
    fn avail_word(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: every caller passes an even offset of a word that `available_ring_len` counts;
        // `self.memory` is borrowed.
        unsafe { self.available.word16(offset) }
    }

    /// A 16-bit word of the used ring; as `avail_word`.
    #[inline]
    fn used_word(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: every caller passes an even offset of a word that `used_ring_len` counts;
        // `self.memory` is borrowed.
        unsafe { self.used.word16(offset) }
    }

    /// `id` and `len` of the used element at `position`.
    #[inline]
    fn used_element_words(&self, position: u16) -> [&AtomicU32; 2] {
        let offset = RING_OFFSET + self.slot(position) * USED_ELEMENT_LEN;
        // SAFETY: the masked slot is below the queue size the area was translated for; elements
        // are 8 bytes from offset 4 of a 4-aligned area; `self.memory` is borrowed.
        unsafe { [self.used.word32(offset), self.used.word32(offset + 4)] }
    }
}

/// The descriptor table of a ring, for as long as that is borrowed.
#[derive(Clone, Copy)]
pub(crate) struct DescriptorTable<'a> {
    base: NonNull<u8>,
    mask: usize,
    _rings: PhantomData<&'a ()>,
}

impl DescriptorTable<'_> {
    /// Reads the descriptor at `index` modulo the queue size.
    #[inline(always)]
    pub(crate) fn descriptor(self, index: u16) -> Descriptor {
        let offset = (usize::from(index) & self.mask) * DESCRIPTOR_LEN;
        // SAFETY: the masked slot is below the queue size the area was translated for; entries
        // are 16 bytes in a 16-aligned table; the rings, and with them the memory, are borrowed.
        // The host side accesses the entries through atomics only.
        let [low, high]: &[AtomicU64; 2] = unsafe { self.base.add(offset).cast().as_ref() };
        // Relaxed: ordered after the index that published the chain by the acquire in
        // `avail_idx`.
        Descriptor::from_words([low.load(Ordering::Relaxed), high.load(Ordering::Relaxed)])
    }
}

/// The words that only a driver writes, and those it reads of the device's.
#[cfg(feature = "driver")]
impl<M: GuestMemory> SplitRings<M> {
    #[inline]
    pub(crate) fn store_descriptor(&self, index: u16, descriptor: Descriptor) {
        let [low, high] = descriptor.to_words();
        // SAFETY: as in `descriptor`.
        let [low_word, high_word] =
            unsafe { self.descriptors.entry(self.slot(index) * DESCRIPTOR_LEN) };
        low_word.store(low, Ordering::Relaxed);
        high_word.store(high, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn store_avail_entry(&self, position: u16, head: u16) {
        let offset = RING_OFFSET + self.slot(position) * AVAILABLE_ELEMENT_LEN;
        self.avail_word(offset)
            .store(head.to_le(), Ordering::Relaxed);
    }

    /// Stores `avail.idx`. Release: pairs with the acquire in `avail_idx`.
    #[inline]
    pub(crate) fn publish_avail_idx(&self, index: u16) {
        self.avail_word(INDEX_OFFSET)
            .store(index.to_le(), Ordering::Release);
    }

    #[inline]
    pub(crate) fn store_avail_flags(&self, flags: u16) {
        self.avail_word(FLAGS_OFFSET)
            .store(flags.to_le(), Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn store_used_event(&self, event: u16) {
        self.avail_word(used_event_offset(self.size.get()))
            .store(event.to_le(), Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn used_flags(&self) -> u16 {
        u16::from_le(self.used_word(FLAGS_OFFSET).load(Ordering::Relaxed))
    }

    #[inline]
    pub(crate) fn avail_event(&self) -> u16 {
        let offset = avail_event_offset(self.size.get());
        u16::from_le(self.used_word(offset).load(Ordering::Relaxed))
    }

    /// `(id, len)` of the used element at `position` modulo the queue size.
    #[inline]
    pub(crate) fn used_element(&self, position: u16) -> (u32, u32) {
        let [id, len] = self.used_element_words(position);
        (
            u32::from_le(id.load(Ordering::Relaxed)),
            u32::from_le(len.load(Ordering::Relaxed)),
        )
    }

    /// Fills the used element with an id no descriptor has, for tests.
    pub(crate) fn store_raw_used_element(&self, position: u16, id: u32, len: u32) {
        let [id_word, len_word] = self.used_element_words(position);
        id_word.store(id.to_le(), Ordering::Relaxed);
        len_word.store(len.to_le(), Ordering::Relaxed);
    }
}
