//! Mappings whose pages may go away, and what becomes of whoever touches one that has gone.

mod handler;
mod slot;
#[cfg(test)]
mod slot_tests;
mod table;

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering, fence};

use crate::sync;

pub(crate) use table::Watched;

/// How often a mapping was lost, since the process began.
static LOSSES: AtomicUsize = AtomicUsize::new(0);

/// Keeps this process alive when it touches guest memory that has gone.
///
/// Whoever handed in a memory file can take its pages away after it was mapped: by truncating it,
/// or by leaving the file system (or the pool of huge pages) behind it without room for a page
/// that was never touched. The next access to such a page is a `SIGBUS`, which by default ends
/// the process and, with it, the devices of every other guest that it serves. The guard is a
/// handler for that signal. It puts zeroed memory of this process's own in place of the mapping,
/// so that the access goes on, and marks the region as lost.
///
/// # For a program
///
/// Call [`install`](Self::install) once, early. Without it nothing changes: a library that uses
/// this crate works the same, and leaves the signal alone.
///
/// # For a device
///
/// A region that is lost stays lost. From then on each lookup in it fails with the error the kernel
/// gives for such an address (`EFAULT`), whether by [`get_slice`](vm_memory::GuestMemoryBackend::get_slice)
/// or through [`Bytes`](vm_memory::Bytes), and so does asynchronous I/O into pages that have gone
/// and were not touched yet. What remains is the access during which the memory was lost, and
/// what was in flight: they succeed, into memory that nobody sees or out of memory that is zero.
/// So whoever has read something from guest memory looks before acting on it, and whoever
/// has written to it looks before telling the guest:
///
/// * [`losses`](Self::losses) has not changed since before the access: the usual case, one load;
/// * else [`MemoryMap::check_intact`](crate::MemoryMap::check_intact) for the whole map,
///   [`Region::is_lost`](crate::Region::is_lost) for one region, or [`is_lost`](Self::is_lost) for
///   host addresses that were looked up earlier.
///
/// ```
/// use hostmem::{MemoryMap, RegionConfig, SigbusGuard};
/// use vm_memory::{Bytes, GuestAddress};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// SigbusGuard::install()?;
///
/// let file = tempfile::tempfile()?;
/// file.set_len(0x1000)?;
/// let map = MemoryMap::new(vec![RegionConfig {
///     guest_addr: GuestAddress(0),
///     size: 0x1000,
///     frontend_addr: 0x7f00_0000_0000,
///     file: file.try_clone()?,
///     mmap_offset: 0,
/// }])?;
/// map.write_obj(7_u32, GuestAddress(0))?;
/// assert!(map.check_intact().is_ok());
///
/// file.set_len(0)?; // what a front-end could do
/// let before = SigbusGuard::losses();
/// let value: u32 = map.read_obj(GuestAddress(0))?; // would have been the end
/// assert_ne!(SigbusGuard::losses(), before); // so `value` means nothing
/// # let _ = value;
/// assert!(map.check_intact().is_err());
/// assert!(map.read_obj::<u32>(GuestAddress(0)).is_err());
/// # Ok(())
/// # }
/// ```
///
/// # Scope
///
/// * Mappings of this crate: regions of a [`MemoryMap`](crate::MemoryMap) and shared
///   [`DirtyLog`](crate::DirtyLog)s, whether made before or after the guard was installed. A
///   whole region is lost at once, with what the mapping holds beside it.
/// * Faults for want of a page (`BUS_ADRERR`). Memory that failed in hardware (`BUS_MCEERR_AR`,
///   `BUS_MCEERR_AO`), misaligned accesses and signals sent by a process go to whatever handler
///   there was before, as do faults at other addresses. If there was none, they end the process as
///   they would have.
///
/// # Limits
///
/// * The handler belongs to the process and stays until its end. Whoever installs another one
///   later must call the one it displaces, as this one does.
/// * A thread that touches lost memory with `SIGBUS` blocked ends the process: the kernel does not hold
///   back the signal of a fault. So do not block it in threads that touch guest memory; nor touch
///   guest memory in a previous handler for it, unless that was installed with `SA_NODEFER`. In
///   handlers of other signals it is as anywhere.
/// * A previous handler that answers a signal sent by a process by restoring the default action, as the
///   standard library's does, is not called again; the guard stays.
/// * A forked process has the guard too, over the same files, but what was lost is counted in each by
///   itself.
/// * If the kernel has no memory or no mapping left even for a single page, the signal is passed on
///   as if the address were not ours.
/// * The memory that takes the region's place is charged to this process when it is written to.
///   Lookups fail from then on, so that what was in flight bounds it.
/// * A seccomp filter must allow `mmap`, `rt_sigaction` and `rt_sigreturn`.
#[derive(Debug)]
pub enum SigbusGuard {}

impl SigbusGuard {
    /// Installs the guard, for the whole process. Again: nothing happens.
    ///
    /// The handler that was there before is called for every `SIGBUS` that is none of ours, with the
    /// signals blocked that it asked for. Safe to call from any thread at any time; a handler that
    /// another thread installs in the same moment may be displaced without being called.
    ///
    /// # Errors
    ///
    /// The kernel refuses the handler (`sigaction`), which only a seccomp filter does.
    pub fn install() -> io::Result<()> {
        handler::install()
    }

    /// Whether [`install`](Self::install) has been called in this process.
    #[must_use]
    pub fn is_installed() -> bool {
        handler::is_installed()
    }

    /// How often a mapping was lost in this process.
    ///
    /// Every access to guest memory that comes before this call is covered: if it touched memory
    /// that had been lost, in this thread or in another, the number has changed from what it was
    /// before the memory was lost. Costs a load from a cache line that is written only then.
    #[inline]
    #[must_use]
    pub fn losses() -> usize {
        // Keeps the accesses before it, which may have seen the memory that took the place of the
        // lost, before the load. Pairs with the release in `lost`; in the thread that faulted
        // itself, program order does, and the fence holds the compiler to it.
        fence(Ordering::Acquire);
        LOSSES.load(Ordering::Relaxed)
    }

    /// Whether any of `len` bytes of host memory from `addr` on belong to a region that was lost
    /// and is still mapped.
    ///
    /// For addresses taken from a lookup some time ago, such as those of an I/O operation in flight.
    /// Goes through all mappings of the process: to be called when [`losses`](Self::losses) has
    /// changed, not for each request.
    #[must_use]
    pub fn is_lost(addr: *const u8, len: usize) -> bool {
        table::table().any_lost(addr.addr(), len)
    }
}

/// Whether nothing was ever lost. Without an order of its own: for what a later look will find too.
#[inline]
pub(crate) fn nothing_lost() -> bool {
    LOSSES.load(Ordering::Relaxed) == 0
}

/// Counts a loss. Called before other memory takes the place of what was lost, so that whoever sees
/// that memory sees the count as well. Async-signal-safe.
fn count_loss() {
    // Release: pairs with the fence in `losses`. Beyond it, the system call that follows is a full
    // barrier on every processor that had the old page mapped.
    LOSSES.fetch_add(1, Ordering::Release);
}
