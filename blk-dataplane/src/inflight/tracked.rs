//! A queue together with the record of what is in flight: every step that changes the one is where the
//! other changes too.

use std::sync::Arc;

use vm_memory::GuestMemoryBackend;
use vring::{
    Chain, Head, Leftover, PopError, Queue, QueueConfig, ReclaimError, RingAddresses, StartError,
};

use super::{InflightError, InflightQueue, Left, Recovered, Tracker};

/// A queue, and its record if it has one.
#[derive(Debug)]
pub(crate) struct TrackedQueue<M> {
    queue: Queue<M>,
    tracker: Option<Box<Tracker>>,
    /// What a predecessor has left, the first to be served last.
    left: Vec<Left>,
    /// What was taken from `left` last, until something else is popped: `unpop` puts it back.
    reclaimed: Option<Left>,
}

/// Why a queue was not started.
#[derive(Debug)]
pub(crate) enum TrackedError {
    Inflight(InflightError),
    Start(StartError),
}

impl<M: GuestMemoryBackend> TrackedQueue<M> {
    /// Starts a queue where its record says, with what is in there to be popped first. Without a record
    /// where `config` says.
    pub(crate) fn start(
        memory: Arc<M>,
        config: &QueueConfig,
        inflight: Option<&InflightQueue>,
    ) -> Result<Self, TrackedError> {
        let Some(inflight) = inflight else {
            return Ok(Queue::start(memory, config)
                .map_err(TrackedError::Start)?
                .into());
        };
        let Recovered {
            tracker,
            base,
            mut left,
        } = inflight
            .recover(&*memory, config)
            .map_err(TrackedError::Inflight)?;
        let config = QueueConfig {
            base: base.unwrap_or(config.base),
            ..*config
        };
        let mut queue = Queue::start(memory, &config).map_err(TrackedError::Start)?;
        if let Queue::Packed(queue) = &mut queue {
            queue.discard_staged();
        }
        if !left.is_empty() {
            tracing::info!(
                count = left.len(),
                "serving requests that were in flight again"
            );
        }
        left.reverse();
        Ok(Self {
            queue,
            tracker: Some(Box::new(tracker)),
            left,
            reclaimed: None,
        })
    }

    /// The queue, for what the record has no part in.
    #[inline]
    pub(crate) fn queue(&self) -> &Queue<M> {
        &self.queue
    }

    /// As [`queue`](Self::queue): notifications only.
    #[inline]
    pub(crate) fn notifications(&mut self) -> &mut Queue<M> {
        &mut self.queue
    }

    /// Whether a predecessor has left chains that were not popped yet.
    #[inline]
    pub(crate) fn has_left(&self) -> bool {
        !self.left.is_empty()
    }

    /// Takes the next chain: of those left over, else of the ring.
    #[inline]
    pub(crate) fn pop(&mut self, chain: &mut Chain) -> Result<Option<Head>, PopError> {
        if self.has_left()
            && let Some(popped) = self.reclaim(chain)
        {
            return popped;
        }
        let popped = self.queue.pop(chain);
        if let Some(tracker) = &mut self.tracker
            && let Ok(Some(head)) | Err(PopError::Chain { head, .. }) = &popped
        {
            self.reclaimed = None;
            tracker.popped(&self.queue, head);
        }
        popped
    }

    /// `None` if no chain is left over that can be in flight.
    #[cold]
    fn reclaim(&mut self, chain: &mut Chain) -> Option<Result<Option<Head>, PopError>> {
        while let Some(left) = self.left.pop() {
            let leftover = match &left {
                Left::Packed { descriptors, .. } => Leftover::Packed(descriptors),
                Left::Split(head) => Leftover::Split(*head),
            };
            let reclaimed = self.queue.reclaim(leftover, chain);
            let tracker = self.tracker.as_deref_mut()?;
            let head = match &reclaimed {
                Ok(head) | Err(ReclaimError::Chain { head, .. }) => head,
                Err(error) => {
                    tracing::warn!(%error, "a request recorded as in flight is dropped");
                    tracker.forget(&left);
                    continue;
                }
            };
            tracker.reclaimed(&left, head);
            self.reclaimed = Some(left);
            return match reclaimed {
                Ok(head) => Some(Ok(Some(head))),
                Err(ReclaimError::Chain { head, fault }) => {
                    Some(Err(PopError::Chain { head, fault }))
                }
                Err(_) => None,
            };
        }
        None
    }

    /// Undoes the latest pop.
    pub(crate) fn unpop(&mut self, head: Head) -> Result<(), Head> {
        if let Some(left) = self.reclaimed.take() {
            self.queue.unreclaim(head)?;
            self.left.push(left);
            return Ok(());
        }
        let index = head.index();
        self.queue.unpop(head)?;
        if let Some(tracker) = &mut self.tracker {
            tracker.unpopped(index);
        }
        Ok(())
    }

    /// Stages a chain to be given back.
    #[inline]
    pub(crate) fn push(&mut self, head: Head, len: u32) {
        if let Some(tracker) = &mut self.tracker {
            // A driver that makes a chain available again before it has got it back can have more given
            // back at once than the ring has entries: then in two batches.
            if tracker.is_full() {
                tracker.before_publish();
                tracker.published(self.queue.publish());
            }
            tracker.pushed(head.index());
        }
        self.queue.push(head, len);
    }

    /// Shows the driver what was pushed.
    #[inline]
    pub(crate) fn publish(&mut self) -> usize {
        match &mut self.tracker {
            None => self.queue.publish(),
            Some(tracker) => {
                tracker.before_publish();
                let count = self.queue.publish();
                tracker.published(count);
                count
            }
        }
    }

    /// See [`Queue::set_memory`].
    pub(crate) fn set_memory(
        &mut self,
        memory: Arc<M>,
        addresses: RingAddresses,
    ) -> Result<(), StartError> {
        self.queue.set_memory(memory, addresses)
    }
}

impl<M> From<Queue<M>> for TrackedQueue<M> {
    /// A queue without a record.
    fn from(queue: Queue<M>) -> Self {
        Self {
            queue,
            tracker: None,
            left: Vec::new(),
            reclaimed: None,
        }
    }
}
