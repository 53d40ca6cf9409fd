//! Sources and pollers that misbehave: too many, never quiet, closed too early, gone in their own handler.

mod deadline;

use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use deadline::within_deadline;
use event_poll::{
    BusyPoll, Error, EventNotifier, EventPoll, PollSettings, Poller, Stopper, Timer, Token,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Has work at every turn and never stops of itself.
struct Greedy;

impl Poller for Greedy {
    fn poll(&mut self) -> bool {
        true
    }
    fn arm(&mut self) -> bool {
        unreachable!("the loop never comes to sleep")
    }
    fn disarm(&mut self) {}
}

#[test]
fn a_poller_that_always_has_work_starves_neither_a_timer_nor_another_poller() {
    struct Counting(u64);
    impl Poller for Counting {
        fn poll(&mut self) -> bool {
            self.0 += 1;
            false
        }
        fn arm(&mut self) -> bool {
            unreachable!("the loop never comes to sleep")
        }
        fn disarm(&mut self) {}
    }
    let (expirations, turns, looks) = within_deadline(|| {
        let timer = Timer::new().unwrap();
        timer.set_periodic(Duration::from_micros(100)).unwrap();
        let mut poll = EventPoll::new(4).unwrap();
        poll.add(&timer, Token(1)).unwrap();
        let mut counting = Counting(0);
        let mut expirations = 0;
        let mut busy = BusyPoll::new(PollSettings::default());
        poll.run_polling(&mut busy, &mut [&mut Greedy, &mut counting], |_| {
            assert!(timer.test_and_clear().unwrap() > 0);
            expirations += 1;
            match expirations {
                5 => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        })
        .unwrap();
        (expirations, counting.0, poll.stats().wakeups)
    });
    assert_eq!(expirations, 5);
    // One look in so many turns, and the other poller is asked at each of them.
    assert_eq!(turns, looks * 64);
}

#[test]
fn an_always_ready_source_starves_neither_the_others_nor_a_stop() {
    let order = within_deadline(|| {
        let timer = Timer::new().unwrap();
        // Has expired anew whenever it is looked at.
        timer.set_periodic(Duration::from_nanos(1)).unwrap();
        let stubborn = EventNotifier::new().unwrap();
        stubborn.notify().unwrap();
        let kick = EventNotifier::new().unwrap();
        let mut poll = EventPoll::new(1).unwrap();
        poll.add(&timer, Token(0)).unwrap();
        poll.add(&stubborn, Token(1)).unwrap();
        poll.add(&kick, Token(2)).unwrap();
        kick.notify().unwrap();
        let stopper = poll.stopper();
        let mut order = Vec::new();
        poll.run(|event| {
            order.push(event.token.0);
            match event.token.0 {
                0 => assert!(timer.test_and_clear().unwrap() > 0),
                // Nobody clears this one.
                1 => {}
                _ => {
                    kick.test_and_clear().unwrap();
                    stopper.stop();
                }
            }
            ControlFlow::Continue(())
        })
        .unwrap();
        order
    });
    // One event per wait, by turns.
    assert!(order.len() <= 3, "{order:?}");
    assert_eq!(order.last(), Some(&2));
}

#[test]
fn a_source_that_removes_itself_in_its_handler_is_not_heard_of_again_and_can_come_back() {
    let seen = within_deadline(|| {
        let (once, other) = (EventNotifier::new().unwrap(), EventNotifier::new().unwrap());
        let mut poll = EventPoll::new(4).unwrap();
        poll.add(&once, Token(1)).unwrap();
        poll.add(&other, Token(2)).unwrap();
        let registry = poll.registry();
        once.notify().unwrap();
        other.notify().unwrap();
        let mut seen = Vec::new();
        let mut others = 0;
        poll.run(|event| {
            seen.push(event.token.0);
            if event.token == Token(1) {
                // Its cause stands; only the removal keeps it quiet.
                registry.remove(&once).unwrap();
                assert!(matches!(registry.remove(&once), Err(Error::NotRegistered)));
                return ControlFlow::Continue(());
            }
            others += 1;
            match others {
                // Four waits with `once` out, then it comes back under another token.
                4 => registry.add(&once, Token(3)).unwrap(),
                6 => return ControlFlow::Break(()),
                _ => {}
            }
            if event.token == Token(3) {
                registry.remove(&once).unwrap();
            }
            ControlFlow::Continue(())
        })
        .unwrap();
        seen
    });
    assert_eq!(seen.iter().filter(|&&token| token == 1).count(), 1);
    assert_eq!(seen.iter().filter(|&&token| token == 3).count(), 1);
    assert_eq!(seen.len(), 7);
}

#[test]
fn a_handler_may_remove_and_close_its_own_source() {
    let (calls, quiet) = within_deadline(|| {
        let kick = EventNotifier::new().unwrap();
        // The other end keeps the file description, and so the event, alive.
        let far = kick.try_clone().unwrap();
        let mut poll = EventPoll::new(4).unwrap();
        poll.add(&kick, Token(1)).unwrap();
        far.notify().unwrap();
        let registry = poll.registry();
        let mut kick = Some(kick);
        let mut calls = 0;
        poll.run(|_| {
            calls += 1;
            let kick = kick.take().unwrap();
            registry.remove(&kick).unwrap();
            drop(kick);
            ControlFlow::Break(())
        })
        .unwrap();
        far.notify().unwrap();
        let quiet = poll.wait(Some(Duration::ZERO)).unwrap().is_empty();
        (calls, quiet)
    });
    assert_eq!((calls, quiet), (1, true));
}

#[test]
fn a_source_closed_while_registered_falls_silent_and_the_loop_goes_on() {
    let (kick, gone) = (EventNotifier::new().unwrap(), EventNotifier::new().unwrap());
    let mut poll = EventPoll::new(4).unwrap();
    poll.add(&kick, Token(1)).unwrap();
    poll.add(&gone, Token(2)).unwrap();
    gone.notify().unwrap();
    // The only handle: the kernel drops its watch with it.
    drop(gone);
    kick.notify().unwrap();
    let ready: Vec<_> = poll.wait(None).unwrap().iter().map(|e| e.token.0).collect();
    assert_eq!(ready, [1]);
    poll.remove(&kick).unwrap();
}

#[test]
fn f7_a_source_closed_first_is_still_reported_under_its_token_and_holds_up_nothing() {
    // What the documentation warns of, so that nobody is surprised: the other end keeps it alive.
    let order = within_deadline(|| {
        let (far, near) = (EventNotifier::new().unwrap(), EventNotifier::new().unwrap());
        let kick = EventNotifier::from_fd(far.as_fd().try_clone_to_owned().unwrap()).unwrap();
        let mut poll = EventPoll::new(1).unwrap();
        poll.add(&kick, Token(7)).unwrap();
        poll.add(&near, Token(8)).unwrap();
        drop(kick);
        far.notify().unwrap();
        near.notify().unwrap();
        // The handle that is left is the same file and another descriptor.
        assert!(matches!(poll.remove(&far), Err(Error::NotRegistered)));
        let mut order = Vec::new();
        for _ in 0..4 {
            order.push(poll.wait(None).unwrap()[0].token.0);
        }
        order
    });
    assert_eq!(order.iter().filter(|&&token| token == 7).count(), 2);
    assert_eq!(order.iter().filter(|&&token| token == 8).count(), 2);
}

#[test]
fn a_wake_storm_before_the_wait_is_one_wake_and_takes_no_event_away() {
    let mut poll = EventPoll::new(1).unwrap();
    let kick = EventNotifier::new().unwrap();
    poll.add(&kick, Token(1)).unwrap();
    let stopper = poll.stopper();
    for _ in 0..10_000 {
        stopper.wake();
    }
    kick.notify().unwrap();
    // One place for both.
    assert!(poll.wait(None).unwrap().is_empty());
    assert_eq!(poll.wait(None).unwrap()[0].token, Token(1));
    kick.test_and_clear().unwrap();
    assert!(poll.wait(Some(Duration::ZERO)).unwrap().is_empty());
    assert_eq!(poll.stats().wakeups, 3);
}

#[test]
fn wake_storms_from_many_threads_lose_no_kick_and_no_stop() {
    const STORMS: usize = 4;
    const KICKS: usize = 2000;

    let served = within_deadline(|| {
        let mut poll = EventPoll::new(4).unwrap();
        let kick = EventNotifier::new().unwrap();
        poll.add(&kick, Token(1)).unwrap();
        let far = kick.try_clone().unwrap();
        let (stopper, over) = (poll.stopper(), Arc::new(AtomicBool::new(false)));
        let start = Arc::new(Barrier::new(STORMS + 1));
        let storms: Vec<_> = (0..STORMS)
            .map(|_| {
                let (stopper, over, start) = (stopper.clone(), over.clone(), start.clone());
                thread::spawn(move || storm(&stopper, &over, &start))
            })
            .collect();
        start.wait();
        let mut served = 0;
        // Each kick is sent when the one before was served: a lost one hangs the test.
        far.notify().unwrap();
        poll.run(|_| {
            assert!(kick.test_and_clear().unwrap());
            served += 1;
            if served == KICKS {
                stopper.stop();
            } else {
                far.notify().unwrap();
            }
            ControlFlow::Continue(())
        })
        .unwrap();
        over.store(true, Ordering::Relaxed);
        storms.into_iter().for_each(|storm| storm.join().unwrap());
        served
    });
    assert_eq!(served, KICKS);
}

fn storm(stopper: &Stopper, over: &AtomicBool, start: &Barrier) {
    start.wait();
    while !over.load(Ordering::Relaxed) {
        stopper.wake();
    }
}

#[test]
fn a_thousand_sources_are_each_heard_once_in_few_waits_and_leave_in_their_handlers() {
    const SOURCES: u64 = 1000;
    const PER_WAIT: u64 = 50;

    // 1024 descriptors is what a process may have as a rule.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most.min(4096), most).unwrap();
    within_deadline(|| {
        let mut poll = EventPoll::new(usize::try_from(PER_WAIT).unwrap()).unwrap();
        let sources: Vec<_> = (0..SOURCES)
            .map(|token| {
                let source = EventNotifier::new().unwrap();
                poll.add(&source, Token(token)).unwrap();
                source.notify().unwrap();
                source
            })
            .collect();
        let source = |token: Token| &sources[usize::try_from(token.0).unwrap()];

        // Nobody clears anything: they take turns all the same, so each is heard in one round.
        let mut heard = vec![0; sources.len()];
        for _ in 0..SOURCES.div_ceil(PER_WAIT) {
            for event in poll.wait(None).unwrap() {
                heard[usize::try_from(event.token.0).unwrap()] += 1;
            }
        }
        assert!(
            heard.iter().all(|&times| (1..=2).contains(&times)),
            "{heard:?}"
        );

        // Each removes itself, and nothing else is left but the stop.
        let (registry, stopper) = (poll.registry(), poll.stopper());
        let mut left = SOURCES;
        poll.run(|event| {
            registry.remove(source(event.token)).unwrap();
            left -= 1;
            if left == 0 {
                stopper.stop();
            }
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(left, 0);
        // All are still readable; nobody waits for them.
        poll.reset();
        assert!(poll.wait(Some(Duration::ZERO)).unwrap().is_empty());
    });
}
