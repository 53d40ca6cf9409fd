//! The inputs and oracles of the fuzz targets in `fuzz_targets/`, which are one line each.
//!
//! They are a library so that `tests/corpora.rs` can replay the committed corpora with any
//! compiler, and so that `cargo fuzz fmt` prints what an input means. See README.md.
//!
//! ```text
//! bytes ── arbitrary ──> Input (mostly valid, rarely corrupt) ──> run ──┬─> crate under test
//!                                                                       └─> model: plain bytes,
//!                                                                           linear scans
//! ```
//!
//! An oracle shares no code with what it judges. It panics on the first difference.

pub mod blk_request;
mod copies;
mod device;
pub mod inflight;
pub mod iosched;
pub mod mem_table;
mod naive_memory;
mod naive_order;
mod naive_walk;
mod pick;
mod ring_input;
mod sleep;
pub mod vhost_message;
pub mod vring_differential;
pub mod vring_packed;
pub mod vring_split;
