//! What the benches share: the workloads, the peers they are compared with, and the counters.
//!
//! Not a library for anyone else. `README.md` has the commands and says what each figure means.
//!
//! ```text
//!   rings ─────┐                    ┌─ benches/*.rs   time: criterion, and rounds in turn
//!   reads ─────┼── one workload ────┤
//!   lookups ───┤                    │
//!   disk ──────┘   run(n) -> time   ├─ bin/counts.rs  instructions, system calls, allocations
//!                                   └─ tests/*.rs     the counts that must hold
//!
//!   versus          the program beside its peers, each a process; floor: a bare loop as one
//! ```

pub mod allocations;
mod bare_aio;
mod bare_uring;
pub mod disk;
pub mod figures;
pub mod fixture;
pub mod floor;
pub mod instructions;
pub mod lookups;
mod processors;
pub mod reads;
pub mod rings;
pub mod rounds;
pub mod syscalls;
mod transfer;
pub mod versus;
pub mod wake;
pub mod workload;

/// Any failure to set a bench up: it ends the bench with its message.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
