//! Immutable guest memory map: guest-physical and front-end addresses to host memory.
//!
//! A device that lives outside the VMM's process is told, region by region, where the guest's
//! memory is: its guest-physical address, its size, its address in the front-end's process, and a
//! file to map. This crate checks the description, which it does not trust, maps the files and
//! answers the two questions a device has: where is this guest address (buffers, in each
//! request), and which guest address is this front-end address (rings, when a queue is set up).
//! It serves any [`vm_memory`] user; a device written for `vm_memory`'s traits works with a
//! [`MemoryMap`] as with `GuestMemoryMmap`.
//!
//! # Design
//!
//! ```text
//!  SET_MEM_TABLE ──> MemoryMap::new ──────┐
//!  ADD_MEM_REG ────> map.with_region ─────┼──> check ──> map ──> MemoryMap' ──> Arc, swapped
//!  REM_MEM_REG ────> map.without_region ──┘      │ on error: MemoryMap stays
//!
//!  guest address ──────> hint, else search ──> Region ──> VolatileSlice, in one region
//!        range ────────> get_slices ─────────> one VolatileSlice a region
//!  front-end address ──> search ─────────────> guest address
//! ```
//!
//! * **Immutable, replaced as a whole.** A change makes a new map, all or nothing. Users hold an
//!   `Arc<MemoryMap>`, so the lookup takes no lock, and a map that was replaced stays until
//!   the last request that points into it has let go. Maps made from one another share
//!   regions: one that stays is neither mapped again nor moved.
//! * **Never assumed contiguous.** Neighbours in guest-physical memory are anywhere in host
//!   memory. A range that crosses from one to the other is split by
//!   [`get_slices`](vm_memory::GuestMemoryBackend::get_slices), and refused by
//!   [`get_slice`](vm_memory::GuestMemoryBackend::get_slice), which has but one slice to give.
//! * **Lookup.** A binary search over the regions' addresses, kept side by side. With more than
//!   a few regions the one of the last hit is tried first; that hint is the only word written after
//!   a map is made, and only when it changes.
//! * **Mapping.** Shared, readable and writable, without reserving swap. A mapping starts and ends
//!   at page boundaries, huge pages' where the file is on `hugetlbfs`; what it holds beside the
//!   region can not be reached.
//! * **No unsafe code.** The mapping itself is `vm_memory`'s [`MmapRegion`](vm_memory::MmapRegion).
//!
//! # Assumptions
//!
//! The file is at least as long as the region when it is mapped; this is checked. It must stay so:
//! whoever else can truncate it can kill this process (`SIGBUS`) when it touches a page that is
//! gone. The same goes for a `hugetlbfs` pool that is exhausted at the first touch of a page.
//!
//! # Example
//!
//! A guest with a hole below 4 GiB, where PCI devices are, and one file for all its memory:
//!
//! ```
//! use std::sync::Arc;
//!
//! use hostmem::{MapError, MemoryMap, RegionConfig};
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! const LOW: u64 = 0xC000_0000;
//! const HIGH: u64 = 0x4000_0000;
//! let file = tempfile::tempfile()?;
//! file.set_len(LOW + HIGH)?;
//!
//! let low = RegionConfig {
//!     guest_addr: GuestAddress(0),
//!     size: LOW,
//!     frontend_addr: 0x7f00_0000_0000,
//!     file: file.try_clone()?,
//!     mmap_offset: 0,
//! };
//! let high = RegionConfig {
//!     guest_addr: GuestAddress(0x1_0000_0000),
//!     size: HIGH,
//!     frontend_addr: 0x7f00_0000_0000 + LOW,
//!     file: file.try_clone()?,
//!     mmap_offset: LOW,
//! };
//! let map = Arc::new(MemoryMap::new(vec![high, low])?);
//!
//! map.write_slice(b"hello", GuestAddress(0x1_0000_0000))?;
//! assert!(map.find_region(GuestAddress(0xC000_0000)).is_none());
//! assert_eq!(
//!     map.frontend_to_guest(0x7f00_0000_0000 + LOW),
//!     Some(GuestAddress(0x1_0000_0000))
//! );
//!
//! // A region that is in the way of another is refused, and nothing has changed.
//! let refused = map.with_region(RegionConfig {
//!     guest_addr: GuestAddress(LOW - 0x1000),
//!     size: 0x2000,
//!     frontend_addr: 0x1000,
//!     file,
//!     mmap_offset: 0,
//! });
//! assert!(matches!(refused, Err(MapError::GuestOverlap { .. })));
//! # Ok(())
//! # }
//! ```
//!
//! # Features
//!
//! None. Linux only, on 64-bit hosts.

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("hostmem maps all of a guest's memory at once: it takes Linux on a 64-bit host");

mod backing;
mod barrier;
mod dirty;
mod error;
mod index;
mod map;
mod mapping;
mod region;
mod region_set;
mod sigbus;
mod sync;

// Runs the README's example.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

// The public interface is:
pub use dirty::{DirtyLog, LogError, RegionBitmap, RegionBitmapSlice};
pub use error::{MapError, MemoryLost};
pub use map::MemoryMap;
pub use region::{Region, RegionConfig};
pub use sigbus::SigbusGuard;

/// How many regions a map can have.
///
/// As many as KVM gives memory slots to a guest on x86 (512, less 3 of its own), which is what
/// front-ends divide a guest's memory by; libvhost-user and crosvm offer the same number.
pub const MAX_REGIONS: usize = 509;

/// What guest address and file offset of a region must agree in: their remainder by this.
///
/// The strictest alignment that a virtqueue has (descriptor table, virtio 1.3 §2.7). With it, an
/// aligned guest address is an aligned host address, and the ring's words can be read and written
/// atomically. Front-ends align both to pages.
pub const HOST_ALIGNMENT: u64 = 16;
