//! [`cycle`] under loom: every interleaving, and every value that the memory model lets a load see.
//!
//! The other side is a guest's driver: it publishes, passes a barrier, reads whether to kick, and kicks. A
//! lost kick leaves the cycle asleep with nobody to wake it, which loom reports as a deadlock. Each mistake
//! that loses one is made on purpose too, to show that the model would tell.

use std::convert::Infallible;
use std::ops::ControlFlow;
// Not loom's: its drop panics once more while a found deadlock unwinds. What is shared is of no interest.
use std::sync::Arc;

use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use loom::sync::{Condvar, Mutex};
use loom::thread;

use super::{Host, Pace, Poller, cycle};

/// Ways to get it wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mistake {
    None,
    /// Arming does not look again.
    NoRecheck,
    /// Arming looks again before it has asked for kicks.
    RecheckFirst,
    /// Arming looks again without a barrier: its load may pass its store.
    NoBarrierInArm,
    /// The guest reads whether to kick without a barrier: its load may pass its store.
    NoBarrierInGuest,
}

/// A queue of which only the number of published chains matters, and its kick eventfd.
#[derive(Debug)]
struct Shared {
    avail: AtomicUsize,
    kicks_wanted: AtomicBool,
    stopped: AtomicBool,
    /// The eventfd: level triggered, cleared by the handler.
    eventfd: Mutex<bool>,
    waiting: Condvar,
}

impl Shared {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            avail: AtomicUsize::new(0),
            kicks_wanted: AtomicBool::new(true),
            stopped: AtomicBool::new(false),
            eventfd: Mutex::new(false),
            waiting: Condvar::new(),
        })
    }

    fn notify(&self) {
        *self.eventfd.lock().unwrap() = true;
        self.waiting.notify_one();
    }

    /// The guest makes one chain available.
    fn publish(&self, mistake: Mistake) {
        // Release, pairs with the Acquire in `Queue::has_more`.
        let avail = self.avail.load(Ordering::Relaxed);
        self.avail.store(avail + 1, Ordering::Release);
        if mistake != Mistake::NoBarrierInGuest {
            // Pairs with the fence in `Queue::arm`.
            fence(Ordering::SeqCst);
        }
        if self.kicks_wanted.load(Ordering::Relaxed) {
            self.notify();
        }
    }

    /// As `Stopper::stop`.
    fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.notify();
    }
}

struct Queue {
    shared: Arc<Shared>,
    served: usize,
    /// After so many the device stops itself.
    expected: usize,
    mistake: Mistake,
}

impl Queue {
    fn has_more(&self) -> bool {
        self.shared.avail.load(Ordering::Acquire) != self.served
    }
}

impl Poller for Queue {
    fn poll(&mut self) -> bool {
        let more = self.has_more();
        self.served += usize::from(more);
        if self.served == self.expected {
            self.shared.stopped.store(true, Ordering::Release);
        }
        more
    }

    fn arm(&mut self) -> bool {
        let early = !self.has_more();
        self.shared.kicks_wanted.store(true, Ordering::Relaxed);
        if self.mistake != Mistake::NoBarrierInArm {
            // Pairs with the fence in `Shared::publish`.
            fence(Ordering::SeqCst);
        }
        match self.mistake {
            Mistake::NoRecheck => true,
            Mistake::RecheckFirst => early,
            _ => !self.has_more(),
        }
    }

    fn disarm(&mut self) {
        self.shared.kicks_wanted.store(false, Ordering::Relaxed);
    }
}

struct Epoll(Arc<Shared>);

impl Host for Epoll {
    type Error = Infallible;

    fn is_stopped(&self) -> bool {
        self.0.stopped.load(Ordering::Acquire)
    }

    fn all_polled(&self) -> bool {
        true
    }

    fn look(&mut self) -> Result<ControlFlow<()>, Infallible> {
        unreachable!("far fewer turns than until the first look")
    }

    fn sleep(&mut self) -> Result<ControlFlow<()>, Infallible> {
        let mut set = self.0.eventfd.lock().unwrap();
        while !*set {
            set = self.0.waiting.wait(set).unwrap();
        }
        *set = false;
        Ok(ControlFlow::Continue(()))
    }
}

/// Polls a fixed number of times in each idle.
struct Times {
    each: u32,
    left: u32,
}

impl Pace for Times {
    fn worked(&mut self) {
        self.left = self.each;
    }

    fn again(&mut self) -> bool {
        let again = self.left > 0;
        self.left = self.left.saturating_sub(1);
        again
    }
}

fn serve(shared: &Arc<Shared>, expected: usize, polls: u32, mistake: Mistake) {
    let mut queue = Queue {
        shared: Arc::clone(shared),
        served: 0,
        expected,
        mistake,
    };
    let mut pace = Times {
        each: polls,
        left: polls,
    };
    let Ok(()) = cycle(&mut Epoll(Arc::clone(shared)), &mut pace, &mut [&mut queue]);
}

/// A guest that publishes `chains`, and a device that has to serve them all.
fn model(chains: usize, polls: u32, mistake: Mistake) {
    let mut builder = loom::model::Builder::new();
    // More preemptions find nothing that three do not, in programs this small.
    builder.preemption_bound = Some(3);
    builder.check(move || {
        let shared = Shared::new();
        let guest = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                for _ in 0..chains {
                    shared.publish(mistake);
                }
            })
        };
        serve(&shared, chains, polls, mistake);
        guest.join().unwrap();
    });
}

#[test]
fn n7_no_kick_is_lost_without_polling() {
    model(2, 0, Mistake::None);
}

#[test]
fn n7_no_kick_is_lost_with_polling_before_the_sleep() {
    model(2, 1, Mistake::None);
}

#[test]
fn n7_no_stop_is_lost() {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(|| {
        let shared = Shared::new();
        let others: Vec<_> = [Shared::stop as fn(&Shared), |shared| {
            shared.publish(Mistake::None);
        }]
        .into_iter()
        .map(|act| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || act(&shared))
        })
        .collect();
        // More than will ever come: only the stop ends it.
        serve(&shared, usize::MAX, 0, Mistake::None);
        for other in others {
            other.join().unwrap();
        }
    });
}

#[test]
#[should_panic(expected = "deadlock")]
fn n7_the_model_tells_when_arming_does_not_look_again() {
    model(1, 0, Mistake::NoRecheck);
}

#[test]
#[should_panic(expected = "deadlock")]
fn n7_the_model_tells_when_arming_looks_before_it_asks() {
    model(1, 0, Mistake::RecheckFirst);
}

#[test]
#[should_panic(expected = "deadlock")]
fn n7_the_model_tells_when_arming_has_no_barrier() {
    model(1, 0, Mistake::NoBarrierInArm);
}

#[test]
#[should_panic(expected = "deadlock")]
fn n7_the_model_tells_when_the_guest_has_no_barrier() {
    model(1, 0, Mistake::NoBarrierInGuest);
}
