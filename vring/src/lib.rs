//! Device side of a virtio virtqueue, bounded and total over any ring contents.
//!
//! # Overview
//!
//! A virtqueue is shared memory that a guest may fill with anything at any time. This crate turns
//! it into owned values: [`Queue::pop`] takes a chain of buffers the guest made available,
//! [`Queue::push`] gives it back. Whatever the ring holds, no call panics, loops without bound,
//! allocates, or writes to the ring where a device has nothing to write; what the driver did wrong
//! is a value ([`ChainFault`], [`RingFault`]) that says so.
//!
//! A [`Queue`] has the format that was negotiated, [`SplitQueue`] (virtio 1.3 §2.7) and
//! [`PackedQueue`] (§2.8) one each, with the same operations.
//!
//! A virtual machine monitor that only wants a ring depends on this crate alone: guest memory is
//! any [`vm_memory::GuestMemory`], behind an IOMMU or not.
//!
//! # Design
//!
//! ```text
//!   guest                                  device
//!   ─────                                  ──────
//!   descriptor table ──────────┐
//!   available ring ── idx ─────┴─ pop ───> Chain (owned segments) + Head (token)
//!                                                     │ the consumer translates
//!                                                     │ and does its I/O
//!   used ring <── publish <── staged <──── push ──────┘ Head, bytes written
//!        │ one store for all
//!        └─ should_notify: one interrupt decision for all
//! ```
//!
//! In a packed ring the three boxes on the left are one, the descriptor ring, and the store that
//! publishes is that of the first used descriptor's flags.
//!
//! - Configuration is parsed once ([`QueueSize`], [`QueueConfig`]); a started queue has no
//!   setters. A new memory map is taken as a whole ([`Queue::set_memory`]), or the ring stops.
//! - The three areas are translated to host pointers once, and every word is an atomic, read
//!   once. All unsafe code is in three modules, `ring_memory`, `split::rings` and
//!   `packed::rings`.
//! - A broken chain costs that chain: its [`Head`] is pushed back with length 0. A broken ring
//!   stops, is reported once, and lets what is in flight complete.
//! - Chains go into storage the caller owns and reuses ([`Chain`]): nothing allocates after start.
//! - Buffer addresses are not translated here. Their arithmetic is checked; whether memory is
//!   behind them is for the consumer to find, who has to translate them for its I/O anyway.
//! - Writes to the ring are recorded in the memory's dirty bitmap, if it keeps one, for live
//!   migration; an idle queue is saved and restored as plain data ([`QueueState`]).
//!
//! # Example
//!
//! See [`Queue`] for a round trip. A device's loop:
//!
//! ```
//! use vring::{Chain, Finished, PopError, Queue};
//! use vm_memory::GuestMemory;
//!
//! /// Chains taken before others get their turn: the guest may publish as fast as they are taken.
//! const BATCH_MAX: u16 = 64;
//!
//! /// One pass over the queue. True: the ring is empty, sleep until the guest kicks. False: come
//! /// back once other queues have had their turn.
//! fn serve<M: GuestMemory>(
//!     queue: &mut Queue<M>,
//!     chain: &mut Chain,
//!     interrupt: impl FnOnce(),
//! ) -> bool {
//!     let mut batch = queue.batch(BATCH_MAX);
//!     loop {
//!         match batch.pop(chain) {
//!             Ok(Some(head)) => batch.push(head, 0), // having done the request
//!             Ok(None) => break,
//!             Err(PopError::Chain { head, .. }) => batch.push(head, 0),
//!             Err(_broken) => break, // reported once: signal the error event
//!         }
//!     }
//!     let Finished { notify, sleep } = batch.finish();
//!     if notify {
//!         interrupt();
//!     }
//!     sleep
//! }
//! ```
//!
//! [`Batch`] makes the calls in the one order that loses no wake-up. Whoever needs another one has
//! them all on the queue itself.
//!
//! # Features
//!
//! - `driver`: the guest side of a ring, for tests, fuzzers, benches and load generators, able
//!   to write deliberately wrong rings.
//! - `serde`: [`QueueState`] can be serialised.

mod base;
mod batch;
mod chain;
mod config;
#[cfg(feature = "driver")]
pub mod driver;
mod fault;
mod head;
mod in_flight;
mod in_order;
mod indirect;
mod notification;
mod packed;
mod queue;
mod reclaim;
mod ring_memory;
mod split;
mod state;

// The public interface is:
pub use crate::base::{PackedPosition, RingBase};
pub use crate::batch::{Batch, Finished};
pub use crate::chain::{BufferError, Chain, MAX_INDIRECT_DESCRIPTORS, Segment};
pub use crate::config::{
    ConfigError, QueueConfig, QueueSize, RingAddresses, RingArea, RingFeatures, StartError,
};
pub use crate::fault::{ChainFault, PopError, RingFault};
pub use crate::head::Head;
pub use crate::packed::PackedQueue;
pub use crate::queue::Queue;
pub use crate::reclaim::{Leftover, ReclaimError, RingDescriptor};
pub use crate::split::SplitQueue;
pub use crate::state::{QueueState, RestoreError, SaveError};

/// The README's example, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
