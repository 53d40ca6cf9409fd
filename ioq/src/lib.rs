//! An asynchronous file I/O queue: Linux AIO through raw system calls, io_uring, and an engine that
//! does nothing, for measuring everything else.
//!
//! # Overview
//!
//! An [`IoQueue`] runs reads, writes, fdatasync, discards and zeroes on one file or block device, many at a
//! time, from one thread. It is made for a virtual disk's data plane: no allocation, lock or system call per
//! operation, capacity fixed at the start, one system call per batch (a few for a disk that is idle), completions read without
//! any. [`Engine::Auto`] takes the engine that suits the file, or what the host has. What the kernel
//! leaves to its callers is done here:
//!
//! - a short submit or `EAGAIN` parks the rest and loses nothing;
//! - an operation the kernel refuses fails alone;
//! - short reads and writes are continued; the end of the file inside a read is an error;
//! - `EINTR` is retried;
//! - what an engine cannot do without blocking (discards, zeroes, an fdatasync the kernel refuses to run
//!   asynchronously) goes to at most four worker threads, never to the caller's.
//!
//! # Design
//!
//! ```text
//!   queue_readv / queue_writev / queue_fdatasync / queue_discard / queue_write_zeroes / read / write
//!                   │ owner + segments into a free slot
//!                   v
//!   free ──> queued ──submit──> in flight ──────────> completed ──reap──> owner + result
//!              ^   │               │    ^                 │
//!              │   └ EAGAIN: parked┘    └ worker threads  │
//!              └──────── short transfer, EINTR ───────────┘
//! ```
//!
//! **Buffers cannot be freed early.** The kernel writes to a read's memory whenever it
//! likes, so a queue *owns* what keeps the memory alive: the `O` of an operation moves in with it
//! and comes out with its result, and there is no way to get it earlier. Dropping the queue first
//! tears down the kernel's context, which waits for everything in flight, then joins the workers,
//! and only then drops the owners; should the kernel refuse, the owners are leaked. Leaking the
//! queue leaks the owners. So [`IoQueue::read`] and [`IoQueue::write`] are safe;
//! [`IoQueue::queue_readv`] and [`IoQueue::queue_writev`] take addresses, which only the caller
//! can vouch for, and are not.
//!
//! A queue is for one thread at a time and may move to another one if its owners may.
//! [`IoQueue::reap`] is the only call that gives results out, so queueing never re-enters the
//! caller.
//!
//! Order: none. The kernel runs operations in any order; an fdatasync covers writes
//! whose completion was reaped before it was queued.
//!
//! # Example
//!
//! ```
//! use std::{fs::File, sync::Arc};
//! use ioq::{Config, Durability, IoQueue};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let path = std::env::temp_dir().join(format!("ioq-doc-{}", std::process::id()));
//! let file = File::options().read(true).write(true).create(true).truncate(true).open(&path)?;
//! # std::fs::remove_file(&path)?;
//! let mut queue = IoQueue::linux_aio(Arc::new(file), &Config::default())?;
//!
//! // An owner is a buffer and whatever tells it from the others.
//! for block in 0..4u8 {
//!     queue.write(u64::from(block) * 512, (vec![block; 512], block), Durability::WriteBack)?;
//! }
//! queue.submit();
//! let mut written = 0;
//! while written < 4 {
//!     written += queue.reap(|(_buf, block), result| assert_eq!(result, Ok(512), "block {block}"));
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Features
//!
//! - `testing`: the `testing` module, disks in memory that inject faults, for tests of
//!   what is built on this crate.

mod aio;
mod backend;
mod blocking;
mod buffer;
mod engine;
mod error;
mod notifier;
mod null;
mod op;
mod queue;
mod segments;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod uring;
mod worker;

// The public interface is:
pub use crate::buffer::{AlignedBuf, IoBuf};
pub use crate::engine::{Engine, Fallback, UnknownEngine};
pub use crate::error::{IoError, IoErrorKind, QueueError, SetupError};
pub use crate::op::{Durability, Unmap};
pub use crate::queue::{
    Armed, Config, IoQueue, RETRY_DELAY, SEGMENTS_MAX, SubmitReport, TRANSIENT_RETRIES_MAX,
};

/// Compiles and runs what `README.md` shows.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
