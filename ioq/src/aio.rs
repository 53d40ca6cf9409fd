//! Linux AIO through raw system calls.

// UNSAFETY: io_setup, io_submit, io_getevents and io_destroy are raw system calls that take
// addresses of control blocks.
#![expect(unsafe_code)]

mod abi;
mod ring;

use std::collections::vec_deque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use crate::engine::{BlockingFile, Completion, Engine, Submission};
use crate::error::SetupError;
use crate::notifier::Notifier;
use crate::op::{Durability, Op, Opcode, Table};
use abi::{IoEvent, Iocb};
use ring::Ring;

/// Tries of one system call that keeps being interrupted. A signal storm must not hold the data
/// thread; what is left over is parked and tried again later.
const INTERRUPTED_TRIES_MAX: usize = 16;

/// Events per io_getevents where the ring cannot be read; 1 KiB of stack.
const GETEVENTS_BATCH: usize = 32;

/// How completions are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CompletionSource {
    /// The mapped ring if its layout is known, otherwise io_getevents.
    RingIfUsable,
    /// io_getevents, for testing the fallback.
    #[cfg(test)]
    SystemCall,
}

/// An AIO context and its control blocks.
#[derive(Debug)]
pub(crate) struct LinuxAio {
    /// `aio_context_t`; `None` once destroyed.
    ctx: Option<libc::c_ulong>,
    ring: Option<Ring>,
    file: Arc<File>,
    notifier: Arc<Notifier>,
    /// One control block per slot. The kernel copies it in io_submit, but for the address.
    iocbs: Box<[Iocb]>,
    /// Addresses for one io_submit, capacity fixed at the depth.
    batch: Vec<*mut Iocb>,
    /// Until the kernel or the file has refused `IOCB_CMD_FDSYNC` once.
    fdsync: bool,
}

// SAFETY: `batch` holds pointers into `iocbs` only within a call of `submit`; an AIO context
// belongs to the process, not to a thread.
unsafe impl Send for LinuxAio {}

impl LinuxAio {
    pub(crate) fn new(
        file: Arc<File>,
        depth: u16,
        source: CompletionSource,
    ) -> Result<Self, SetupError> {
        // SAFETY: no pointer is passed.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        if flags < 0 {
            return Err(SetupError::File(io::Error::last_os_error()));
        }
        if flags & libc::O_APPEND != 0 {
            return Err(SetupError::AppendMode);
        }
        let notifier = Arc::new(Notifier::new().map_err(SetupError::EventFd)?);
        let mut ctx: libc::c_ulong = 0;
        // SAFETY: `ctx` is writable and 0, as io_setup demands.
        let rc =
            unsafe { libc::syscall(libc::SYS_io_setup, libc::c_long::from(depth), &raw mut ctx) };
        if rc < 0 {
            let error = io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(libc::EAGAIN) => SetupError::AioLimit { depth },
                _ => SetupError::AioUnavailable(error),
            });
        }
        let ring = match source {
            // SAFETY: `ctx` came from io_setup; `quiesce` drops the ring before io_destroy.
            CompletionSource::RingIfUsable => unsafe { Ring::of_context(ctx, depth) },
            #[cfg(test)]
            CompletionSource::SystemCall => None,
        };
        Ok(Self {
            ctx: Some(ctx),
            ring,
            file,
            notifier,
            iocbs: vec![Iocb::default(); usize::from(depth)].into_boxed_slice(),
            batch: Vec::with_capacity(usize::from(depth)),
            fdsync: true,
        })
    }

    #[cfg(test)]
    pub(crate) fn reads_ring(&self) -> bool {
        self.ring.is_some()
    }

    fn iocb(&self, slot: u16, op: &Op, table: &Table) -> Iocb {
        let mut iocb = Iocb {
            data: u64::from(slot),
            fd: self.file.as_raw_fd().cast_unsigned(),
            flags: abi::FLAG_RESFD,
            resfd: self.notifier.raw().cast_unsigned(),
            ..Iocb::default()
        };
        let (single, vectored) = match op.opcode {
            // Everything else must be zero.
            Opcode::Fdatasync => {
                iocb.opcode = abi::CMD_FDSYNC;
                return iocb;
            }
            Opcode::Read => (abi::CMD_PREAD, abi::CMD_PREADV),
            Opcode::Write(durability) => {
                if durability == Durability::WriteThrough {
                    iocb.rw_flags = abi::RWF_DSYNC;
                }
                (abi::CMD_PWRITE, abi::CMD_PWRITEV)
            }
        };
        // The end of the operation is at most i64::MAX (`Table::prepare_transfer`).
        iocb.offset = i64::try_from(op.offset).unwrap_or(i64::MAX);
        match table.segments(slot) {
            // Saves the kernel copying and checking a vector.
            [segment] => {
                iocb.opcode = single;
                iocb.buf = segment.iov_base.expose_provenance() as u64;
                iocb.nbytes = segment.iov_len as u64;
            }
            segments => {
                iocb.opcode = vectored;
                iocb.buf = segments.as_ptr().expose_provenance() as u64;
                iocb.nbytes = segments.len() as u64;
            }
        }
        iocb
    }

    fn get_events(&self, ctx: libc::c_ulong, out: &mut [Completion]) -> usize {
        let mut events = [IoEvent::default(); GETEVENTS_BATCH];
        let mut taken = 0;
        while taken < out.len() {
            let want = (out.len() - taken).min(GETEVENTS_BATCH);
            let mut now = libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            let min: libc::c_long = 0;
            let mut got = 0;
            for _ in 0..INTERRUPTED_TRIES_MAX {
                // SAFETY: `events` has room for `want` events; all outlive the call.
                let rc = unsafe {
                    libc::syscall(
                        libc::SYS_io_getevents,
                        ctx,
                        min,
                        want,
                        events.as_mut_ptr(),
                        &raw mut now,
                    )
                };
                if rc >= 0 {
                    got = usize::try_from(rc).unwrap_or(0).min(want);
                    break;
                }
                if io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
                    break;
                }
            }
            for (to, event) in out[taken..].iter_mut().zip(&events[..got]) {
                let slot = u16::try_from(event.data).unwrap_or(u16::MAX);
                *to = Completion {
                    slot,
                    result: event.res,
                };
            }
            taken += got;
            if got < want {
                break;
            }
        }
        taken
    }
}

impl Engine for LinuxAio {
    fn submit(&mut self, slots: vec_deque::Iter<'_, u16>, table: &Table) -> Submission {
        let Some(ctx) = self.ctx else {
            return Submission::Again;
        };
        let mut first = None;
        self.batch.clear();
        let iocbs = self.iocbs.as_mut_ptr();
        for &slot in slots {
            let op = table.op(slot);
            if op.opcode == Opcode::Fdatasync && !self.fdsync {
                break;
            }
            first.get_or_insert(op.opcode);
            assert!(usize::from(slot) < self.iocbs.len(), "slot out of range");
            // SAFETY: just checked to be in range.
            let iocb = unsafe { iocbs.add(usize::from(slot)) };
            // SAFETY: in range, and no reference to the control blocks exists here.
            unsafe { iocb.write(self.iocb(slot, op, table)) };
            self.batch.push(iocb);
        }
        let Some(first) = first else {
            return Submission::Unsupported;
        };
        for _ in 0..INTERRUPTED_TRIES_MAX {
            // SAFETY: `batch` holds addresses of control blocks of this context that stay in
            // place; the segments they name are in `table`, where they stay until the slot
            // comes back; the memory those name is kept by the slot's owner, which the queue
            // neither gives back before that nor drops before `quiesce`.
            let rc = unsafe {
                libc::syscall(
                    libc::SYS_io_submit,
                    ctx,
                    self.batch.len(),
                    self.batch.as_ptr(),
                )
            };
            if let Ok(accepted @ 1..) = usize::try_from(rc) {
                return Submission::Accepted(accepted);
            }
            if rc == 0 {
                return Submission::Again;
            }
            match io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO)
            {
                libc::EINTR => {}
                libc::EAGAIN => return Submission::Again,
                // Before Linux 4.18, or a file that has no fsync.
                libc::EINVAL | libc::EOPNOTSUPP if first == Opcode::Fdatasync => {
                    self.fdsync = false;
                    return Submission::Unsupported;
                }
                errno => return Submission::Refused(errno),
            }
        }
        Submission::Again
    }

    fn reap(&mut self, out: &mut [Completion]) -> usize {
        match (&self.ring, self.ctx) {
            (Some(ring), _) => ring.take(out),
            (None, Some(ctx)) => self.get_events(ctx, out),
            (None, None) => 0,
        }
    }

    fn completions_pending(&self) -> bool {
        // Without the ring only the eventfd tells.
        self.ring.as_ref().is_some_and(|ring| !ring.is_empty())
    }

    fn notifier(&self) -> Option<&Arc<Notifier>> {
        Some(&self.notifier)
    }

    fn blocking(&self) -> Option<Arc<dyn BlockingFile>> {
        Some(Arc::new(Descriptor(Arc::clone(&self.file))))
    }

    fn quiesce(&mut self) -> bool {
        // The kernel unmaps the ring.
        self.ring = None;
        let Some(ctx) = self.ctx.take() else {
            return true;
        };
        // Blocks until every operation of the context has completed (kill_ioctx in fs/aio.c).
        // SAFETY: `ctx` came from io_setup and is not used again.
        let rc = unsafe { libc::syscall(libc::SYS_io_destroy, ctx) };
        rc == 0
    }
}

impl Drop for LinuxAio {
    fn drop(&mut self) {
        // Does nothing unless setting up the queue failed half-way.
        self.quiesce();
    }
}

/// The file, for the worker.
#[derive(Debug)]
struct Descriptor(Arc<File>);

impl BlockingFile for Descriptor {
    fn fdatasync(&self) -> i64 {
        for _ in 0..INTERRUPTED_TRIES_MAX {
            // SAFETY: no pointer is passed.
            if unsafe { libc::fdatasync(self.0.as_raw_fd()) } == 0 {
                return 0;
            }
            let errno = io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO);
            if errno != libc::EINTR {
                return -i64::from(errno);
            }
        }
        -i64::from(libc::EINTR)
    }
}
