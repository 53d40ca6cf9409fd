//! The switch without the barrier that the kernel gives to those who mark.

mod sync {
    pub(crate) use super::super::loom_sync::*;

    pub(crate) fn light() {}
}

#[path = "../../src/dirty/switch.rs"]
#[expect(dead_code, reason = "the models need part of it")]
pub(crate) mod switch;
