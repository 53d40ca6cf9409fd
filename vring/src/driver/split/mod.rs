//! The guest side of a split ring.

mod raw;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{GuestAddress, GuestMemory};

use crate::chain::Segment;
use crate::config::{QueueSize, RingAddresses, RingFeatures};
use crate::driver::DriverError;
use crate::driver::chain::{
    AddError, Full, RawDescriptor, Used, directed, raw_total_len, table_entries, total_len,
    write_table,
};
use crate::driver::in_order::Order;
use crate::notification::need_event;
use crate::ring_memory::DESCRIPTOR_BYTES;
use crate::split::descriptor::{Descriptor, F_INDIRECT, F_NEXT};
use crate::split::notification::{NO_INTERRUPT, NO_NOTIFY};
use crate::split::rings::SplitRings;

/// The guest side of a split ring. See the [module](super) for what it is for.
///
/// ```
/// use std::sync::Arc;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vring::driver::{SplitDriver, SplitLayout};
/// use vring::{QueueSize, RingFeatures, Segment};
///
/// let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)])?);
/// let size = QueueSize::new(8)?;
/// let addresses = SplitLayout::new(GuestAddress(0), size)?.addresses();
/// let mut driver = SplitDriver::new(memory, addresses, size, RingFeatures::default())?;
/// let head = driver.add_chain(&[Segment { addr: GuestAddress(0x4000), len: 512 }], &[])?;
/// assert_eq!((head, driver.free()), (0, 7));
/// assert_eq!(driver.publish(), 1);
/// assert!(driver.needs_kick());
/// assert_eq!(driver.poll_used(), None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct SplitDriver<M> {
    rings: SplitRings<M>,
    features: RingFeatures,
    /// The driver's own links between descriptors, of chains and of the free list: the table in
    /// guest memory is never read back.
    next: Box<[u16]>,
    /// Descriptors of the chain at each head; 0 where none is outstanding.
    chain_len: Box<[u16]>,
    free_head: u16,
    free: u16,
    /// `avail.idx` as published.
    avail_idx: u16,
    /// Entries written after `avail_idx` and not published yet.
    staged: u16,
    /// `avail.idx` at the last kick decision.
    kicked: u16,
    next_used: u16,
    /// `used.idx` as last read.
    used_idx: u16,
    /// With `VIRTIO_F_IN_ORDER`. Descriptors are then taken in ring order, and `next` never changes
    /// (virtio 1.3 §2.7.9).
    order: Option<Order>,
}

impl<M> fmt::Debug for SplitDriver<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SplitDriver")
            .field("rings", &self.rings)
            .field("features", &self.features)
            .field("free", &self.free)
            .field("avail_idx", &self.avail_idx)
            .field("staged", &self.staged)
            .field("next_used", &self.next_used)
            .finish_non_exhaustive()
    }
}

impl<M: GuestMemory> SplitDriver<M> {
    /// Sets up an empty ring at `addresses`, with all its words zero.
    ///
    /// # Errors
    ///
    /// [`DriverError::Ring`] if the memory does not hold the ring.
    pub fn new(
        memory: Arc<M>,
        addresses: RingAddresses,
        size: QueueSize,
        features: RingFeatures,
    ) -> Result<Self, DriverError> {
        Self::starting_at(memory, addresses, size, features, 0)
    }

    /// Like [`new`](Self::new) with both indices at `index`, as of a ring that has been running:
    /// the device's base is then `index` too. Lets a test cross 65535 at once.
    ///
    /// # Errors
    ///
    /// [`DriverError::Ring`] if the memory does not hold the ring.
    pub fn starting_at(
        memory: Arc<M>,
        addresses: RingAddresses,
        size: QueueSize,
        features: RingFeatures,
        index: u16,
    ) -> Result<Self, DriverError> {
        let rings = SplitRings::translate(memory, size, addresses)?;
        let entries = size.get();
        let nothing = Descriptor {
            address: 0,
            len: 0,
            flags: 0,
            next: 0,
        };
        for i in 0..entries {
            rings.store_descriptor(i, nothing);
            rings.store_avail_entry(i, 0);
            rings.store_used_element(i, 0, 0);
        }
        rings.store_avail_flags(0);
        rings.store_used_event(0);
        rings.publish_avail_idx(index);
        rings.store_used_flags(0);
        rings.store_avail_event(index);
        rings.publish_used_idx(index);
        Ok(Self {
            rings,
            features,
            // Without IN_ORDER the last link is never followed: it is taken when nothing is free
            // any more.
            next: (1..=entries).map(|next| next % entries).collect(),
            chain_len: vec![0; usize::from(entries)].into_boxed_slice(),
            free_head: 0,
            free: entries,
            avail_idx: index,
            staged: 0,
            kicked: index,
            next_used: index,
            used_idx: index,
            order: features.in_order.then(|| Order::new(entries)),
        })
    }

    /// Writes a chain of direct descriptors and stages its head. Returns the head.
    ///
    /// With no segments at all the chain is one empty readable descriptor.
    ///
    /// # Errors
    ///
    /// [`Full`]: not enough free descriptors; nothing was written.
    #[inline]
    pub fn add_chain(&mut self, readable: &[Segment], writable: &[Segment]) -> Result<u16, Full> {
        let needed = (readable.len() + writable.len()).max(1);
        let count = self.reserve(needed)?;
        let head = self.free_head;
        let mut index = head;
        let mut left = count;
        let mut last = head;
        for (segment, write) in directed(readable, writable) {
            left -= 1;
            last = index;
            let next = self.next[usize::from(index)];
            let more = if left == 0 { 0 } else { F_NEXT };
            self.rings.store_descriptor(
                index,
                Descriptor {
                    address: segment.addr.0,
                    len: segment.len,
                    flags: write | more,
                    next: if left == 0 { 0 } else { next },
                },
            );
            index = next;
        }
        self.take(head, last, count);
        self.stage(head, total_len(writable));
        Ok(head)
    }

    /// Writes the chain into an indirect table at `table` and stages one descriptor that points
    /// to it. Returns the head. The table must stay untouched until the chain is used.
    ///
    /// # Errors
    ///
    /// [`AddError`]: no free descriptor, or the table is not inside one region of memory.
    #[inline]
    pub fn add_indirect(
        &mut self,
        table: GuestAddress,
        readable: &[Segment],
        writable: &[Segment],
    ) -> Result<u16, AddError> {
        self.reserve(1)?;
        let last = table_entries(table, readable, writable)? - 1;
        let encode = |index, segment: Segment, write| {
            let (more, next) = if index == last {
                (0, 0)
            } else {
                (F_NEXT, index + 1)
            };
            Descriptor {
                address: segment.addr.0,
                len: segment.len,
                flags: write | more,
                next,
            }
            .to_words()
        };
        let memory = &**self.rings.memory();
        let count = write_table(memory, table, readable, writable, encode)?;
        let head = self.free_head;
        self.rings.store_descriptor(
            head,
            Descriptor {
                address: table.0,
                len: u32::from(count) * DESCRIPTOR_BYTES,
                flags: F_INDIRECT,
                next: 0,
            },
        );
        self.take(head, head, 1);
        self.stage(head, total_len(writable));
        Ok(head)
    }

    /// Writes a chain of descriptors as they are, right or wrong, and stages its head. Returns the
    /// head. `next` of each is the one after it, and of the last one the first, for those that have
    /// [`F_NEXT`](super::F_NEXT) set.
    ///
    /// # Errors
    ///
    /// [`Full`]: not enough free descriptors; nothing was written.
    pub fn add_raw(&mut self, descriptors: &[RawDescriptor]) -> Result<u16, Full> {
        let count = self.reserve(descriptors.len().max(1))?;
        let head = self.free_head;
        let (mut index, mut last) = (head, head);
        let mut left = descriptors.len();
        for &RawDescriptor {
            address,
            len,
            flags,
        } in descriptors
        {
            left -= 1;
            last = index;
            index = self.next[usize::from(index)];
            let next = if left == 0 { head } else { index };
            let descriptor = Descriptor {
                address,
                len,
                flags,
                next,
            };
            self.rings.store_descriptor(last, descriptor);
        }
        self.take(head, last, count);
        self.stage(head, raw_total_len(descriptors));
        Ok(head)
    }

    /// Stages `head` as it is, right or wrong: for descriptors written with
    /// [`write_desc`](Self::write_desc). No descriptor is taken off the free list.
    ///
    /// With `VIRTIO_F_IN_ORDER` its used length is reported as 0 if the device skips its used
    /// element: how much that would be is not looked up.
    #[inline]
    pub fn offer(&mut self, head: u16) {
        self.stage(head, 0);
    }

    /// Makes every staged chain available, with one store, and returns how many there were.
    #[inline]
    pub fn publish(&mut self) -> usize {
        let count = self.staged;
        if count != 0 {
            self.avail_idx = self.next_avail();
            self.staged = 0;
            self.rings.publish_avail_idx(self.avail_idx);
        }
        usize::from(count)
    }

    /// Decides whether to kick the device, once for everything published since the last decision.
    #[inline]
    pub fn needs_kick(&mut self) -> bool {
        let new = self.avail_idx;
        let old = std::mem::replace(&mut self.kicked, new);
        if old == new {
            return false;
        }
        // Full barrier between the store of `avail.idx` and the load of what the device wants;
        // pairs with the one in `SplitQueue::enable_notification` (virtio 1.3 §2.7.13.4.1).
        fence(Ordering::SeqCst);
        if self.features.event_idx {
            need_event(self.rings.avail_event(), new, old)
        } else {
            self.rings.used_flags() & NO_NOTIFY == 0
        }
    }

    /// Takes the next completion, and frees its descriptors.
    ///
    /// With `VIRTIO_F_IN_ORDER` a used element may stand for several chains: each is a completion
    /// of its own, those before the last with all their writable bytes written.
    #[inline]
    pub fn poll_used(&mut self) -> Option<Used> {
        if let Some((head, len)) = self.order.as_mut().and_then(Order::next) {
            return Some(self.complete(head, len));
        }
        if self.next_used == self.used_idx {
            self.used_idx = self.rings.used_idx();
            if self.next_used == self.used_idx {
                return None;
            }
        }
        let (id, len) = self.rings.used_element(self.next_used);
        if let Some(order) = &mut self.order {
            let limit = self.used_idx.wrapping_sub(self.next_used);
            if order.begin_run(id, len, usize::from(limit))
                && let Some((head, len)) = order.next()
            {
                return Some(self.complete(head, len));
            }
            self.next_used = self.next_used.wrapping_add(1);
            return Some(Used {
                id,
                len,
                expected: false,
            });
        }
        self.next_used = self.next_used.wrapping_add(1);
        let expected = u16::try_from(id).is_ok_and(|head| self.release(head));
        Some(Used { id, len, expected })
    }

    /// Whether [`poll_used`](Self::poll_used) would return a completion: what a driver that polls looks at
    /// meanwhile.
    #[inline]
    pub fn has_used(&self) -> bool {
        self.order.as_ref().is_some_and(Order::has_next)
            || self.next_used != self.used_idx
            || self.rings.used_idx() != self.used_idx
    }

    /// Asks for an interrupt at the next completion, then looks again: true if nothing has
    /// completed in between, so the caller may sleep.
    #[inline]
    pub fn enable_interrupts(&mut self) -> bool {
        if self.features.event_idx {
            self.rings.store_used_event(self.next_used);
        } else {
            self.rings.store_avail_flags(0);
        }
        // Full barrier between asking for interrupts and the last look at `used.idx`; pairs with
        // the one in `SplitQueue::should_notify`.
        fence(Ordering::SeqCst);
        self.rings.used_idx() == self.next_used
    }

    /// Asks for no interrupts. With `VIRTIO_F_EVENT_IDX` that is an event as far away as an index
    /// can be: 65535 completions on.
    #[inline]
    pub fn disable_interrupts(&mut self) {
        if self.features.event_idx {
            self.rings.store_used_event(self.next_used.wrapping_sub(1));
        } else {
            self.rings.store_avail_flags(NO_INTERRUPT);
        }
    }

    /// Free descriptors.
    #[inline]
    pub const fn free(&self) -> u16 {
        self.free
    }

    /// Number of entries.
    #[inline]
    pub const fn size(&self) -> QueueSize {
        self.rings.size()
    }

    /// The next index to publish: `avail.idx` as it will be once staged chains are published.
    #[inline]
    pub const fn next_avail(&self) -> u16 {
        self.avail_idx.wrapping_add(self.staged)
    }

    /// Index of the next completion to take.
    #[inline]
    pub const fn next_used(&self) -> u16 {
        self.next_used
    }

    /// The completion of the oldest chain, in order.
    fn complete(&mut self, head: u16, len: u32) -> Used {
        self.next_used = self.next_used.wrapping_add(1);
        Used {
            id: u32::from(head),
            len,
            expected: self.release(head),
        }
    }

    fn reserve(&self, needed: usize) -> Result<u16, Full> {
        match u16::try_from(needed) {
            Ok(count) if count <= self.free => Ok(count),
            _ => Err(Full {
                needed,
                free: self.free,
            }),
        }
    }

    /// Takes the `count` descriptors from `head`, which is the free list's first, to `last`.
    fn take(&mut self, head: u16, last: u16, count: u16) {
        self.free_head = self.next[usize::from(last)];
        self.free -= count;
        self.chain_len[usize::from(head)] = count;
    }

    /// Returns the chain at `head` to the free list; false if none is outstanding there.
    #[inline]
    fn release(&mut self, head: u16) -> bool {
        let Some(len) = self.chain_len.get_mut(usize::from(head)) else {
            return false;
        };
        let count = std::mem::take(len);
        if count == 0 {
            return false;
        }
        self.free += count;
        if self.order.is_some() {
            return true;
        }
        let mut last = head;
        for _ in 1..count {
            last = self.next[usize::from(last)];
        }
        self.next[usize::from(last)] = self.free_head;
        self.free_head = head;
        true
    }

    #[inline]
    fn stage(&mut self, head: u16, writable: u32) {
        if let Some(order) = &mut self.order {
            order.offer(head, writable);
        }
        self.rings.store_avail_entry(self.next_avail(), head);
        self.staged = self.staged.wrapping_add(1);
    }
}
