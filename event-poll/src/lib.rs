//! Waiting for events on Linux: an epoll loop with many events per wait, which polls before it sleeps for
//! as long as that pays; an eventfd notifier that never blocks; a timer; and a way to stop or wake the loop
//! from another thread.
//!
//! # Overview
//!
//! The data plane of a virtual device sleeps until something happens: the guest kicks a queue, the
//! kernel completes I/O, the control thread has a message. Each of these is a file descriptor, most
//! of them an eventfd. [`EventNotifier`] is one such eventfd, made here or received from a process
//! that is not trusted. [`EventPoll`] waits on any number of descriptors and hands out all that are
//! ready in one go. A [`Stopper`] reaches the waiting thread from any other, a [`Registry`] changes what
//! it waits for, a [`Timer`] wakes it for housekeeping.
//!
//! A sleep and the wake after it cost as much as dozens of requests. So a queue in shared memory is a
//! [`Poller`]: [`EventPoll::run_polling`] asks it for work, asks again for a while when there is none,
//! and then only has itself notified and sleeps. How long is up to a [`PollWindow`], which learns what
//! pays; [`BusyPoll`] is the same for a loop of your own.
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
//!                       Registry (Clone, Send, Sync)
//!
//!  run_polling:  disarm ─> poll ⟲ while there is work, and a window longer ─> arm, look again ─> wait
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
//!   without sleeping.
//! * The order of polling and sleeping is one function without system calls, and model-checked with
//!   `loom`: a kick that races with going to sleep is not lost.
//! * How long to poll is a pure function of the idles before, compared with a naive model and run on
//!   simulated loads: a depth-1 stream is caught, a paced one hardly ever polled for.
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

mod busy;
mod cycle;
mod error;
mod event;
mod notifier;
mod nowait;
mod poll;
mod registry;
mod stopper;
mod timer;
mod window;

// The public interface is:
pub use crate::busy::BusyPoll;
pub use crate::cycle::Poller;
pub use crate::error::Error;
pub use crate::event::{Event, Interest, Token};
pub use crate::notifier::EventNotifier;
pub use crate::poll::{EventPoll, MAX_EVENTS_PER_WAIT, Stats};
pub use crate::registry::Registry;
pub use crate::stopper::Stopper;
pub use crate::timer::Timer;
pub use crate::window::{DEFAULT_POLL_MAX, POLL_MAX_LIMIT, PollSettings, PollStats, PollWindow};

/// Compiles and runs what `README.md` shows.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
