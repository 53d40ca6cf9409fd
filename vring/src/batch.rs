//! The right order of a device's pass over a queue, made the easy one.

use std::mem::ManuallyDrop;

use vm_memory::GuestMemory;

use crate::chain::Chain;
use crate::fault::PopError;
use crate::head::Head;
use crate::packed::PackedQueue;
use crate::queue::Queue;
use crate::split::SplitQueue;

/// What a pass needs of a queue of either format. Sealed: the module is private.
pub trait Virtqueue {
    fn pop(&mut self, chain: &mut Chain) -> Result<Option<Head>, PopError>;
    fn unpop(&mut self, head: Head) -> Result<(), Head>;
    fn push(&mut self, head: Head, len: u32);
    fn publish(&mut self) -> usize;
    fn should_notify(&mut self) -> bool;
    fn disable_notification(&mut self);
    fn enable_notification(&mut self) -> bool;
}

/// Makes a queue's methods those of the trait, and gives it `batch`.
macro_rules! impl_virtqueue {
    ($($queue:ident),*) => {$(
        impl<M: GuestMemory> Virtqueue for $queue<M> {
            #[inline]
            fn pop(&mut self, chain: &mut Chain) -> Result<Option<Head>, PopError> {
                self.pop(chain)
            }

            #[inline]
            fn unpop(&mut self, head: Head) -> Result<(), Head> {
                self.unpop(head)
            }

            #[inline]
            fn push(&mut self, head: Head, len: u32) {
                self.push(head, len);
            }

            #[inline]
            fn publish(&mut self) -> usize {
                self.publish()
            }

            #[inline]
            fn should_notify(&mut self) -> bool {
                self.should_notify()
            }

            #[inline]
            fn disable_notification(&mut self) {
                self.disable_notification();
            }

            #[inline]
            fn enable_notification(&mut self) -> bool {
                self.enable_notification()
            }
        }

        impl<M: GuestMemory> $queue<M> {
            /// Begins a pass that pops up to `limit` chains and pushes any number, in the one order
            /// that loses no wake-up and never takes for ever. See [`Batch`].
            #[inline]
            pub const fn batch(&mut self, limit: u16) -> Batch<'_, Self> {
                Batch::new(self, limit)
            }
        }
    )*};
}

impl_virtqueue!(PackedQueue, Queue, SplitQueue);

/// One bounded pass of a device over a queue: chains taken, chains given back, one decision whether
/// to interrupt the driver, and one whether the device may sleep.
///
/// ```text
///   batch(limit) ─ pop ─┬─ pop ... ─────────── None ─── finish
///                       │                       │         ├─ publish: one store for all pushed
///          the first asks the driver     empty, or        ├─ notify: interrupt the driver?
///          not to kick any more          limit reached    └─ sleep: if empty, ask for kicks,
///                                                            and look again
/// ```
///
/// Between `batch` and [`finish`](Self::finish) chains are popped and pushed in any way: those
/// popped just now, and those of earlier passes whose I/O has completed. A chain that is not done
/// stays in flight and is pushed in a later pass.
///
/// The ring is found empty at most `limit` chains from here, however fast the driver publishes
/// (row N6); then [`Finished::sleep`] is false, and the caller comes back after other queues, its
/// completions and its control channel have had their turn.
///
/// Dropped without `finish`, it publishes what was pushed. Both decisions are then still to be made:
/// by the next pass, which must come before the device sleeps.
///
/// # Example
///
/// ```
/// # use std::sync::Arc;
/// # use vm_memory::{GuestAddress, GuestMemoryMmap};
/// # use vring::driver::{SplitDriver, SplitLayout};
/// # use vring::{Chain, PopError, QueueConfig, QueueSize, RingBase, RingFeatures, SplitQueue};
/// # let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)])?);
/// # let (size, features) = (QueueSize::new(4)?, RingFeatures::default());
/// # let addresses = SplitLayout::new(GuestAddress(0x1000), size)?.addresses();
/// # let mut guest = SplitDriver::new(Arc::clone(&memory), addresses, size, features)?;
/// # let base = RingBase::fresh(features);
/// # let mut queue = SplitQueue::start(memory, &QueueConfig { size, addresses, features, base })?;
/// # let mut chain = Chain::for_queue(size);
/// guest.add_chain(&[], &[])?;
/// guest.add_chain(&[], &[])?;
/// guest.publish();
///
/// let mut batch = queue.batch(32);
/// while let Some(head) = batch.pop(&mut chain)? {
///     batch.push(head, 0); // having done the request
/// }
/// let finished = batch.finish();
/// assert!(finished.notify, "the driver is told of both at once");
/// assert!(finished.sleep, "nothing more is there, and a kick will come");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "the driver is told, and kicks are asked for again, by `finish`"]
pub struct Batch<'queue, Q: Virtqueue> {
    queue: &'queue mut Q,
    /// Chains that may still be popped.
    left: u16,
    /// The driver has been asked not to kick.
    disarmed: bool,
    /// The last look found nothing.
    empty: bool,
}

/// What is to be done after a [`Batch`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use = "a driver that is not interrupted may wait for ever"]
pub struct Finished {
    /// Interrupt the driver: it waits for something that has been published.
    pub notify: bool,
    /// True: the ring is empty and a kick will come, so the device may sleep. False: more is there,
    /// or may be; come back without waiting for a kick.
    pub sleep: bool,
}

impl<'queue, Q: Virtqueue> Batch<'queue, Q> {
    #[inline]
    const fn new(queue: &'queue mut Q, limit: u16) -> Self {
        Self {
            queue,
            left: limit,
            disarmed: false,
            empty: false,
        }
    }

    /// Takes the next chain, or `None` if there is none, or the limit is reached.
    ///
    /// The first chain taken asks the driver not to kick for more: it is being looked for anyway.
    ///
    /// # Errors
    ///
    /// Those of [`SplitQueue::pop`](crate::SplitQueue::pop). A broken chain counts towards the
    /// limit. After a ring fault there is nothing more to come, and the pass is finished as usual:
    /// what was pushed is published.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<Option<Head>, PopError> {
        let Some(left) = self.left.checked_sub(1) else {
            return Ok(None);
        };
        let popped = self.queue.pop(chain);
        self.empty = matches!(popped, Ok(None) | Err(PopError::Ring(_)));
        if !self.empty {
            self.left = left;
            if !self.disarmed {
                self.disarmed = true;
                self.queue.disable_notification();
            }
        }
        popped
    }

    /// Takes back the latest [`pop`](Self::pop), for a device that finds it has no room. The pass
    /// does not end with [`Finished::sleep`] then, unless a later pop finds the ring empty: the
    /// chain is still there, and no kick comes for it. It has been counted towards the limit.
    ///
    /// # Errors
    ///
    /// Returns the head if it is not the latest.
    pub fn unpop(&mut self, head: Head) -> Result<(), Head> {
        self.queue.unpop(head)?;
        self.empty = false;
        Ok(())
    }

    /// Gives a chain back, of this pass or an earlier one, with `len` bytes written. The driver sees
    /// it when the pass is finished.
    #[inline]
    pub fn push(&mut self, head: Head, len: u32) {
        self.queue.push(head, len);
    }

    /// The queue, to look at.
    #[inline]
    pub const fn queue(&self) -> &Q {
        self.queue
    }

    /// Publishes what was pushed, decides whether the driver is to be interrupted, and, if the ring
    /// was found empty, asks for kicks again and takes a last look.
    ///
    /// In this order: publishing first lets the driver refill the ring before the last look.
    #[inline]
    pub fn finish(self) -> Finished {
        // Holds nothing but a borrow; `drop` would publish again.
        let mut pass = ManuallyDrop::new(self);
        pass.queue.publish();
        let notify = pass.queue.should_notify();
        let sleep = pass.empty && pass.queue.enable_notification();
        Finished { notify, sleep }
    }
}

impl<Q: Virtqueue> Drop for Batch<'_, Q> {
    #[inline]
    fn drop(&mut self) {
        self.queue.publish();
    }
}

#[cfg(test)]
mod wake_ups;

#[cfg(test)]
mod tests {
    use super::*;

    /// Says what was called, and has as many chains as it is told.
    #[derive(Debug, Default)]
    struct Recorder {
        available: u16,
        calls: Vec<&'static str>,
    }

    impl Virtqueue for Recorder {
        fn pop(&mut self, _: &mut Chain) -> Result<Option<Head>, PopError> {
            self.calls.push("pop");
            let Some(left) = self.available.checked_sub(1) else {
                return Ok(None);
            };
            self.available = left;
            Ok(Some(Head::new(left)))
        }

        fn unpop(&mut self, _: Head) -> Result<(), Head> {
            self.calls.push("unpop");
            self.available += 1;
            Ok(())
        }

        fn push(&mut self, _: Head, _: u32) {
            self.calls.push("push");
        }

        fn publish(&mut self) -> usize {
            self.calls.push("publish");
            0
        }

        fn should_notify(&mut self) -> bool {
            self.calls.push("notify?");
            false
        }

        fn disable_notification(&mut self) {
            self.calls.push("disable");
        }

        fn enable_notification(&mut self) -> bool {
            self.calls.push("enable");
            self.available == 0
        }
    }

    fn chain() -> Chain {
        Chain::for_queue(crate::QueueSize::new(1).unwrap())
    }

    /// A pass that pushes all it pops.
    fn serve(queue: &mut Recorder, limit: u16) -> Finished {
        let mut chain = chain();
        let mut batch = Batch::new(queue, limit);
        while let Some(head) = batch.pop(&mut chain).unwrap() {
            batch.push(head, 0);
        }
        batch.finish()
    }

    #[test]
    fn a_pass_that_empties_the_ring_makes_every_call_in_its_place() {
        let mut queue = Recorder {
            available: 2,
            ..Recorder::default()
        };
        assert!(serve(&mut queue, 10).sleep);
        let expected = [
            "pop", "disable", "push", "pop", "push", "pop", "publish", "notify?", "enable",
        ];
        assert_eq!(queue.calls, expected);
    }

    #[test]
    fn a_pass_that_reaches_its_limit_does_not_ask_for_kicks() {
        let mut queue = Recorder {
            available: 2,
            ..Recorder::default()
        };
        assert!(!serve(&mut queue, 2).sleep, "it has not looked");
        assert_eq!(
            queue.calls,
            [
                "pop", "disable", "push", "pop", "push", "publish", "notify?"
            ]
        );
        assert!(serve(&mut queue, 2).sleep);
    }

    #[test]
    fn a_pass_that_finds_nothing_does_not_silence_the_driver() {
        let mut queue = Recorder::default();
        assert!(serve(&mut queue, 2).sleep);
        assert_eq!(queue.calls, ["pop", "publish", "notify?", "enable"]);
    }

    #[test]
    fn a_chain_taken_back_keeps_the_device_awake() {
        let mut queue = Recorder {
            available: 1,
            ..Recorder::default()
        };
        let mut chain = chain();
        let mut batch = Batch::new(&mut queue, 2);
        let head = batch.pop(&mut chain).unwrap().unwrap();
        batch.unpop(head).unwrap();
        let head = batch.pop(&mut chain).unwrap().unwrap();
        batch.unpop(head).unwrap();
        assert_eq!(batch.pop(&mut chain), Ok(None), "the limit counts them");
        assert!(!batch.finish().sleep);
    }

    #[test]
    fn a_chain_taken_back_after_the_ring_was_found_empty_is_no_reason_to_ask_for_kicks() {
        let mut queue = Recorder {
            available: 1,
            ..Recorder::default()
        };
        let mut chain = chain();
        let mut batch = Batch::new(&mut queue, 2);
        let head = batch.pop(&mut chain).unwrap().unwrap();
        assert_eq!(batch.pop(&mut chain), Ok(None));
        batch.unpop(head).unwrap();
        assert!(!batch.finish().sleep);
        assert!(!queue.calls.contains(&"enable"), "{:?}", queue.calls);
    }

    #[test]
    fn a_dropped_pass_publishes_once_and_a_finished_one_too() {
        let mut queue = Recorder::default();
        drop(Batch::new(&mut queue, 1));
        assert_eq!(queue.calls, ["publish"]);
    }
}
