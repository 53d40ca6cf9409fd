//! The loop: events, errors, stop and wake.

mod deadline;

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use deadline::within_deadline;
use event_poll::{Error, EventNotifier, EventPoll, MAX_EVENTS_PER_WAIT, Token};

fn notifiers(count: usize) -> Vec<EventNotifier> {
    (0..count).map(|_| EventNotifier::new().unwrap()).collect()
}

fn poll_of(notifiers: &[EventNotifier], max_events: usize) -> EventPoll {
    let mut poll = EventPoll::new(max_events).unwrap();
    for (token, notifier) in (0..).zip(notifiers) {
        poll.add(notifier, Token(token)).unwrap();
    }
    poll
}

/// Looks without sleeping.
fn ready_now(poll: &mut EventPoll) -> Vec<u64> {
    let mut tokens: Vec<u64> = poll
        .wait(Some(Duration::ZERO))
        .unwrap()
        .iter()
        .map(|event| event.token.0)
        .collect();
    tokens.sort_unstable();
    tokens
}

#[test]
fn one_wait_hands_out_all_that_is_ready() {
    let notifiers = notifiers(5);
    let mut poll = poll_of(&notifiers, 8);
    for index in [0, 2, 4] {
        notifiers[index].notify().unwrap();
    }
    assert_eq!(ready_now(&mut poll), [0, 2, 4]);
    assert_eq!(poll.stats().wakeups, 1);
    assert_eq!(poll.stats().events, 3);
}

#[test]
fn an_event_is_reported_until_cleared() {
    let notifiers = notifiers(1);
    let mut poll = poll_of(&notifiers, 1);
    notifiers[0].notify().unwrap();
    assert_eq!(ready_now(&mut poll), [0]);
    assert_eq!(ready_now(&mut poll), [0]);
    notifiers[0].test_and_clear().unwrap();
    assert_eq!(ready_now(&mut poll), []);
}

#[test]
fn more_ready_than_fit_one_wait_take_turns() {
    let notifiers = notifiers(6);
    let mut poll = poll_of(&notifiers, 2);
    for notifier in &notifiers {
        notifier.notify().unwrap();
    }
    let mut seen = BTreeSet::new();
    for _ in 0..3 {
        let ready = ready_now(&mut poll);
        assert_eq!(ready.len(), 2, "as many as were asked for, and no more");
        seen.extend(ready);
    }
    assert_eq!(seen.len(), 6, "none starves although none is ever cleared");
}

#[test]
fn an_event_whose_place_a_wake_took_comes_with_the_next_wait() {
    let notifiers = notifiers(2);
    let mut poll = poll_of(&notifiers, 2);
    poll.stopper().wake();
    notifiers
        .iter()
        .for_each(|notifier| notifier.notify().unwrap());
    let mut seen = BTreeSet::from_iter(ready_now(&mut poll));
    seen.extend(ready_now(&mut poll));
    assert_eq!(Vec::from_iter(seen), [0, 1]);
}

#[test]
fn n1_spurious_kick_is_one_wakeup_with_nothing_to_do() {
    let notifiers = notifiers(1);
    let mut poll = poll_of(&notifiers, 1);
    notifiers[0].notify().unwrap();
    assert_eq!(poll.wait(None).unwrap().len(), 1);
    assert!(notifiers[0].test_and_clear().unwrap());
    assert!(!notifiers[0].test_and_clear().unwrap());
    assert_eq!(ready_now(&mut poll), []);
}

#[test]
fn n2_kick_flood_is_one_event_and_one_read() {
    let notifiers = notifiers(1);
    let mut poll = poll_of(&notifiers, 4);
    nix::unistd::write(&notifiers[0], &(u64::MAX - 1).to_ne_bytes()).unwrap();
    for _ in 0..1000 {
        notifiers[0].notify().unwrap();
    }
    assert_eq!(ready_now(&mut poll), [0]);
    assert!(notifiers[0].test_and_clear().unwrap());
    assert_eq!(ready_now(&mut poll), []);
    assert_eq!(poll.stats().events, 1);
}

#[test]
fn n9_files_that_are_always_ready_can_not_be_added() {
    let mut poll = EventPoll::new(1).unwrap();
    for path in ["/proc/self/exe", "/dev/zero", "/"] {
        let file = File::open(path).unwrap();
        assert!(
            matches!(poll.add(&file, Token(0)), Err(Error::NotPollable)),
            "{path}"
        );
        assert!(
            matches!(poll.remove(&file), Err(Error::NotRegistered)),
            "{path}"
        );
    }
}

#[test]
fn n9_a_closed_pipe_shows_as_hangup_and_is_quiet_once_removed() {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let mut poll = EventPoll::new(1).unwrap();
    poll.add(&reader, Token(7)).unwrap();
    assert_eq!(ready_now(&mut poll), []);
    drop(writer);
    let event = poll.wait(None).unwrap()[0];
    assert!(event.is_hangup() && !event.is_readable() && !event.is_error());
    poll.remove(&reader).unwrap();
    assert_eq!(ready_now(&mut poll), []);
}

#[test]
fn a_removed_descriptor_is_silent_and_can_be_added_again() {
    let notifiers = notifiers(2);
    let mut poll = poll_of(&notifiers, 2);
    notifiers
        .iter()
        .for_each(|notifier| notifier.notify().unwrap());
    poll.remove(&notifiers[0]).unwrap();
    assert_eq!(ready_now(&mut poll), [1]);
    assert!(matches!(
        poll.remove(&notifiers[0]),
        Err(Error::NotRegistered)
    ));
    poll.add(&notifiers[0], Token(9)).unwrap();
    assert_eq!(ready_now(&mut poll), [1, 9]);
}

#[test]
fn f7_one_eventfd_in_two_roles_reports_both() {
    let kick = EventNotifier::new().unwrap();
    let other = EventNotifier::from_fd(kick.as_fd().try_clone_to_owned().unwrap()).unwrap();
    let mut poll = EventPoll::new(2).unwrap();
    poll.add(&kick, Token(1)).unwrap();
    poll.add(&other, Token(2)).unwrap();
    kick.notify().unwrap();
    assert_eq!(ready_now(&mut poll), [1, 2]);
}

#[test]
fn f7_a_kick_before_the_descriptor_is_added_is_not_lost() {
    let (old, new) = (EventNotifier::new().unwrap(), EventNotifier::new().unwrap());
    let mut poll = EventPoll::new(2).unwrap();
    poll.add(&old, Token(1)).unwrap();
    new.notify().unwrap();
    poll.remove(&old).unwrap();
    poll.add(&new, Token(2)).unwrap();
    assert_eq!(ready_now(&mut poll), [2]);
}

#[test]
fn misuse_is_an_error_and_changes_nothing() {
    assert!(matches!(
        EventPoll::new(0),
        Err(Error::EventsPerWait { requested: 0 })
    ));
    assert!(EventPoll::new(MAX_EVENTS_PER_WAIT).is_ok());
    assert!(matches!(
        EventPoll::new(MAX_EVENTS_PER_WAIT + 1),
        Err(Error::EventsPerWait { requested }) if requested == MAX_EVENTS_PER_WAIT + 1
    ));

    let notifiers = notifiers(1);
    let mut poll = poll_of(&notifiers, 1);
    assert!(matches!(
        poll.add(&notifiers[0], Token(5)),
        Err(Error::AlreadyRegistered)
    ));
    let other = EventNotifier::new().unwrap();
    assert!(matches!(
        poll.add(&other, Token(u64::MAX)),
        Err(Error::ReservedToken)
    ));
    poll.add(&other, Token(u64::MAX - 1)).unwrap();
    notifiers[0].notify().unwrap();
    assert_eq!(ready_now(&mut poll), [0]);
}

#[test]
fn a_timeout_is_waited_for_in_full_and_gives_no_events() {
    // Not a multiple of a millisecond: rounding down would come back early.
    let timeout = Duration::from_micros(2500);
    let mut poll = EventPoll::new(1).unwrap();
    let start = Instant::now();
    assert!(poll.wait(Some(timeout)).unwrap().is_empty());
    assert!(start.elapsed() >= timeout);
}

#[test]
fn a_short_timeout_sleeps_once_and_does_not_spin() {
    let mut poll = EventPoll::new(1).unwrap();
    assert!(poll.wait(Some(Duration::from_nanos(1))).unwrap().is_empty());
    assert_eq!(poll.stats().wakeups, 1);
}

#[test]
fn an_endless_timeout_ends_with_an_event() {
    let kick = EventNotifier::new().unwrap();
    let far_end = kick.try_clone().unwrap();
    let mut poll = EventPoll::new(1).unwrap();
    poll.add(&kick, Token(0)).unwrap();
    let ready = within_deadline(move || {
        let kicker = thread::spawn(move || far_end.notify());
        let ready = poll.wait(Some(Duration::MAX)).unwrap().len();
        kicker.join().unwrap().unwrap();
        ready
    });
    assert_eq!(ready, 1);
}

#[test]
fn a_wake_before_the_wait_is_not_lost() {
    let mut poll = EventPoll::new(1).unwrap();
    let stopper = poll.stopper();
    stopper.wake();
    stopper.wake();
    let mut poll = within_deadline(move || {
        assert!(poll.wait(None).unwrap().is_empty());
        poll
    });
    assert!(!poll.stopper().is_stopped());
    // Both wakes were one, which is used up: this wait sleeps to its end.
    assert!(
        poll.wait(Some(Duration::from_millis(1)))
            .unwrap()
            .is_empty()
    );
    assert_eq!(poll.stats().wakeups, 2);
}

#[test]
fn a_wake_from_another_thread_ends_a_wait() {
    let mut poll = EventPoll::new(1).unwrap();
    let stopper = poll.stopper();
    let waker = thread::spawn(move || stopper.wake());
    assert!(within_deadline(move || poll.wait(None).unwrap().is_empty()));
    waker.join().unwrap();
}

#[test]
fn a_wake_does_not_end_run() {
    let kick = EventNotifier::new().unwrap();
    let far_end = kick.try_clone().unwrap();
    let mut poll = EventPoll::new(1).unwrap();
    poll.add(&kick, Token(0)).unwrap();
    let stopper = poll.stopper();
    let (sender, handled) = mpsc::channel();
    let runner = thread::spawn(move || {
        poll.run(|event| {
            kick.test_and_clear().unwrap();
            sender.send(event.token).unwrap();
            ControlFlow::Continue(())
        })
    });
    for _ in 0..3 {
        stopper.wake();
        far_end.notify().unwrap();
        assert_eq!(handled.recv_timeout(Duration::from_secs(30)), Ok(Token(0)));
    }
    stopper.stop();
    within_deadline(move || runner.join().unwrap()).unwrap();
}

#[test]
fn stop_from_another_thread_ends_run() {
    let mut poll = EventPoll::new(1).unwrap();
    let stopper = poll.stopper();
    let stopping = thread::spawn(move || stopper.stop());
    within_deadline(move || poll.run(|_| ControlFlow::Continue(()))).unwrap();
    stopping.join().unwrap();
}

#[test]
fn stop_ends_run_although_events_never_cease() {
    let notifiers = notifiers(3);
    let mut poll = poll_of(&notifiers, 1);
    notifiers
        .iter()
        .for_each(|notifier| notifier.notify().unwrap());
    let stopper = poll.stopper();
    let (sender, started) = mpsc::channel();
    let runner = thread::spawn(move || {
        poll.run(|_| {
            let _ = sender.send(());
            ControlFlow::Continue(())
        })
    });
    started.recv_timeout(Duration::from_secs(30)).unwrap();
    stopper.stop();
    within_deadline(move || runner.join().unwrap()).unwrap();
}

#[test]
fn stop_before_run_holds_until_reset() {
    let notifiers = notifiers(1);
    let mut poll = poll_of(&notifiers, 1);
    notifiers[0].notify().unwrap();
    poll.stopper().stop();
    let mut poll = within_deadline(move || {
        for _ in 0..2 {
            poll.run(|_| panic!("stopped before it started")).unwrap();
        }
        poll
    });
    assert!(poll.stopper().is_stopped());

    poll.reset();
    let calls = within_deadline(move || {
        let mut calls = 0;
        poll.run(|_| {
            calls += 1;
            ControlFlow::Break(())
        })
        .unwrap();
        calls
    });
    assert_eq!(calls, 1);
}

#[test]
fn no_handler_starts_after_a_stop_in_the_same_batch() {
    let notifiers = notifiers(3);
    let mut poll = poll_of(&notifiers, 4);
    notifiers
        .iter()
        .for_each(|notifier| notifier.notify().unwrap());
    let stopper = poll.stopper();
    let mut calls = 0;
    poll.run(|_| {
        calls += 1;
        stopper.stop();
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(calls, 1);
}

#[test]
fn break_ends_run_and_leaves_the_other_events_for_the_next() {
    let notifiers = notifiers(3);
    let mut poll = poll_of(&notifiers, 4);
    notifiers
        .iter()
        .for_each(|notifier| notifier.notify().unwrap());
    let mut seen = BTreeSet::new();
    for _ in 0..3 {
        poll.run(|event| {
            let index = usize::try_from(event.token.0).unwrap();
            assert!(notifiers[index].test_and_clear().unwrap());
            seen.insert(index);
            ControlFlow::Break(())
        })
        .unwrap();
    }
    assert_eq!(seen.len(), 3);
}

#[test]
fn a_wait_after_stop_still_sleeps_for_work_in_flight() {
    let kick = EventNotifier::new().unwrap();
    let completion = kick.try_clone().unwrap();
    let mut poll = EventPoll::new(1).unwrap();
    poll.add(&kick, Token(3)).unwrap();
    poll.stopper().stop();
    assert!(
        poll.wait(None).unwrap().is_empty(),
        "the stop ends one wait"
    );
    let token = within_deadline(move || {
        let completer = thread::spawn(move || completion.notify());
        let token = poll.wait(None).unwrap()[0].token;
        completer.join().unwrap().unwrap();
        token
    });
    assert_eq!(token, Token(3));
}

#[test]
fn an_idle_loop_wakes_only_to_stop() {
    let notifiers = notifiers(4);
    let mut poll = poll_of(&notifiers, 4);
    let stopper = poll.stopper();
    let runner = thread::spawn(move || {
        poll.run(|_| ControlFlow::Continue(())).unwrap();
        poll.stats()
    });
    // Time to spin in, were it to.
    thread::sleep(Duration::from_millis(50));
    stopper.stop();
    let stats = within_deadline(move || runner.join().unwrap());
    // None if the thread had not come to wait yet.
    assert!(stats.wakeups <= 1, "{stats:?}");
    assert_eq!(stats.events, 0);
}

#[test]
fn a_stopper_outlives_its_loop() {
    let poll = EventPoll::new(1).unwrap();
    let stopper = poll.stopper();
    drop(poll);
    stopper.wake();
    stopper.stop();
    assert!(stopper.is_stopped());
}
