//! The slot as it is in the crate.

use super::loom_sync as sync;

#[path = "../../src/sigbus/slot.rs"]
#[expect(dead_code, reason = "the models need part of it")]
pub(crate) mod slot;
