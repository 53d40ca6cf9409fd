//! Request merger for block I/O: a batch of requests in, fewer and larger ones out, nothing reordered
//! that may not be. Pure logic: no I/O, no clock, no unsafe, no allocation after start.
//!
//! # Overview
//!
//! A guest that reads a file in sequence hands the device many small requests at once, each touching
//! the one before. Submitted as one, they cost one trip through the host's block layer. [`Merger`]
//! collects the requests of one batch ([`plug`](Merger::plug)) and hands out the merged list
//! ([`unplug`](Merger::unplug)), each entry with its [`Part`]s, so that every request is completed
//! once and with its own length. [`split_completion`] says which parts a short or failed transfer
//! has completed.
//!
//! # What is guaranteed
//!
//! * Each request comes out exactly once, as a part of exactly one merged request.
//! * Merged are only requests of the same direction where one ends exactly where the next begins,
//!   within [`Limits`]. A request that exceeds the limits by itself passes alone.
//! * Two requests that overlap, at least one of them a write, come out in the order they came in and
//!   are never parts of the same merged request. The order of all others is free: virtio-blk
//!   promises none (virtio 1.3, 5.2.6), and there is none once they are in flight.
//! * Nothing moves across a flush, a discard, a write-zeroes or any other [barrier](Op::moves_data),
//!   and none of these is ever merged.
//! * Any values are taken: a request of length 0, or one that ends at or beyond 2^64, passes alone.
//!
//! The order of the list is that of submission. Requests in flight at the same time are not ordered
//! by it; that overlapping writes are not in flight together is for whoever issued them.
//!
//! # Design
//!
//! ```text
//! plug(Request)* ──> batch ──> nothing can merge? ──────────────> arrival order ──> emit
//!                                │ no                                                ^
//!                                ├─ ascending? ──> one pass over neighbours ─────────┤
//!                                │ no                                                │
//!                                └─ between barriers: sort, layers, chains ──────────┘
//! ```
//!
//! For a batch of n requests:
//!
//! 1. *One request, or none that begins where another of its direction ends* (a hash table of
//!    beginnings, O(n)): out in arrival order. Random I/O ends here.
//! 2. *Each request begins at or after the end of the one before*, which `plug` tracks: one pass,
//!    O(n). Sequential I/O ends here.
//! 3. Otherwise the batch is cut at its barriers, and each piece sorted by offset, O(n log n). If
//!    requests of the piece overlap and one of them writes, each gets a *layer*: one more than the
//!    highest layer of the earlier requests it conflicts with, found with a segment tree over the
//!    sorted offsets, O(n log n). Requests of one layer do not conflict, and layers are emitted in
//!    order, so every conflicting pair keeps its order, and a block written again and again does not
//!    keep the rest from merging.
//! 4. Within a layer, requests are chained from the lowest offset up: the next part is the earliest
//!    request that begins where the chain ends. It is the neighbour in the sorted order or found by
//!    binary search (reads may overlap within a layer), O(n log n).
//!
//! # Example
//!
//! ```
//! use iosched::{Limits, Merger, Op, Request};
//!
//! let limits = Limits { max_segments: 1024, max_bytes: 1 << 20 };
//! let mut merger = Merger::new(128, limits);
//! for (tag, sector) in [(0, 8), (1, 0), (2, 100)] {
//!     let request = Request { op: Op::Read, offset: sector * 512, len: 4096, segments: 1, tag };
//!     merger.plug(request).unwrap();
//! }
//!
//! let mut out = Vec::new();
//! merger.unplug(|merged| {
//!     let tags: Vec<u32> = merged.parts.iter().map(|part| part.tag).collect();
//!     out.push((merged.offset, merged.len, tags));
//! });
//! assert_eq!(out, [(0, 8192, vec![1, 0]), (51200, 4096, vec![2])]);
//! ```
//!
//! # Features
//!
//! None.

#![forbid(unsafe_code)]

mod completion;
mod layers;
mod merger;
mod request;
mod stats;
mod steps;
mod touch;
#[cfg(test)]
mod worst_cases;

// The public interface is:
pub use crate::completion::{PartOutcome, SplitCompletion, split_completion};
pub use crate::merger::{Full, MAX_CAPACITY, Merger};
pub use crate::request::{Limits, Merged, Op, Part, Request};
pub use crate::stats::Stats;

/// Compiles and runs what `README.md` shows.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
