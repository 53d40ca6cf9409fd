//! Waiting for events on Linux: an epoll loop with many events per wait, an eventfd notifier that
//! never blocks, and a way to stop or wake the loop from another thread.
//!
//! # Overview
//!
//! The data plane of a virtual device sleeps until something happens: the guest kicks a queue, the
//! kernel completes I/O, the control thread has a message. Each of these is a file descriptor, most
//! of them an eventfd. [`EventNotifier`] is one such eventfd, made here or received from a process
//! that is not trusted. [`EventPoll`] waits on any number of descriptors and hands out all that are
//! ready in one go. A [`Stopper`] reaches the waiting thread from any other.
//!
//! Errors are returned. Nothing here exits, panics, or allocates after start.
//!
//! # Design
//!
//! ```text
//!  kick eventfd ──┐ add(fd, Token)
//!  completions ───┼──> EventPoll ── one epoll_wait ──> &[Event { token, readiness }]
//!  control fd ────┘        ^                                    │
//!                          │ stop(), wake()                     v
//!                       Stopper (Clone, Send, Sync)   EventNotifier::test_and_clear
//! ```
//!
//! * Level triggered. A descriptor that is not drained is reported again, so a handler may stop
//!   early without losing an event; and a descriptor that can not be drained makes the loop spin,
//!   which is why [`EventNotifier::from_fd`] refuses what is not an eventfd and
//!   [`EventNotifier::test_and_clear`] tells an empty counter from an end of file.
//! * No handler table. The loop knows tokens only; what a token means, and the borrow of it, stays
//!   with the caller.
//! * Stop is a latch, wake is an event. See [`Stopper`].
//! * The one blocking call is behind [`EventPoll::wait`], and `wait` with a zero timeout looks
//!   without sleeping: busy polling before the sleep belongs in front of it.
//!
//! # Example
//!
//! ```
//! use event_poll::{EventNotifier, EventPoll, Token};
//! use std::ops::ControlFlow;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! const KICK: Token = Token(0);
//!
//! let kick = EventNotifier::new()?;
//! let guest = kick.try_clone()?;
//! let mut poll = EventPoll::new(16)?;
//! poll.add(&kick, KICK)?;
//! let stopper = poll.stopper();
//!
//! let data_thread = std::thread::spawn(move || {
//!     let mut kicks = 0;
//!     poll.run(|event| {
//!         if event.token == KICK && matches!(kick.test_and_clear(), Ok(true)) {
//!             kicks += 1;
//!             stopper.stop();
//!         }
//!         ControlFlow::Continue(())
//!     })
//!     .map(|()| kicks)
//! });
//!
//! guest.notify()?;
//! assert_eq!(data_thread.join().unwrap()?, 1);
//! # Ok(())
//! # }
//! ```
//!
//! # Features
//!
//! None. Linux only.

mod error;
mod notifier;
mod nowait;
mod poll;
mod stopper;

// The public interface is:
pub use crate::error::Error;
pub use crate::notifier::EventNotifier;
pub use crate::poll::{Event, EventPoll, MAX_EVENTS_PER_WAIT, Stats, Token};
pub use crate::stopper::Stopper;
