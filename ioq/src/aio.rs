//! Linux AIO through raw system calls.

// UNSAFETY: io_setup, io_submit, io_getevents and io_destroy are raw system calls that take
// addresses of control blocks.
#![expect(unsafe_code)]

mod abi;
mod ring;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;

use libc::iovec;

use crate::backend::{
    Arming, Backend, BlockingFile, Completion, INTERRUPTED_TRIES_MAX, Submission, take_at_most,
};
use crate::blocking::Blocking;
use crate::engine::{self, Engine};
use crate::error::SetupError;
use crate::notifier::Notifier;
use crate::op::{Durability, Op, Opcode, Table};
use abi::{IoEvent, Iocb};
use ring::Ring;

/// Submit calls in a row whose operations had all completed when the call returned, after which a
/// disarmed queue submits without the eventfd. A file that completes so (tmpfs, or any buffered
/// one) does it always; a disk that is quick by chance does not do it so often.
const INLINE_STREAK: u8 = 16;

/// Operations that io_submit takes without gathering them (`AIO_PLUG_THRESHOLD` in fs/aio.c).
const UNPLUGGED: usize = 2;

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
    /// Keeps the file open.
    blocking: Arc<Blocking>,
    notifier: Arc<Notifier>,
    /// One control block per slot, what never changes filled in. The kernel copies it in
    /// io_submit, but for the address.
    iocbs: Box<[Iocb]>,
    /// Addresses for one io_submit, as many as slots.
    batch: Box<[*mut Iocb]>,
    /// Until the kernel or the file has refused `IOCB_CMD_FDSYNC` once.
    fdsync: bool,
    armed: bool,
    /// Submit calls in a row as [`INLINE_STREAK`] says, up to that.
    inline: u8,
    /// Operations taken by the kernel whose completions were not reaped, and how many of them
    /// complete without signalling.
    in_flight: usize,
    silent: usize,
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
        engine::check(&file)?;
        let blocking = Blocking::new(Arc::clone(&file)).map_err(SetupError::File)?;
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
        let blank = Iocb {
            fd: file.as_raw_fd().cast_unsigned(),
            resfd: notifier.as_raw_fd().cast_unsigned(),
            ..Iocb::default()
        };
        let iocbs = (0..depth).map(|slot| Iocb {
            data: u64::from(slot),
            ..blank
        });
        Ok(Self {
            ctx: Some(ctx),
            ring,
            blocking: Arc::new(blocking),
            notifier,
            iocbs: iocbs.collect(),
            batch: vec![ptr::null_mut(); usize::from(depth)].into_boxed_slice(),
            fdsync: true,
            armed: true,
            inline: 0,
            in_flight: 0,
            silent: 0,
        })
    }

    #[cfg(test)]
    pub(crate) fn reads_ring(&self) -> bool {
        self.ring.is_some()
    }

    /// Whether operations submitted now need not signal: nobody waits for a signal, and they are
    /// expected to have completed before the submit call returns.
    #[inline]
    fn may_be_silent(&self) -> bool {
        !self.armed && self.inline == INLINE_STREAK && self.ring.is_some()
    }

    /// Operations for one io_submit. The kernel gathers those of a call and starts none before all are prepared, a
    /// microsecond or two each (`blk_start_plug`): a disk that has little to do gets the first ones by themselves, and as
    /// many more each time as half of what it has. Where operations end within the call there is nothing to wait for.
    #[inline]
    fn most_at_once(&self) -> usize {
        if self.inline == INLINE_STREAK {
            usize::MAX
        } else {
            (self.in_flight / 2).max(UNPLUGGED)
        }
    }

    /// Accounts for operations the kernel has just taken, of which `silent` will not signal.
    #[inline]
    fn accepted(&mut self, taken: usize, silent: usize) {
        self.in_flight += taken;
        self.silent += silent;
        let completed = self.ring.as_ref().map_or(0, Ring::len);
        self.inline = if completed >= self.in_flight {
            (self.inline + 1).min(INLINE_STREAK)
        } else {
            0
        };
    }

    /// How many of the first `taken` of the batch do not signal.
    #[cold]
    fn silent_of(&self, taken: usize) -> usize {
        let batch = self.batch[..taken].iter();
        // SAFETY: addresses of control blocks in `iocbs`, to which no reference exists here.
        batch.filter(|&&iocb| unsafe { (*iocb).flags } == 0).count()
    }

    #[inline]
    fn reaped(&mut self, completions: &[Completion]) {
        let count = completions.len();
        // Nearly always all that is in flight signals, or none of it does.
        let silent = match self.silent {
            0 => 0,
            all if all == self.in_flight => count,
            _ => self.silent_among(completions),
        };
        self.in_flight = self.in_flight.saturating_sub(count);
        self.silent = self.silent.saturating_sub(silent);
        if count > silent {
            self.notifier.expect_signal();
        }
    }

    /// How many of the completions did not signal.
    #[cold]
    fn silent_among(&self, completions: &[Completion]) -> usize {
        let slots = completions
            .iter()
            .map(|completion| usize::from(completion.slot));
        let iocbs = slots.filter_map(|slot| self.iocbs.get(slot));
        iocbs.filter(|iocb| iocb.flags == 0).count()
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

impl Backend for LinuxAio {
    fn engine(&self) -> Engine {
        Engine::LinuxAio
    }

    fn submit(&mut self, slots: &[u16], table: &Table) -> Submission {
        let Some(ctx) = self.ctx else {
            return Submission::Again;
        };
        let slots = &slots[..slots.len().min(self.most_at_once())];
        let flags = if self.may_be_silent() {
            0
        } else {
            abi::FLAG_RESFD
        };
        let mut filled = 0;
        // An fdatasync always completes later, so it is never silent.
        let mut syncs = 0;
        let slab = self.iocbs.len();
        let iocbs = self.iocbs.as_mut_ptr();
        for &slot in slots {
            let (op, segments) = table.parts(slot);
            if op.opcode == Opcode::Fdatasync {
                if !self.fdsync {
                    break;
                }
                syncs += 1;
            }
            assert!(usize::from(slot) < slab, "slot out of range");
            // SAFETY: just checked to be in range.
            let iocb = unsafe { iocbs.add(usize::from(slot)) };
            // SAFETY: in range, and no other reference to the control blocks exists here.
            if !fill(unsafe { &mut *iocb }, op, segments, flags) {
                break;
            }
            // Not more than there are slots.
            self.batch[filled] = iocb;
            filled += 1;
        }
        let Some(&first) = slots.first() else {
            return Submission::Accepted {
                taken: 0,
                backlog: 0,
            };
        };
        if filled == 0 {
            return Submission::Unsupported;
        }
        for _ in 0..INTERRUPTED_TRIES_MAX {
            let submitted = take_at_most(filled).and_then(|count| {
                // SAFETY: `batch` holds addresses of control blocks of this context that stay in
                // place; the segments they name are in `table`, where they stay until the slot
                // comes back; the memory those name is kept by the slot's owner, which the queue
                // neither gives back before that nor drops before `quiesce`.
                let rc =
                    unsafe { libc::syscall(libc::SYS_io_submit, ctx, count, self.batch.as_ptr()) };
                usize::try_from(rc).map_err(|_| {
                    io::Error::last_os_error()
                        .raw_os_error()
                        .unwrap_or(libc::EIO)
                })
            });
            match submitted {
                Ok(0) => return Submission::Again,
                Ok(taken) => {
                    let taken = taken.min(filled);
                    let silent = match flags {
                        abi::FLAG_RESFD => 0,
                        _ if syncs == 0 => taken,
                        _ => self.silent_of(taken),
                    };
                    self.accepted(taken, silent);
                    return Submission::Accepted { taken, backlog: 0 };
                }
                Err(libc::EINTR) => {}
                Err(libc::EAGAIN) => return Submission::Again,
                // Before Linux 4.18, or a file that has no fsync.
                Err(libc::EINVAL | libc::EOPNOTSUPP)
                    if table.op(first).opcode == Opcode::Fdatasync =>
                {
                    self.fdsync = false;
                    return Submission::Unsupported;
                }
                Err(errno) => return Submission::Refused(errno),
            }
        }
        Submission::Again
    }

    fn reap(&mut self, out: &mut [Completion]) -> usize {
        let taken = match (&self.ring, self.ctx) {
            (Some(ring), _) => ring.take(out),
            (None, Some(ctx)) => self.get_events(ctx, out),
            (None, None) => 0,
        };
        if taken > 0 {
            self.reaped(&out[..taken]);
        }
        taken
    }

    fn completions_pending(&self) -> bool {
        // Without the ring only the eventfd tells.
        self.ring.as_ref().is_some_and(|ring| !ring.is_empty())
    }

    fn sees_completions(&self) -> bool {
        self.ring.is_some()
    }

    fn completes_on_submit(&self) -> bool {
        self.inline == INLINE_STREAK
    }

    fn notifier(&self) -> Option<&Arc<Notifier>> {
        Some(&self.notifier)
    }

    fn disarm(&mut self) {
        self.armed = false;
    }

    fn arm(&mut self) -> Arming {
        self.armed = true;
        if self.completions_pending() {
            Arming::Pending
        } else if self.silent > 0 {
            Arming::Silent(self.silent)
        } else {
            Arming::Armed
        }
    }

    fn blocking(&self) -> Option<Arc<dyn BlockingFile>> {
        Some(Arc::<Blocking>::clone(&self.blocking))
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

/// Fills in a control block, but for what never changes. False: not an operation of Linux AIO.
#[inline]
fn fill(iocb: &mut Iocb, op: &Op, segments: &[iovec], flags: u32) -> bool {
    iocb.flags = flags;
    iocb.rw_flags = 0;
    let (single, vectored) = match op.opcode {
        Opcode::Read => (abi::CMD_PREAD, abi::CMD_PREADV),
        Opcode::Write(durability) => {
            if durability == Durability::WriteThrough {
                iocb.rw_flags = abi::RWF_DSYNC;
            }
            (abi::CMD_PWRITE, abi::CMD_PWRITEV)
        }
        Opcode::Fdatasync => {
            iocb.opcode = abi::CMD_FDSYNC;
            iocb.flags = abi::FLAG_RESFD;
            // Everything else must be zero.
            (iocb.buf, iocb.nbytes, iocb.offset) = (0, 0, 0);
            return true;
        }
        Opcode::Discard | Opcode::SecureErase | Opcode::WriteZeroes(..) => return false,
    };
    // The end of the operation is at most i64::MAX (`Table::prepare_transfer`).
    iocb.offset = op.offset.cast_signed();
    match segments {
        // Saves the kernel copying and checking a vector, and may not be where the kernel finds it.
        [segment] => {
            iocb.opcode = single;
            iocb.buf = segment.iov_base.expose_provenance() as u64;
            iocb.nbytes = segment.iov_len as u64;
        }
        _ => {
            iocb.opcode = vectored;
            iocb.buf = segments.as_ptr().expose_provenance() as u64;
            iocb.nbytes = segments.len() as u64;
        }
    }
    true
}
