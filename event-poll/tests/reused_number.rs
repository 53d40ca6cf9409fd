//! A descriptor closed without being removed, whose number comes again. Alone in its file: a test beside
//! it could open a file in between.

use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use event_poll::{EventNotifier, EventPoll, Token};

#[test]
fn f7_a_number_that_was_closed_without_being_removed_can_be_used_again() {
    let mut poll = EventPoll::new(4).unwrap();
    let first = EventNotifier::new().unwrap();
    let number = first.as_fd().as_raw_fd();
    poll.add(&first, Token(1)).unwrap();
    drop(first);
    let second = EventNotifier::new().unwrap();
    assert_eq!(second.as_fd().as_raw_fd(), number, "the lowest free one");
    poll.add(&second, Token(2)).unwrap();
    let third = EventNotifier::new().unwrap();
    poll.add(&third, Token(3)).unwrap();
    // The new one is the one known, also when an event comes with a removal.
    third.notify().unwrap();
    second.notify().unwrap();
    let registry = poll.registry();
    let mut tokens = Vec::new();
    poll.run(|event| {
        tokens.push(event.token.0);
        if event.token == Token(3) {
            registry.remove(&third).unwrap();
            return ControlFlow::Continue(());
        }
        ControlFlow::Break(())
    })
    .unwrap();
    assert_eq!((tokens, poll.stats().wakeups), (vec![3, 2], 1));
    poll.remove(&second).unwrap();
    assert!(poll.wait(Some(Duration::ZERO)).unwrap().is_empty());
}
