//! One running queue: its ring, its notifiers, and where it stands.

use std::sync::Arc;

use crossbeam_channel::Sender;
use event_poll::EventNotifier;
use vm_memory::GuestMemoryBackend;
use vring::{Chain, Head, PopError, RingAddresses, RingBase};

use super::{CacheFeatures, Notifier};
use crate::counters::{Counters, RequestCounters};
use crate::inflight::TrackedQueue;
use crate::request::Accepted;

pub(super) struct QueueState<M: GuestMemoryBackend> {
    /// Its number on the device.
    pub(super) index: u16,
    pub(super) ring: TrackedQueue<M>,
    /// Where the ring lies in the memory map in force.
    pub(super) addresses: RingAddresses,
    /// Watched by the data thread's loop while it is here.
    pub(super) kick: Option<EventNotifier>,
    /// Nobody kicks: the ring is looked at whenever the thread is awake, and that is every [`super::POLLED_INTERVAL`].
    pub(super) polled: bool,
    pub(super) call: Option<Box<dyn Notifier>>,
    pub(super) err: Option<Box<dyn Notifier>>,
    /// Disabled queues keep their state and are not fetched from (vhost-user: SET_VRING_ENABLE).
    pub(super) enabled: bool,
    /// What the driver took of it.
    pub(super) cache: CacheFeatures,
    pub(super) accepted: Accepted,
    /// The guest has been asked to kick; cleared by the kick.
    pub(super) armed: bool,
    /// There may be more in the ring, but no room for it.
    pub(super) starved: bool,
    /// Whoever waits for the queue to stop. Set: no more fetching, but of what a predecessor has left.
    pub(super) stopping: Option<Sender<Option<RingBase>>>,
    unpublished: bool,
    /// Publications since the last interrupt.
    quiet: u32,
    /// Something was published, and whether the guest wants an interrupt has not been asked since; how many bytes
    /// of data.
    held: Option<u64>,
    /// The last fetch left more in the ring, to be done at once.
    pub(super) more: bool,
}

impl<M: GuestMemoryBackend> std::fmt::Debug for QueueState<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueueState")
            .field("index", &self.index)
            .field("enabled", &self.enabled)
            .field("armed", &self.armed)
            .field("starved", &self.starved)
            .field("in_flight", &self.ring.queue().in_flight())
            .finish_non_exhaustive()
    }
}

/// Publications without an interrupt after which a guest counts as one that polls. One that sleeps wants some hundred
/// interrupts for as many, even while it is busy.
const QUIET_PUBLICATIONS: u32 = 512;

/// Bytes of data that a guest may have been given back without an interrupt, while more are given back at once: a
/// microsecond of them. Of the null device only. On tmpfs, where they take as long as the guest does to wake, it gained
/// nothing (docs/performance.md).
const HELD_BYTES_MAX: u64 = 64 << 10;

/// What a pop found.
pub(super) enum Fetched {
    Chain(Head),
    /// To be returned with length 0.
    BadChain(Head),
    Nothing,
}

impl<M: GuestMemoryBackend> QueueState<M> {
    pub(super) fn new(
        index: u16,
        ring: TrackedQueue<M>,
        addresses: RingAddresses,
        cache: CacheFeatures,
        accepted: Accepted,
    ) -> Self {
        Self {
            index,
            ring,
            addresses,
            kick: None,
            polled: false,
            call: None,
            err: None,
            enabled: false,
            cache,
            accepted,
            armed: false,
            starved: false,
            stopping: None,
            unpublished: false,
            quiet: 0,
            held: None,
            more: false,
        }
    }

    pub(super) fn may_fetch(&self) -> bool {
        self.enabled && (self.stopping.is_none() || self.ring.has_left())
    }

    pub(super) fn pop(
        &mut self,
        chain: &mut Chain,
        counters: &Counters,
        of_queue: &RequestCounters,
    ) -> Fetched {
        if self.stopping.is_some() && !self.ring.has_left() {
            return Fetched::Nothing;
        }
        match self.ring.pop(chain) {
            Ok(Some(head)) => {
                self.disarm();
                Fetched::Chain(head)
            }
            Ok(None) => Fetched::Nothing,
            Err(PopError::Chain { head, fault }) => {
                self.disarm();
                tracing::debug!(head = head.index(), %fault, "malformed descriptor chain");
                Fetched::BadChain(head)
            }
            Err(error) => {
                // Reported once per start of the ring: no flood, whatever the guest does.
                tracing::warn!(%error, "ring stopped until it is set up anew");
                counters.ring_faults.add(1);
                of_queue.ring_faults.add(1);
                self.signal_error();
                Fetched::Nothing
            }
        }
    }

    /// Looks the ring up again, after memory was lost somewhere. If it was the ring's, it latches a
    /// fault that the next pop reports.
    pub(super) fn check_memory(&mut self) {
        let memory = Arc::clone(self.ring.queue().memory());
        if let Err(error) = self.ring.set_memory(memory, self.addresses)
            && !matches!(error, vring::StartError::RingLost)
        {
            tracing::warn!(queue = self.index, %error, "the memory that the ring is in has gone");
        }
    }

    /// While the ring is being fetched from, kicks tell nothing new.
    fn disarm(&mut self) {
        self.ring.notifications().disable_notification();
        self.armed = false;
    }

    /// Undoes the latest pop.
    pub(super) fn unpop(&mut self, head: Head) {
        let not_latest = self.ring.unpop(head);
        debug_assert!(
            not_latest.is_ok(),
            "only the chain just popped is un-popped"
        );
        if let Err(head) = not_latest {
            self.push(head, 0);
        }
    }

    pub(super) fn push(&mut self, head: Head, used_len: u32) {
        self.ring.push(head, used_len);
        self.unpublished = true;
    }

    /// As [`push`](Self::push), of a request that moved `len` bytes.
    #[inline]
    pub(super) fn push_moved(&mut self, head: Head, used_len: u32, len: u64) {
        self.push(head, used_len);
        self.held = Some(self.held.unwrap_or(0).saturating_add(len));
    }

    /// True if there was anything.
    pub(super) fn publish(&mut self, counters: &Counters) -> bool {
        let published = std::mem::take(&mut self.unpublished);
        let more = std::mem::take(&mut self.more);
        if published {
            self.ring.publish();
        } else if self.held.is_none() {
            return false;
        }
        // While there is more to be done at once, the guest need not be woken for little: it has the rest by the
        // time it runs.
        if more && self.held.is_some_and(|bytes| bytes < HELD_BYTES_MAX) {
            return published;
        }
        self.held = None;
        if self.ring.notifications().should_notify() {
            self.quiet = 0;
            self.interrupt(counters);
        } else {
            self.quiet = self.quiet.saturating_add(1);
        }
        published
    }

    /// Whether the guest seems to look for completions by itself: one that sleeps at times wants an interrupt before
    /// long.
    pub(super) fn guest_polls(&self) -> bool {
        self.quiet >= QUIET_PUBLICATIONS
    }

    /// Interrupts the guest, if there is a way to.
    pub(super) fn interrupt(&self, counters: &Counters) {
        if let Some(call) = &self.call {
            counters.notifications.add(1);
            if let Err(error) = call.notify() {
                // A guest that cannot be interrupted still finds its completions in the ring.
                tracing::debug!(%error, "the call descriptor cannot be signalled");
            }
        }
    }

    /// Tells the front-end that the ring is broken.
    pub(super) fn signal_error(&self) {
        if let Some(err) = &self.err
            && let Err(error) = err.notify()
        {
            tracing::debug!(%error, "the err descriptor cannot be signalled");
        }
    }

    /// Takes the kick. False if the descriptor is not fit to be waited on.
    pub(super) fn clear_kick(&self) -> bool {
        match &self.kick {
            Some(kick) => kick.test_and_clear().is_ok(),
            None => true,
        }
    }
}
