//! The timer, by itself and in a loop.

mod deadline;

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use deadline::within_deadline;
use event_poll::{Error, EventPoll, Timer, Token};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// Waits for the timer; what it says then.
fn expirations(timer: &Timer) -> u64 {
    let mut poll = EventPoll::new(1).unwrap();
    poll.add(timer, Token(0)).unwrap();
    assert_eq!(poll.wait(None).unwrap().len(), 1);
    timer.test_and_clear().unwrap()
}

/// Whether the timer is readable now.
fn expired(timer: &Timer) -> bool {
    let mut poll = EventPoll::new(1).unwrap();
    poll.add(timer, Token(0)).unwrap();
    !poll.wait(Some(Duration::ZERO)).unwrap().is_empty()
}

#[test]
fn a_new_timer_is_not_set_and_asking_it_does_not_sleep() {
    let (count, cloexec) = within_deadline(|| {
        let timer = Timer::new().unwrap();
        assert!(!expired(&timer));
        let flags = FdFlag::from_bits_retain(fcntl(&timer, FcntlArg::F_GETFD).unwrap());
        (timer.test_and_clear().unwrap(), flags)
    });
    assert_eq!((count, cloexec), (0, FdFlag::FD_CLOEXEC));
}

#[test]
fn once_is_once_and_not_early() {
    within_deadline(|| {
        let timer = Timer::new().unwrap();
        let start = Instant::now();
        timer.set_once(Duration::from_millis(5)).unwrap();
        assert_eq!(expirations(&timer), 1);
        assert!(start.elapsed() >= Duration::from_millis(5));
        assert_eq!(timer.test_and_clear().unwrap(), 0);
        std::thread::sleep(Duration::from_millis(10));
        assert!(!expired(&timer));
    });
}

#[test]
fn once_after_no_time_expires_at_once() {
    within_deadline(|| {
        let timer = Timer::new().unwrap();
        timer.set_once(Duration::ZERO).unwrap();
        assert_eq!(expirations(&timer), 1);
    });
}

#[test]
fn a_periodic_timer_counts_and_one_read_clears_all() {
    within_deadline(|| {
        let timer = Timer::new().unwrap();
        timer.set_periodic(Duration::from_millis(1)).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert!(timer.test_and_clear().unwrap() >= 19);
        assert!(expirations(&timer) >= 1, "it goes on");
    });
}

#[test]
fn a_cancelled_timer_is_quiet_even_if_it_had_expired() {
    within_deadline(|| {
        let timer = Timer::new().unwrap();
        timer.set_periodic(Duration::from_micros(100)).unwrap();
        std::thread::sleep(Duration::from_millis(2));
        timer.cancel().unwrap();
        assert!(!expired(&timer));
        assert_eq!(timer.test_and_clear().unwrap(), 0);
    });
}

#[test]
fn no_period_is_refused_and_leaves_the_timer_as_it_was() {
    within_deadline(|| {
        let timer = Timer::new().unwrap();
        timer.set_once(Duration::from_millis(1)).unwrap();
        assert!(matches!(
            timer.set_periodic(Duration::ZERO),
            Err(Error::ZeroPeriod)
        ));
        assert_eq!(expirations(&timer), 1);
    });
}

#[test]
fn times_beyond_any_clock_are_never_not_now() {
    let timer = Timer::new().unwrap();
    timer.set_once(Duration::MAX).unwrap();
    assert!(!expired(&timer));
    timer.set_periodic(Duration::MAX).unwrap();
    assert!(!expired(&timer));
}

#[test]
fn housekeeping_goes_on_in_a_running_loop() {
    let ticks = within_deadline(|| {
        let timer = Timer::new().unwrap();
        timer.set_periodic(Duration::from_millis(1)).unwrap();
        let mut poll = EventPoll::new(1).unwrap();
        poll.add(&timer, Token(0)).unwrap();
        let mut ticks = 0;
        poll.run(|_| {
            ticks += timer.test_and_clear().unwrap();
            if ticks < 5 {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        })
        .unwrap();
        ticks
    });
    assert!(ticks >= 5);
}
