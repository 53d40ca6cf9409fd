//! A virtio-blk data plane.
//!
//! # Overview
//!
//! Dedicated threads take a guest's block requests straight from its virtqueues in shared memory,
//! submit them to the host kernel's asynchronous I/O, and complete them back: no lock, no
//! allocation and no copy on the way. A VMM embeds it through [`DataPlane`], over its own guest
//! memory and notifiers; the feature `vhost-user` adds the server that lets any vhost-user front-end
//! connect to it.
//!
//! # Design
//!
//! ```text
//!            control (any thread)                       data thread, one or more per device
//!   DataPlane ── channel ─────────────────> commands ─┐
//!   guest kick ─ eventfd ─> event-poll ─────────────> fetch: vring.pop, parse, iosched.plug
//!   guest irq <─ call fd <─ vring.push, publish <─ ioq.reap <─ kernel <─ ioq.submit (once)
//! ```
//!
//! Control never touches a ring: it sends a command that the data thread carries out between two
//! batches. Data threads share nothing per request. A flush completes only after every write popped before
//! it, on whichever thread, is on stable storage. A bad
//! request costs itself, a bad chain its head, a broken ring its queue; nothing costs the device.
//!
//! # Example
//!
//! See [`DataPlane`].
//!
//! # Features
//!
//! - `vhost-user`: the vhost-user-blk server, module `vhost_user`.
//! - `load-generator`: module `load`, the other end of that protocol: puts load on any vhost-user-blk back-end, and
//!   measures it.
//! - `testing`: module `testing`, a device over a disk that a test writes.

mod capacity;
mod clock;
mod config_space;
mod counters;
mod data_thread;
mod dataplane;
mod device;
mod image;
mod inflight;
mod lifetime;
#[cfg(feature = "load-generator")]
pub mod load;
mod notifier;
mod ranges;
mod request;
mod tally;
#[cfg(feature = "testing")]
pub mod testing;
mod threads;
#[cfg(feature = "vhost-user")]
pub mod vhost_user;
mod write_back;

// The public interface is:
pub use capacity::ConfigSubscription;
pub use config_space::{CONFIG_SPACE_LEN, ConfigSpace};
pub use counters::{
    CounterSnapshot, LATENCY_BUCKETS, LatencyHistogram, QueueSnapshot, RequestSnapshot,
};
pub use data_thread::StartError;
pub use dataplane::{ConfigError, DataPlane, Gone, QueueError, QueueSetup, StopError};
pub use device::{
    Backing, DEFAULT_NUM_QUEUES, DEFAULT_POLL_MAX, DEFAULT_QUEUE_SIZE, Device, DeviceError,
    DeviceOptions, MAX_NUM_QUEUES, POLL_MAX_LIMIT, ResizeError, Resized,
};
/// Installed by whoever owns the process: `SigbusGuard::install()`. Without it a front-end that truncates
/// the guest's memory ends the process; with it, requests and rings in that memory fail.
pub use hostmem::SigbusGuard;
pub use image::{BufferedReason, Caching, Image, ImageError, ImageOptions, LockHolder};
pub use inflight::{InflightError, InflightQueue, InflightRegion};
/// What [`DeviceOptions::engine`] chooses among.
pub use ioq::Engine;
pub use notifier::Notifier;
pub use threads::{MAX_THREADS, ThreadOptions};

/// The unit of virtio-blk addresses, whatever the block size (virtio 1.3 §5.2.6).
pub const SECTOR_SIZE: u64 = 512;
