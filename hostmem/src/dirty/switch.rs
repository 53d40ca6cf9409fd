//! A log that comes and goes under those who write to it.
//!
//! While there is none, a writer pays for one load. While there is one, it enters the place that the
//! log is in, looks whether it is still the one in force, writes, and leaves. Whoever takes a log
//! away waits until the place is empty. There are two places: a new log goes into the one while the
//! old is still in the other.
//!
//! ```text
//!   writer                        control
//!   data written                  log into the free place
//!   active? ── none: done         active = that place
//!     │                           heavy barrier      (see `with`)
//!   users += 1                    wait for users of the old place to be 0
//!   active still? ── no: again    the old log is out
//!   mark, users -= 1
//! ```

// UNSAFETY: a place is written by control and read by writers; the protocol above keeps them apart.
#![expect(unsafe_code)]

use std::fmt;
use std::io;
use std::panic::RefUnwindSafe;

use super::sync::{
    Arc, AtomicUsize, Mutex, Ordering, PoisonError, UnsafeCell, fence, heavy, light, yield_now,
};

/// In `active`: no log. Not the index of a place.
const OFF: usize = usize::MAX;

/// One for the log in force, one for that which is on its way in or out.
const PLACES: usize = 2;

/// Holds at most one log, and lets go of none while it is in use.
pub(crate) struct Switch<L> {
    /// Index of the place whose log is in force, or `OFF`.
    active: AtomicUsize,
    places: [Place<L>; PLACES],
    /// What `active` is, for control: one change at a time.
    control: Mutex<usize>,
}

struct Place<L> {
    /// Writers that have entered: those that use the log, and some that are about to find that it is
    /// not in force any more.
    users: AtomicUsize,
    /// Written only while the place is not active and nobody uses it.
    log: UnsafeCell<Option<Arc<L>>>,
}

// SAFETY: the logs are shared between threads and dropped on any of them, which is what `Arc` asks
// `Send` and `Sync` for; that the cells are not written while they are read is the protocol's part.
unsafe impl<L: Send + Sync> Send for Switch<L> {}
// SAFETY: as above.
unsafe impl<L: Send + Sync> Sync for Switch<L> {}

// A writer that panics leaves its place like any other, and control has no panic half way.
impl<L: RefUnwindSafe> RefUnwindSafe for Switch<L> {}

impl<L> Default for Switch<L> {
    fn default() -> Self {
        let place = || Place {
            users: AtomicUsize::new(0),
            log: UnsafeCell::new(None),
        };
        Self {
            active: AtomicUsize::new(OFF),
            places: [place(), place()],
            control: Mutex::new(OFF),
        }
    }
}

impl<L> fmt::Debug for Switch<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let active = self.active.load(Ordering::Relaxed);
        f.debug_struct("Switch")
            .field("on", &(active != OFF))
            .finish_non_exhaustive()
    }
}

/// Leaves the place when dropped, if `f` panics too: control would wait for ever.
struct Entered<'a>(&'a AtomicUsize);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        // Pairs with the load in `quiesce`: what was done with the log is over.
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl<L> Switch<L> {
    /// Calls `f` with the log in force, if there is one.
    ///
    /// What the caller has stored before is either seen by whoever comes back from the
    /// [`replace`](Self::replace) that switches the log on, or `f` is called: never neither.
    #[inline]
    pub(crate) fn with<R>(&self, f: impl FnOnce(&L) -> R) -> Option<R> {
        // Between the caller's stores and the load. Pairs with `heavy` in `replace`.
        light();
        let active = self.active.load(Ordering::Relaxed);
        if active == OFF {
            return None;
        }
        self.with_place(active, f)
    }

    #[cold]
    fn with_place<R>(&self, mut index: usize, f: impl FnOnce(&L) -> R) -> Option<R> {
        // Goes round once for each change that happens just now.
        loop {
            // `OFF` is the index of none.
            let place = self.places.get(index)?;
            place.users.fetch_add(1, Ordering::Relaxed);
            let entered = Entered(&place.users);
            // Between the count and the look. Pairs with the fence in `quiesce`: either control sees
            // the count, or this sees that the place is not in force any more.
            fence(Ordering::SeqCst);
            // Acquire: the log was put there before. Pairs with the store in `replace`.
            let active = self.active.load(Ordering::Acquire);
            if active == index {
                return place.log.with(|log| {
                    // SAFETY: the place was active after we entered, so control takes it for free only
                    // after it was made inactive and we have left (`quiesce`).
                    unsafe { &*log }.as_deref().map(f)
                });
            }
            drop(entered);
            index = active;
        }
    }

    /// Puts `log` in force, or none, and returns the one that was, which nobody uses any more.
    ///
    /// # Errors
    ///
    /// The kernel gives no barrier; nothing has changed. Only for a log, not for none.
    pub(crate) fn replace(&self, log: Option<Arc<L>>) -> io::Result<Option<Arc<L>>> {
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        let old = *control;
        let new = match log {
            Some(log) => {
                // Asked before anything has changed, as nothing can be done about a refusal after.
                heavy()?;
                let new = if old == 0 { 1 } else { 0 };
                self.places[new].log.with_mut(|place| {
                    // SAFETY: this place is not active, and has been quiesced since it was; control
                    // is ours, by the lock.
                    unsafe { *place = Some(log) };
                });
                new
            }
            None => OFF,
        };
        // Release: the log is there. Pairs with the second load of `active` in `with_place`.
        self.active.store(new, Ordering::Release);
        *control = new;
        if new != OFF {
            // Between the store and what our caller loads. Pairs with `light` in `with`.
            let barrier = heavy();
            debug_assert!(barrier.is_ok(), "given a moment ago: {barrier:?}");
        }
        Ok(self.places.get(old).and_then(|place| {
            Self::quiesce(place);
            place.log.with_mut(|log| {
                // SAFETY: the place is not active, and nobody uses it; control is ours, by the lock.
                unsafe { (*log).take() }
            })
        }))
    }

    /// The log in force.
    pub(crate) fn current(&self) -> Option<Arc<L>> {
        let control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        self.places.get(*control)?.log.with(|log| {
            // SAFETY: it is written under the lock only, which is ours.
            unsafe { &*log }.clone()
        })
    }

    /// Waits until nobody uses a place that is not active any more.
    ///
    /// Not for long: whoever enters from now on leaves without having used the log, and comes back
    /// to this place only if it is active again; who is in it sets a few bits.
    fn quiesce(place: &Place<L>) {
        // Between the store of `active` and the look at the count. Pairs with the fence in
        // `with_place`.
        fence(Ordering::SeqCst);
        // Pairs with the release in `Entered`.
        while place.users.load(Ordering::Acquire) != 0 {
            yield_now();
        }
    }
}
