//! Adding, changing and removing while the loop runs.

mod asleep;
mod deadline;

use std::io::Write;
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use asleep::until_asleep;
use deadline::within_deadline;
use event_poll::{Error, EventNotifier, EventPoll, Interest, Token};

#[test]
fn what_a_handler_removes_is_not_heard_of_again_even_in_the_same_batch() {
    let tokens = within_deadline(|| {
        let notifiers: Vec<_> = (0..5).map(|_| EventNotifier::new().unwrap()).collect();
        let mut poll = EventPoll::new(8).unwrap();
        for (token, notifier) in (0..).zip(&notifiers) {
            poll.add(notifier, Token(token)).unwrap();
            notifier.notify().unwrap();
        }
        let registry = poll.registry();
        let stopper = poll.stopper();
        let mut tokens = Vec::new();
        poll.run(|event| {
            tokens.push(event.token.0);
            let index = usize::try_from(event.token.0).unwrap();
            notifiers[index].test_and_clear().unwrap();
            if tokens.len() == 1 {
                // All others but one, whose events are in this batch as well.
                for (other, notifier) in notifiers.iter().enumerate().take(4) {
                    if other != index {
                        registry.remove(notifier).unwrap();
                    }
                }
            } else {
                stopper.stop();
            }
            ControlFlow::Continue(())
        })
        .unwrap();
        tokens
    });
    // The kernel hands them out in the order they became ready.
    assert_eq!(tokens, [0, 4]);
}

#[test]
fn an_event_of_a_shared_token_survives_the_removal_of_the_other_descriptor() {
    let handled = within_deadline(|| {
        let (first, second) = (EventNotifier::new().unwrap(), EventNotifier::new().unwrap());
        let mut poll = EventPoll::new(8).unwrap();
        for notifier in [&first, &second] {
            poll.add(notifier, Token(3)).unwrap();
            notifier.notify().unwrap();
        }
        let registry = poll.registry();
        let mut handled = 0;
        poll.run(|_| {
            handled += 1;
            if handled == 1 {
                registry.remove(&first).unwrap();
                return ControlFlow::Continue(());
            }
            assert!(second.test_and_clear().unwrap());
            ControlFlow::Break(())
        })
        .unwrap();
        handled
    });
    assert_eq!(handled, 2);
}

#[test]
fn another_thread_adds_to_a_loop_that_sleeps() {
    let token = within_deadline(|| {
        let mut poll = EventPoll::new(1).unwrap();
        let registry = poll.registry();
        let (sender, tid) = mpsc::channel();
        let waiter = thread::spawn(move || {
            sender.send(nix::unistd::gettid()).unwrap();
            poll.wait(None).unwrap()[0].token
        });
        until_asleep(tid.recv().unwrap());
        let kick = EventNotifier::new().unwrap();
        kick.notify().unwrap();
        registry.add(&kick, Token(5)).unwrap();
        waiter.join().unwrap()
    });
    assert_eq!(token, Token(5));
}

#[test]
fn interest_is_what_is_reported_and_can_be_changed() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut poll = EventPoll::new(1).unwrap();
    let registry = poll.registry();
    let now = |poll: &mut EventPoll| {
        let ready = poll.wait(Some(Duration::ZERO)).unwrap();
        ready
            .first()
            .map(|event| (event.token.0, event.is_readable(), event.is_writable()))
    };
    poll.add_for(&ours, Token(1), Interest::WRITABLE).unwrap();
    assert_eq!(now(&mut poll), Some((1, false, true)));
    registry
        .change(&ours, Token(2), Interest::READABLE)
        .unwrap();
    assert_eq!(now(&mut poll), None);
    theirs.write_all(b"x").unwrap();
    assert_eq!(now(&mut poll), Some((2, true, false)));
    let both = Interest::READABLE | Interest::WRITABLE;
    registry.change(&ours, Token(2), both).unwrap();
    assert_eq!(now(&mut poll), Some((2, true, true)));
    registry.change(&ours, Token(2), Interest::NONE).unwrap();
    assert_eq!(now(&mut poll), None);
    drop(theirs);
    assert!(poll.wait(None).unwrap()[0].is_hangup(), "always reported");
}

#[test]
fn a_changed_token_is_known_when_another_is_removed_in_the_same_batch() {
    let tokens = within_deadline(|| {
        let (first, second) = (EventNotifier::new().unwrap(), EventNotifier::new().unwrap());
        let mut poll = EventPoll::new(4).unwrap();
        let registry = poll.registry();
        registry.add(&first, Token(1)).unwrap();
        registry.add(&second, Token(2)).unwrap();
        registry
            .change(&second, Token(9), Interest::READABLE)
            .unwrap();
        first.notify().unwrap();
        second.notify().unwrap();
        let mut tokens = Vec::new();
        poll.run(|event| {
            tokens.push(event.token.0);
            if event.token == Token(1) {
                registry.remove(&first).unwrap();
                return ControlFlow::Continue(());
            }
            ControlFlow::Break(())
        })
        .unwrap();
        (tokens, poll.stats().wakeups)
    });
    assert_eq!(tokens, (vec![1, 9], 1));
}

#[test]
fn misuse_is_an_error_and_changes_nothing() {
    let (known, unknown) = (EventNotifier::new().unwrap(), EventNotifier::new().unwrap());
    let mut poll = EventPoll::new(1).unwrap();
    let registry = poll.registry();
    registry.add(&known, Token(1)).unwrap();
    known.notify().unwrap();
    assert!(matches!(
        registry.change(&unknown, Token(1), Interest::READABLE),
        Err(Error::NotRegistered)
    ));
    assert!(matches!(
        registry.change(&known, Token(u64::MAX), Interest::NONE),
        Err(Error::ReservedToken)
    ));
    assert!(matches!(
        registry.add_polled(&known, Token(2)),
        Err(Error::AlreadyRegistered)
    ));
    assert!(matches!(
        registry.remove(&unknown),
        Err(Error::NotRegistered)
    ));
    assert_eq!(poll.wait(None).unwrap()[0].token, Token(1));
}

#[test]
fn a_registry_outlives_its_loop() {
    let registry = EventPoll::new(1).unwrap().registry();
    let kick = EventNotifier::new().unwrap();
    registry.add(&kick, Token(0)).unwrap();
    registry.remove(&kick).unwrap();
}
