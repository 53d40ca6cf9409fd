//! What the model-checked module takes from the standard library.
//!
//! `tests/models` compiles `peers.rs` against loom's versions of these, so it names them by
//! `super::sync`, and nothing else that synchronises.

pub(crate) use std::sync::Arc;
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
