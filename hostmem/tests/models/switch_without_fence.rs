//! The switch without the fences between the count of users and the place in force.

mod sync {
    pub(crate) use super::super::loom_sync::*;

    pub(crate) fn fence(_: Ordering) {}
}

#[path = "../../src/dirty/switch.rs"]
#[expect(dead_code, reason = "the models need part of it")]
pub(crate) mod switch;
