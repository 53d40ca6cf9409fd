//! The device side of a split ring (virtio 1.3 §2.7).

pub(crate) mod descriptor;
pub(crate) mod layout;
pub(crate) mod notification;
mod reclaim;
mod reorder;
pub(crate) mod rings;
mod walk;

use std::fmt;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemory};

use self::rings::SplitRings;
use self::walk::walk;
use crate::base::RingBase;
use crate::chain::Chain;
use crate::config::{QueueConfig, QueueSize, RingAddresses, RingFeatures, StartError};
use crate::fault::{PopError, RingFault};
use crate::head::Head;
use crate::in_flight::InFlight;
use crate::in_order::InOrder;

/// No head: those have 16 bits.
const NONE: u32 = u32::MAX;

/// A started split ring, device side.
///
/// Owned by one thread at a time; nothing in it is shared with another thread of the host. `M`
/// is the memory the ring lives in. The three areas are translated once, at start, so a map is
/// replaced by another, never changed.
///
/// Behind an IOMMU (`vm_memory::IommuMemory`) each area must be in one piece in the host too, and
/// allow what the device does there. Indirect tables and buffers are looked up for each chain, and
/// so follow the mappings; the three areas are not. When one of them is invalidated, whoever
/// handles that calls [`set_memory`](Self::set_memory) with the same memory, before the guest is
/// told that it is done: the ring is translated again, or stops.
///
/// # What the caller must guarantee
///
/// - Every [`Head`] goes back to the queue it came from. One that is not in flight here is
///   ignored by [`push`](Self::push) (a debug build panics), so a mix-up never puts a bogus id
///   into the used ring, but heads of two queues with the same index cannot be told apart.
/// - The [`Chain`] was made for this queue's size or a larger one.
/// - Buffers are translated by the consumer, through [`memory`](Self::memory) or a newer map;
///   the ring does not look behind their addresses.
///
/// # Example
///
/// ```
/// use std::sync::Arc;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vring::driver::{SplitDriver, SplitLayout};
/// use vring::{Chain, QueueConfig, QueueSize, RingBase, RingFeatures, Segment, SplitQueue};
///
/// let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)])?);
/// let size = QueueSize::new(16)?;
/// let features = RingFeatures::default();
/// let layout = SplitLayout::new(GuestAddress(0x1000), size)?;
///
/// // The guest makes two buffers available ...
/// let mut guest = SplitDriver::new(Arc::clone(&memory), layout.addresses(), size, features)?;
/// let request = Segment { addr: GuestAddress(0x4000), len: 16 };
/// let answer = Segment { addr: GuestAddress(0x5000), len: 1 };
/// guest.add_chain(&[request], &[answer])?;
/// guest.publish();
///
/// // ... and the device serves them.
/// let addresses = layout.addresses();
/// let base = RingBase::fresh(features);
/// let config = QueueConfig { size, addresses, features, base };
/// let mut queue = SplitQueue::start(Arc::clone(&memory), &config)?;
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
pub struct SplitQueue<M> {
    rings: SplitRings<M>,
    features: RingFeatures,
    /// Index of the next available entry to fetch; free-running.
    next_avail: u16,
    /// `avail.idx` as last read and checked: entries up to here may be fetched without looking.
    avail_idx: u16,
    /// `used.idx` as published. What the guest makes of the word in memory does not matter
    /// (row A8).
    used_idx: u16,
    /// Used elements written after `used_idx` and not published yet.
    staged: usize,
    /// `used_idx` at the last notification decision, unless too much has happened since for the
    /// 16-bit arithmetic, or nothing has been decided yet.
    signalled_used: Option<u16>,
    /// The `NO_NOTIFY` bit as last stored.
    kicks_disabled: bool,
    /// Without room with `VIRTIO_F_IN_ORDER`: then every head is refused here, and takes the slow
    /// way to `in_order`; so the fast way need not ask which it is.
    in_flight: InFlight,
    /// Chains in flight and those that wait for them, with `VIRTIO_F_IN_ORDER`.
    in_order: Option<Box<InOrder>>,
    /// The head that [`unpop`](Self::unpop) can take back, while it is in flight; or [`NONE`].
    latest: u32,
    fault: Option<RingFault>,
    fault_reported: bool,
    /// The memory map no longer holds the ring: it must not be touched any more.
    lost: bool,
    /// Whether what is published is marked in the memory's dirty bitmap.
    marks_dirty: bool,
}

impl<M> fmt::Debug for SplitQueue<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SplitQueue")
            .field("rings", &self.rings)
            .field("features", &self.features)
            .field("next_avail", &self.next_avail)
            .field("avail_idx", &self.avail_idx)
            .field("used_idx", &self.used_idx)
            .field("staged", &self.staged)
            .field("in_flight", &self.in_flight)
            .field("in_order", &self.in_order.is_some())
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}

impl<M: GuestMemory> SplitQueue<M> {
    /// Starts a queue: translates the three areas, and reads the used index, once.
    ///
    /// The used index of a fresh ring is zero; that of a ring resumed from another back-end is
    /// where that one stopped, and only the ring remembers it. From then on the queue's own
    /// count is the truth. `used.flags` is cleared: it must be 0 with `VIRTIO_F_EVENT_IDX`
    /// (virtio 1.3 §2.7.10.2), and without it kicks start out enabled, whatever a predecessor
    /// left behind.
    ///
    /// Areas may overlap one another: the guest then garbles its own ring and nothing else.
    ///
    /// # Errors
    ///
    /// [`StartError`] if an area is misaligned, wraps, or is not inside one region, or if the
    /// configuration is that of a packed ring. Nothing has been written then.
    pub fn start(memory: Arc<M>, config: &QueueConfig) -> Result<Self, StartError> {
        let (rings, next_avail) = Self::translate(memory, config)?;
        let used_idx = rings.used_idx();
        Ok(Self::begin(rings, config.features, next_avail, used_idx))
    }

    /// Everything of a start that can fail; writes nothing.
    pub(crate) fn translate(
        memory: Arc<M>,
        config: &QueueConfig,
    ) -> Result<(SplitRings<M>, u16), StartError> {
        let RingBase::Split { next_avail } = config.base else {
            return Err(StartError::FormatMismatch);
        };
        if config.features.packed {
            return Err(StartError::FormatMismatch);
        }
        let rings = SplitRings::translate(memory, config.size, config.addresses)?;
        Ok((rings, next_avail))
    }

    /// The rest of a start.
    pub(crate) fn begin(
        rings: SplitRings<M>,
        features: RingFeatures,
        next_avail: u16,
        used_idx: u16,
    ) -> Self {
        rings.store_used_flags(0);
        let (entries, in_order) = (rings.size().get(), features.in_order);
        Self {
            rings,
            features,
            next_avail,
            avail_idx: next_avail,
            used_idx,
            staged: 0,
            signalled_used: None,
            kicks_disabled: false,
            in_flight: InFlight::new(if in_order { 0 } else { entries }),
            in_order: in_order.then(|| Box::new(InOrder::new(entries))),
            latest: NONE,
            fault: None,
            fault_reported: false,
            lost: false,
            marks_dirty: true,
        }
    }

    /// Takes the next chain the driver made available, or `None` if there is none.
    ///
    /// Fills `chain` with its buffers and takes ownership of the chain until its [`Head`] is
    /// pushed. Every descriptor is read once, into owned values: what the guest writes afterwards
    /// changes nothing. Takes at most as many steps as the table has descriptors. Buffer
    /// addresses are not translated: one that points outside memory comes to light when the
    /// consumer translates it, and is then answered like a [`PopError::Chain`].
    ///
    /// # Errors
    ///
    /// - [`PopError::Chain`]: this chain breaks a rule; push its head with length 0 and go on.
    /// - [`PopError::Ring`]: the ring is broken; nothing was consumed. Returned once, and from
    ///   then on `Ok(None)`.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<Option<Head>, PopError> {
        if self.next_avail == self.avail_idx && !self.fetch_avail_idx()? {
            return Ok(None);
        }
        let index = self.rings.avail_entry(self.next_avail);
        if !self.in_flight.insert(index) {
            return self.pop_refused(index, chain);
        }
        self.taken(index);
        let head = Head::new(index);
        match walk(&self.rings, self.features.indirect_desc, index, chain) {
            Ok(()) => Ok(Some(head)),
            Err(fault) => Err(PopError::Chain { head, fault }),
        }
    }

    /// The rest of a pop whose head `in_flight` refuses: always, with `VIRTIO_F_IN_ORDER`.
    #[cold]
    fn pop_refused(&mut self, index: u16, chain: &mut Chain) -> Result<Option<Head>, PopError> {
        let size = self.rings.size().get();
        if index >= size {
            return self.ring_fault(RingFault::HeadOutOfRange { head: index, size });
        }
        if !self.arrive_in_order(index) {
            return self.ring_fault(RingFault::HeadInFlight { head: index });
        }
        self.taken(index);
        let head = Head::new(index);
        match walk(&self.rings, self.features.indirect_desc, index, chain) {
            Ok(()) => {
                self.set_latest_writable(chain.writable_len());
                Ok(Some(head))
            }
            Err(fault) => Err(PopError::Chain { head, fault }),
        }
    }

    /// The available entry with this head is fetched.
    #[inline(always)]
    fn taken(&mut self, index: u16) {
        self.next_avail = self.next_avail.wrapping_add(1);
        self.latest = u32::from(index);
        // The driver wrote the descriptors, mostly on another processor, and fetching a line from
        // there takes longer than the rest of a pop. So while this chain is walked those of the next but
        // one are on their way; the next one's have been since the pop before, when `next_buffer` looks at
        // them. Measured with a driver on another core: up to a quarter less time for batches of 8 to 128,
        // direct or indirect; two to four per cent more where all is in the cache already
        // (benches/README.md).
        let ahead = self.avail_idx.wrapping_sub(self.next_avail);
        if ahead > 1 {
            self.rings.prefetch_chain(self.next_avail.wrapping_add(1));
        }
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
        let index = head.index();
        let taken_back = self.latest == u32::from(index)
            && match &mut self.in_order {
                None => self.in_flight.remove(index),
                Some(in_order) => in_order.retract(index),
            };
        if !taken_back {
            return Err(head);
        }
        self.latest = NONE;
        self.next_avail = self.next_avail.wrapping_sub(1);
        if self.fault.is_some() {
            // A stopped ring stays empty.
            self.avail_idx = self.next_avail;
        }
        Ok(())
    }

    /// Gives a chain back to the driver: `len` bytes of its writable buffers, from the first one
    /// on, are written (virtio 1.3 §2.7.8).
    ///
    /// Only stages the used element; the driver sees it after [`publish`](Self::publish). Works
    /// after a ring fault too, so that what is in flight completes.
    ///
    /// In any order. With `VIRTIO_F_IN_ORDER` (virtio 1.3 §2.7.9) a chain waits in the queue until
    /// all that were popped before it have been pushed.
    #[inline]
    pub fn push(&mut self, head: Head, len: u32) {
        let index = head.index();
        if !self.in_flight.remove(index) {
            self.push_in_order(index, len);
            return;
        }
        if self.lost {
            return;
        }
        self.rings.store_used_element(self.next_used(), index, len);
        // One for each chain popped: never so many.
        self.staged = self.staged.wrapping_add(1);
    }

    /// Makes every chain pushed visible to the driver, with one store, and returns how many there
    /// were.
    ///
    /// With `VIRTIO_F_IN_ORDER`: those before which all have been pushed. Chains in a row that were
    /// written in full share one used element, that of the last.
    #[inline]
    pub fn publish(&mut self) -> usize {
        if self.staged == 0 {
            // Always, with IN_ORDER.
            self.stage_in_order();
        }
        let count = self.staged;
        if count == 0 {
            return 0;
        }
        let next_used = self.next_used();
        self.rings.publish_used_idx(next_used);
        if self.marks_dirty {
            self.rings.mark_published_dirty(next_used, count);
        }
        // Once 65536 elements lie between two decisions, old and new index no longer tell how
        // far the ring went.
        if let Some(signalled) = self.signalled_used
            && usize::from(self.used_idx.wrapping_sub(signalled)) + count > usize::from(u16::MAX)
        {
            self.signalled_used = None;
        }
        self.used_idx = next_used;
        self.staged = 0;
        count
    }

    /// Where the first buffer of the next chain is said to be, if one is known of without a look at the driver's
    /// index: for a prefetch. Nothing is checked, and the pop that follows may find something else.
    #[inline]
    pub fn next_buffer(&self) -> Option<GuestAddress> {
        if self.next_avail == self.avail_idx {
            return None;
        }
        let index = self.rings.avail_entry(self.next_avail);
        Some(GuestAddress(self.rings.table().descriptor(index).address))
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
            None => self.next_avail != self.avail_idx || self.rings.avail_idx() != self.next_avail,
        }
    }

    /// Chains popped and not pushed yet.
    #[inline]
    pub const fn in_flight(&self) -> u16 {
        match &self.in_order {
            None => self.in_flight.count(),
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

    /// Where a successor goes on: what `GET_VRING_BASE` returns.
    #[inline]
    pub const fn base(&self) -> RingBase {
        RingBase::Split {
            next_avail: self.next_avail,
        }
    }

    /// Index of the next available entry to fetch.
    #[inline]
    pub const fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The fault that stopped the ring, if one did.
    #[inline]
    pub const fn fault(&self) -> Option<RingFault> {
        self.fault
    }

    /// Moves the ring to a new memory map, at the addresses it has there, or translates it again in
    /// the same, where an IOMMU's mappings have changed. Everything else is unchanged: indices, what
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
        match SplitRings::translate(memory, self.size(), addresses) {
            Ok(rings) => {
                self.rings = rings;
                Ok(())
            }
            Err(error) => {
                self.latch(RingFault::MemoryLost);
                self.lost = true;
                self.staged = 0;
                Err(error)
            }
        }
    }

    /// `used.idx` as published.
    pub(crate) const fn used_idx(&self) -> u16 {
        self.used_idx
    }

    /// Chains pushed that the driver cannot see.
    pub(crate) fn unpublished(&self) -> usize {
        let waiting = self.in_order.as_ref().map_or(0, |order| order.waiting());
        self.staged + usize::from(waiting)
    }

    /// Position of the next used element to write.
    #[inline]
    fn next_used(&self) -> u16 {
        let [low, high, ..] = self.staged.to_le_bytes();
        self.used_idx.wrapping_add(u16::from_le_bytes([low, high]))
    }

    /// Reads `avail.idx`; true if there is something to fetch.
    #[inline]
    fn fetch_avail_idx(&mut self) -> Result<bool, PopError> {
        if let Some(fault) = self.fault {
            // Latched by `set_memory`, and so not reported yet.
            if !self.fault_reported {
                self.fault_reported = true;
                return Err(PopError::Ring(fault));
            }
            return Ok(false);
        }
        let avail_idx = self.rings.avail_idx();
        let size = self.rings.size().get();
        // An index that went backwards is one that is far ahead (rows A1, A2).
        if avail_idx.wrapping_sub(self.next_avail) > size {
            return self.ring_fault(RingFault::AvailIndexJump {
                avail_idx,
                next_avail: self.next_avail,
                size,
            });
        }
        self.avail_idx = avail_idx;
        if avail_idx.wrapping_sub(self.next_avail) > 1 {
            // See `taken`.
            self.rings.prefetch_chain(self.next_avail.wrapping_add(1));
        }
        Ok(avail_idx != self.next_avail)
    }

    #[cold]
    fn ring_fault<T>(&mut self, fault: RingFault) -> Result<T, PopError> {
        self.latch(fault);
        self.fault_reported = true;
        Err(PopError::Ring(fault))
    }

    /// Stops fetching. With nothing left between the two indices, every pop takes the slow way,
    /// where the fault is; so the fast way need not ask.
    #[cold]
    fn latch(&mut self, fault: RingFault) {
        self.fault.get_or_insert(fault);
        self.avail_idx = self.next_avail;
    }
}
