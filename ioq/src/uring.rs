//! io_uring: one enter per batch, a registered file, completions read from the mapped ring.

// UNSAFETY: entries pushed into the submission ring hold addresses the kernel will use; looking at the rings
// through `&self` needs a promise that nobody else does.
#![expect(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use io_uring::types::{CancelBuilder, Fixed, FsyncFlags, Timespec};
use io_uring::{EnterFlags, IoUring, Probe, opcode, squeue};

use crate::backend::{
    Arming, Backend, BlockingFile, Completion, INTERRUPTED_TRIES_MAX, Submission, take_at_most,
};
use crate::blocking::Blocking;
use crate::engine::{self, Engine};
use crate::error::SetupError;
use crate::notifier::Notifier;
use crate::op::{Durability, Op, Opcode, Table};

/// The registered file, the only one.
const FILE: Fixed = Fixed(0);

/// Most bytes one entry can ask for: the kernel moves no more at a time (`MAX_RW_COUNT` with pages of
/// 4 KiB), and the rest is continued like any short transfer.
const BYTES_MAX: u32 = 0x7fff_f000;

/// Entries of the largest submission ring (`IORING_MAX_ENTRIES`). The completion ring has twice as
/// many, so even the deepest queue cannot overflow it.
const ENTRIES_MAX: u32 = 32_768;

/// User data of the entry that `new` tries the ring with; never a slot's.
const SELF_TEST: u64 = u64::MAX;

/// Operations this engine needs, all of Linux 5.6 or earlier, and one that tells of 5.8: before that the completion
/// ring has no flags to disable the eventfd in, and what is written there overwrites the head of the submission
/// ring.
const NEEDED: [u8; 6] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Tee::CODE,
];

/// A ring, its registered file and eventfd.
pub(crate) struct Uring {
    /// `None` once quiet.
    ring: Option<IoUring>,
    blocking: Arc<Blocking>,
    notifier: Arc<Notifier>,
    /// Entries the kernel has consumed whose completions were not taken.
    in_kernel: usize,
    /// Slots of entries in the ring that the kernel has not consumed, for want of a resource. An
    /// entry cannot be taken back, so these count as accepted. Capacity the depth.
    staged: Vec<u16>,
    /// The ring is unusable: what was staged then, to be handed back with the error.
    failed: Vec<Completion>,
    dead: Option<i32>,
    armed: bool,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring")
            .field("in_kernel", &self.in_kernel)
            .field("staged", &self.staged.len())
            .field("dead", &self.dead)
            .finish_non_exhaustive()
    }
}

impl Uring {
    pub(crate) fn new(file: Arc<File>, depth: u16) -> Result<Self, SetupError> {
        engine::check(&file)?;
        let notifier = Arc::new(Notifier::new().map_err(SetupError::EventFd)?);
        let mut ring = build(depth).map_err(SetupError::IoUringUnavailable)?;
        prepare(&mut ring, &file, &notifier).map_err(SetupError::IoUringUnavailable)?;
        Ok(Self {
            ring: Some(ring),
            blocking: Arc::new(Blocking::new(file).map_err(SetupError::File)?),
            notifier,
            in_kernel: 0,
            staged: Vec::with_capacity(usize::from(depth)),
            failed: Vec::new(),
            dead: None,
            armed: true,
        })
    }

    /// Lets the kernel consume what is in the submission ring. On return `staged` holds what it
    /// did not.
    fn enter(&mut self, pushed: &[u16]) {
        let Some(ring) = &mut self.ring else { return };
        let mut left = self.staged.len() + pushed.len();
        let all = left;
        let mut interrupted = 0;
        while left > 0 {
            let entered = take_at_most(left).and_then(|most| {
                // Completions of the disk are put off until the thread next enters the kernel
                // anyway, so nothing else is asked for here.
                let most = u32::try_from(most).unwrap_or(u32::MAX);
                // SAFETY: no argument beyond numbers. The entries were pushed by `submit`.
                let entered = unsafe { ring.submitter().enter::<libc::sigset_t>(most, 0, 0, None) };
                entered.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))
            });
            match entered {
                Ok(0) | Err(libc::EAGAIN | libc::EBUSY) => break,
                // The kernel stops at an entry it refuses, whose error is a completion like any
                // other: go on with the next.
                Ok(consumed) => left -= consumed.min(left),
                Err(libc::EINTR) if interrupted < INTERRUPTED_TRIES_MAX => interrupted += 1,
                Err(libc::EINTR) => break,
                // The ring is of no use any more: the process has closed it or has forbidden itself
                // to use it. What is left in it must never be consumed, since it fails now.
                Err(errno) => {
                    self.dead = Some(errno);
                    break;
                }
            }
        }
        self.in_kernel += all - left;
        if left == 0 {
            self.staged.clear();
            return;
        }
        // Rare. In the order of the ring: what was staged before, then what was pushed.
        self.staged.extend_from_slice(pushed);
        self.staged.drain(..all - left);
        if let Some(errno) = self.dead {
            let result = -i64::from(errno);
            let slots = self.staged.drain(..);
            self.failed
                .extend(slots.map(|slot| Completion { slot, result }));
        }
    }

    /// Takes completions from the ring.
    fn take(&mut self, out: &mut [Completion]) -> usize {
        let Some(ring) = &mut self.ring else { return 0 };
        let mut taken = 0;
        for (to, entry) in out.iter_mut().zip(ring.completion()) {
            // A slot number not handed out is caught by the queue's table.
            let slot = u16::try_from(entry.user_data()).unwrap_or(u16::MAX);
            let result = i64::from(entry.result());
            *to = Completion { slot, result };
            taken += 1;
        }
        self.in_kernel = self.in_kernel.saturating_sub(taken);
        taken
    }

    /// Whether the kernel has completions ready that only need this thread to enter it.
    fn task_work_waits(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| {
            // SAFETY: rings are looked at by this value alone, and it is not `Sync`; no other view
            // of the submission ring is alive.
            unsafe { ring.submission_shared() }.taskrun()
        })
    }

    fn run_task_work(&self) {
        if let Some(ring) = &self.ring {
            let flags = EnterFlags::GETEVENTS.bits();
            // An error leaves the flag set, and the next reap tries again.
            // SAFETY: no argument beyond numbers.
            let _ = unsafe { ring.submitter().enter::<libc::sigset_t>(0, 0, flags, None) };
        }
    }
}

impl Backend for Uring {
    fn engine(&self) -> Engine {
        Engine::IoUring
    }

    fn submit(&mut self, slots: &[u16], table: &Table) -> Submission {
        if let Some(errno) = self.dead {
            return match slots {
                [] => Submission::Accepted {
                    taken: 0,
                    backlog: 0,
                },
                _ => Submission::Refused(errno),
            };
        }
        let Some(ring) = &mut self.ring else {
            return Submission::Again;
        };
        let mut taken = 0;
        let mut first_unsupported = false;
        {
            let mut entries = ring.submission();
            for &slot in slots {
                let Some(entry) = entry(slot, table) else {
                    first_unsupported = taken == 0;
                    break;
                };
                // SAFETY: the segments an entry names are in `table`, where they stay until the slot
                // comes back; the memory those name is kept by the slot's owner, which the queue
                // neither gives back before that nor drops before `quiesce`.
                if unsafe { entries.push(&entry) }.is_err() {
                    break;
                }
                taken += 1;
            }
        }
        if first_unsupported {
            return Submission::Unsupported;
        }
        self.enter(&slots[..taken]);
        if taken == 0 && !slots.is_empty() {
            return Submission::Again;
        }
        Submission::Accepted {
            taken,
            backlog: self.staged.len(),
        }
    }

    fn reap(&mut self, out: &mut [Completion]) -> usize {
        let mut taken = self.take(out);
        if taken == 0 && self.task_work_waits() {
            self.run_task_work();
            taken = self.take(out);
        }
        if taken > 0 && self.armed {
            self.notifier.expect_signal();
        }
        while taken < out.len() {
            let Some(failed) = self.failed.pop() else {
                break;
            };
            out[taken] = failed;
            taken += 1;
        }
        taken
    }

    fn completions_pending(&self) -> bool {
        let in_ring = self.ring.as_ref().is_some_and(|ring| {
            // SAFETY: as in `task_work_waits`.
            !unsafe { ring.completion_shared() }.is_empty()
        });
        in_ring || !self.failed.is_empty() || self.task_work_waits()
    }

    fn notifier(&self) -> Option<&Arc<Notifier>> {
        Some(&self.notifier)
    }

    fn disarm(&mut self) {
        if self.armed
            && let Some(ring) = &mut self.ring
        {
            ring.completion().disable_eventfd();
            self.armed = false;
        }
    }

    fn arm(&mut self) -> Arming {
        if !self.armed
            && let Some(ring) = &mut self.ring
        {
            ring.completion().enable_eventfd();
            self.armed = true;
            // The flag is cleared before the tail is read below. Pairs with the full barrier between the
            // kernel's store of the tail and its look at the flag (io_cqring_wake, before
            // io_eventfd_signal): either we see the completion or the kernel signals it.
            fence(Ordering::SeqCst);
        }
        if self.completions_pending() {
            Arming::Pending
        } else {
            Arming::Armed
        }
    }

    fn blocking(&self) -> Option<Arc<dyn BlockingFile>> {
        Some(Arc::<Blocking>::clone(&self.blocking))
    }

    fn quiesce(&mut self) -> bool {
        // Closing a ring neither cancels nor waits before it returns: the kernel does both later, in
        // the background, and would write to memory that is free by then.
        if self.in_kernel > 0
            && let Some(ring) = &self.ring
        {
            // Before Linux 6.0 this fails, and what is in flight takes its time.
            let now = Timespec::new();
            let _ = ring
                .submitter()
                .register_sync_cancel(Some(now), CancelBuilder::any());
        }
        while self.in_kernel > 0 {
            let mut completions = [Completion::default(); 16];
            if self.take(&mut completions) > 0 {
                continue;
            }
            let Some(ring) = &self.ring else { return false };
            let flags = EnterFlags::GETEVENTS.bits();
            // SAFETY: no argument beyond numbers.
            let waited = unsafe { ring.submitter().enter::<libc::sigset_t>(0, 1, flags, None) };
            match waited {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return false,
                _ => {}
            }
        }
        if let Some(ring) = self.ring.take() {
            // Or the kernel would let go of the file, and of its locks, only some time after the ring
            // is closed.
            let _ = ring.submitter().unregister_files();
        }
        true
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // Does nothing unless setting up the queue failed half-way.
        self.quiesce();
    }
}

/// The entry for a slot, or `None` for what io_uring would only hand to a kernel thread.
#[inline]
fn entry(slot: u16, table: &Table) -> Option<squeue::Entry> {
    let (op, segments) = table.parts(slot);
    let entry = match op.opcode {
        Opcode::Read => match segments {
            // Saves the kernel copying and checking a vector.
            [segment] => opcode::Read::new(FILE, segment.iov_base.cast(), bytes(segment.iov_len))
                .offset(op.offset)
                .build(),
            segments => opcode::Readv::new(FILE, segments.as_ptr(), count(op))
                .offset(op.offset)
                .build(),
        },
        Opcode::Write(durability) => {
            let flags = match durability {
                Durability::WriteBack => 0,
                Durability::WriteThrough => libc::RWF_DSYNC,
            };
            match segments {
                [segment] => {
                    opcode::Write::new(FILE, segment.iov_base.cast(), bytes(segment.iov_len))
                        .offset(op.offset)
                        .rw_flags(flags)
                        .build()
                }
                segments => opcode::Writev::new(FILE, segments.as_ptr(), count(op))
                    .offset(op.offset)
                    .rw_flags(flags)
                    .build(),
            }
        }
        Opcode::Fdatasync => opcode::Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build(),
        Opcode::Discard | Opcode::SecureErase | Opcode::WriteZeroes(..) => return None,
    };
    Some(entry.user_data(u64::from(slot)))
}

fn bytes(len: usize) -> u32 {
    u32::try_from(len).map_or(BYTES_MAX, |len| len.min(BYTES_MAX))
}

fn count(op: &Op) -> u32 {
    u32::from(op.count)
}

/// A ring for `depth` operations in flight.
fn build(depth: u16) -> io::Result<IoUring> {
    let entries = u32::from(depth).clamp(1, ENTRIES_MAX);
    // A completion of the disk waits for this thread's next entry into the kernel, and a flag
    // says that it waits: without that the kernel would interrupt the thread, on a virtual machine
    // by an exit, for each (Linux 5.19).
    let mut builder = IoUring::builder();
    builder.setup_coop_taskrun().setup_taskrun_flag();
    match builder.build(entries) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            IoUring::builder().build(entries)
        }
        built => built,
    }
}

/// Tries the ring out, so that a host which only refuses later is found now, then registers.
fn prepare(ring: &mut IoUring, file: &File, notifier: &Notifier) -> io::Result<()> {
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    if NEEDED.iter().any(|&code| !probe.is_supported(code)) {
        return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
    }
    // On a thread of the kernel's, of which each thread that submits keeps one once it has it: where the process may
    // have none (RLIMIT_NPROC, pids.max), every fdatasync would be cancelled.
    let nop = opcode::Nop::new()
        .build()
        .flags(squeue::Flags::ASYNC)
        .user_data(SELF_TEST);
    // SAFETY: the entry names no memory.
    unsafe { ring.submission().push(&nop) }
        .map_err(|_| io::Error::from_raw_os_error(libc::ENOSPC))?;
    loop {
        match ring.submit_and_wait(1) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
            Ok(_) => break,
        }
    }
    match ring.completion().next() {
        Some(entry) if entry.user_data() == SELF_TEST && entry.result() == 0 => {}
        Some(entry) if entry.result() == -libc::ECANCELED => {
            return Err(io::Error::other("the kernel can start no thread for it"));
        }
        _ => return Err(io::Error::from_raw_os_error(libc::EIO)),
    }
    ring.submitter().register_files(&[file.as_raw_fd()])?;
    ring.submitter().register_eventfd(notifier.as_raw_fd())
}
