//! The guest side of a virtqueue, for testing and loading devices.
//!
//! A tool for other people's tests, fuzzers, benches and load generators; no guest runs it. It
//! works two ways on the same ring:
//!
//! - as a correct driver, with free descriptors tracked and notifications suppressed as the
//!   specification asks, and no allocation after construction;
//! - as a wrong one: the `write_*` and `set_*` functions put any value into any word, right
//!   beside the state of the correct driver, which does not notice.
//!
//! ```
//! use std::sync::Arc;
//! use vm_memory::{GuestAddress, GuestMemoryMmap};
//! use vring::driver::{SplitDriver, SplitLayout};
//! use vring::{Chain, ChainFault, PopError, QueueConfig, QueueSize, RingBase, RingFeatures, SplitQueue};
//!
//! let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)])?);
//! let size = QueueSize::new(4)?;
//! let features = RingFeatures::default();
//! let addresses = SplitLayout::new(GuestAddress(0x1000), size)?.addresses();
//! let mut guest = SplitDriver::new(Arc::clone(&memory), addresses, size, features)?;
//! let base = RingBase::fresh(features);
//! let config = QueueConfig { size, addresses, features, base };
//! let mut queue = SplitQueue::start(memory, &config)?;
//!
//! // A descriptor that is its own successor.
//! guest.write_desc(0, 0x4000, 512, vring::driver::F_NEXT, 0);
//! guest.offer(0);
//! guest.publish();
//! let mut chain = Chain::for_queue(size);
//! match queue.pop(&mut chain) {
//!     Err(PopError::Chain { head, fault }) => {
//!         assert_eq!(fault, ChainFault::TooManyDescriptors { limit: 4 });
//!         queue.push(head, 0);
//!     }
//!     other => panic!("{other:?}"),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod chain;
mod formats;
mod in_order;
mod layout;
mod packed;
mod split;

pub use self::chain::{AddError, Full, RawDescriptor, Used};
pub use self::formats::Driver;
pub use self::layout::{DriverError, Layout, PackedLayout, SplitLayout};
pub use self::packed::PackedDriver;
pub use self::split::SplitDriver;

/// `VIRTQ_DESC_F_AVAIL`, packed rings: the driver's wrap counter of the pass the descriptor was made
/// available in.
pub const F_AVAIL: u16 = crate::packed::descriptor::F_AVAIL;
/// `VIRTQ_DESC_F_INDIRECT`: the buffer is a table of descriptors.
pub const F_INDIRECT: u16 = crate::split::descriptor::F_INDIRECT;
/// `VIRTQ_DESC_F_NEXT`: the chain continues at `next`.
pub const F_NEXT: u16 = crate::split::descriptor::F_NEXT;
/// `VIRTQ_DESC_F_USED`, packed rings: the device's wrap counter of the pass the descriptor was used
/// in, and its inverse while it is available.
pub const F_USED: u16 = crate::packed::descriptor::F_USED;
/// `VIRTQ_DESC_F_WRITE`: the device may write the buffer, and not read it.
pub const F_WRITE: u16 = crate::split::descriptor::F_WRITE;

/// `RING_EVENT_FLAGS_DESC`, packed rings: notify when a certain descriptor is passed.
pub const EVENT_DESC: u16 = crate::packed::event::EVENT_DESC;
/// `RING_EVENT_FLAGS_DISABLE`, packed rings: notify of nothing.
pub const EVENT_DISABLE: u16 = crate::packed::event::EVENT_DISABLE;
/// `RING_EVENT_FLAGS_ENABLE`, packed rings: notify of everything.
pub const EVENT_ENABLE: u16 = crate::packed::event::EVENT_ENABLE;
