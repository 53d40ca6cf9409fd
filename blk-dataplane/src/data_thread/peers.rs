//! What the data threads of a device share, and all of it: how a flush on one learns that the writes
//! popped on the others have completed.
//!
//! Each thread has a desk. Once per batch, and only if that has changed, it notes there whether it has
//! writes in flight. A thread with a flush asks those that have; each puts a mark behind the writes it
//! has popped, answers when the last before the mark has completed, and goes on meanwhile. While nobody
//! flushes, a thread reads its own desk once per pass, which stays in its cache.
//!
//! ```text
//!   flushing thread                       a thread with writes in flight
//!   asked |= me ──── wake if asleep ────> mark behind the writes popped
//!   fdatasync <───── wake if asleep ───── answered |= it, when they have completed
//! ```
//!
//! A write counts as popped when its batch has been noted. Until then the guest cannot know that it was,
//! and its completion comes later still.

use super::sync::{Arc, AtomicBool, AtomicU64, Ordering, fence};

/// Data threads of one device: each is a bit in a peer's mask. Disks that keep more than 64 processors
/// busy with submitting do not exist.
pub(crate) const MAX_THREADS: usize = 64;
const _: () = assert!(MAX_THREADS <= u64::BITS as usize);

/// Ends a thread's sleep.
pub(crate) trait Wake {
    fn wake(&self);
}

/// A thread's number among its peers.
pub(crate) type Peer = usize;

/// Two cache lines: the processor fetches them in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Desk {
    /// Writes are in flight.
    writing: AtomicBool,
    /// Who waits for the writes popped so far.
    asked: AtomicU64,
    /// Whose writes have completed since they were asked.
    answered: AtomicU64,
    /// Nobody looks here before a wake.
    asleep: AtomicBool,
    /// Nobody will ever look here again.
    gone: AtomicBool,
}

/// The desks of a device's threads.
#[derive(Debug)]
pub(crate) struct Desks<W> {
    desks: Box<[Desk]>,
    wakers: Box<[std::sync::OnceLock<W>]>,
}

impl<W: Wake> Desks<W> {
    /// Of `count` threads, at most [`MAX_THREADS`].
    pub(crate) fn new(count: usize) -> Self {
        debug_assert!((1..=MAX_THREADS).contains(&count));
        Self {
            desks: (0..count).map(|_| Desk::default()).collect(),
            wakers: (0..count).map(|_| std::sync::OnceLock::new()).collect(),
        }
    }

    fn wake_if_asleep(&self, peer: Peer) {
        // Pairs with the fence in `lie_down`: either it sees what was put on its desk, or this sees that
        // it sleeps.
        fence(Ordering::SeqCst);
        if self.desks[peer].asleep.load(Ordering::Relaxed)
            && let Some(waker) = self.wakers[peer].get()
        {
            waker.wake();
        }
    }
}

/// A thread's place at its desk.
#[derive(Debug)]
pub(crate) struct Seat<W: Wake> {
    desks: Arc<Desks<W>>,
    me: Peer,
    /// What this thread has last noted.
    writing: bool,
}

impl<W: Wake> Seat<W> {
    /// The place of thread `me`, which `waker` wakes; one at a time.
    pub(crate) fn new(desks: Arc<Desks<W>>, me: Peer, waker: W) -> Self {
        // A thread that ended and was started anew would keep its first waker. No device does that.
        let _ = desks.wakers[me].set(waker);
        Self {
            desks,
            me,
            writing: false,
        }
    }

    fn desk(&self) -> &Desk {
        &self.desks.desks[self.me]
    }

    /// Notes whether writes are in flight: after a batch was popped, and after writes have completed.
    #[inline]
    pub(crate) fn note_writing(&mut self, writing: bool) {
        if writing != self.writing {
            self.writing = writing;
            // Release, pairs with the Acquire in `ask`: whoever sees that nothing is in flight comes
            // after the completions.
            self.desk().writing.store(writing, Ordering::Release);
        }
    }

    /// Asks every peer that has writes in flight, and returns which: each answers once. Not to be called
    /// again before they have.
    pub(crate) fn ask(&self) -> u64 {
        let mut waiting_for = 0;
        for (peer, desk) in self.desks.desks.iter().enumerate() {
            if peer == self.me || !desk.writing.load(Ordering::Acquire) {
                continue;
            }
            // Release, pairs with the Acquire in `take_asked`.
            desk.asked.fetch_or(1 << self.me, Ordering::Release);
            self.desks.wake_if_asleep(peer);
            // After that fence, which pairs with the one in `drop`: either it has found what was asked,
            // or this finds it gone. Acquire, as for an answer.
            if !desk.gone.load(Ordering::Acquire) {
                waiting_for |= 1 << peer;
            }
        }
        waiting_for
    }

    /// Which peers have asked since the last call. Each is to be answered when all writes popped so far
    /// have completed.
    #[inline]
    pub(crate) fn take_asked(&self) -> u64 {
        take(&self.desk().asked)
    }

    /// Answers a peer that has asked.
    pub(crate) fn answer(&self, peer: Peer) {
        // Release, pairs with the Acquire in `take_answered`: the completions come before the flush.
        self.desks.desks[peer]
            .answered
            .fetch_or(1 << self.me, Ordering::Release);
        self.desks.wake_if_asleep(peer);
    }

    /// Which peers have answered since the last call.
    #[inline]
    pub(crate) fn take_answered(&self) -> u64 {
        take(&self.desk().answered)
    }

    /// To be called before a sleep. False: something has come, and there may be no wake for it.
    pub(crate) fn lie_down(&self) -> bool {
        let desk = self.desk();
        desk.asleep.store(true, Ordering::Relaxed);
        // Pairs with the fence in `wake_if_asleep`.
        fence(Ordering::SeqCst);
        let nothing =
            desk.asked.load(Ordering::Relaxed) == 0 && desk.answered.load(Ordering::Relaxed) == 0;
        if !nothing {
            self.get_up();
        }
        nothing
    }

    /// To be called after a sleep.
    pub(crate) fn get_up(&self) {
        self.desk().asleep.store(false, Ordering::Relaxed);
    }
}

impl<W: Wake> Drop for Seat<W> {
    /// Nobody waits for a thread that has gone. It has nothing in flight then, unless it panicked.
    fn drop(&mut self) {
        self.note_writing(false);
        // Release, pairs with the Acquire in `ask`.
        self.desk().gone.store(true, Ordering::Release);
        // Pairs with the fence in `ask`.
        fence(Ordering::SeqCst);
        let mut asked = self.take_asked();
        while asked != 0 {
            self.answer(lowest(asked));
            asked &= asked - 1;
        }
    }
}

/// The first peer in a mask that is not empty.
pub(crate) fn lowest(mask: u64) -> Peer {
    // At most 64.
    usize::try_from(mask.trailing_zeros()).unwrap_or(usize::MAX)
}

#[inline]
fn take(mask: &AtomicU64) -> u64 {
    if mask.load(Ordering::Relaxed) == 0 {
        return 0;
    }
    // Acquire, pairs with the Release of those that set bits.
    mask.swap(0, Ordering::Acquire)
}
