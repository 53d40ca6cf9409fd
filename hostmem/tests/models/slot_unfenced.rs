//! The slot without its fences.

mod sync {
    pub(crate) use super::super::loom_sync::*;

    pub(crate) fn fence(_: Ordering) {}
}

#[path = "../../src/sigbus/slot.rs"]
#[expect(dead_code, reason = "the models need part of it")]
pub(crate) mod slot;
