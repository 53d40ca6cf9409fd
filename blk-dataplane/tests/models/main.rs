//! What the data threads share, in every order in which they can meet: `peers.rs` under loom.
//!
//! The same file is compiled three times: as it is, and twice with a mistake in it that the models must
//! find.

#![expect(
    clippy::duplicate_mod,
    reason = "once as it is, and once for each mistake"
)]

mod peers_checked;
mod peers_without_fence;
mod peers_without_order;

/// The models, over one of the three versions.
macro_rules! models {
    ($peers:ident) => {
        use std::mem::ManuallyDrop;
        // Not loom's: its drop panics once more while a mistake that was found unwinds.
        use std::sync::Arc;

        use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
        use loom::sync::{Condvar, Mutex};
        use loom::thread;

        use $peers::{Desks, Seat, Wake};

        /// An eventfd and the wait for it. A wake that does not come leaves its thread waiting for ever,
        /// which loom reports as a deadlock.
        #[derive(Clone)]
        struct Eventfd(Arc<(Mutex<bool>, Condvar)>);

        impl Eventfd {
            fn new() -> Self {
                Self(Arc::new((Mutex::new(false), Condvar::new())))
            }

            fn wait(&self) {
                let mut set = self.0.0.lock().unwrap();
                while !*set {
                    set = self.0.1.wait(set).unwrap();
                }
                *set = false;
            }
        }

        impl Wake for Eventfd {
            fn wake(&self) {
                *self.0.0.lock().unwrap() = true;
                self.0.1.notify_one();
            }
        }

        /// Leaves its place when its thread is done, and not when that unwinds, where loom takes no more
        /// operations.
        fn seat(
            desks: &Arc<Desks<Eventfd>>,
            me: usize,
            eventfds: &[Eventfd],
        ) -> ManuallyDrop<Seat<Eventfd>> {
            ManuallyDrop::new(Seat::new(Arc::clone(desks), me, eventfds[me].clone()))
        }

        /// Runs `flusher` against a thread that has popped one write, noted it, completes it, answers
        /// who asks, and sleeps between. `completed` is the write's effect.
        fn one_writer(ends_early: bool) {
            let mut model = loom::model::Builder::new();
            // Every order takes minutes, and finds no more.
            model.preemption_bound = Some(3);
            model.check(move || {
                let desks = Arc::new(Desks::new(2));
                let completed = Arc::new(AtomicBool::new(false));
                let finished = Arc::new(AtomicBool::new(false));
                let eventfds = [Eventfd::new(), Eventfd::new()];
                let flusher = seat(&desks, 0, &eventfds);
                let mut writer = seat(&desks, 1, &eventfds);
                // Popped before the flush: the flush must come after its completion.
                writer.note_writing(true);
                let thread = thread::spawn({
                    let (completed, finished) = (Arc::clone(&completed), Arc::clone(&finished));
                    let eventfd = eventfds[1].clone();
                    move || {
                        completed.store(true, Ordering::Relaxed);
                        if ends_early {
                            drop(ManuallyDrop::into_inner(writer));
                            return;
                        }
                        writer.note_writing(false);
                        loop {
                            if writer.take_asked() != 0 {
                                writer.answer(0);
                            }
                            if finished.load(Ordering::Acquire) {
                                return;
                            }
                            if writer.lie_down() {
                                eventfd.wait();
                                writer.get_up();
                            }
                        }
                    }
                });
                let mut waiting_for = flusher.ask();
                loop {
                    waiting_for &= !flusher.take_answered();
                    if waiting_for == 0 {
                        break;
                    }
                    if flusher.lie_down() {
                        eventfds[0].wait();
                        flusher.get_up();
                    }
                }
                assert!(
                    completed.load(Ordering::Relaxed),
                    "flushed before the write had completed"
                );
                finished.store(true, Ordering::Release);
                eventfds[1].wake();
                thread.join().unwrap();
            });
        }

        /// Two threads flush at once, each with a write in flight: neither waits for the other's flush.
        fn both_flush() {
            let mut model = loom::model::Builder::new();
            model.preemption_bound = Some(2);
            model.check(|| {
                let desks = Arc::new(Desks::new(2));
                let completed = Arc::new([AtomicBool::new(false), AtomicBool::new(false)]);
                let flushed = Arc::new(AtomicUsize::new(0));
                let eventfds = [Eventfd::new(), Eventfd::new()];
                let mut seats: Vec<_> = (0..2)
                    .map(|me| {
                        let mut seat = seat(&desks, me, &eventfds);
                        seat.note_writing(true);
                        seat
                    })
                    .collect();
                let run = |me: usize, mut seat: ManuallyDrop<Seat<Eventfd>>| {
                    let other = 1 - me;
                    let (completed, flushed) = (Arc::clone(&completed), Arc::clone(&flushed));
                    let eventfds = eventfds.clone();
                    move || {
                        let mut waiting_for = seat.ask();
                        completed[me].store(true, Ordering::Relaxed);
                        seat.note_writing(false);
                        let mut done = false;
                        loop {
                            if seat.take_asked() != 0 {
                                seat.answer(other);
                            }
                            waiting_for &= !seat.take_answered();
                            if waiting_for == 0 && !done {
                                done = true;
                                assert!(completed[other].load(Ordering::Relaxed));
                                // SeqCst: the last one to come wakes the other.
                                if flushed.fetch_add(1, Ordering::SeqCst) == 1 {
                                    eventfds[other].wake();
                                }
                            }
                            if flushed.load(Ordering::SeqCst) == 2 {
                                return;
                            }
                            if seat.lie_down() {
                                eventfds[me].wait();
                                seat.get_up();
                            }
                        }
                    }
                };
                let second = run(1, seats.pop().unwrap());
                let mut first = run(0, seats.pop().unwrap());
                let thread = thread::spawn(second);
                first();
                thread.join().unwrap();
            });
        }
    };
}
pub(crate) use models;
