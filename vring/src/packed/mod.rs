//! The device side of a packed ring (virtio 1.3 §2.8).

pub(crate) mod descriptor;
pub(crate) mod event;
pub(crate) mod layout;
mod notification;
mod outstanding;
pub(crate) mod position;
mod reclaim;
mod reorder;
pub(crate) mod rings;
#[cfg(test)]
mod tests;
mod walk;

use std::fmt;
use std::sync::Arc;

use vm_memory::GuestMemory;

use self::descriptor::{Tail, used_flags};
use self::event::EventSuppression;
use self::outstanding::Outstanding;
use self::position::{distance, from_position, to_position, wrap};
use self::rings::PackedRings;
use self::walk::{Broken, Walked, walk};
use crate::base::RingBase;
use crate::chain::Chain;
use crate::config::{QueueConfig, QueueSize, RingAddresses, RingFeatures, StartError};
use crate::fault::{PopError, RingFault};
use crate::head::Head;
use crate::in_order::InOrder;
use crate::split::descriptor::F_WRITE;

/// Descriptors from the one a chain is looked for at to the one that is brought nearer meanwhile:
/// two cache lines, beyond most chains. 4 and 12 are about as good.
const PREFETCH_AHEAD: u16 = 8;

/// A started packed ring, device side.
///
/// The same operations as [`SplitQueue`](crate::SplitQueue), with the same meaning; what that says
/// of its caller and of the memory `M` holds here too. What a packed ring has of its own:
///
/// - [`Head::index`] is the number of a slot of this queue, not something the driver wrote.
/// - A chain that does not end is a [`RingFault`], since the next one starts where it ends.
/// - The ring does not remember where a device stopped, so [`base`](Self::base) has both positions.
/// - The ring's memory is written where the driver's descriptors were: a chain's used descriptor
///   goes where that of the oldest chain not yet given back was.
///
/// # Example
///
/// ```
/// use std::sync::Arc;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vring::driver::{PackedDriver, PackedLayout};
/// use vring::{Chain, PackedQueue, QueueConfig, QueueSize, RingBase, RingFeatures, Segment};
///
/// let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)])?);
/// let size = QueueSize::new(16)?;
/// let features = RingFeatures { packed: true, ..RingFeatures::default() };
/// let addresses = PackedLayout::new(GuestAddress(0x1000), size)?.addresses();
///
/// // The guest makes two buffers available ...
/// let mut guest = PackedDriver::new(Arc::clone(&memory), addresses, size, features)?;
/// let request = Segment { addr: GuestAddress(0x4000), len: 16 };
/// let answer = Segment { addr: GuestAddress(0x5000), len: 1 };
/// guest.add_chain(&[request], &[answer])?;
/// guest.publish();
///
/// // ... and the device serves them.
/// let base = RingBase::fresh(features);
/// let config = QueueConfig { size, addresses, features, base };
/// let mut queue = PackedQueue::start(Arc::clone(&memory), &config)?;
/// let mut chain = Chain::for_queue(size);
/// while let Some(head) = queue.pop(&mut chain)? {
///     assert_eq!((chain.readable(), chain.writable()), (&[request][..], &[answer][..]));
///     let written = chain.copy_to_writable(&*memory, 0, &[0])?;
///     queue.push(head, u32::try_from(written)?);
/// }
/// queue.publish();
/// assert!(queue.should_notify());
/// assert_eq!(guest.poll_used().map(|used| used.len), Some(1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct PackedQueue<M> {
    rings: PackedRings<M>,
    features: RingFeatures,
    /// The descriptor to look for the next chain at. Like the other two a free-running index:
    /// see [`position`].
    next_avail: u16,
    /// The descriptor the driver looks for the next used one at. Never more than the queue size
    /// behind `next_avail`.
    used: u16,
    /// The descriptor to write the next used one to: `used`, and behind it what is staged.
    next_used: u16,
    /// Chains staged between `used` and `next_used`.
    staged: usize,
    /// The used descriptor that goes to `used`, which hands all that are staged over.
    first_staged: Tail,
    /// Descriptors published since the last notification decision; as many as can be before the
    /// first one.
    unsignalled: u32,
    /// What was last stored is DISABLE.
    kicks_disabled: bool,
    outstanding: Outstanding,
    /// Chains in flight and those that wait for them, with `VIRTIO_F_IN_ORDER`. All of them are
    /// in `outstanding` too.
    in_order: Option<Box<InOrder>>,
    /// The head that [`unpop`](Self::unpop) can take back, while it is in flight.
    latest: Option<u16>,
    fault: Option<RingFault>,
    fault_reported: bool,
    /// The memory map no longer holds the ring: it must not be touched any more.
    lost: bool,
    /// Whether what is published is marked in the memory's dirty bitmap.
    marks_dirty: bool,
}

impl<M> fmt::Debug for PackedQueue<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PackedQueue")
            .field("rings", &self.rings)
            .field("features", &self.features)
            .field("next_avail", &self.next_avail)
            .field("used", &self.used)
            .field("staged", &self.staged)
            .field("outstanding", &self.outstanding.count())
            .field("in_order", &self.in_order.is_some())
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}

impl<M: GuestMemory> PackedQueue<M> {
    /// Starts a queue: translates the three areas, and asks for kicks, whatever a predecessor left
    /// behind.
    ///
    /// Areas may overlap one another: the guest then garbles its own ring and nothing else.
    ///
    /// # Errors
    ///
    /// [`StartError`] if an area is misaligned, wraps, or is not inside one region, if a position
    /// of the base is not in the ring or the two are further apart than it is long, or if the
    /// configuration is that of a split ring. Nothing has been written then.
    pub fn start(memory: Arc<M>, config: &QueueConfig) -> Result<Self, StartError> {
        let RingBase::Packed { avail, used } = config.base else {
            return Err(StartError::FormatMismatch);
        };
        if !config.features.packed {
            return Err(StartError::FormatMismatch);
        }
        let size = config.size.get();
        for index in [avail.index, used.index] {
            if index >= size {
                return Err(StartError::BaseOutOfRange { index, size });
            }
        }
        let outstanding = distance(used, avail, size);
        if outstanding > size {
            return Err(StartError::BaseTooFarAhead { outstanding, size });
        }
        let rings = PackedRings::translate(memory, config.size, config.addresses)?;
        rings.store_device_event(EventSuppression::ENABLE);
        let used = from_position(used, size);
        Ok(Self {
            rings,
            features: config.features,
            next_avail: used.wrapping_add(outstanding),
            used,
            next_used: used,
            staged: 0,
            first_staged: Tail {
                len: 0,
                id: 0,
                flags: 0,
            },
            unsignalled: u32::MAX,
            kicks_disabled: false,
            outstanding: Outstanding::new(size),
            in_order: (config.features.in_order).then(|| Box::new(InOrder::new(size))),
            latest: None,
            fault: None,
            fault_reported: false,
            lost: false,
            marks_dirty: true,
        })
    }

    /// Takes the next chain the driver made available, or `None` if there is none.
    ///
    /// Fills `chain` with its buffers and takes ownership of the chain until its [`Head`] is
    /// pushed. Every descriptor is read once, into owned values: what the guest writes afterwards
    /// changes nothing. Takes at most as many steps as the ring has descriptors. Buffer addresses
    /// are not translated: one that points outside memory comes to light when the consumer
    /// translates it, and is then answered like a [`PopError::Chain`].
    ///
    /// # Errors
    ///
    /// - [`PopError::Chain`]: this chain breaks a rule; push its head with length 0 and go on.
    /// - [`PopError::Ring`]: the ring is broken; nothing was consumed. Returned once, and from
    ///   then on `Ok(None)`.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<Option<Head>, PopError> {
        if self.fault.is_some() {
            return self.stopped();
        }
        let size = self.size().get();
        let first = self.rings.tail(self.next_avail);
        // Garbage in the two bits is a descriptor not made available (virtio 1.3 §2.8.1).
        if !first.is_available(wrap(self.next_avail, size)) {
            return Ok(None);
        }
        // The driver wrote the descriptors, mostly on another processor, and fetching a line from
        // there takes longer than the rest of a pop. Measured with a driver on another core:
        // chains of three take a quarter to a third less time in batches of 8 to 64; single
        // descriptors, as the indirect ones are, and batches of one no more and no less.
        self.rings
            .prefetch(self.next_avail.wrapping_add(PREFETCH_AHEAD));
        // The descriptors up to `used`, a ring further on, are those of chains that the driver has
        // not got back, so none of this chain can be among them.
        let limit = size.saturating_sub(self.next_avail.wrapping_sub(self.used));
        let indirect_desc = self.features.indirect_desc;
        let walked = walk(
            &self.rings,
            indirect_desc,
            self.next_avail,
            first,
            limit,
            chain,
        );
        let Walked { descriptors, id } = match walked {
            Ok(walked) => walked,
            Err(broken) => return self.broken(broken, limit, chain),
        };
        let Ok(slot) = self.outstanding.insert(id, descriptors) else {
            return self.same_id(id, chain);
        };
        self.take(slot, descriptors);
        if self.in_order.is_some() {
            self.arrive_in_order(slot, Some(chain.writable_len()));
        }
        Ok(Some(Head::new(slot)))
    }

    /// Takes back the latest [`pop`](Self::pop), as if it had not happened: for a device that
    /// finds it has no room for the request. The chain is popped again later.
    ///
    /// Only the latest pop can be undone, only once, and only before its head is pushed.
    ///
    /// # Errors
    ///
    /// Returns the head if it is not the latest.
    pub fn unpop(&mut self, head: Head) -> Result<(), Head> {
        let slot = head.index();
        if self.latest != Some(slot) {
            return Err(head);
        }
        if let Some(in_order) = &mut self.in_order
            && !in_order.retract(slot)
        {
            return Err(head);
        }
        let Some(chain) = self.outstanding.remove(slot) else {
            return Err(head);
        };
        self.latest = None;
        self.next_avail = self.next_avail.wrapping_sub(chain.descriptors);
        Ok(())
    }

    /// Gives a chain back to the driver: `len` bytes of its writable buffers, from the first one
    /// on, are written (virtio 1.3 §2.8.4).
    ///
    /// Only stages the used descriptor; the driver sees it after [`publish`](Self::publish). Works
    /// after a ring fault too, so that what is in flight completes.
    ///
    /// In any order. With `VIRTIO_F_IN_ORDER` (virtio 1.3 §2.8.8) a chain waits in the queue until
    /// all that were popped before it have been pushed.
    #[inline]
    pub fn push(&mut self, head: Head, len: u32) {
        let slot = head.index();
        if self.in_order.is_some() {
            self.push_in_order(slot, len);
            return;
        }
        let chain = self.outstanding.remove(slot);
        debug_assert!(chain.is_some(), "head {slot} is not from this queue");
        if let Some(chain) = chain
            && !self.lost
        {
            self.stage(chain.id, len, chain.descriptors);
            // One for each chain popped: never so many.
            self.staged = self.staged.wrapping_add(1);
        }
    }

    /// Makes every chain pushed visible to the driver, with one store, and returns how many there
    /// were.
    ///
    /// With `VIRTIO_F_IN_ORDER`: those before which all have been pushed. Chains in a row that were
    /// written in full share one used descriptor, with the id of the last.
    #[inline]
    pub fn publish(&mut self) -> usize {
        if self.in_order.is_some() {
            self.stage_in_order();
        }
        let count = self.staged;
        if count == 0 {
            return 0;
        }
        self.rings.publish_tail(self.used, self.first_staged);
        if self.marks_dirty {
            self.rings.mark_used_dirty(self.used, self.next_used);
        }
        let passed = self.next_used.wrapping_sub(self.used);
        self.unsignalled = self.unsignalled.saturating_add(u32::from(passed));
        self.used = self.next_used;
        self.staged = 0;
        count
    }

    /// Whether [`publish`](Self::publish) marks what it has written in the memory's dirty bitmap, if that has one; at
    /// first it does. The look-up costs as much as the rest of a publication: a device whose memory nobody
    /// migrates at present may do without.
    pub fn set_marks_dirty(&mut self, marks: bool) {
        self.marks_dirty = marks;
    }

    /// Whether [`pop`](Self::pop) would find something: a chain, or a fault to report.
    #[inline]
    pub fn has_available(&mut self) -> bool {
        match self.fault {
            Some(_) => !self.fault_reported,
            None => self.is_available(),
        }
    }

    /// Chains popped and not pushed yet.
    #[inline]
    pub const fn in_flight(&self) -> u16 {
        match &self.in_order {
            None => self.outstanding.count(),
            Some(in_order) => in_order.in_flight(),
        }
    }

    /// Number of entries.
    #[inline]
    pub const fn size(&self) -> QueueSize {
        self.rings.size()
    }

    /// The negotiated features the ring was started with.
    #[inline]
    pub const fn features(&self) -> RingFeatures {
        self.features
    }

    /// The memory the ring is in.
    #[inline]
    pub const fn memory(&self) -> &Arc<M> {
        self.rings.memory()
    }

    /// Where the three areas are.
    #[inline]
    pub const fn addresses(&self) -> RingAddresses {
        self.rings.addresses()
    }

    /// Where a successor goes on: what `GET_VRING_BASE` returns. What is staged and not published
    /// does not count as used.
    #[inline]
    pub const fn base(&self) -> RingBase {
        let size = self.size().get();
        RingBase::Packed {
            avail: to_position(self.next_avail, size),
            used: to_position(self.used, size),
        }
    }

    /// The fault that stopped the ring, if one did.
    #[inline]
    pub const fn fault(&self) -> Option<RingFault> {
        self.fault
    }

    /// Moves the ring to a new memory map, at the addresses it has there, or translates it again in
    /// the same, where an IOMMU's mappings have changed. Everything else is unchanged: positions, what
    /// is staged, what is in flight.
    ///
    /// # Errors
    ///
    /// [`StartError`] if the new map does not hold the ring. The queue then latches
    /// [`RingFault::MemoryLost`] (unless another fault came first): it fetches nothing, never
    /// touches the ring again, and heads that are pushed only leave the count of those in flight.
    /// It keeps the old map, which requests in flight may still point into.
    pub fn set_memory(
        &mut self,
        memory: Arc<M>,
        addresses: RingAddresses,
    ) -> Result<(), StartError> {
        if self.lost {
            return Err(StartError::RingLost);
        }
        match PackedRings::translate(memory, self.size(), addresses) {
            Ok(rings) => {
                self.rings = rings;
                Ok(())
            }
            Err(error) => {
                self.fault.get_or_insert(RingFault::MemoryLost);
                self.lost = true;
                self.staged = 0;
                self.next_used = self.used;
                Err(error)
            }
        }
    }

    /// The rest of a pop whose chain was taken in.
    #[inline]
    const fn take(&mut self, slot: u16, descriptors: u16) {
        self.next_avail = self.next_avail.wrapping_add(descriptors);
        self.latest = Some(slot);
    }

    /// The rest of a pop that found no sound chain.
    #[cold]
    fn broken(
        &mut self,
        broken: Broken,
        limit: u16,
        chain: &mut Chain,
    ) -> Result<Option<Head>, PopError> {
        match broken {
            Broken::Chain { walked, fault } => {
                let Walked { descriptors, id } = walked;
                let Ok(slot) = self.outstanding.insert(id, descriptors) else {
                    return self.same_id(id, chain);
                };
                self.take(slot, descriptors);
                if self.in_order.is_some() {
                    self.arrive_in_order(slot, None);
                }
                let head = Head::new(slot);
                Err(PopError::Chain { head, fault })
            }
            Broken::Endless => {
                chain.clear();
                self.ring_fault(RingFault::ChainOverrun { limit })
            }
        }
    }

    #[cold]
    fn same_id(&mut self, id: u16, chain: &mut Chain) -> Result<Option<Head>, PopError> {
        chain.clear();
        self.ring_fault(RingFault::BufferIdInFlight { id })
    }

    /// Chains pushed that the driver cannot see.
    pub(crate) fn unpublished(&self) -> usize {
        let waiting = self.in_order.as_ref().map_or(0, |order| order.waiting());
        self.staged + usize::from(waiting)
    }

    /// Writes the next used descriptor, for `descriptors` of the ring: all but the first of a
    /// batch at once, since the driver looks at none before that one.
    #[inline]
    fn stage(&mut self, id: u16, len: u32, descriptors: u16) {
        let mut flags = used_flags(wrap(self.next_used, self.size().get()));
        if len != 0 {
            // Something was written (virtio 1.3 §2.8.3); without it the length is reserved.
            flags |= F_WRITE;
        }
        let tail = Tail { len, id, flags };
        if self.next_used == self.used {
            self.first_staged = tail;
        } else {
            self.rings.store_tail(self.next_used, tail);
        }
        self.next_used = self.next_used.wrapping_add(descriptors);
    }

    #[inline]
    fn is_available(&self) -> bool {
        let wrap = wrap(self.next_avail, self.size().get());
        self.rings.tail(self.next_avail).is_available(wrap)
    }

    #[cold]
    const fn stopped(&mut self) -> Result<Option<Head>, PopError> {
        match self.fault {
            // Latched by `set_memory`, and so not reported yet.
            Some(fault) if !self.fault_reported => {
                self.fault_reported = true;
                Err(PopError::Ring(fault))
            }
            _ => Ok(None),
        }
    }

    #[cold]
    fn ring_fault<T>(&mut self, fault: RingFault) -> Result<T, PopError> {
        self.fault.get_or_insert(fault);
        self.fault_reported = true;
        Err(PopError::Ring(fault))
    }
}
