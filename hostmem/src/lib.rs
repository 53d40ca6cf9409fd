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
//! Three things make it fit for memory that somebody else owns: it outlives memory that goes away
//! ([`SigbusGuard`]), it records what is written while a guest is migrated ([`DirtyLog`]), and
//! lookups take the same time whether a guest has one region or [`MAX_REGIONS`].
//!
//! # Design
//!
//! ```text
//!  SET_MEM_TABLE ──> map.with_regions ────┐
//!  ADD_MEM_REG ────> map.with_region ─────┼──> check ──> map ──> MemoryMap' ──> Arc, swapped
//!  REM_MEM_REG ────> map.without_region ──┘      │ on error: MemoryMap stays
//!  SET_LOG_BASE ───> map.start_log ───────> one log for all maps made from one another
//!
//!  guest address ──────> table ──> Region ──> VolatileSlice, in one region ──> write ──> mark
//!        range ────────> get_slices ────────> one VolatileSlice a region          log? ──┘
//!  front-end address ──> table ──> guest address
//!
//!  page gone ──> SIGBUS ──> guard: ours? zeroes in its place, region lost ──> lookups: EFAULT
//!                              └── not ours: the handler there was before
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
//! * **Lookup.** The address space is divided into buckets, of which each leads to the region that an
//!   address in it is in, or to the one before; where small regions crowd between large, or far from
//!   them, into a finer division. Nothing is written, so threads that look up do not meet. A
//!   layout made to defeat the table is searched, in time bounded by the logarithm of the number of
//!   regions.
//! * **Mapping.** Shared, readable and writable, without reserving swap. A mapping starts and ends
//!   at page boundaries, huge pages' where the file is on `hugetlbfs`; what it holds beside the
//!   region can not be reached.
//! * **Memory that goes away.** A file truncated by the other side, a pool of huge pages or a file
//!   system that has no room for a page at its first touch: each is a `SIGBUS`. The guard, which a
//!   program installs and a library leaves alone, turns it into a lost region.
//! * **Dirty log.** One bit per page, in memory shared with the front-end or private. While there is
//!   none, a write pays for one load. A log is put in force and taken away with requests going on:
//!   who marks is counted, and nothing is freed while counted; the barrier that this takes between a
//!   write and the look whether there is a log is made by the kernel, when there comes one.
//! * **Unsafe code** is in three modules: the signal handler (`sigbus::handler`), the place that a log
//!   is in (`dirty::switch`), and one system call (`barrier`). The mapping itself is `vm_memory`'s
//!   [`MmapRegion`](vm_memory::MmapRegion). What these share between threads is model-checked with
//!   loom.
//!
//! ## Assumptions
//!
//! The file is at least as long as the region when it is mapped; this is checked. If it may become
//! shorter, the program must install [`SigbusGuard`], or demand files sealed with `F_SEAL_SHRINK`.
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
//! None. Linux 4.14 or later, on 64-bit hosts.

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
