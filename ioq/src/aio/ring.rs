//! Completions read from the ring the kernel maps into the process, without a system call.

// UNSAFETY: the ring is memory shared with the kernel, reached by the address io_setup returned.
#![expect(unsafe_code)]

use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use super::abi::{IoEvent, RING_COMPAT_FEATURES, RING_INCOMPAT_FEATURES, RING_MAGIC, RingHeader};
use crate::backend::Completion;

/// The completion ring of one AIO context.
#[derive(Debug)]
pub(super) struct Ring {
    header: NonNull<RingHeader>,
    events: NonNull<IoEvent>,
    nr: u32,
}

// SAFETY: the mapping belongs to the process, not to a thread; only the owning engine reads it.
unsafe impl Send for Ring {}

impl Ring {
    /// The ring of context `ctx`, if it has one of the layout we know: a context's id is its
    /// ring's address on Linux, but not on every system that speaks its ABI (gVisor).
    ///
    /// # Safety
    /// - `ctx` came from `io_setup` and the result is not used after `io_destroy`.
    pub(super) unsafe fn of_context(ctx: libc::c_ulong, depth: u16) -> Option<Self> {
        let address = usize::try_from(ctx).ok()?;
        let header = NonNull::new(std::ptr::with_exposed_provenance_mut::<RingHeader>(address))?;
        // SAFETY: sysconf takes no pointer.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()?;
        if !address.is_multiple_of(page) {
            return None;
        }
        let mut resident = 0u8;
        // mincore fails with ENOMEM where nothing is mapped, so that an opaque id is not
        // mistaken for an address.
        // SAFETY: one page is asked about, one byte is written.
        if unsafe { libc::mincore(header.as_ptr().cast(), page, &raw mut resident) } != 0 {
            return None;
        }
        // SAFETY: a whole page is mapped at this page-aligned address, larger than a header. The
        // fields read here are constant since io_setup.
        let (magic, compat, incompat, length, nr) = unsafe {
            let ring = header.as_ptr();
            (
                (&raw const (*ring).magic).read_volatile(),
                (&raw const (*ring).compat_features).read_volatile(),
                (&raw const (*ring).incompat_features).read_volatile(),
                (&raw const (*ring).header_length).read_volatile(),
                (&raw const (*ring).nr).read_volatile(),
            )
        };
        let known = magic == RING_MAGIC
            && compat == RING_COMPAT_FEATURES
            && incompat == RING_INCOMPAT_FEATURES
            && usize::try_from(length) == Ok(size_of::<RingHeader>())
            // One entry always stays free, to tell a full ring from an empty one.
            && nr > u32::from(depth);
        if !known {
            return None;
        }
        // SAFETY: the kernel maps `nr` events behind the header.
        let events = unsafe { header.add(1) }.cast();
        Some(Self { header, events, nr })
    }

    fn header(&self) -> &RingHeader {
        // SAFETY: mapped until io_destroy (`of_context`); all that changes in it is atomic.
        unsafe { self.header.as_ref() }
    }

    pub(super) fn is_empty(&self) -> bool {
        let header = self.header();
        header.head.load(Ordering::Relaxed) == header.tail.load(Ordering::Acquire)
    }

    /// Events in the ring.
    pub(super) fn len(&self) -> usize {
        let header = self.header();
        let head = header.head.load(Ordering::Relaxed);
        let tail = header.tail.load(Ordering::Acquire);
        let events = if tail >= head {
            tail - head
        } else {
            tail.saturating_add(self.nr).saturating_sub(head)
        };
        events as usize
    }

    /// Takes events into `out`, and says how many.
    pub(super) fn take(&self, out: &mut [Completion]) -> usize {
        let header = self.header();
        // Only this side writes `head`.
        let mut head = header.head.load(Ordering::Relaxed);
        // Pairs with smp_wmb before the store of `tail` in aio_complete (fs/aio.c): events before
        // the tail are written.
        let tail = header.tail.load(Ordering::Acquire);
        if head >= self.nr || tail >= self.nr {
            // The process itself has scribbled over the mapping. Nothing in it can be believed.
            debug_assert!(false, "completion ring corrupted");
            return 0;
        }
        let mut taken = 0;
        for to in out {
            if head == tail {
                break;
            }
            // SAFETY: head < nr; the kernel does not touch an event between tail and head.
            let event = unsafe { self.events.add(head as usize).read() };
            head = if head + 1 == self.nr { 0 } else { head + 1 };
            // A slot number the engine did not hand out is caught by the queue's table.
            let slot = u16::try_from(event.data).unwrap_or(u16::MAX);
            *to = Completion {
                slot,
                result: event.res,
            };
            taken += 1;
        }
        // Pairs with the kernel's read of `head` in user_refill_reqs_available (under its
        // completion_lock): it reuses an entry only after our reads of it are done.
        header.head.store(head, Ordering::Release);
        taken
    }
}
