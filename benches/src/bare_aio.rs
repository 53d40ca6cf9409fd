//! The floor: a loop of raw `io_submit` with nothing around it. One file, one buffer per slot, no
//! retries, no owners; any error ends it.

// UNSAFETY: raw system calls that take addresses of control blocks and buffers, and the completion
// ring that the kernel maps.
#![expect(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use ioq::AlignedBuf;

use crate::Error;
use crate::transfer::Transfer;

/// How completions are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reap {
    /// From the mapped ring: no system call. The true floor.
    Ring,
    /// With `io_getevents`, as most programs do.
    GetEvents,
    /// From the mapped ring, and where that is empty with `io_getevents`, which sleeps: for disks, whose completions
    /// take their time.
    RingOrSleep,
}

/// Completions taken at once.
pub(crate) const REAP_MAX: usize = 32;

/// `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct IoEvent {
    data: u64,
    obj: u64,
    res: i64,
    res2: i64,
}

/// The header of `struct aio_ring`; the events follow.
#[repr(C)]
struct RingHeader {
    id: u32,
    nr: u32,
    head: AtomicU32,
    tail: AtomicU32,
    magic: u32,
    compat_features: u32,
    incompat_features: u32,
    header_length: u32,
}

/// `AIO_RING_MAGIC`.
const RING_MAGIC: u32 = 0xa10a_10a1;
/// `IOCB_CMD_PREAD`.
const CMD_PREAD: u16 = 0;
/// `IOCB_CMD_PWRITE`.
const CMD_PWRITE: u16 = 1;
/// `IOCB_FLAG_RESFD`.
const FLAG_RESFD: u32 = 1;

#[derive(Debug)]
pub(crate) struct BareAio {
    context: libc::c_ulong,
    /// On Linux a context's id is the address of its completion ring.
    ring: usize,
    reap: Reap,
    transfer: Transfer,
    iocbs: Box<[libc::iocb]>,
    /// Of the batch.
    pointers: Vec<*mut libc::iocb>,
    /// Free slots.
    free: Vec<usize>,
    buffers: Box<[AlignedBuf]>,
    file: File,
    resfd: Option<nix::sys::eventfd::EventFd>,
}

impl BareAio {
    /// With `resfd` each completion also signals an eventfd, which nobody reads.
    pub(crate) fn new(
        file: File,
        transfer: Transfer,
        depth: u16,
        reap: Reap,
        resfd: bool,
    ) -> Result<Self, Error> {
        let mut context = 0;
        // SAFETY: `context` is writable and 0.
        let rc = unsafe {
            libc::syscall(
                libc::SYS_io_setup,
                libc::c_long::from(depth),
                &raw mut context,
            )
        };
        if rc < 0 {
            return Err(io::Error::last_os_error().into());
        }
        let depth = usize::from(depth);
        let buffers = transfer.buffers(depth)?;
        let bare = Self {
            context,
            ring: usize::try_from(context)?,
            reap,
            transfer,
            // SAFETY: plain integers, for which zero is a value.
            iocbs: vec![unsafe { std::mem::zeroed() }; depth].into_boxed_slice(),
            pointers: Vec::with_capacity(depth),
            free: (0..depth).collect(),
            buffers,
            file,
            resfd: resfd.then(nix::sys::eventfd::EventFd::new).transpose()?,
        };
        if reap != Reap::GetEvents && bare.ring().magic != RING_MAGIC {
            return Err("the kernel maps no completion ring".into());
        }
        Ok(bare)
    }

    /// Puts the transfer of block `number` into the batch, and returns its slot. None: no slot is free.
    #[inline]
    pub(crate) fn queue(&mut self, number: u64) -> Option<usize> {
        let slot = self.free.pop()?;
        let iocb = &mut self.iocbs[slot];
        iocb.aio_data = slot as u64;
        iocb.aio_lio_opcode = if self.transfer.write {
            CMD_PWRITE
        } else {
            CMD_PREAD
        };
        iocb.aio_fildes = self.file.as_raw_fd().cast_unsigned();
        iocb.aio_buf = self.buffers[slot].as_mut_ptr().expose_provenance() as u64;
        let len = self.transfer.len as u64;
        iocb.aio_nbytes = len;
        iocb.aio_offset = (number * len).cast_signed();
        if let Some(resfd) = &self.resfd {
            iocb.aio_flags = FLAG_RESFD;
            iocb.aio_resfd = resfd.as_raw_fd().cast_unsigned();
        }
        self.pointers.push(ptr::from_mut(iocb));
        Some(slot)
    }

    /// Submits the batch.
    #[inline]
    pub(crate) fn submit(&mut self) -> Result<(), Error> {
        let count = self.pointers.len();
        // SAFETY: control blocks and the buffers they name stay where they are until the context is
        // destroyed; each slot is used once at a time.
        let rc = unsafe {
            libc::syscall(
                libc::SYS_io_submit,
                self.context,
                count,
                self.pointers.as_ptr(),
            )
        };
        self.pointers.clear();
        if usize::try_from(rc) == Ok(count) {
            Ok(())
        } else {
            Err(format!(
                "io_submit took {rc} of {count}: {}",
                io::Error::last_os_error()
            )
            .into())
        }
    }

    /// Hands out what has completed, at most [`REAP_MAX`] at a time: the slot and the first word of each block.
    #[inline]
    pub(crate) fn reap(&mut self, mut complete: impl FnMut(usize, u64)) -> Result<usize, Error> {
        let mut events = [IoEvent::default(); REAP_MAX];
        let count = match self.reap {
            Reap::Ring => self.take(&mut events),
            Reap::GetEvents => self.get_events(&mut events)?,
            Reap::RingOrSleep => match self.take(&mut events) {
                0 => self.get_events(&mut events)?,
                count => count,
            },
        };
        for event in &events[..count] {
            if usize::try_from(event.res) != Ok(self.transfer.len) {
                return Err(format!("a transfer gave {}", event.res).into());
            }
            let slot = usize::try_from(event.data)?;
            let mut word = [0; 8];
            word.copy_from_slice(&self.buffers[slot][..8]);
            complete(slot, u64::from_le_bytes(word));
            self.free.push(slot);
        }
        Ok(count)
    }

    /// Whether nothing is in flight.
    pub(crate) fn is_quiet(&self) -> bool {
        self.free.len() == self.iocbs.len()
    }

    fn ring(&self) -> &RingHeader {
        let header = ptr::with_exposed_provenance::<RingHeader>(self.ring);
        // SAFETY: mapped until `io_destroy`; what changes in it is atomic.
        unsafe { &*header }
    }

    #[inline]
    fn take(&self, events: &mut [IoEvent]) -> usize {
        let ring = self.ring();
        let first = ptr::from_ref(ring).wrapping_add(1).cast::<IoEvent>();
        let mut head = ring.head.load(Ordering::Relaxed);
        // Pairs with smp_wmb in aio_complete (fs/aio.c).
        let tail = ring.tail.load(Ordering::Acquire);
        let mut count = 0;
        while head != tail && count < events.len() {
            // SAFETY: head < nr, and the kernel does not touch events between tail and head.
            events[count] = unsafe { first.add(head as usize).read() };
            head = (head + 1) % ring.nr;
            count += 1;
        }
        // Pairs with the kernel's read of head: our reads are done before an entry is reused.
        ring.head.store(head, Ordering::Release);
        count
    }

    fn get_events(&self, events: &mut [IoEvent]) -> Result<usize, Error> {
        let min: libc::c_long = 1;
        // SAFETY: `events` has room for its length; a null timeout waits.
        let rc = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                min,
                events.len(),
                events.as_mut_ptr(),
                ptr::null_mut::<libc::timespec>(),
            )
        };
        usize::try_from(rc).map_err(|_| io::Error::last_os_error().into())
    }
}

impl Drop for BareAio {
    fn drop(&mut self) {
        // Waits for what is in flight, so the buffers outlive it.
        // SAFETY: the context came from io_setup and is not used again.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}
