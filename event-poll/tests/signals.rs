//! I9: a signal neither ends a wait nor prolongs it.

// UNSAFETY: installing a signal handler.
#![expect(unsafe_code)]

mod asleep;
mod deadline;

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use asleep::until_asleep;
use deadline::within_deadline;
use event_poll::{EventNotifier, EventPoll, Token};
use nix::sys::pthread::pthread_kill;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::Pid;

static DELIVERED: AtomicUsize = AtomicUsize::new(0);

/// The tests of this file count the same deliveries.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

extern "C" fn count(_signal: libc::c_int) {
    DELIVERED.fetch_add(1, Ordering::SeqCst);
}

fn install_handler() -> MutexGuard<'static, ()> {
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let action = SigAction::new(
        SigHandler::Handler(count),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: the handler only adds to an atomic, which is async-signal-safe.
    unsafe { sigaction(Signal::SIGUSR1, &action) }.unwrap();
    guard
}

/// Sends a signal and returns once its handler ran.
fn interrupt<T>(thread: &JoinHandle<T>) {
    let before = DELIVERED.load(Ordering::SeqCst);
    pthread_kill(thread.as_pthread_t(), Signal::SIGUSR1).unwrap();
    while DELIVERED.load(Ordering::SeqCst) == before {
        thread::yield_now();
    }
}

#[test]
fn i9_signals_do_not_end_a_wait() {
    let _guard = install_handler();
    within_deadline(|| {
        let kick = EventNotifier::new().unwrap();
        let far_end = kick.try_clone().unwrap();
        let (sender, receiver) = mpsc::channel();
        let waiter = thread::spawn(move || {
            let mut poll = EventPoll::new(1).unwrap();
            poll.add(&kick, Token(4)).unwrap();
            sender.send(nix::unistd::gettid()).unwrap();
            let ready = poll.wait(None).unwrap().to_vec();
            (ready, poll.stats())
        });
        let tid = receiver.recv().unwrap();
        for _ in 0..20 {
            until_asleep(tid);
            interrupt(&waiter);
        }
        far_end.notify().unwrap();
        let (ready, stats) = waiter.join().unwrap();
        assert_eq!(ready.len(), 1);
        assert_eq!(ready[0].token, Token(4));
        assert!(
            stats.wakeups > 1,
            "no signal came during the wait: {stats:?}"
        );
    });
}

#[test]
fn i9_signals_do_not_prolong_or_shorten_a_timeout() {
    let _guard = install_handler();
    within_deadline(|| {
        let timeout = Duration::from_millis(60);
        let done = Arc::new(AtomicUsize::new(0));
        let waiter_done = Arc::clone(&done);
        let waiter = thread::spawn(move || {
            let mut poll = EventPoll::new(1).unwrap();
            let start = Instant::now();
            let events = poll.wait(Some(timeout)).unwrap().len();
            let elapsed = start.elapsed();
            waiter_done.store(1, Ordering::SeqCst);
            // Alive until the last signal is delivered.
            while waiter_done.load(Ordering::SeqCst) != 2 {
                thread::yield_now();
            }
            (events, elapsed, poll.stats())
        });
        // A timeout that began anew after each signal would never end.
        while done.load(Ordering::SeqCst) == 0 {
            interrupt(&waiter);
        }
        done.store(2, Ordering::SeqCst);
        let (events, elapsed, stats) = waiter.join().unwrap();
        assert_eq!(events, 0);
        assert!(elapsed >= timeout);
        assert!(
            stats.wakeups > 1,
            "no signal came during the wait: {stats:?}"
        );
    });
}

/// The milliseconds of the `epoll_wait` or `epoll_pwait` that the thread sleeps in, once it does.
fn sleeping_for(tid: Pid) -> u64 {
    loop {
        until_asleep(tid);
        // Number, then arguments in hexadecimal; "running" if it has been woken meanwhile.
        let call = std::fs::read_to_string(format!("/proc/self/task/{tid}/syscall")).unwrap();
        let fields: Vec<_> = call.split(' ').collect();
        let number = fields[0].parse().ok();
        if number.is_some_and(|number| WAITS.contains(&number)) {
            return u64::from_str_radix(fields[4].trim_start_matches("0x"), 16).unwrap();
        }
        thread::yield_now();
    }
}

#[cfg(target_arch = "x86_64")]
const WAITS: [libc::c_long; 2] = [libc::SYS_epoll_wait, libc::SYS_epoll_pwait];
#[cfg(not(target_arch = "x86_64"))]
const WAITS: [libc::c_long; 1] = [libc::SYS_epoll_pwait];

#[test]
fn i9_the_wait_after_a_signal_is_for_what_is_left_only() {
    const TIMEOUT: Duration = Duration::from_secs(1000);

    let _guard = install_handler();
    within_deadline(|| {
        let mut poll = EventPoll::new(1).unwrap();
        let stopper = poll.stopper();
        let (sender, receiver) = mpsc::channel();
        let waiter = thread::spawn(move || {
            sender.send(nix::unistd::gettid()).unwrap();
            poll.wait(Some(TIMEOUT)).unwrap().len()
        });
        let tid = receiver.recv().unwrap();
        assert_eq!(sleeping_for(tid), 1_000_000);
        // Some of it passes; the kernel counts whole milliseconds.
        thread::sleep(Duration::from_millis(5));
        interrupt(&waiter);
        // Until it sleeps again, the call before is the one to be seen.
        loop {
            let left = sleeping_for(tid);
            if left != 1_000_000 {
                assert!(left < 1_000_000, "{left}");
                break;
            }
        }
        stopper.wake();
        assert_eq!(waiter.join().unwrap(), 0);
    });
}
