//! The switch as it is in the crate.

use super::loom_sync as sync;

#[path = "../../src/dirty/switch.rs"]
#[expect(dead_code, reason = "the models need part of it")]
pub(crate) mod switch;
