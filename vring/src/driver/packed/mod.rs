//! The guest side of a packed ring.

mod raw;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{GuestAddress, GuestMemory};

use crate::base::{PackedPosition, RingBase};
use crate::chain::Segment;
use crate::config::{QueueSize, RingAddresses, RingFeatures};
use crate::driver::DriverError;
use crate::driver::chain::{
    AddError, Full, RawDescriptor, Used, directed, raw_total_len, total_len, write_table,
};
use crate::driver::in_order::Order;
use crate::packed::descriptor::{F_AVAIL, F_USED, Tail, available_flags, used_flags};
use crate::packed::event::EventSuppression;
use crate::packed::rings::PackedRings;
use crate::ring_memory::DESCRIPTOR_BYTES;
use crate::split::descriptor::{F_INDIRECT, F_NEXT};

/// Buffer ids there are: any value of the field (virtio 1.3 §2.8.13), so that a test may choose.
const BUFFER_IDS: usize = 1 << 16;

/// The chains made available and not used yet, by buffer id. Zeroes are no such chain, and so many
/// that only those in use should ever be touched.
struct Outstanding {
    /// Descriptors of the chain; 0 if there is none.
    count: Box<[u16]>,
    /// How many of them were free: fewer only where a test overwrote others.
    taken: Box<[u16]>,
    /// The id is one of the driver's own, and free again afterwards.
    from_list: Box<[bool]>,
}

impl Outstanding {
    fn new() -> Self {
        Self {
            count: vec![0; BUFFER_IDS].into_boxed_slice(),
            taken: vec![0; BUFFER_IDS].into_boxed_slice(),
            from_list: vec![false; BUFFER_IDS].into_boxed_slice(),
        }
    }
}

/// The guest side of a packed ring. See the [module](super) for what it is for.
///
/// Buffer ids are the driver's own choice in a packed ring; this one hands out ids below the queue
/// size. Only a chain's last descriptor has it: the others carry its complement, which a device has
/// no business to look at (virtio 1.3 §2.8.6).
///
/// ```
/// use std::sync::Arc;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vring::driver::{PackedDriver, PackedLayout};
/// use vring::{QueueSize, RingFeatures, Segment};
///
/// let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)])?);
/// let size = QueueSize::new(8)?;
/// let addresses = PackedLayout::new(GuestAddress(0), size)?.addresses();
/// let features = RingFeatures { packed: true, ..RingFeatures::default() };
/// let mut driver = PackedDriver::new(memory, addresses, size, features)?;
/// let id = driver.add_chain(&[Segment { addr: GuestAddress(0x4000), len: 512 }], &[])?;
/// assert_eq!((id, driver.free()), (0, 7));
/// assert_eq!(driver.publish(), 1);
/// assert!(driver.needs_kick());
/// assert_eq!(driver.poll_used(), None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct PackedDriver<M> {
    rings: PackedRings<M>,
    features: RingFeatures,
    outstanding: Outstanding,
    /// Ids below the queue size that are free; the first `free_id_count` count.
    free_ids: Box<[u16]>,
    free_id_count: u16,
    free: u16,
    next_avail: PackedPosition,
    /// The first descriptor of the batch that is not published yet, all but its address: its flags
    /// make the batch available, and so are stored last.
    held: Option<(u16, Tail)>,
    /// Chains in that batch, and descriptors.
    staged: usize,
    staged_descriptors: u32,
    /// Descriptors published since the last kick decision.
    undecided: u32,
    next_used: PackedPosition,
    /// With `VIRTIO_F_IN_ORDER`.
    order: Option<Order>,
}

impl<M> fmt::Debug for PackedDriver<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PackedDriver")
            .field("rings", &self.rings)
            .field("features", &self.features)
            .field("free", &self.free)
            .field("next_avail", &self.next_avail)
            .field("staged", &self.staged)
            .field("next_used", &self.next_used)
            .finish_non_exhaustive()
    }
}

impl<M: GuestMemory> PackedDriver<M> {
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
        Self::starting_at(memory, addresses, size, features, PackedPosition::FIRST)
    }

    /// Like [`new`](Self::new) with both positions at `position`, as of a ring that has been
    /// running and is idle: both of the device's are then `position` too. Every descriptor is one
    /// that the device used in the pass the position implies. Lets a test cross the end of the ring
    /// at once, in either pass.
    ///
    /// # Errors
    ///
    /// [`DriverError::Ring`] if the memory does not hold the ring, [`DriverError::Base`] if the
    /// position is not in it.
    pub fn starting_at(
        memory: Arc<M>,
        addresses: RingAddresses,
        size: QueueSize,
        features: RingFeatures,
        position: PackedPosition,
    ) -> Result<Self, DriverError> {
        let entries = size.get();
        if position.index >= entries {
            let base = RingBase::Packed {
                avail: position,
                used: position,
            };
            return Err(DriverError::Base { base });
        }
        let rings = PackedRings::translate(memory, size, addresses)?;
        for index in 0..entries {
            let pass = position.wrap == (index < position.index);
            rings.store_address(index, 0);
            rings.store_tail(
                index,
                Tail {
                    len: 0,
                    id: 0,
                    flags: used_flags(pass),
                },
            );
        }
        rings.store_driver_event(EventSuppression::ENABLE);
        rings.store_device_event(EventSuppression::ENABLE);
        Ok(Self {
            rings,
            features,
            outstanding: Outstanding::new(),
            free_ids: (0..entries).rev().collect(),
            free_id_count: entries,
            free: entries,
            next_avail: position,
            held: None,
            staged: 0,
            staged_descriptors: 0,
            undecided: 0,
            next_used: position,
            order: features.in_order.then(|| Order::new(entries)),
        })
    }

    /// Writes a chain of direct descriptors and stages it. Returns its buffer id.
    ///
    /// With no segments at all the chain is one empty readable descriptor.
    ///
    /// # Errors
    ///
    /// [`Full`]: not enough free descriptors; nothing was written.
    #[inline]
    pub fn add_chain(&mut self, readable: &[Segment], writable: &[Segment]) -> Result<u16, Full> {
        let count = self.reserve((readable.len() + writable.len()).max(1))?;
        let id = self.take_id();
        let mut left = count;
        for (segment, write) in directed(readable, writable) {
            left -= 1;
            let (more, id) = if left == 0 { (0, id) } else { (F_NEXT, !id) };
            self.write(segment.addr.0, segment.len, id, write | more);
        }
        self.stage(id, count, total_len(writable), true);
        Ok(id)
    }

    /// Writes the chain into an indirect table at `table` and stages one descriptor that points
    /// to it. Returns its buffer id. The table must stay untouched until the chain is used.
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
        // No NEXT in a packed ring's table: its entries are taken in order, all of them
        // (virtio 1.3 §2.8.7). The id there is reserved.
        let encode = |_, segment: Segment, flags| {
            let tail = Tail {
                len: segment.len,
                id: 0,
                flags,
            };
            [segment.addr.0.to_le(), tail.to_word()]
        };
        let memory = &**self.rings.memory();
        let count = write_table(memory, table, readable, writable, encode)?;
        let id = self.take_id();
        let len = u32::from(count) * DESCRIPTOR_BYTES;
        self.write(table.0, len, id, F_INDIRECT);
        self.stage(id, 1, total_len(writable), true);
        Ok(id)
    }

    /// Writes a chain of descriptors as they are, right or wrong, and stages it. Returns its buffer
    /// id.
    ///
    /// Unlike [`add_chain`](Self::add_chain) it goes on where there are no free descriptors, over
    /// those that are outstanding: the way to a ring with more descriptors available than it has.
    ///
    /// # Errors
    ///
    /// [`Full`]: more descriptors than the ring has, or no free id; nothing was written.
    #[inline]
    pub fn add_raw(&mut self, descriptors: &[RawDescriptor]) -> Result<u16, Full> {
        let count = self.fits_ring(descriptors)?;
        if self.free_id_count == 0 {
            return Err(self.full(descriptors.len()));
        }
        let id = self.take_id();
        self.write_raw(id, count, descriptors, true);
        Ok(id)
    }

    /// Like [`add_raw`](Self::add_raw) with any buffer id, even one that is outstanding. What the
    /// driver knew of an outstanding chain with that id is replaced.
    ///
    /// # Errors
    ///
    /// [`Full`]: more descriptors than the ring has; nothing was written.
    pub fn add_raw_with_id(&mut self, id: u16, descriptors: &[RawDescriptor]) -> Result<(), Full> {
        let count = self.fits_ring(descriptors)?;
        self.write_raw(id, count, descriptors, false);
        Ok(())
    }

    /// Makes every staged chain available, with one store, and returns how many there were: that of
    /// the first one's flags, which the device looks at before all others (virtio 1.3 §2.8.21.1).
    #[inline]
    pub fn publish(&mut self) -> usize {
        let Some((index, tail)) = self.held.take() else {
            return 0;
        };
        self.rings.publish_tail(index, tail);
        self.undecided = self.undecided.saturating_add(self.staged_descriptors);
        self.staged_descriptors = 0;
        std::mem::take(&mut self.staged)
    }

    /// Decides whether to kick the device, once for everything published since the last decision.
    #[inline]
    pub fn needs_kick(&mut self) -> bool {
        let stride = std::mem::take(&mut self.undecided);
        if stride == 0 {
            return false;
        }
        // Full barrier between the store of the flags and the load of what the device wants; pairs
        // with the device's between storing what it wants and looking at the flags again
        // (virtio 1.3 §2.8.21.3.1).
        fence(Ordering::SeqCst);
        let published = match self.held {
            Some((index, _)) => self.held_position(index),
            None => self.next_avail,
        };
        let size = self.rings.size().get();
        (self.rings.device_event()).wants(self.features.event_idx, published, stride, size)
    }

    /// Takes the next completion, and frees its descriptors.
    ///
    /// With `VIRTIO_F_IN_ORDER` a used descriptor may stand for several chains: each is a completion
    /// of its own, those before the last with all their writable bytes written.
    ///
    /// After an id of no chain the driver cannot know where the next used descriptor is, and looks
    /// at the one after.
    #[inline]
    pub fn poll_used(&mut self) -> Option<Used> {
        if let Some((id, len)) = self.order.as_mut().and_then(Order::next) {
            return Some(self.complete(id, len));
        }
        let tail = self.rings.tail(self.next_used.index);
        if !tail.is_used(self.next_used.wrap) {
            return None;
        }
        // Without WRITE nothing was written, and the length means nothing (virtio 1.3 §2.8.4).
        let len = if tail.is_writable() { tail.len } else { 0 };
        let id = tail.id;
        let Some(order) = &mut self.order else {
            return Some(self.complete(id, len));
        };
        let size = usize::from(self.rings.size().get());
        if order.begin_run(u32::from(id), len, size)
            && let Some((id, len)) = order.next()
        {
            return Some(self.complete(id, len));
        }
        self.next_used = self.next_used.advanced(1, self.rings.size().get());
        Some(Used {
            id: u32::from(id),
            len,
            expected: false,
        })
    }

    /// Whether [`poll_used`](Self::poll_used) would return a completion: what a driver that polls looks at
    /// meanwhile.
    #[inline]
    pub fn has_used(&self) -> bool {
        self.order.as_ref().is_some_and(Order::has_next)
            || (self.rings.tail(self.next_used.index)).is_used(self.next_used.wrap)
    }

    /// Asks for an interrupt at the next completion, then looks again: true if nothing has
    /// completed in between, so the caller may sleep.
    #[inline]
    pub fn enable_interrupts(&mut self) -> bool {
        self.rings.store_driver_event(if self.features.event_idx {
            EventSuppression::at(self.next_used)
        } else {
            EventSuppression::ENABLE
        });
        // Full barrier between asking for interrupts and the last look at the flags; pairs with
        // the one in the device's decision to interrupt (virtio 1.3 §2.8.10).
        fence(Ordering::SeqCst);
        let tail = self.rings.tail(self.next_used.index);
        !tail.is_used(self.next_used.wrap)
    }

    /// Asks for no interrupts.
    #[inline]
    pub fn disable_interrupts(&mut self) {
        self.rings.store_driver_event(EventSuppression::DISABLE);
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

    /// Where the next descriptor is written.
    #[inline]
    pub const fn next_avail(&self) -> PackedPosition {
        self.next_avail
    }

    /// Where the next completion is looked for.
    #[inline]
    pub const fn next_used(&self) -> PackedPosition {
        self.next_used
    }

    /// The position of the held descriptor, which is at `index`: less than a pass before the next
    /// one, or a whole one.
    const fn held_position(&self, index: u16) -> PackedPosition {
        PackedPosition {
            index,
            wrap: self.next_avail.wrap == (index < self.next_avail.index),
        }
    }

    fn full(&self, needed: usize) -> Full {
        Full {
            needed,
            free: self.free,
        }
    }

    fn reserve(&self, needed: usize) -> Result<u16, Full> {
        match u16::try_from(needed) {
            // Without a free id, raw chains have taken them.
            Ok(count) if count <= self.free && self.free_id_count != 0 => Ok(count),
            _ => Err(self.full(needed)),
        }
    }

    #[inline]
    fn fits_ring(&self, descriptors: &[RawDescriptor]) -> Result<u16, Full> {
        match u16::try_from(descriptors.len()) {
            Ok(count) if count <= self.rings.size().get() => Ok(count),
            _ => Err(self.full(descriptors.len())),
        }
    }

    /// A free id; there is one.
    #[inline]
    fn take_id(&mut self) -> u16 {
        self.free_id_count -= 1;
        self.free_ids[usize::from(self.free_id_count)]
    }

    /// Writes the next descriptor, and makes it available unless it is the batch's first.
    #[inline]
    fn write(&mut self, address: u64, len: u32, id: u16, flags: u16) {
        let PackedPosition { index, wrap } = self.next_avail;
        let flags = flags & !(F_AVAIL | F_USED) | available_flags(wrap);
        let tail = Tail { len, id, flags };
        self.rings.store_address(index, address);
        match self.held {
            None => self.held = Some((index, tail)),
            Some(_) => self.rings.store_tail(index, tail),
        }
        self.next_avail = self.next_avail.advanced(1, self.rings.size().get());
        self.staged_descriptors += 1;
    }

    #[inline]
    fn write_raw(&mut self, id: u16, count: u16, descriptors: &[RawDescriptor], from_list: bool) {
        for (at, raw) in (1..).zip(descriptors) {
            let id = if at == count { id } else { !id };
            self.write(raw.address, raw.len, id, raw.flags);
        }
        // Only an order has a use for it.
        let writable = if self.order.is_some() {
            raw_total_len(descriptors)
        } else {
            0
        };
        self.stage(id, count, writable, from_list);
    }

    /// Notes the chain just written.
    #[inline]
    fn stage(&mut self, id: u16, count: u16, writable: u32, from_list: bool) {
        let taken = count.min(self.free);
        self.free -= taken;
        let chain = usize::from(id);
        self.outstanding.count[chain] = count;
        self.outstanding.taken[chain] = taken;
        self.outstanding.from_list[chain] = from_list;
        if let Some(order) = &mut self.order {
            order.offer(id, writable);
        }
        self.staged += 1;
    }

    /// The completion of the chain with this id, whose used descriptor, or with IN_ORDER that which
    /// stands for it, is at `next_used`.
    #[inline]
    fn complete(&mut self, id: u16, len: u32) -> Used {
        let chain = usize::from(id);
        let count = std::mem::take(&mut self.outstanding.count[chain]);
        let taken = std::mem::take(&mut self.outstanding.taken[chain]);
        let from_list = std::mem::take(&mut self.outstanding.from_list[chain]);
        self.next_used = (self.next_used).advanced(count.max(1), self.rings.size().get());
        self.free += taken;
        if from_list {
            self.free_ids[usize::from(self.free_id_count)] = id;
            self.free_id_count += 1;
        }
        Used {
            id: u32::from(id),
            len,
            expected: count != 0,
        }
    }
}
