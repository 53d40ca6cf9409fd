//! A queue over a disk that a test writes.

// UNSAFETY: moves bytes between the disk's answers and the operations' segments, as the kernel would.
#![expect(unsafe_code)]

use std::fmt;
use std::ptr;
use std::sync::Arc;

use libc::iovec;

use crate::backend::{Backend, BlockingFile, Completion, Submission};
use crate::engine::Engine;
use crate::error::SetupError;
use crate::notifier::Notifier;
use crate::op::{Durability, Opcode, Table, Unmap};
use crate::queue::{Config, IoQueue};

/// An operation as a [`Disk`] gets it. Offsets and lengths are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// See [`IoQueue::queue_discard`].
    Discard {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// See [`IoQueue::queue_fdatasync`].
    Fdatasync,
    /// See [`IoQueue::queue_readv`].
    Read {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// See [`IoQueue::queue_secure_erase`].
    SecureErase {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// See [`IoQueue::queue_writev`].
    Write {
        /// Where.
        offset: u64,
        /// What, as it is when the operation is submitted.
        data: Vec<u8>,
        /// When it counts as complete.
        durability: Durability,
    },
    /// See [`IoQueue::queue_write_zeroes`].
    WriteZeroes {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
        /// Whether the storage may go.
        unmap: Unmap,
        /// When it counts as complete.
        durability: Durability,
    },
}

/// How an operation of a [`Disk`] ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// That many bytes were written. Fewer than asked for is a short write, which is continued.
    Bytes(u64),
    /// These bytes were read. Fewer than asked for is a short read, which is continued; none is
    /// the end of the file. More than asked for are dropped.
    Data(Vec<u8>),
    /// Done: an fdatasync, or a whole range or write.
    Done,
    /// An error number.
    Error(i32),
}

/// Why a [`Disk`] takes no operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// Not now: it is submitted again later, and no operation after it before.
    Again,
    /// Never: it fails with this error number.
    Errno(i32),
}

/// A disk of a test's own, below a queue. It sees operations in the order they were submitted, and
/// completes them when, in what order, and as it likes.
///
/// ```
/// use std::collections::VecDeque;
/// use ioq::testing::{Disk, Operation, Outcome, Refusal, queue_over};
/// use ioq::{Config, Durability};
///
/// /// Forgets what it is told, and calls everything a success.
/// #[derive(Debug, Default)]
/// struct Liar(VecDeque<(u64, Outcome)>);
///
/// impl Disk for Liar {
///     fn submit(&mut self, id: u64, operation: Operation) -> Result<(), Refusal> {
///         let outcome = match operation {
///             Operation::Read { len, .. } => Outcome::Data(vec![0; len as usize]),
///             _ => Outcome::Done,
///         };
///         self.0.push_back((id, outcome));
///         Ok(())
///     }
///     fn complete(&mut self) -> Option<(u64, Outcome)> {
///         self.0.pop_front()
///     }
///     fn completions_pending(&self) -> bool {
///         !self.0.is_empty()
///     }
/// }
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut queue = queue_over(|_waker| Liar::default(), &Config::default())?;
/// queue.write(0, vec![1; 512], Durability::WriteThrough)?;
/// queue.submit();
/// assert_eq!(queue.reap(|_, result| assert_eq!(result, Ok(512))), 1);
/// # Ok(())
/// # }
/// ```
pub trait Disk: fmt::Debug + Send {
    /// Takes an operation, whose `id` no other one of this queue has or will have.
    ///
    /// # Errors
    /// The disk does not take it.
    fn submit(&mut self, id: u64, operation: Operation) -> Result<(), Refusal>;

    /// An operation that has ended, if there is one. An id that is not in flight is ignored.
    fn complete(&mut self) -> Option<(u64, Outcome)>;

    /// Whether [`Disk::complete`] would give something.
    fn completions_pending(&self) -> bool;

    /// The queue is dropped: operations in flight are forgotten, and no other call follows.
    fn stop(&mut self) {}
}

impl<D: Disk + ?Sized> Disk for Box<D> {
    fn submit(&mut self, id: u64, operation: Operation) -> Result<(), Refusal> {
        (**self).submit(id, operation)
    }

    fn complete(&mut self) -> Option<(u64, Outcome)> {
        (**self).complete()
    }

    fn completions_pending(&self) -> bool {
        (**self).completions_pending()
    }

    fn stop(&mut self) {
        (**self).stop();
    }
}

/// Wakes who sleeps on the queue's completion descriptor; usable from any thread.
#[derive(Clone, Debug)]
pub struct Waker(Arc<Notifier>);

impl Waker {
    /// To be called after an operation's completion has become pending, unless that was inside
    /// [`Disk::submit`].
    pub fn wake(&self) {
        self.0.signal();
    }
}

/// A queue over the disk that `make` makes. Completions always make its descriptor readable.
///
/// # Errors
/// As [`IoQueue::null`], and [`SetupError::EventFd`].
pub fn queue_over<O, D: Disk + 'static>(
    make: impl FnOnce(Waker) -> D,
    config: &Config,
) -> Result<IoQueue<O>, SetupError> {
    let notifier = Arc::new(Notifier::new().map_err(SetupError::EventFd)?);
    let disk = make(Waker(Arc::clone(&notifier)));
    let backend = DiskBackend {
        disk: Box::new(disk),
        notifier,
        taken: Vec::with_capacity(usize::from(config.depth)),
        next_id: 0,
    };
    IoQueue::with_backend(Box::new(backend), config)
}

/// Where the bytes of an operation go.
#[derive(Debug)]
struct Taken {
    id: u64,
    slot: u16,
    /// A read's; empty for all others.
    segments: Vec<iovec>,
    len: u64,
}

#[derive(Debug)]
struct DiskBackend {
    disk: Box<dyn Disk>,
    notifier: Arc<Notifier>,
    taken: Vec<Taken>,
    next_id: u64,
}

// SAFETY: the segments' memory is kept by the queue that owns the backend and moves with it.
unsafe impl Send for DiskBackend {}

impl Backend for DiskBackend {
    fn engine(&self) -> Engine {
        Engine::LinuxAio
    }

    fn submit(&mut self, slots: &[u16], table: &Table) -> Submission {
        let mut taken = 0;
        for &slot in slots {
            let op = table.op(slot);
            let (offset, len) = (op.offset, op.remaining);
            let operation = match op.opcode {
                Opcode::Discard => Operation::Discard { offset, len },
                Opcode::Fdatasync => Operation::Fdatasync,
                Opcode::Read => Operation::Read { offset, len },
                Opcode::Write(durability) => Operation::Write {
                    offset,
                    data: gather(table.segments(slot)),
                    durability,
                },
                Opcode::SecureErase => Operation::SecureErase { offset, len },
                Opcode::WriteZeroes(unmap, durability) => Operation::WriteZeroes {
                    offset,
                    len,
                    unmap,
                    durability,
                },
            };
            let id = self.next_id;
            match self.disk.submit(id, operation) {
                Ok(()) => {}
                Err(_) if taken > 0 => break,
                Err(Refusal::Again) => return Submission::Again,
                Err(Refusal::Errno(errno)) => return Submission::Refused(errno),
            }
            self.next_id += 1;
            let segments = match op.opcode {
                Opcode::Read => table.segments(slot).to_vec(),
                _ => Vec::new(),
            };
            self.taken.push(Taken {
                id,
                slot,
                segments,
                len,
            });
            taken += 1;
        }
        if self.disk.completions_pending() {
            self.notifier.signal();
        }
        Submission::Accepted { taken, backlog: 0 }
    }

    fn reap(&mut self, out: &mut [Completion]) -> usize {
        let mut count = 0;
        while count < out.len() {
            let Some((id, outcome)) = self.disk.complete() else {
                break;
            };
            let Some(at) = self.taken.iter().position(|taken| taken.id == id) else {
                continue;
            };
            let taken = self.taken.swap_remove(at);
            let moved = match outcome {
                Outcome::Bytes(moved) => Ok(moved),
                Outcome::Data(data) => Ok(scatter(&data, &taken.segments)),
                Outcome::Done => Ok(taken.len),
                Outcome::Error(errno) => Err(errno),
            };
            out[count] = Completion {
                slot: taken.slot,
                result: match moved {
                    Ok(moved) => i64::try_from(moved).unwrap_or(i64::MAX),
                    Err(errno) => -i64::from(errno),
                },
            };
            count += 1;
        }
        count
    }

    fn completions_pending(&self) -> bool {
        self.disk.completions_pending()
    }

    fn notifier(&self) -> Option<&Arc<Notifier>> {
        Some(&self.notifier)
    }

    fn blocking(&self) -> Option<Arc<dyn BlockingFile>> {
        None
    }

    fn quiesce(&mut self) -> bool {
        // Nothing moves but in `submit` and `reap`.
        self.disk.stop();
        self.taken.clear();
        true
    }
}

fn gather(segments: &[iovec]) -> Vec<u8> {
    let mut data = Vec::new();
    for segment in segments {
        let start = data.len();
        data.resize(start + segment.iov_len, 0);
        // SAFETY: the queue's caller vouched for the segment until the owner is back, which it is
        // not before `reap`; the vector has just got room for it.
        unsafe {
            ptr::copy(
                segment.iov_base.cast::<u8>(),
                data[start..].as_mut_ptr(),
                segment.iov_len,
            );
        }
    }
    data
}

/// How many bytes fitted.
fn scatter(mut data: &[u8], segments: &[iovec]) -> u64 {
    let mut moved = 0;
    for segment in segments {
        let part = segment.iov_len.min(data.len());
        // SAFETY: as in `gather`, for writes; `part` is within both.
        unsafe { ptr::copy(data.as_ptr(), segment.iov_base.cast(), part) };
        data = &data[part..];
        moved += part as u64;
    }
    moved
}
