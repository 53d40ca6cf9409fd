//! Polling before the sleep: counted, not timed.

// UNSAFETY: a seccomp filter, by which the kernel itself says whether epoll was called; and the filter's
// program is passed by address.
#![expect(unsafe_code)]

mod asleep;
mod deadline;

use std::cell::Cell;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use asleep::until_asleep;
use deadline::within_deadline;
use event_poll::{BusyPoll, Error, EventNotifier, EventPoll, PollSettings, Poller, Stopper, Token};
use nix::sys::resource::{Usage, UsageWho, getrusage};

/// From now on every call of this thread that waits on an epoll instance fails with `EPERM`.
fn forbid_epoll_wait() {
    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const REFUSE: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned();
    let is = |number: libc::c_long, skip: u8| libc::sock_filter {
        code: u16::try_from(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K).unwrap(),
        jt: skip,
        jf: 0,
        k: u32::try_from(number).unwrap(),
    };
    let answer = |k| libc::sock_filter {
        code: u16::try_from(libc::BPF_RET | libc::BPF_K).unwrap(),
        jt: 0,
        jf: 0,
        k,
    };
    let mut program = [
        // The system call's number is the first word of `seccomp_data`.
        libc::sock_filter {
            code: u16::try_from(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS).unwrap(),
            jt: 0,
            jf: 0,
            k: 0,
        },
        #[cfg(target_arch = "x86_64")]
        is(libc::SYS_epoll_wait, 3),
        #[cfg(not(target_arch = "x86_64"))]
        is(libc::SYS_epoll_pwait, 3),
        is(libc::SYS_epoll_pwait, 2),
        is(libc::SYS_epoll_pwait2, 1),
        answer(ALLOW),
        answer(REFUSE),
    ];
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).unwrap(),
        filter: program.as_mut_ptr(),
    };
    // SAFETY: no pointers; the thread gains no privileges by exec any more.
    let result = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: `program` describes an array that lives until the call returns; the kernel copies it.
    let result = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Has work for so many turns, then stops the loop.
struct Turns {
    left: u32,
    stopper: Stopper,
}

impl Poller for Turns {
    fn poll(&mut self) -> bool {
        if self.left == 0 {
            return false;
        }
        self.left -= 1;
        if self.left == 0 {
            self.stopper.stop();
        }
        true
    }

    fn arm(&mut self) -> bool {
        true
    }

    fn disarm(&mut self) {}
}

#[test]
fn a_busy_loop_makes_no_epoll_call() {
    let result = within_deadline(|| {
        let kick = EventNotifier::new().unwrap();
        let mut poll = EventPoll::new(4).unwrap();
        poll.add_polled(&kick, Token(0)).unwrap();
        // Nobody looks, kicked or not.
        kick.notify().unwrap();
        let mut turns = Turns {
            left: 100_000,
            stopper: poll.stopper(),
        };
        forbid_epoll_wait();
        let mut busy = BusyPoll::new(PollSettings::default());
        let run = poll.run_polling(&mut busy, &mut [&mut turns], |_| panic!("nobody looks"));
        (run, turns.left, poll.stats().wakeups)
    });
    assert!(matches!(result, (Ok(()), 0, 0)), "{result:?}");
}

#[test]
fn the_filter_notices_an_epoll_call() {
    let result = within_deadline(|| {
        let mut poll = EventPoll::new(4).unwrap();
        let mut idle = Turns {
            left: 0,
            stopper: poll.stopper(),
        };
        forbid_epoll_wait();
        let mut busy = BusyPoll::new(PollSettings::default());
        poll.run_polling(&mut busy, &mut [&mut idle], |_| ControlFlow::Continue(()))
    });
    assert!(
        matches!(&result, Err(Error::System { call: "epoll_wait", source })
            if source.kind() == std::io::ErrorKind::PermissionDenied),
        "{result:?}"
    );
}

/// Never has work; tells what the thread has used of the processor when it goes to sleep and when it wakes.
struct Idle {
    usage: mpsc::Sender<Usage>,
    armed: bool,
}

impl Poller for Idle {
    fn poll(&mut self) -> bool {
        false
    }

    fn arm(&mut self) -> bool {
        self.armed = true;
        self.usage
            .send(getrusage(UsageWho::RUSAGE_THREAD).unwrap())
            .unwrap();
        true
    }

    fn disarm(&mut self) {
        if std::mem::take(&mut self.armed) {
            self.usage
                .send(getrusage(UsageWho::RUSAGE_THREAD).unwrap())
                .unwrap();
        }
    }
}

#[test]
fn an_idle_loop_sleeps_once_and_uses_no_processor_time() {
    for settings in [PollSettings::default(), PollSettings::OFF] {
        let mut poll = EventPoll::new(4).unwrap();
        let stopper = poll.stopper();
        let (usage, used) = mpsc::channel();
        let (sender, tid) = mpsc::channel();
        let runner = thread::spawn(move || {
            sender.send(nix::unistd::gettid()).unwrap();
            let mut busy = BusyPoll::new(settings);
            let mut idle = Idle {
                usage,
                armed: false,
            };
            poll.run_polling(&mut busy, &mut [&mut idle], |_| ControlFlow::Continue(()))
                .unwrap();
            poll.stats()
        });
        let asleep = used.recv_timeout(Duration::from_secs(30)).unwrap();
        until_asleep(tid.recv().unwrap());
        // Time to use, were it to.
        thread::sleep(Duration::from_millis(300));
        stopper.stop();
        let awake = used.recv_timeout(Duration::from_secs(30)).unwrap();
        let stats = within_deadline(move || runner.join().unwrap());

        assert_eq!((stats.wakeups, stats.events), (1, 0));
        assert_eq!(
            awake.voluntary_context_switches() - asleep.voluntary_context_switches(),
            1
        );
        let processor = |usage: Usage| {
            let time = usage.user_time() + usage.system_time();
            time.tv_sec() * 1_000_000 + time.tv_usec()
        };
        let micros = processor(awake) - processor(asleep);
        assert!(micros <= 10_000, "{micros} us of 300,000");
    }
}

/// A queue of which only the number of requests matters, as in `EventPoll::run_polling`'s example.
#[derive(Default)]
struct Ring {
    requests: AtomicU32,
    kicks_wanted: AtomicBool,
}

impl Ring {
    fn publish(&self, kick: &EventNotifier) {
        self.requests.fetch_add(1, Ordering::Release);
        // Pairs with the fence in `Device::arm`.
        fence(Ordering::SeqCst);
        if self.kicks_wanted.load(Ordering::Relaxed) {
            kick.notify().unwrap();
        }
    }
}

struct Device {
    ring: Arc<Ring>,
    served: Arc<AtomicU32>,
    last: u32,
    stopper: Stopper,
}

impl Poller for Device {
    fn poll(&mut self) -> bool {
        let requests = self.ring.requests.load(Ordering::Acquire);
        let served = self.served.swap(requests, Ordering::AcqRel);
        if requests == self.last {
            self.stopper.stop();
        }
        served != requests
    }

    fn arm(&mut self) -> bool {
        self.ring.kicks_wanted.store(true, Ordering::Relaxed);
        // Pairs with the fence in `Ring::publish`.
        fence(Ordering::SeqCst);
        self.ring.requests.load(Ordering::Acquire) == self.served.load(Ordering::Relaxed)
    }

    fn disarm(&mut self) {
        self.ring.kicks_wanted.store(false, Ordering::Relaxed);
    }
}

#[test]
fn n7_a_guest_that_waits_for_each_request_is_served_to_the_end_with_and_without_polling() {
    const REQUESTS: u32 = 20_000;
    for settings in [
        PollSettings::OFF,
        PollSettings::default(),
        PollSettings::up_to(Duration::from_millis(1)),
    ] {
        let (stats, busy) = within_deadline(move || {
            let ring = Arc::new(Ring::default());
            let served = Arc::new(AtomicU32::new(0));
            let kick = EventNotifier::new().unwrap();
            let mut poll = EventPoll::new(4).unwrap();
            poll.add_polled(&kick, Token(0)).unwrap();
            let mut device = Device {
                ring: Arc::clone(&ring),
                served: Arc::clone(&served),
                last: REQUESTS,
                stopper: poll.stopper(),
            };
            let far_end = kick.try_clone().unwrap();
            let guest = thread::spawn(move || {
                for request in 1..=REQUESTS {
                    ring.publish(&far_end);
                    while served.load(Ordering::Acquire) < request {
                        // One processor for both would leave no other way.
                        thread::yield_now();
                    }
                }
            });
            let mut busy = BusyPoll::new(settings);
            poll.run_polling(&mut busy, &mut [&mut device], |event| {
                assert_eq!(event.token, Token(0));
                kick.test_and_clear().unwrap();
                ControlFlow::Continue(())
            })
            .unwrap();
            guest.join().unwrap();
            (poll.stats(), busy.stats())
        });
        let idles = busy.paid + busy.in_vain + busy.unpolled;
        if settings == PollSettings::OFF {
            assert_eq!(idles, 0, "{busy:?}");
        } else {
            // A sleep is a wait; none of the idles that polling caught had one. The last is cut short.
            assert!(
                stats.wakeups <= busy.in_vain + busy.unpolled + 1,
                "{busy:?} {stats:?}"
            );
        }
    }
}

#[test]
fn n6_a_ring_that_moves_at_every_arming_is_polled_and_starves_nobody() {
    /// Always something when armed, never when polled.
    struct Moving(u32);
    impl Poller for Moving {
        fn poll(&mut self) -> bool {
            false
        }
        fn arm(&mut self) -> bool {
            self.0 += 1;
            false
        }
        fn disarm(&mut self) {}
    }
    let (armed, calls) = within_deadline(|| {
        let other = EventNotifier::new().unwrap();
        let mut poll = EventPoll::new(4).unwrap();
        poll.add(&other, Token(7)).unwrap();
        other.notify().unwrap();
        let mut moving = Moving(0);
        let mut calls = 0;
        let mut busy = BusyPoll::new(PollSettings::OFF);
        poll.run_polling(&mut busy, &mut [&mut moving], |event| {
            assert_eq!(event.token, Token(7));
            calls += 1;
            ControlFlow::Break(())
        })
        .unwrap();
        (moving.0, calls)
    });
    assert_eq!((armed, calls), (64, 1), "one look in 64 turns");
}

#[test]
fn n6_a_ring_that_moves_at_every_arming_does_not_keep_a_stop_from_ending_the_loop() {
    struct Moving(Stopper, u32);
    impl Poller for Moving {
        fn poll(&mut self) -> bool {
            self.1 += 1;
            if self.1 == 1000 {
                self.0.stop();
            }
            false
        }
        fn arm(&mut self) -> bool {
            false
        }
        fn disarm(&mut self) {}
    }
    within_deadline(|| {
        let mut poll = EventPoll::new(4).unwrap();
        let mut moving = Moving(poll.stopper(), 0);
        let mut busy = BusyPoll::new(PollSettings::OFF);
        poll.run_polling(&mut busy, &mut [&mut moving], |_| ControlFlow::Continue(()))
            .unwrap();
    });
}

#[test]
fn a_descriptor_no_poller_speaks_for_is_served_while_another_keeps_the_loop_busy() {
    let calls = within_deadline(|| {
        let control = EventNotifier::new().unwrap();
        let mut poll = EventPoll::new(4).unwrap();
        poll.add(&control, Token(1)).unwrap();
        let mut turns = Turns {
            left: 1000,
            stopper: poll.stopper(),
        };
        control.notify().unwrap();
        let mut calls = 0;
        let mut busy = BusyPoll::new(PollSettings::OFF);
        poll.run_polling(&mut busy, &mut [&mut turns], |event| {
            assert_eq!(event.token, Token(1));
            control.test_and_clear().unwrap();
            calls += 1;
            ControlFlow::Continue(())
        })
        .unwrap();
        (calls, poll.stats().wakeups)
    });
    assert_eq!(calls, (1, 1000 / 64));
}

#[test]
fn a_sleep_is_a_look_and_the_turns_until_the_next_are_counted_from_it() {
    /// Sleeps after every 63 turns with work, ten times.
    struct Bursts {
        turn: u32,
        sleeps: u64,
        stopper: Stopper,
    }
    impl Poller for Bursts {
        fn poll(&mut self) -> bool {
            self.turn += 1;
            !self.turn.is_multiple_of(64)
        }
        fn arm(&mut self) -> bool {
            self.sleeps += 1;
            if self.sleeps == 10 {
                self.stopper.stop();
            }
            true
        }
        fn disarm(&mut self) {}
    }
    let counts = within_deadline(|| {
        let control = EventNotifier::new().unwrap();
        let mut poll = EventPoll::new(4).unwrap();
        poll.add(&control, Token(1)).unwrap();
        // Nobody clears it: no sleep takes long.
        control.notify().unwrap();
        let mut bursts = Bursts {
            turn: 0,
            sleeps: 0,
            stopper: poll.stopper(),
        };
        let mut busy = BusyPoll::new(PollSettings::OFF);
        poll.run_polling(&mut busy, &mut [&mut bursts], |_| ControlFlow::Continue(()))
            .unwrap();
        (bursts.sleeps, poll.stats().wakeups)
    });
    assert_eq!(counts, (10, 10));
}

#[test]
fn once_the_last_descriptor_no_poller_speaks_for_is_removed_nobody_looks_any_more() {
    let wakeups = within_deadline(|| {
        let (kick, control) = (EventNotifier::new().unwrap(), EventNotifier::new().unwrap());
        let mut poll = EventPoll::new(4).unwrap();
        poll.add_polled(&kick, Token(0)).unwrap();
        poll.add(&control, Token(1)).unwrap();
        let registry = poll.registry();
        let mut turns = Turns {
            left: 1000,
            stopper: poll.stopper(),
        };
        control.notify().unwrap();
        let mut busy = BusyPoll::new(PollSettings::OFF);
        // It leaves while the loop is busy, at the first look.
        poll.run_polling(&mut busy, &mut [&mut turns], |_| {
            registry.remove(&control).unwrap();
            ControlFlow::Continue(())
        })
        .unwrap();
        poll.stats().wakeups
    });
    assert_eq!(wakeups, 1);
}

#[test]
fn each_poller_has_its_turn_and_is_disarmed_when_the_loop_returns() {
    struct Queue<'a> {
        armed: &'a Cell<bool>,
        turns: &'a Cell<u32>,
        work: u32,
    }
    impl Poller for Queue<'_> {
        fn poll(&mut self) -> bool {
            assert!(!self.armed.get(), "polled while armed");
            self.turns.set(self.turns.get() + 1);
            self.work = self.work.saturating_sub(1);
            self.work > 0
        }
        fn arm(&mut self) -> bool {
            self.armed.set(true);
            true
        }
        fn disarm(&mut self) {
            self.armed.set(false);
        }
    }
    let wake = EventNotifier::new().unwrap();
    let mut poll = EventPoll::new(4).unwrap();
    poll.add(&wake, Token(0)).unwrap();
    wake.notify().unwrap();
    let cells: [_; 2] = std::array::from_fn(|_| (Cell::new(true), Cell::new(0)));
    let [mut first, mut second] =
        [(&cells[0], 1), (&cells[1], 5)].map(|((armed, turns), work)| Queue { armed, turns, work });
    let mut busy = BusyPoll::new(PollSettings::OFF);
    poll.run_polling(&mut busy, &mut [&mut first, &mut second], |_| {
        ControlFlow::Break(())
    })
    .unwrap();
    for (armed, turns) in &cells {
        assert_eq!((armed.get(), turns.get()), (false, 5));
    }
}

#[test]
fn stop_and_wake_from_other_threads_reach_a_polling_loop() {
    let mut poll = EventPoll::new(4).unwrap();
    let stopper = poll.stopper();
    let far = stopper.clone();
    let runner = thread::spawn(move || {
        let mut turns = Turns {
            left: u32::MAX,
            stopper,
        };
        let mut busy = BusyPoll::new(PollSettings::default());
        poll.run_polling(&mut busy, &mut [&mut turns], |_| ControlFlow::Continue(()))
    });
    far.wake();
    far.stop();
    within_deadline(move || runner.join().unwrap()).unwrap();
}
