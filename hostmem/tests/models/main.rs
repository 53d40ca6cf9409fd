//! What threads share without a lock, in every order in which they can meet: the files of `src` that
//! say `super::sync`, compiled against loom's versions of it. Each kind of model is also run on code
//! that is broken on purpose, and must fail there.

#![expect(
    clippy::duplicate_mod,
    reason = "once as they are, and once for each mistake"
)]

mod loom_sync;
mod regions;
mod slot;
mod slot_real;
mod slot_unfenced;
mod switch;
mod switch_real;
mod switch_without_barrier;
mod switch_without_fence;
mod watched;
