//! What control may ask of the data thread.

use std::sync::Arc;

use crossbeam_channel::Sender;
use event_poll::{EventNotifier, Token};
use virtio_bindings::virtio_blk as blk;
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vring::{RingAddresses, RingBase};

use super::buffers::MemoryRef;
use super::queue::QueueState;
use super::{AfterDrain, DataThread, Drain};
use crate::device::bit;
use crate::inflight::TrackedQueue;
use crate::notifier::{Notifier, SharedNotifier};
use crate::request::Accepted;

/// Addresses that no memory map holds: 16-aligned, and any ring there would wrap.
const NOWHERE: RingAddresses = RingAddresses {
    descriptor_area: GuestAddress(u64::MAX - 15),
    driver_area: GuestAddress(u64::MAX - 15),
    device_area: GuestAddress(u64::MAX - 15),
};

/// A queue ready to run.
pub(crate) struct QueueParts<M: GuestMemoryBackend> {
    pub(crate) ring: TrackedQueue<M>,
    pub(crate) addresses: RingAddresses,
    /// `None`: nobody kicks.
    pub(crate) kick: Option<EventNotifier>,
    pub(crate) call: Option<Box<dyn Notifier>>,
    pub(crate) err: Option<Box<dyn Notifier>>,
    pub(crate) enabled: bool,
    pub(crate) cache: CacheFeatures,
    pub(crate) accepted: Accepted,
}

/// What a driver has accepted of the features that say when a write is stable (virtio 1.3 §5.2.6.2).
#[derive(Clone, Copy, Debug)]
pub(crate) struct CacheFeatures {
    /// `VIRTIO_BLK_F_FLUSH`
    pub(crate) flush: bool,
    /// `VIRTIO_BLK_F_CONFIG_WCE`
    pub(crate) config_wce: bool,
}

impl CacheFeatures {
    /// Of negotiated feature bits.
    pub(crate) fn of(features: u64) -> Self {
        Self {
            flush: features & bit(blk::VIRTIO_BLK_F_FLUSH) != 0,
            config_wce: features & bit(blk::VIRTIO_BLK_F_CONFIG_WCE) != 0,
        }
    }

    /// Whether the driver's writes must be stable before they complete: it cannot flush, or it has turned
    /// the cache off.
    pub(crate) fn is_write_through(self, writeback: bool) -> bool {
        !self.flush || self.config_wce && !writeback
    }
}

/// Each is carried out between two batches. Replies are sent when the thing has happened.
pub(crate) enum Command<M: GuestMemoryBackend> {
    /// The caller has seen to it that the index is free and in range.
    StartQueue {
        index: u16,
        parts: Box<QueueParts<M>>,
        reply: Sender<Result<(), event_poll::Error>>,
    },
    /// Replies with where a successor goes on once nothing of the queue is in flight and everything
    /// is published; `None` if it was not running.
    StopQueue {
        index: u16,
        reply: Sender<Option<RingBase>>,
    },
    EnableQueue {
        index: u16,
        enabled: bool,
    },
    SetKick {
        index: u16,
        kick: Option<EventNotifier>,
        reply: Sender<Result<(), event_poll::Error>>,
    },
    SetCall {
        index: u16,
        call: Option<Box<dyn Notifier>>,
        reply: Sender<()>,
    },
    SetErr {
        index: u16,
        err: Option<Box<dyn Notifier>>,
        reply: Sender<()>,
    },
    /// A new memory map, and where each running ring lies in it.
    UpdateMemory {
        memory: Arc<M>,
        rings: Vec<(u16, Option<RingAddresses>)>,
        reply: Sender<()>,
    },
    /// Whether what the kernel writes to guest memory is to be marked as dirty. Replies when it is so.
    /// Signalled after each pass that has given something back to the guest.
    SetLogged {
        notifier: Option<SharedNotifier>,
    },
    SetMarksDirty {
        marks: bool,
        reply: Sender<()>,
    },
    /// Replies when every write that completes from then on heeds it.
    SetWriteback {
        writeback: bool,
        reply: Sender<()>,
    },
    /// Fetches nothing until told to resume. Replies when nothing is in flight.
    Pause {
        reply: Sender<()>,
    },
    Resume,
    /// Stops fetching, completes everything, exits.
    Exit {
        reply: Sender<()>,
    },
}

impl<M: GuestMemoryBackend> DataThread<M> {
    /// Replies are sent without looking whether somebody still waits: one who gave up is no error.
    pub(super) fn command(&mut self, command: Command<M>) {
        match command {
            Command::StartQueue {
                index,
                parts,
                reply,
            } => {
                let _ = reply.send(self.start_queue(index, *parts));
            }
            Command::StopQueue { index, reply } => match self.queue(index) {
                // A second stop takes the first one's place; the first caller sees it dropped.
                Some(queue) => {
                    queue.stopping = Some(reply);
                    self.winding_up = true;
                }
                None => {
                    let _ = reply.send(None);
                }
            },
            Command::EnableQueue { index, enabled } => {
                if let Some(queue) = self.queue(index) {
                    // The pass that follows looks at the ring without waiting for a kick: one that
                    // came while the queue was disabled is not repeated (peers.md lesson 1).
                    queue.enabled = enabled;
                }
            }
            Command::SetKick { index, kick, reply } => {
                let _ = reply.send(self.set_kick(index, kick));
            }
            Command::SetCall { index, call, reply } => {
                let counters = Arc::clone(&self.counters);
                if let Some(queue) = self.queue(index) {
                    queue.call = call;
                    // Completions may have been announced to the old one, or to nobody, when the
                    // front-end no longer listened there; a spurious interrupt is always allowed.
                    queue.interrupt(&counters);
                }
                let _ = reply.send(());
            }
            Command::SetErr { index, err, reply } => {
                if let Some(queue) = self.queue(index) {
                    queue.err = err;
                    if queue.ring.queue().fault().is_some() {
                        queue.signal_error();
                    }
                }
                let _ = reply.send(());
            }
            Command::UpdateMemory {
                memory,
                rings,
                reply,
            } => {
                self.update_memory(&memory, rings);
                let _ = reply.send(());
            }
            Command::SetLogged { notifier } => self.logged = notifier,
            Command::SetMarksDirty { marks, reply } => {
                self.executor.set_marks_dirty(marks);
                for queue in self.queues.iter_mut().flatten() {
                    queue.ring.notifications().set_marks_dirty(marks);
                }
                let _ = reply.send(());
            }
            Command::SetWriteback { writeback, reply } => {
                self.writeback = writeback;
                self.update_write_through();
                let _ = reply.send(());
            }
            Command::Pause { reply } => self.drain(reply, AfterDrain::StayPaused),
            Command::Resume => {
                self.paused = false;
            }
            Command::Exit { reply } => self.drain(reply, AfterDrain::Exit),
        }
    }

    fn queue(&mut self, index: u16) -> Option<&mut QueueState<M>> {
        self.queues.get_mut(usize::from(index))?.as_deref_mut()
    }

    fn start_queue(&mut self, index: u16, parts: QueueParts<M>) -> Result<(), event_poll::Error> {
        if let Some(kick) = &parts.kick {
            self.poll.add(kick, Token(u64::from(index)))?;
        }
        let mut queue = QueueState::new(
            index,
            parts.ring,
            parts.addresses,
            parts.cache,
            parts.accepted,
        );
        let marks = self.executor.marks_dirty();
        queue.ring.notifications().set_marks_dirty(marks);
        queue.polled = parts.kick.is_none();
        queue.kick = parts.kick;
        queue.call = parts.call;
        queue.err = parts.err;
        queue.enabled = parts.enabled;
        // Not armed: the first pass of the loop looks at the ring, kick or no kick.
        if let Some(place) = self.queues.get_mut(usize::from(index)) {
            *place = Some(Box::new(queue));
        }
        self.count_running();
        self.update_write_through();
        Ok(())
    }

    fn set_kick(
        &mut self,
        index: u16,
        kick: Option<EventNotifier>,
    ) -> Result<(), event_poll::Error> {
        let Some(place) = self.queues.get_mut(usize::from(index)) else {
            return Ok(());
        };
        let Some(mut queue) = place.take() else {
            return Ok(());
        };
        let added = kick
            .as_ref()
            .map_or(Ok(()), |kick| self.poll.add(kick, Token(u64::from(index))));
        if added.is_ok() {
            self.unwatch(&mut queue);
            queue.polled = kick.is_none();
            // What a guest that was polled puts into the ring from now on, it must be asked to announce.
            queue.armed = false;
            queue.kick = kick;
            // A kick sent to the old descriptor and not yet seen: the pass that follows looks.
        }
        self.queues[usize::from(index)] = Some(queue);
        added
    }

    fn update_memory(&mut self, memory: &Arc<M>, rings: Vec<(u16, Option<RingAddresses>)>) {
        self.memory = MemoryRef::new(Arc::clone(memory));
        for (index, addresses) in rings {
            let Some(queue) = self.queue(index) else {
                continue;
            };
            queue.addresses = addresses.unwrap_or(NOWHERE);
            // If the ring is not there, it latches a fault that the next pop reports.
            let moved = queue.ring.set_memory(Arc::clone(memory), queue.addresses);
            // Not again for a ring that an earlier map has lost: a front-end may send many.
            if let Err(error) = moved
                && !matches!(error, vring::StartError::RingLost)
            {
                tracing::warn!(queue = index, %error, "the new memory map does not hold the ring");
            }
            // Where the ring is now, kicks have not been asked for.
            queue.armed = false;
        }
        // What is in flight holds the map it was translated through.
    }

    fn drain(&mut self, reply: Sender<()>, then: AfterDrain) {
        self.drains.push(Drain { reply, then });
        self.winding_up = true;
    }
}
