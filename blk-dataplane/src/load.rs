//! A load generator: connects to any vhost-user-blk back-end as a virtual machine would, drives its queues, and
//! measures.
//!
//! ```text
//! options ─> front_end ──────────────> guest            job, a thread for each queue
//!            connection: messages      memory in a      workload: which request next
//!            features, memory, rings   memfd            ring: descriptors, made once
//!                                                       measure: counts and latencies ──> report
//! ```
//!
//! Per request a job writes a header and reads a status, both in one cache line, and writes the descriptors, as a
//! driver does; it looks at the clock, publishes and decides whether to kick, unless the options have it do that once
//! for several. So what is measured is the back-end, as far as one processor can keep another busy.
//!
//! The back-end is not trusted: what it answers is checked, what it writes into a ring costs a run and nothing else,
//! and one that goes or goes silent ends the run with an error.
//!
//! ```no_run
//! use std::time::Duration;
//! use blk_dataplane::load::{LoadOptions, Pattern};
//!
//! # fn main() -> Result<(), blk_dataplane::load::LoadError> {
//! let options = LoadOptions {
//!     rw: Pattern::RandRead,
//!     iodepth: 64,
//!     runtime: Some(Duration::from_secs(3)),
//!     ..LoadOptions::default()
//! };
//! let report = blk_dataplane::load::run(&["/run/disk.sock".into()], &options, |_| ())?;
//! println!("{} requests a second", report.iops);
//! # Ok(())
//! # }
//! ```

mod connection;
mod error;
mod front_end;
mod guest;
mod job;
mod measure;
mod options;
mod plot;
mod report;
mod ring;
mod run;
mod table;
mod verify;
mod watch;
mod workload;

// The public interface is:
pub use error::{During, LoadError, Message};
pub use front_end::Backend;
pub use options::{
    BLOCK_SIZE_MAX, DEFAULT_RUNTIME, IODEPTH_MAX, LoadOptions, MEMORY_REGIONS_MAX, NUMJOBS_MAX,
    Pattern,
};
pub use plot::PlotError;
pub use report::{Direction, Latencies, Report};
pub use ring::RingFault;
pub use run::{run, run_until};
pub use watch::Progress;
