//! The queue: slots, order, retries, continuations.

// UNSAFETY: `queue_readv` and `queue_writev` take addresses the kernel will use later, a promise
// only their caller can make; dropping the owners only when the engine is quiet needs
// `ManuallyDrop`.
#![expect(unsafe_code)]

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use libc::iovec;

use crate::aio::{CompletionSource, LinuxAio};
use crate::buffer::IoBuf;
use crate::engine::{Completion, Engine, Submission};
use crate::error::{IoError, QueueError, SetupError};
use crate::null::Null;
use crate::op::{Durability, Opcode, PrepareError, Table};
use crate::segments::Segments;
use crate::worker::Worker;

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

/// Completions taken from the engine in one go; 512 bytes of stack.
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
    engine: Box<dyn Engine>,
    worker: Option<Worker>,
    table: Table,
    /// Slots not handed over yet, oldest first. Never longer than the depth, its capacity.
    pending: VecDeque<u16>,
    /// How many of `pending`, from the front, the caller has already submitted.
    committed: usize,
    /// Operations that were refused, awaiting `reap`. Capacity as `pending`.
    refused: VecDeque<Completion>,
    /// Free slots; the one used last is on top, its cache lines still warm.
    free: Vec<u16>,
    in_engine: usize,
    in_worker: usize,
    /// One per slot. The kernel may write to an owner's memory until its completion or until the
    /// engine is quiet, so `drop` quiets the engine first.
    owners: ManuallyDrop<Box<[Option<O>]>>,
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
        let engine = LinuxAio::new(file, config.depth, CompletionSource::RingIfUsable)?;
        Ok(Self::over(Box::new(engine), table, config.depth))
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
    pub(crate) fn with_engine(
        engine: Box<dyn Engine>,
        config: &Config,
    ) -> Result<Self, SetupError> {
        Ok(Self::over(engine, table(config)?, config.depth))
    }

    fn over(engine: Box<dyn Engine>, table: Table, depth: u16) -> Self {
        let slots = usize::from(depth);
        let owners: Box<[Option<O>]> = (0..slots).map(|_| None).collect();
        Self {
            engine,
            worker: None,
            table,
            pending: VecDeque::with_capacity(slots),
            committed: 0,
            refused: VecDeque::with_capacity(slots),
            free: (0..depth).rev().collect(),
            in_engine: 0,
            in_worker: 0,
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
        let Some(&slot) = self.free.last() else {
            return Err(QueueError::Full { owner });
        };
        self.table.prepare_fdatasync(slot);
        self.enqueue(slot, owner);
        Ok(())
    }

    fn enqueue(&mut self, slot: u16, owner: O) {
        debug_assert_eq!(self.free.last(), Some(&slot));
        self.free.pop();
        self.owners[usize::from(slot)] = Some(owner);
        self.pending.push_back(slot);
    }

    /// Hands everything queued to the kernel, with one system call as long as nothing is refused.
    ///
    /// Loses nothing: what the kernel has no room for stays parked, in order, and is tried again
    /// by the next `submit` or by a [`IoQueue::reap`] that found completions. What the kernel
    /// refuses fails alone, delivered by `reap` like any other error. Never calls back.
    pub fn submit(&mut self) -> SubmitReport {
        self.committed = self.pending.len();
        self.flush()
    }

    fn flush(&mut self) -> SubmitReport {
        let mut report = SubmitReport::default();
        // Every round takes at least one operation from `pending` or is the last.
        while self.committed > 0 {
            let batch = self.pending.range(..self.committed);
            match self.engine.submit(batch, &self.table) {
                Submission::Accepted(count) => {
                    let count = count.min(self.committed);
                    if count == 0 {
                        break;
                    }
                    self.pending.drain(..count);
                    self.committed -= count;
                    self.in_engine += count;
                    report.submitted += count;
                }
                Submission::Again => break,
                Submission::Refused(errno) => {
                    let slot = self.take_pending();
                    self.refuse(slot, errno, &mut report);
                }
                Submission::Unsupported => {
                    let slot = self.take_pending();
                    match self.give_to_worker(slot) {
                        Ok(()) => report.submitted += 1,
                        Err(errno) => self.refuse(slot, errno, &mut report),
                    }
                }
            }
        }
        report.parked = self.committed;
        if report.refused > 0
            && let Some(notifier) = self.engine.notifier()
        {
            // No kernel completion will wake the caller for these.
            notifier.signal();
        }
        report
    }

    fn take_pending(&mut self) -> u16 {
        self.committed -= 1;
        // `committed` was not 0 and counts entries of `pending`; u16::MAX is never a slot.
        self.pending.pop_front().unwrap_or(u16::MAX)
    }

    fn refuse(&mut self, slot: u16, errno: i32, report: &mut SubmitReport) {
        self.refused.push_back(Completion {
            slot,
            result: -i64::from(errno),
        });
        report.refused += 1;
    }

    fn give_to_worker(&mut self, slot: u16) -> Result<(), i32> {
        let opcode = self.table.op(slot).opcode;
        let worker = match &mut self.worker {
            Some(worker) => worker,
            none => {
                let file = self.engine.blocking().ok_or(libc::EOPNOTSUPP)?;
                let depth = u16::try_from(self.owners.len()).unwrap_or(u16::MAX);
                let worker = Worker::start(depth, &file, self.engine.notifier())
                    .map_err(|error| error.raw_os_error().unwrap_or(libc::EAGAIN))?;
                none.insert(worker)
            }
        };
        if worker.submit(slot, opcode) {
            self.in_worker += 1;
            Ok(())
        } else {
            Err(libc::EIO)
        }
    }

    /// Delivers every operation that has completed, and says how many: its owner, and the bytes
    /// moved or the error. Without a system call if nothing has to be submitted.
    ///
    /// Continues short transfers and tries parked operations again. To sleep on
    /// [`IoQueue::completion_fd`] without missing anything: clear it first, then reap.
    pub fn reap(&mut self, mut complete: impl FnMut(O, Result<u64, IoError>)) -> usize {
        let mut delivered = 0;
        let mut resubmit = false;
        // What is refused by the flush below waits for the next call, so that each slot is
        // delivered at most once and the loop ends.
        while let Some(refused) = self.refused.pop_front() {
            let error = errno_of(refused.result);
            delivered += self.deliver(refused.slot, Err(error), &mut complete);
        }
        loop {
            let mut batch = [Completion::default(); REAP_BATCH];
            let count = self.engine.reap(&mut batch);
            for completion in &batch[..count] {
                self.in_engine = self.in_engine.saturating_sub(1);
                match self.settle(*completion) {
                    Some(result) => {
                        delivered += self.deliver(completion.slot, result, &mut complete);
                    }
                    None => resubmit = true,
                }
            }
            if count < REAP_BATCH {
                break;
            }
        }
        // At most as many results as operations the worker had; none is added meanwhile.
        for _ in 0..self.in_worker {
            let Some(completion) = self.worker.as_ref().and_then(Worker::reap) else {
                break;
            };
            self.in_worker -= 1;
            match self.settle(completion) {
                Some(result) => {
                    delivered += self.deliver(completion.slot, result, &mut complete);
                }
                None => resubmit = true,
            }
        }
        // A completion freed resources; if nothing is in flight there is none to wait for.
        if self.committed > 0 && (resubmit || delivered > 0 || self.in_engine == 0) {
            self.flush();
        }
        delivered
    }

    /// The operation's result, or `None` if it goes on and was put in front of what is parked.
    fn settle(&mut self, completion: Completion) -> Option<Result<u64, IoError>> {
        let Completion { slot, result } = completion;
        if self
            .owners
            .get(usize::from(slot))
            .is_none_or(Option::is_none)
        {
            // Not a slot in flight: an engine's mistake, which `deliver` ignores too.
            debug_assert!(false, "completion of slot {slot}, which is not in flight");
            return Some(Err(errno_of(-i64::from(libc::EIO))));
        }
        let op = self.table.op_mut(slot);
        let Ok(moved) = u64::try_from(result) else {
            let error = errno_of(result);
            let transient = match error.errno() {
                Some(libc::EINTR) => true,
                // Of an fdatasync, any answer but "interrupted before it began" may mean data lost.
                Some(libc::EAGAIN) => op.opcode != Opcode::Fdatasync,
                _ => false,
            };
            if !transient || op.retries >= TRANSIENT_RETRIES_MAX {
                return Some(Err(error));
            }
            op.retries += 1;
            self.resume(slot);
            return None;
        };
        if op.opcode == Opcode::Fdatasync {
            return Some(Ok(0));
        }
        let remaining = op.remaining;
        match moved.min(remaining) {
            all if all == remaining => Some(Ok(op.done + remaining)),
            0 if op.opcode == Opcode::Read => Some(Err(IoError::UNEXPECTED_EOF)),
            0 => Some(Err(IoError::WRITE_ZERO)),
            part => {
                self.table.advance(slot, part);
                self.resume(slot);
                None
            }
        }
    }

    fn resume(&mut self, slot: u16) {
        self.pending.push_front(slot);
        self.committed += 1;
    }

    fn deliver(
        &mut self,
        slot: u16,
        result: Result<u64, IoError>,
        complete: &mut impl FnMut(O, Result<u64, IoError>),
    ) -> usize {
        let Some(owner) = self
            .owners
            .get_mut(usize::from(slot))
            .and_then(Option::take)
        else {
            return 0;
        };
        // Before the call, so that a panic in it leaks no slot.
        self.free.push(slot);
        complete(owner, result);
        1
    }

    /// An eventfd that is readable when completions wait, for epoll; the same for the queue's
    /// whole life. `None` for an engine whose completions are all there when
    /// [`IoQueue::submit`] returns: reap after each submit.
    pub fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        self.engine.notifier().map(|notifier| notifier.as_fd())
    }

    /// Makes [`IoQueue::completion_fd`] unreadable, and says whether it was readable. Call it
    /// before [`IoQueue::reap`], not after: what completes in between must wake again.
    pub fn clear_completion_fd(&self) -> bool {
        self.engine
            .notifier()
            .is_some_and(|notifier| notifier.clear())
    }

    /// Whether [`IoQueue::reap`] would deliver or continue something: a few loads, no
    /// system call, made for polling. (Where the kernel's completion ring cannot be read, only
    /// `completion_fd` knows what the kernel has completed.)
    pub fn completions_pending(&self) -> bool {
        !self.refused.is_empty()
            || self.engine.completions_pending()
            || (self.in_worker > 0
                && self
                    .worker
                    .as_ref()
                    .is_some_and(Worker::completions_pending))
    }

    /// Whether operations are parked and no completion will come to try them again: the caller
    /// must call [`IoQueue::submit`] after [`RETRY_DELAY`].
    pub fn needs_retry(&self) -> bool {
        self.committed > 0 && self.in_engine == 0 && self.in_worker == 0 && self.refused.is_empty()
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
        let quiet = self.engine.quiesce();
        self.worker = None;
        if quiet || self.in_engine == 0 {
            // SAFETY: not used again; nothing the kernel was given is in flight any more.
            unsafe { ManuallyDrop::drop(&mut self.owners) };
        }
        // Otherwise the kernel may still write to the owners' memory, and leaking it is all
        // that is safe.
    }
}

impl<O> fmt::Debug for IoQueue<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoQueue")
            .field("capacity", &self.capacity())
            .field("queued", &self.queued())
            .field("in_flight", &self.in_flight())
            .field("parked", &self.committed)
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

/// The error of a negative result.
fn errno_of(result: i64) -> IoError {
    // The kernel's numbers end at 4095.
    IoError::from_errno(i32::try_from(result.saturating_neg()).unwrap_or(libc::EIO))
}

#[cfg(test)]
mod tests;
