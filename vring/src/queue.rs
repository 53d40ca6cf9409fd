//! A queue of whichever format was negotiated.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemory};

use crate::base::RingBase;
use crate::chain::Chain;
use crate::config::{QueueConfig, QueueSize, RingAddresses, RingFeatures, StartError};
use crate::fault::{PopError, RingFault};
use crate::head::Head;
use crate::packed::PackedQueue;
use crate::split::SplitQueue;

/// A started ring, device side, of the format that was negotiated.
///
/// Every operation is that of the format's own queue: each method here says what holds for both. A
/// device that serves either format has a `Queue`; one that knows the format saves the branch
/// with a [`SplitQueue`] or a [`PackedQueue`], which the match gives.
///
/// # What the caller must guarantee
///
/// - Every [`Head`] goes back to the queue it came from. One that is not in flight here is
///   ignored by [`push`](Self::push) (a debug build panics), so a mix-up never puts a bogus id
///   into the ring, but heads of two queues with the same index cannot be told apart.
/// - The [`Chain`] was made for this queue's size or a larger one.
/// - Buffers are translated by the consumer, through [`memory`](Self::memory) or a newer map;
///   the ring does not look behind their addresses.
///
/// # Example
///
/// ```
/// use std::sync::Arc;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vring::driver::{Driver, Layout};
/// use vring::{Chain, Queue, QueueConfig, QueueSize, RingBase, RingFeatures, Segment};
///
/// let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)])?);
/// let size = QueueSize::new(16)?;
/// for negotiated in [0, 1 << 34] {
///     let features = RingFeatures::from_virtio(negotiated);
///     let addresses = Layout::new(GuestAddress(0x1000), size, features)?.addresses();
///     let mut guest = Driver::new(Arc::clone(&memory), addresses, size, features)?;
///     guest.add_chain(&[], &[Segment { addr: GuestAddress(0x5000), len: 1 }])?;
///     guest.publish();
///
///     let base = RingBase::fresh(features);
///     let config = QueueConfig { size, addresses, features, base };
///     let mut queue = Queue::start(Arc::clone(&memory), &config)?;
///     let mut chain = Chain::for_queue(size);
///     while let Some(head) = queue.pop(&mut chain)? {
///         queue.push(head, 1);
///     }
///     queue.publish();
///     assert!(queue.should_notify());
///     assert_eq!(guest.poll_used().map(|used| used.len), Some(1));
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub enum Queue<M> {
    /// Of a packed ring.
    Packed(PackedQueue<M>),
    /// Of a split ring.
    Split(SplitQueue<M>),
}

/// Calls the same method of whichever queue there is.
macro_rules! forward {
    ($self:ident, $queue:ident => $call:expr) => {
        match $self {
            Self::Packed($queue) => $call,
            Self::Split($queue) => $call,
        }
    };
}

impl<M: GuestMemory> Queue<M> {
    /// Starts a queue of the format that `config.features` says.
    ///
    /// # Errors
    ///
    /// [`StartError`] if an area is misaligned, wraps, or is not inside one region, or if the base
    /// is that of the other format or not one the ring can have. Nothing has been written then.
    pub fn start(memory: Arc<M>, config: &QueueConfig) -> Result<Self, StartError> {
        if config.features.packed {
            PackedQueue::start(memory, config).map(Self::Packed)
        } else {
            SplitQueue::start(memory, config).map(Self::Split)
        }
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
        forward!(self, queue => queue.pop(chain))
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
        forward!(self, queue => queue.unpop(head))
    }

    /// Gives a chain back to the driver: `len` bytes of its writable buffers, from the first one
    /// on, are written.
    ///
    /// Only stages it; the driver sees it after [`publish`](Self::publish). Works after a ring
    /// fault too, so that what is in flight completes.
    ///
    /// In any order. With `VIRTIO_F_IN_ORDER` a chain waits in the queue until all that were popped
    /// before it have been pushed.
    #[inline]
    pub fn push(&mut self, head: Head, len: u32) {
        forward!(self, queue => queue.push(head, len));
    }

    /// Makes every chain pushed visible to the driver, with one store, and returns how many there
    /// were. With `VIRTIO_F_IN_ORDER`: those before which all have been pushed.
    #[inline]
    pub fn publish(&mut self) -> usize {
        forward!(self, queue => queue.publish())
    }

    /// Decides whether the driver is to be interrupted, once for everything published since the
    /// last decision.
    ///
    /// No if nothing was published since the last decision. The first decision after a start is
    /// made as if something had been, since nobody knows what the driver has been told before: an
    /// interrupt too many does no harm.
    #[inline]
    pub fn should_notify(&mut self) -> bool {
        forward!(self, queue => queue.should_notify())
    }

    /// Where the first buffer of the next chain is said to be, if that can be told for next to nothing: for a prefetch.
    /// Nothing is checked, and the pop that follows may find something else. Never of a packed ring, whose next
    /// descriptor says whether it is available only when it is read.
    #[inline]
    pub fn next_buffer(&self) -> Option<GuestAddress> {
        match self {
            Self::Packed(_) => None,
            Self::Split(queue) => queue.next_buffer(),
        }
    }

    /// Whether [`publish`](Self::publish) marks what it has written in the memory's dirty bitmap, if that has one; at
    /// first it does. A device whose memory nobody migrates at present may do without.
    pub fn set_marks_dirty(&mut self, marks: bool) {
        forward!(self, queue => queue.set_marks_dirty(marks));
    }

    /// Asks the driver not to kick while the device is polling anyway. A hint: kicks may come.
    #[inline]
    pub fn disable_notification(&mut self) {
        forward!(self, queue => queue.disable_notification());
    }

    /// Asks the driver to kick for the next chain, then looks again: true means the ring is empty
    /// and a kick will come, so the caller may sleep; false means that buffers raced in and must
    /// be processed first.
    ///
    /// Looks exactly once, however fast the driver publishes (row N6). After a ring fault it is
    /// true: nothing is fetched any more.
    #[inline]
    pub fn enable_notification(&mut self) -> bool {
        forward!(self, queue => queue.enable_notification())
    }

    /// Whether [`pop`](Self::pop) would find something: a chain, or a fault to report.
    #[inline]
    pub fn has_available(&mut self) -> bool {
        forward!(self, queue => queue.has_available())
    }

    /// Chains popped and not pushed yet.
    #[inline]
    pub const fn in_flight(&self) -> u16 {
        forward!(self, queue => queue.in_flight())
    }

    /// Number of entries.
    #[inline]
    pub const fn size(&self) -> QueueSize {
        forward!(self, queue => queue.size())
    }

    /// The negotiated features the ring was started with.
    #[inline]
    pub const fn features(&self) -> RingFeatures {
        forward!(self, queue => queue.features())
    }

    /// The memory the ring is in.
    #[inline]
    pub const fn memory(&self) -> &Arc<M> {
        forward!(self, queue => queue.memory())
    }

    /// Where the three areas are, in [`memory`](Self::memory).
    #[inline]
    pub const fn addresses(&self) -> RingAddresses {
        forward!(self, queue => queue.addresses())
    }

    /// Where a successor goes on: what `GET_VRING_BASE` returns.
    #[inline]
    pub const fn base(&self) -> RingBase {
        forward!(self, queue => queue.base())
    }

    /// The fault that stopped the ring, if one did.
    #[inline]
    pub const fn fault(&self) -> Option<RingFault> {
        forward!(self, queue => queue.fault())
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
        forward!(self, queue => queue.set_memory(memory, addresses))
    }
}

impl<M> From<PackedQueue<M>> for Queue<M> {
    fn from(queue: PackedQueue<M>) -> Self {
        Self::Packed(queue)
    }
}

impl<M> From<SplitQueue<M>> for Queue<M> {
    fn from(queue: SplitQueue<M>) -> Self {
        Self::Split(queue)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;

    #[test]
    fn the_format_is_the_negotiated_one_and_the_base_must_have_it() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let memory = Arc::new(memory);
        for packed in [false, true] {
            let features = RingFeatures {
                packed,
                ..RingFeatures::default()
            };
            let mut config = QueueConfig {
                size: QueueSize::new(8).unwrap(),
                addresses: RingAddresses {
                    descriptor_area: GuestAddress(0),
                    driver_area: GuestAddress(0x100),
                    device_area: GuestAddress(0x200),
                },
                features,
                base: RingBase::fresh(features),
            };
            let queue = Queue::start(Arc::clone(&memory), &config).unwrap();
            assert_eq!(matches!(queue, Queue::Packed(_)), packed);
            assert_eq!((queue.base(), queue.features()), (config.base, features));
            config.base = RingBase::fresh(RingFeatures {
                packed: !packed,
                ..features
            });
            let refused = Queue::start(Arc::clone(&memory), &config).map(|_| ());
            assert_eq!(refused, Err(StartError::FormatMismatch));
        }
    }
}
