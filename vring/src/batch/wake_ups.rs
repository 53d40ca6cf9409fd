//! The passes of a device against a driver, in every order that the memory model allows, as loom
//! finds them: is there one in which both sleep with work left?
//!
//! What is checked is the real [`Batch`], and a model of what is under it: the words of a split ring
//! as loom's atomics, with the orderings and fences of `SplitQueue` and `SplitDriver` copied by hand
//! (the real ones are atomics on guest memory, which loom cannot see). A sleep is a wait for a flag
//! that the other side sets, so a lost wake-up is a deadlock, which loom reports. The tests that must
//! fail take one thing away each, and show that the model would have noticed.

// Not loom's, which would be checked too, and panics again while a deadlock's panic unwinds.
use std::sync::Arc;

use loom::sync::atomic::{AtomicU16, Ordering, fence};
use loom::sync::{Condvar, Mutex};

use super::{Batch, Virtqueue};
use crate::chain::Chain;
use crate::config::QueueSize;
use crate::fault::PopError;
use crate::head::Head;
use crate::notification::need_event;

/// Chains the driver makes available, one by one. With two, one may race with each of the device's
/// two sleeps.
const CHAINS: u16 = 2;

/// What to take away.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Flaw {
    None,
    /// The barrier of `enable_notification`, between asking for kicks and the last look.
    NoFenceBeforeLastLook,
    /// The last look.
    NoLastLook,
    /// The barrier of `should_notify`.
    NoFenceBeforeDecision,
}

/// The words both sides see, and what each sleeps on.
struct Shared {
    avail_idx: AtomicU16,
    used_idx: AtomicU16,
    /// With `VIRTIO_F_EVENT_IDX`: `avail_event` and `used_event`. Without: the flags.
    device_wants: AtomicU16,
    driver_wants: AtomicU16,
    kick: Event,
    interrupt: Event,
    event_idx: bool,
}

/// An eventfd: set by one side, waited for and cleared by the other.
struct Event(Mutex<bool>, Condvar);

impl Event {
    fn new() -> Self {
        Self(Mutex::new(false), Condvar::new())
    }

    fn set(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_one();
    }

    fn wait(&self) {
        let mut set = self.0.lock().unwrap();
        while !*set {
            set = self.1.wait(set).unwrap();
        }
        *set = false;
    }
}

/// `SplitQueue`, as far as its indices go.
struct Device {
    shared: Arc<Shared>,
    flaw: Flaw,
    next_avail: u16,
    avail_idx: u16,
    used_idx: u16,
    staged: u16,
    signalled: Option<u16>,
}

impl Virtqueue for Device {
    fn pop(&mut self, _: &mut Chain) -> Result<Option<Head>, PopError> {
        if self.next_avail == self.avail_idx {
            self.avail_idx = self.shared.avail_idx.load(Ordering::Acquire);
            if self.next_avail == self.avail_idx {
                return Ok(None);
            }
        }
        self.next_avail += 1;
        Ok(Some(Head::new(self.next_avail)))
    }

    fn unpop(&mut self, head: Head) -> Result<(), Head> {
        Err(head)
    }

    fn push(&mut self, _: Head, _: u32) {
        self.staged += 1;
    }

    fn publish(&mut self) -> usize {
        let count = std::mem::take(&mut self.staged);
        if count != 0 {
            self.used_idx += count;
            self.shared.used_idx.store(self.used_idx, Ordering::Release);
        }
        usize::from(count)
    }

    fn should_notify(&mut self) -> bool {
        let new = self.used_idx;
        let old = self.signalled.replace(new);
        if old == Some(new) {
            return false;
        }
        if self.flaw != Flaw::NoFenceBeforeDecision {
            fence(Ordering::SeqCst);
        }
        let wants = self.shared.driver_wants.load(Ordering::Relaxed);
        if self.shared.event_idx {
            old.is_none_or(|old| need_event(wants, new, old))
        } else {
            wants == 0
        }
    }

    fn disable_notification(&mut self) {
        if !self.shared.event_idx {
            self.shared.device_wants.store(1, Ordering::Relaxed);
        }
    }

    fn enable_notification(&mut self) -> bool {
        let wants = if self.shared.event_idx {
            self.next_avail
        } else {
            0
        };
        self.shared.device_wants.store(wants, Ordering::Relaxed);
        if self.flaw != Flaw::NoFenceBeforeLastLook {
            fence(Ordering::SeqCst);
        }
        self.flaw == Flaw::NoLastLook
            || self.shared.avail_idx.load(Ordering::Acquire) == self.next_avail
    }
}

/// The device: passes of up to `limit` chains until all have been served.
fn serve(mut device: Device, limit: u16) {
    let shared = Arc::clone(&device.shared);
    let mut chain = Chain::for_queue(QueueSize::new(1).unwrap());
    let mut served = 0;
    loop {
        let mut batch = Batch::new(&mut device, limit);
        while let Some(head) = batch.pop(&mut chain).unwrap() {
            batch.push(head, 0);
            served += 1;
        }
        let finished = batch.finish();
        if finished.notify {
            shared.interrupt.set();
        }
        if served == CHAINS {
            return;
        }
        if finished.sleep {
            shared.kick.wait();
        }
    }
}

/// The driver: makes chains available as `SplitDriver` does, then sleeps until all are used.
fn drive(shared: &Shared) {
    // Interrupts disabled: by a flag, or an event as far away as can be.
    let never = if shared.event_idx { u16::MAX } else { 1 };
    shared.driver_wants.store(never, Ordering::Relaxed);
    for old in 0..CHAINS {
        let new = old + 1;
        shared.avail_idx.store(new, Ordering::Release);
        fence(Ordering::SeqCst);
        let wants = shared.device_wants.load(Ordering::Relaxed);
        let kick = if shared.event_idx {
            need_event(wants, new, old)
        } else {
            wants == 0
        };
        if kick {
            shared.kick.set();
        }
    }
    let mut used_idx = shared.used_idx.load(Ordering::Acquire);
    while used_idx != CHAINS {
        let wants = if shared.event_idx { used_idx } else { 0 };
        shared.driver_wants.store(wants, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let now = shared.used_idx.load(Ordering::Acquire);
        if now == used_idx {
            shared.interrupt.wait();
        }
        used_idx = shared.used_idx.load(Ordering::Acquire);
    }
}

fn check(event_idx: bool, limit: u16, flaw: Flaw) {
    let mut model = loom::model::Builder::new();
    // Two places where one thread is stopped for the other, at will, on top of every wait: what
    // crossbeam's CI allows too. Every load still has all the values it may see.
    model.preemption_bound = Some(2);
    model.check(move || {
        let shared = Arc::new(Shared {
            avail_idx: AtomicU16::new(0),
            used_idx: AtomicU16::new(0),
            device_wants: AtomicU16::new(0),
            driver_wants: AtomicU16::new(0),
            kick: Event::new(),
            interrupt: Event::new(),
            event_idx,
        });
        let device = Device {
            shared: Arc::clone(&shared),
            flaw,
            next_avail: 0,
            avail_idx: 0,
            used_idx: 0,
            staged: 0,
            // The first decision is yes without looking; it has been made.
            signalled: Some(0),
        };
        let serving = loom::thread::spawn(move || serve(device, limit));
        drive(&shared);
        serving.join().unwrap();
    });
}

#[test]
fn n7_no_order_of_events_loses_a_wake_up() {
    for event_idx in [false, true] {
        for limit in [1, CHAINS + 1] {
            check(event_idx, limit, Flaw::None);
        }
    }
}

#[test]
#[should_panic(expected = "deadlock")]
fn n7_the_model_notices_a_missing_barrier_before_the_last_look() {
    check(true, 3, Flaw::NoFenceBeforeLastLook);
}

#[test]
#[should_panic(expected = "deadlock")]
fn n7_the_model_notices_a_missing_last_look() {
    check(false, 3, Flaw::NoLastLook);
}

#[test]
#[should_panic(expected = "deadlock")]
fn n5_the_model_notices_a_missing_barrier_before_the_decision() {
    check(true, 3, Flaw::NoFenceBeforeDecision);
}
