//! The queue: what is made, asked and told by its caller. What happens to an operation from submit to
//! reap is in `run`.

// UNSAFETY: `queue_readv` and `queue_writev` take addresses the kernel will use later, a promise
// only their caller can make; dropping the owners only when the engine is quiet needs
// `ManuallyDrop`.
#![expect(unsafe_code)]

mod fifo;
mod run;

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use libc::iovec;

use self::fifo::Fifo;
use crate::aio::{CompletionSource, LinuxAio};
use crate::backend::{Arming, Backend, Completion};
use crate::buffer::IoBuf;
use crate::engine::{self, Engine, Fallback};
use crate::error::{QueueError, SetupError};
use crate::null::Null;
use crate::op::{Durability, Opcode, PrepareError, Table, Unmap};
use crate::segments::Segments;
use crate::uring::Uring;
use crate::worker::Workers;

/// Most segments an operation can have: `IOV_MAX`, above which the kernel refuses a vector.
pub const SEGMENTS_MAX: u16 = 1024;

/// Times an operation that comes back with `EINTR` or `EAGAIN` is tried again before the
/// error is delivered. Real causes pass at the first retry; a device that says nothing else must
/// not keep the data thread busy for ever.
pub const TRANSIENT_RETRIES_MAX: u8 = 8;

/// How long to wait before [`IoQueue::submit`] while [`IoQueue::needs_retry`]: the kernel is out of
/// memory for requests, and nothing of this queue will free any. Long enough not to burn
/// a CPU the host needs, short against the 30 s after which a Linux guest gives up on a request.
pub const RETRY_DELAY: Duration = Duration::from_millis(5);

/// Completions taken from the engine in one go; 512 bytes.
const REAP_BATCH: usize = 32;

/// Capacities, fixed when the queue is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Slots: operations queued or in flight at a time, at least 1.
    pub depth: u16,
    /// Segments (iovecs) per operation, 1 to [`SEGMENTS_MAX`], after joining those that touch.
    pub max_segments: u16,
}

impl Default for Config {
    /// 128 slots, a virtqueue's usual size, of 128 segments.
    fn default() -> Self {
        Self {
            depth: 128,
            max_segments: 128,
        }
    }
}

/// What one [`IoQueue::submit`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SubmitReport {
    /// Operations the kernel or a worker took.
    pub submitted: usize,
    /// Operations refused; [`IoQueue::reap`] delivers their errors.
    pub refused: usize,
    /// Operations kept for the next try.
    pub parked: usize,
}

/// A queue of asynchronous operations on one file.
///
/// `O` owns what keeps an operation's memory alive, and comes back with its result.
///
/// See the [crate's documentation](crate) for the life of an operation.
pub struct IoQueue<O> {
    backend: Box<dyn Backend>,
    workers: Option<Workers>,
    table: Table,
    /// Slots not handed over yet, oldest first.
    pending: Fifo,
    /// How many of `pending`, from the front, the caller has already submitted.
    committed: usize,
    /// Operations that were refused, awaiting `reap`. Capacity the depth.
    refused: VecDeque<Completion>,
    /// Free slots; the one used last is on top, its cache lines still warm.
    free: Vec<u16>,
    /// Operations the engine has taken, those it could not yet pass on included.
    in_engine: usize,
    /// Operations the engine has taken and not yet passed on, for want of a resource.
    backlog: usize,
    in_worker: usize,
    /// Where the engine puts completions, kept so as not to be initialised for each `reap`.
    completions: Box<[Completion; REAP_BATCH]>,
    fallback: Option<Box<Fallback>>,
    /// One per slot. The kernel may write to an owner's memory until its completion or until the
    /// engine is quiet, so `drop` quiets the engine first.
    owners: ManuallyDrop<Box<[Option<O>]>>,
}

/// What [`IoQueue::arm_completion_fd`] found: whether to sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "only `Sleep` says that a completion will wake the caller"]
#[non_exhaustive]
pub enum Armed {
    /// Sleep: whatever completes makes [`IoQueue::completion_fd`] readable.
    Sleep,
    /// Reap first: something has completed.
    Reap,
    /// Keep polling, or sleep no longer than the latency that can be borne: that many operations
    /// were submitted while disarmed and complete without a signal. Linux AIO decides that when
    /// an operation is submitted, io_uring when it completes, so this never comes from there.
    Silent(usize),
}

impl<O> IoQueue<O> {
    /// A queue on `file` through Linux AIO. Needs Linux 4.13; before 4.18 fdatasync takes a
    /// worker thread.
    ///
    /// `file` may be buffered, but the kernel then does much of the work inside
    /// [`IoQueue::submit`]; open it with `O_DIRECT` for I/O that is asynchronous, and align
    /// offsets, addresses and lengths as the file system wants.
    ///
    /// # Errors
    /// See [`SetupError`]; [`SetupError::AioLimit`] is the one to expect in production.
    ///
    /// ```
    /// use std::{fs::File, sync::Arc};
    /// use ioq::{AlignedBuf, Config, IoQueue};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let file = Arc::new(File::open("/proc/self/exe")?);
    /// let mut queue = IoQueue::linux_aio(file, &Config { depth: 8, max_segments: 1 })?;
    /// queue.read(0, AlignedBuf::new(4, 4).ok_or("memory")?)?;
    /// queue.submit();
    /// while !queue.is_idle() {
    ///     queue.reap(|buf, result| {
    ///         assert_eq!(result, Ok(4));
    ///         assert_eq!(&buf[..], b"\x7fELF");
    ///     });
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn linux_aio(file: Arc<File>, config: &Config) -> Result<Self, SetupError> {
        let table = table(config)?;
        let backend = LinuxAio::new(file, config.depth, CompletionSource::RingIfUsable)?;
        Ok(Self::over(Box::new(backend), table, config.depth))
    }

    /// A queue on `file` through io_uring. Needs Linux 5.6.
    ///
    /// As [`IoQueue::linux_aio`], but with buffered files too most of the work is not done inside
    /// [`IoQueue::submit`]. Before Linux 6.0, dropping the queue waits for operations in flight
    /// without cancelling those that can be.
    ///
    /// A disk's completions interrupt neither the thread nor a system call it is in, but `EINTR` may
    /// come from `epoll_wait` (5.19 and later); the thread that submitted must be the one that
    /// sleeps.
    ///
    /// # Errors
    /// See [`SetupError`]; [`SetupError::IoUringUnavailable`] is the one to expect in production:
    /// container runtimes' seccomp profiles and hardened kernels forbid io_uring.
    ///
    /// ```
    /// use std::{fs::File, sync::Arc};
    /// use ioq::{AlignedBuf, Config, IoQueue, SetupError};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let file = Arc::new(File::open("/proc/self/exe")?);
    /// let mut queue = match IoQueue::io_uring(file, &Config::default()) {
    ///     Err(SetupError::IoUringUnavailable(_)) => return Ok(()),
    ///     queue => queue?,
    /// };
    /// queue.read(0, AlignedBuf::new(4, 4).ok_or("memory")?)?;
    /// queue.submit();
    /// while !queue.is_idle() {
    ///     queue.reap(|buf, result| {
    ///         assert_eq!(result, Ok(4));
    ///         assert_eq!(&buf[..], b"\x7fELF");
    ///     });
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn io_uring(file: Arc<File>, config: &Config) -> Result<Self, SetupError> {
        let table = table(config)?;
        let backend = Uring::new(file, config.depth)?;
        Ok(Self::over(Box::new(backend), table, config.depth))
    }

    /// A queue on `file` through `engine`. [`Engine::Auto`] takes what the host has:
    /// [`IoQueue::engine`] says what that is, and [`IoQueue::fallback`] whether it is second
    /// choice. Any other engine is had or refused.
    ///
    /// # Errors
    /// See [`SetupError`].
    ///
    /// ```
    /// use std::{fs::File, sync::Arc};
    /// use ioq::{Config, Engine, IoQueue};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let file = Arc::new(File::open("/proc/self/exe")?);
    /// let queue = IoQueue::<Vec<u8>>::open(file, Engine::Auto, &Config::default())?;
    /// if let Some(fallback) = queue.fallback() {
    ///     eprintln!("warning: {fallback}");
    /// }
    /// assert_ne!(queue.engine(), Engine::Auto);
    /// # Ok(())
    /// # }
    /// ```
    pub fn open(file: Arc<File>, engine: Engine, config: &Config) -> Result<Self, SetupError> {
        match engine {
            Engine::LinuxAio => Self::linux_aio(file, config),
            Engine::IoUring => Self::io_uring(file, config),
            Engine::Null => Self::null(config),
            Engine::Auto => Self::auto(file, config),
        }
    }

    fn auto(file: Arc<File>, config: &Config) -> Result<Self, SetupError> {
        let (wanted, second) = match engine::preferred(&file) {
            Engine::IoUring => (Engine::IoUring, Engine::LinuxAio),
            _ => (Engine::LinuxAio, Engine::IoUring),
        };
        let reason = match Self::open(Arc::clone(&file), wanted, config) {
            Err(
                reason @ (SetupError::AioLimit { .. }
                | SetupError::AioUnavailable(_)
                | SetupError::IoUringUnavailable(_)),
            ) => reason,
            had_or_hopeless => return had_or_hopeless,
        };
        match Self::open(file, second, config) {
            Ok(mut queue) => {
                queue.fallback = Some(Box::new(Fallback {
                    wanted,
                    used: second,
                    reason,
                }));
                Ok(queue)
            }
            Err(error) => {
                let (linux_aio, io_uring) = match wanted {
                    Engine::IoUring => (error, reason),
                    _ => (reason, error),
                };
                Err(SetupError::NoEngine {
                    linux_aio: Box::new(linux_aio),
                    io_uring: Box::new(io_uring),
                })
            }
        }
    }

    /// A queue that does no I/O: operations complete while they are submitted, reads give zeroes,
    /// writes are dropped. For measuring everything else.
    ///
    /// # Errors
    /// [`SetupError::Depth`], [`SetupError::Segments`] and [`SetupError::Storage`].
    ///
    /// ```
    /// use ioq::{Config, Durability, IoQueue};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let mut queue = IoQueue::null(&Config::default())?;
    /// queue.write(0, vec![1u8; 512], Durability::WriteBack)?;
    /// queue.submit();
    /// assert_eq!(queue.reap(|_, result| assert_eq!(result, Ok(512))), 1);
    /// # Ok(())
    /// # }
    /// ```
    pub fn null(config: &Config) -> Result<Self, SetupError> {
        let table = table(config)?;
        Ok(Self::over(
            Box::new(Null::new(config.depth)),
            table,
            config.depth,
        ))
    }

    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn with_backend(
        backend: Box<dyn Backend>,
        config: &Config,
    ) -> Result<Self, SetupError> {
        Ok(Self::over(backend, table(config)?, config.depth))
    }

    fn over(backend: Box<dyn Backend>, table: Table, depth: u16) -> Self {
        let slots = usize::from(depth);
        let owners: Box<[Option<O>]> = (0..slots).map(|_| None).collect();
        Self {
            backend,
            workers: None,
            table,
            pending: Fifo::with_capacity(slots),
            committed: 0,
            refused: VecDeque::with_capacity(slots),
            free: (0..depth).rev().collect(),
            in_engine: 0,
            backlog: 0,
            in_worker: 0,
            completions: Box::new([Completion::default(); REAP_BATCH]),
            fallback: None,
            owners: ManuallyDrop::new(owners),
        }
    }

    /// Queues a read of the file from byte `offset` into `segments`, filled in order.
    ///
    /// The segments are copied out; neighbours that touch in host memory are joined, empty ones dropped.
    /// Nothing happens before [`IoQueue::submit`]. The result is the segments' whole length:
    /// short reads are continued, and the end of the file is
    /// [`IoErrorKind::UnexpectedEof`](crate::IoErrorKind::UnexpectedEof).
    ///
    /// # Errors
    /// See [`QueueError`]; each gives `owner` back.
    ///
    /// # Safety
    /// - Each segment is valid for writes of its length until `owner` has come back from
    ///   [`IoQueue::reap`] or the queue was dropped; moving `owner` does not change that. (If the
    ///   queue is leaked, the memory must stay valid for ever, as `owner` then does.)
    /// - No Rust reference to that memory is used meanwhile: the kernel writes it at any time.
    pub unsafe fn queue_readv(
        &mut self,
        offset: u64,
        segments: impl IntoIterator<Item = iovec>,
        owner: O,
    ) -> Result<(), QueueError<O>> {
        self.queue_transfer(Opcode::Read, offset, segments, owner)
    }

    /// Queues a write of `segments`, in order, to the file from byte `offset` on.
    ///
    /// As [`IoQueue::queue_readv`]; the result is the segments' whole length.
    ///
    /// # Errors
    /// See [`QueueError`]; each gives `owner` back.
    ///
    /// # Safety
    /// - Each segment is valid for reads of its length until `owner` has come back from
    ///   [`IoQueue::reap`] or the queue was dropped; moving `owner` does not change that. (If the
    ///   queue is leaked, the memory must stay valid for ever, as `owner` then does.)
    /// - No mutable Rust reference to that memory is used meanwhile.
    pub unsafe fn queue_writev(
        &mut self,
        offset: u64,
        segments: impl IntoIterator<Item = iovec>,
        durability: Durability,
        owner: O,
    ) -> Result<(), QueueError<O>> {
        self.queue_transfer(Opcode::Write(durability), offset, segments, owner)
    }

    fn queue_transfer(
        &mut self,
        opcode: Opcode,
        offset: u64,
        segments: impl IntoIterator<Item = iovec>,
        owner: O,
    ) -> Result<(), QueueError<O>> {
        let Some(&slot) = self.free.last() else {
            return Err(QueueError::Full { owner });
        };
        let segments = segments.into_iter().inspect(|segment| {
            debug_assert!(
                segment.iov_len == 0 || !segment.iov_base.is_null(),
                "a segment must be valid memory"
            );
        });
        match self.table.prepare_transfer(slot, opcode, offset, segments) {
            Ok(()) => {
                self.enqueue(slot, owner);
                Ok(())
            }
            Err(PrepareError::OffsetTooLarge) => Err(QueueError::OffsetTooLarge { owner, offset }),
            Err(PrepareError::TooManySegments) => Err(QueueError::TooManySegments {
                owner,
                limit: self.table.max_segments(),
            }),
        }
    }

    /// Queues an fdatasync of the file; its result is 0 bytes.
    ///
    /// It covers writes whose completion was reaped before this call, and promises nothing
    /// about others: the kernel runs operations in any order. Its error is delivered as it is
    /// and never retried, because a kernel that has reported lost writes once calls the next
    /// fdatasync a success.
    ///
    /// # Errors
    /// [`QueueError::Full`] only.
    pub fn queue_fdatasync(&mut self, owner: O) -> Result<(), QueueError<O>> {
        self.queue_range(Opcode::Fdatasync, 0, 0, owner)
    }

    /// Queues a discard: the `len` bytes from `offset` on are of no use any more. What they read as
    /// afterwards is undefined; the result is `len`.
    ///
    /// A file gets a hole (`FALLOC_FL_PUNCH_HOLE`), what of the range lies beyond its end being left
    /// out; a block device is told (`BLKDISCARD`), and wants a range in whole blocks. Runs on a
    /// worker thread. Where the file system or device cannot do it, the error is
    /// [`IoErrorKind::Unsupported`](crate::IoErrorKind::Unsupported).
    ///
    /// # Errors
    /// [`QueueError::Full`] and [`QueueError::OffsetTooLarge`].
    ///
    /// ```
    /// use std::os::unix::fs::MetadataExt;
    /// use std::sync::Arc;
    /// use ioq::{Config, Durability, IoQueue, Unmap};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let path = std::path::Path::new("/dev/shm").join(format!("ioq-doc-discard-{}", std::process::id()));
    /// # std::fs::write(&path, vec![1; 65536])?;
    /// let file = Arc::new(std::fs::File::options().read(true).write(true).open(&path)?);
    /// # std::fs::remove_file(&path)?;
    /// let mut queue = IoQueue::linux_aio(Arc::clone(&file), &Config::default())?;
    /// queue.queue_discard(0, 32768, "discard")?;
    /// queue.queue_write_zeroes(32768, 4096, Unmap::Forbidden, Durability::WriteBack, "zeroes")?;
    /// queue.submit();
    /// while !queue.is_idle() {
    ///     queue.reap(|what, result| println!("{what}: {result:?}"));
    /// }
    /// assert_eq!(file.metadata()?.blocks() * 512, 32768);
    /// # Ok(())
    /// # }
    /// ```
    pub fn queue_discard(&mut self, offset: u64, len: u64, owner: O) -> Result<(), QueueError<O>> {
        self.queue_range(Opcode::Discard, offset, len, owner)
    }

    /// Queues the secure erasure of the `len` bytes from `offset` on (`BLKSECDISCARD`): when it is done no copy
    /// of them is left on the device, not even in blocks that it had replaced. The result is `len`. Block
    /// devices whose hardware can do it only (eMMC, mostly); anything else fails with
    /// [`IoErrorKind::Unsupported`](crate::IoErrorKind::Unsupported). Runs on a worker thread, and may take
    /// long.
    ///
    /// # Errors
    /// [`QueueError::Full`] and [`QueueError::OffsetTooLarge`].
    ///
    /// ```
    /// use ioq::{Config, IoErrorKind, IoQueue};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let path = std::path::Path::new("/dev/shm").join(format!("ioq-doc-erase-{}", std::process::id()));
    /// # std::fs::write(&path, vec![1; 4096])?;
    /// let file = std::fs::File::options().read(true).write(true).open(&path)?;
    /// # std::fs::remove_file(&path)?;
    /// let mut queue = IoQueue::linux_aio(file.into(), &Config::default())?;
    /// queue.queue_secure_erase(0, 4096, ())?;
    /// queue.submit();
    /// while !queue.is_idle() {
    ///     // A file: nobody can promise that.
    ///     queue.reap(|(), result| assert_eq!(result.unwrap_err().kind(), IoErrorKind::Unsupported));
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn queue_secure_erase(
        &mut self,
        offset: u64,
        len: u64,
        owner: O,
    ) -> Result<(), QueueError<O>> {
        self.queue_range(Opcode::SecureErase, offset, len, owner)
    }

    /// Queues making the `len` bytes from `offset` on read as zeroes; the result is `len`.
    ///
    /// With [`Unmap::Allowed`] the range becomes a hole where that can be had; otherwise, and with
    /// [`Unmap::Forbidden`], it keeps its storage (`FALLOC_FL_ZERO_RANGE`, `BLKZEROOUT`). Where the
    /// file system has neither (tmpfs has no `FALLOC_FL_ZERO_RANGE`), zeroes are written. What of the
    /// range lies beyond a file's end is left out. Runs on a worker thread, with an fdatasync after it
    /// for [`Durability::WriteThrough`].
    ///
    /// # Errors
    /// [`QueueError::Full`] and [`QueueError::OffsetTooLarge`].
    pub fn queue_write_zeroes(
        &mut self,
        offset: u64,
        len: u64,
        unmap: Unmap,
        durability: Durability,
        owner: O,
    ) -> Result<(), QueueError<O>> {
        self.queue_range(Opcode::WriteZeroes(unmap, durability), offset, len, owner)
    }

    fn queue_range(
        &mut self,
        opcode: Opcode,
        offset: u64,
        len: u64,
        owner: O,
    ) -> Result<(), QueueError<O>> {
        let Some(&slot) = self.free.last() else {
            return Err(QueueError::Full { owner });
        };
        if self.table.prepare_range(slot, opcode, offset, len).is_err() {
            return Err(QueueError::OffsetTooLarge { owner, offset });
        }
        self.enqueue(slot, owner);
        Ok(())
    }

    fn enqueue(&mut self, slot: u16, owner: O) {
        debug_assert_eq!(self.free.last(), Some(&slot));
        self.free.pop();
        self.owners[usize::from(slot)] = Some(owner);
        self.pending.push_back(slot);
    }

    /// Which engine runs the queue; never [`Engine::Auto`]. A disk of `ioq::testing` names the one
    /// it imitates.
    pub fn engine(&self) -> Engine {
        self.backend.engine()
    }

    /// Set if [`Engine::Auto`] could not have its first choice: one line for the log.
    pub fn fallback(&self) -> Option<&Fallback> {
        self.fallback.as_deref()
    }

    /// An eventfd that is readable when completions wait, for epoll; the same for the queue's
    /// whole life. `None` for an engine whose completions are all there when
    /// [`IoQueue::submit`] returns: reap after each submit.
    pub fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        self.backend.notifier().map(|notifier| notifier.as_fd())
    }

    /// Makes [`IoQueue::completion_fd`] unreadable, and says whether it was readable. Call it
    /// before [`IoQueue::reap`], not after: what completes in between must wake again.
    pub fn clear_completion_fd(&self) -> bool {
        self.backend
            .notifier()
            .is_some_and(|notifier| notifier.clear())
    }

    /// The caller polls: completions need not make [`IoQueue::completion_fd`] readable, which
    /// saves the kernel signalling each and the caller a wake-up for what it has reaped
    /// already. Costs no system call; call it whenever there is work.
    ///
    /// A caller that has disarmed must not sleep before [`IoQueue::arm_completion_fd`] has said so.
    /// Linux AIO fixes at submission whether an operation signals, and a queue on it therefore
    /// goes on signalling unless operations have lately been completing inside
    /// [`IoQueue::submit`], as they do on tmpfs.
    pub fn disarm_completion_fd(&mut self) {
        self.backend.disarm();
    }

    /// The caller is about to sleep: arms [`IoQueue::completion_fd`], makes it unreadable if only
    /// what was reaped already had made it readable, and looks once more. Whatever
    /// completes after that look signals, so [`Armed::Sleep`] loses no wake-up.
    ///
    /// ```
    /// use ioq::{Armed, Config, IoQueue};
    /// # use std::os::fd::AsRawFd;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let file = std::sync::Arc::new(std::fs::File::open("/proc/self/exe")?);
    /// let mut queue = IoQueue::linux_aio(file, &Config::default())?;
    /// queue.read(0, vec![0u8; 4096])?;
    /// while !queue.is_idle() {
    ///     queue.disarm_completion_fd();
    ///     queue.submit();
    ///     if queue.reap(|_, result| assert_eq!(result, Ok(4096))) > 0 {
    ///         continue;
    ///     }
    ///     match queue.arm_completion_fd() {
    ///         Armed::Sleep => { /* epoll_wait on queue.completion_fd(), then clear it */ }
    ///         _ => continue,
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn arm_completion_fd(&mut self) -> Armed {
        // Before the look: a completion whose signal this takes is found by it.
        if let Some(notifier) = self.backend.notifier() {
            notifier.clear_expected();
        }
        let arming = self.backend.arm();
        if arming == Arming::Pending || self.refused_or_worked() {
            return Armed::Reap;
        }
        match arming {
            Arming::Silent(count) => Armed::Silent(count),
            _ => Armed::Sleep,
        }
    }

    fn refused_or_worked(&self) -> bool {
        !self.refused.is_empty()
            || (self.in_worker > 0
                && self
                    .workers
                    .as_ref()
                    .is_some_and(Workers::completions_pending))
    }

    /// Whether [`IoQueue::reap`] would deliver or continue something: a few loads, no
    /// system call, made for polling. (Where the kernel's completion ring cannot be read, only
    /// `completion_fd` knows what the kernel has completed.)
    pub fn completions_pending(&self) -> bool {
        self.backend.completions_pending() || self.refused_or_worked()
    }

    /// Whether operations are parked and no completion will come to try them again: the caller
    /// must call [`IoQueue::submit`] after [`RETRY_DELAY`].
    pub fn needs_retry(&self) -> bool {
        self.committed + self.backlog > 0
            && self.in_engine == self.backlog
            && self.in_worker == 0
            && self.refused.is_empty()
    }

    /// Operations not handed over yet, parked ones included.
    pub fn queued(&self) -> usize {
        self.pending.len()
    }

    /// Operations handed over whose result was not delivered yet, refused ones included.
    pub fn in_flight(&self) -> usize {
        self.capacity() - self.free_slots() - self.queued()
    }

    /// Operations that can be queued before [`QueueError::Full`].
    pub fn free_slots(&self) -> usize {
        self.free.len()
    }

    /// Slots: [`Config::depth`].
    pub fn capacity(&self) -> usize {
        self.owners.len()
    }

    /// Whether nothing is queued or in flight.
    pub fn is_idle(&self) -> bool {
        self.free_slots() == self.capacity()
    }

    /// Segments an operation may have: [`Config::max_segments`].
    pub fn max_segments(&self) -> usize {
        usize::from(self.table.max_segments())
    }
}

impl<B: IoBuf> IoQueue<B> {
    /// Queues a read that fills `buf` from byte `offset` of the file; `buf` comes back from
    /// [`IoQueue::reap`]. As [`IoQueue::queue_readv`].
    ///
    /// # Errors
    /// See [`QueueError`]; each gives `buf` back.
    pub fn read(&mut self, offset: u64, mut buf: B) -> Result<(), QueueError<B>> {
        let segment = buf.segment();
        // SAFETY: `IoBuf` promises that the memory is valid wherever `buf` is moved and that
        // nobody else uses it; the queue keeps `buf` until the operation is done.
        unsafe { self.queue_readv(offset, [segment], buf) }
    }

    /// Queues a write of all of `buf` to the file from byte `offset` on; `buf` comes back from
    /// [`IoQueue::reap`]. As [`IoQueue::queue_writev`].
    ///
    /// # Errors
    /// See [`QueueError`]; each gives `buf` back.
    pub fn write(
        &mut self,
        offset: u64,
        mut buf: B,
        durability: Durability,
    ) -> Result<(), QueueError<B>> {
        let segment = buf.segment();
        // SAFETY: as in `read`.
        unsafe { self.queue_writev(offset, [segment], durability, buf) }
    }
}

impl<O> Drop for IoQueue<O> {
    /// Waits for everything in flight, then drops the owners, which do not learn of a result.
    fn drop(&mut self) {
        let quiet = self.backend.quiesce();
        self.workers = None;
        if quiet || self.in_engine == 0 {
            // SAFETY: not used again; nothing the kernel was given is in flight any more.
            unsafe { ManuallyDrop::drop(&mut self.owners) };
        } else {
            // The kernel may still write to the owners' memory, and leaking it is all
            // that is safe.
            #[cfg(test)]
            tests::leaked_on_purpose(self.owners.as_ptr().addr());
        }
    }
}

impl<O> fmt::Debug for IoQueue<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoQueue")
            .field("capacity", &self.capacity())
            .field("queued", &self.queued())
            .field("in_flight", &self.in_flight())
            .field("engine", &self.engine())
            .field("parked", &(self.committed + self.backlog))
            .finish_non_exhaustive()
    }
}

fn table(config: &Config) -> Result<Table, SetupError> {
    let &Config {
        depth,
        max_segments,
    } = config;
    if depth == 0 {
        return Err(SetupError::Depth);
    }
    if !(1..=SEGMENTS_MAX).contains(&max_segments) {
        return Err(SetupError::Segments { max_segments });
    }
    let segments = Segments::new(depth, max_segments)
        .map_err(|(bytes, source)| SetupError::Storage { bytes, source })?;
    Ok(Table::new(depth, segments))
}

#[cfg(test)]
mod tests;
