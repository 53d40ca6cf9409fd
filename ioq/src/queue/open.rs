//! Making a queue: which engine, and what instead if the host refuses it.

use std::collections::VecDeque;
use std::fs::File;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use super::fifo::Fifo;
use super::{Config, IoQueue, REAP_BATCH, SEGMENTS_MAX};
use crate::aio::{CompletionSource, LinuxAio};
use crate::backend::{Backend, Completion};
use crate::engine::{self, Engine, Fallback};
use crate::error::SetupError;
use crate::null::Null;
use crate::op::Table;
use crate::segments::Segments;
use crate::uring::Uring;

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

    /// A queue on `file` through io_uring. Needs Linux 5.8.
    ///
    /// As [`IoQueue::linux_aio`], but with buffered files too most of the work is not done inside
    /// [`IoQueue::submit`]. Before Linux 6.0, dropping the queue waits for operations in flight
    /// without cancelling those that can be.
    ///
    /// A disk's completions interrupt neither the thread nor a system call it is in, but `EINTR` may
    /// come from `epoll_wait` (5.19 and later); the thread that submitted must be the one that
    /// sleeps, and must live until its operations are done: the kernel cancels what a thread that has
    /// ended still had to finish.
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

    /// A queue on `file` through `engine`. [`Engine::Auto`] takes the one that suits the file, or else what
    /// the host has: [`IoQueue::engine`] says what that is, and [`IoQueue::fallback`] whether it is second
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

    /// A queue that does no I/O: operations complete while they are submitted, writes are dropped, and reads
    /// leave their memory as it is. For measuring everything else.
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
            Box::new(Null::new(config.depth, false)),
            table,
            config.depth,
        ))
    }

    /// As [`IoQueue::null`], with reads that give zeroes.
    ///
    /// # Errors
    /// As [`IoQueue::null`].
    ///
    /// ```
    /// use ioq::{Config, IoQueue};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let mut queue = IoQueue::null_zeroes(&Config::default())?;
    /// queue.read(0, vec![1u8; 512])?;
    /// queue.submit();
    /// queue.reap(|buffer, _| assert_eq!(buffer, [0; 512]));
    /// # Ok(())
    /// # }
    /// ```
    pub fn null_zeroes(config: &Config) -> Result<Self, SetupError> {
        let table = table(config)?;
        Ok(Self::over(
            Box::new(Null::new(config.depth, true)),
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
            taken: 0..0,
            fallback: None,
            owners: ManuallyDrop::new(owners),
        }
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
