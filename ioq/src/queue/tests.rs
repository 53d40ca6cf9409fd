// Engines that only tests make: the fallback of Linux AIO, one that cannot be quieted.

mod kernel_faults;

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::aio::{CompletionSource, LinuxAio};
use crate::backend::{BlockingFile, Submission};
use crate::error::SetupError;
use crate::notifier::Notifier;

fn file_of(bytes: &[u8]) -> Arc<File> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    Arc::new(file)
}

fn wait<O>(queue: &IoQueue<O>) {
    let fd = queue.completion_fd().unwrap();
    let mut poll = libc::pollfd {
        fd: std::os::fd::AsRawFd::as_raw_fd(&fd),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd that outlives the call.
    let rc = unsafe { libc::poll(&raw mut poll, 1, 30_000) };
    assert_eq!(rc, 1, "no completion within 30 s");
}

#[test]
fn completion_ring_is_used_on_linux() {
    let engine = LinuxAio::new(file_of(b""), 4, CompletionSource::RingIfUsable).unwrap();
    assert!(engine.reads_ring());
}

#[test]
fn completions_come_through_io_getevents_without_the_ring() {
    let config = Config {
        depth: 100,
        max_segments: 1,
    };
    let engine = LinuxAio::new(file_of(&[3; 6400]), 100, CompletionSource::SystemCall).unwrap();
    let mut queue = IoQueue::with_backend(Box::new(engine), &config).unwrap();
    for i in 0..100 {
        queue.read(i * 64, (vec![0u8; 64], i)).unwrap();
    }
    queue.submit();
    let mut seen = [false; 100];
    while !queue.is_idle() {
        wait(&queue);
        queue.clear_completion_fd();
        queue.reap(|(buf, i), result| {
            assert_eq!(result, Ok(64));
            assert_eq!(buf, [3; 64]);
            assert!(!std::mem::replace(
                &mut seen[usize::try_from(i).unwrap()],
                true
            ));
        });
    }
    assert_eq!(seen, [true; 100]);
}

#[test]
fn arming_without_the_ring_loses_no_wake_up() {
    let config = Config {
        depth: 2,
        max_segments: 1,
    };
    // On tmpfs an operation has completed when it has been submitted.
    let mut file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.write_all(&[3; 64]).unwrap();
    let engine = LinuxAio::new(file.into(), 2, CompletionSource::SystemCall).unwrap();
    let mut queue = IoQueue::with_backend(Box::new(engine), &config).unwrap();
    queue.disarm_completion_fd();
    for _ in 0..2 {
        queue.read(0, vec![0u8; 64]).unwrap();
        queue.submit();
        assert_eq!(queue.reap(|_, result| assert_eq!(result, Ok(64))), 1);
        // Completes after that look, and before the next.
        queue.read(0, vec![0u8; 64]).unwrap();
        queue.submit();
        if queue.arm_completion_fd() == Armed::Sleep {
            wait(&queue);
        }
        assert_eq!(queue.reap(|_, result| assert_eq!(result, Ok(64))), 1);
    }
    // The signal of what was reaped already is looked after once.
    queue.read(0, vec![0u8; 64]).unwrap();
    queue.submit();
    assert_eq!(queue.reap(|_, _| ()), 1);
    assert_eq!(queue.arm_completion_fd(), Armed::Reap);
    assert_eq!(queue.reap(|_, _| ()), 0);
    assert_eq!(queue.arm_completion_fd(), Armed::Sleep);
}

#[test]
fn ring_wraps_many_times() {
    let mut queue = IoQueue::linux_aio(
        file_of(&[9; 512]),
        &Config {
            depth: 3,
            max_segments: 1,
        },
    )
    .unwrap();
    let mut done = 0;
    for _ in 0..5000 {
        queue.read(0, vec![0u8; 512]).unwrap();
        queue.submit();
        while !queue.is_idle() {
            done += queue.reap(|buf, result| {
                assert_eq!(result, Ok(512));
                assert_eq!(buf, [9; 512]);
            });
        }
    }
    assert_eq!(done, 5000);
}

/// Takes everything, completes nothing, and says whether it can be quieted.
#[derive(Debug)]
struct Stuck {
    quiet: bool,
    drops: &'static AtomicUsize,
}

impl Backend for Stuck {
    fn engine(&self) -> Engine {
        Engine::Null
    }
    fn submit(&mut self, slots: &[u16], _: &Table) -> Submission {
        Submission::Accepted {
            taken: slots.len(),
            backlog: 0,
        }
    }
    fn reap(&mut self, _: &mut [Completion]) -> usize {
        0
    }
    fn completions_pending(&self) -> bool {
        false
    }
    fn notifier(&self) -> Option<&Arc<Notifier>> {
        None
    }
    fn blocking(&self) -> Option<Arc<dyn BlockingFile>> {
        None
    }
    fn quiesce(&mut self) -> bool {
        assert_eq!(self.drops.load(Ordering::Relaxed), 0, "an owner went first");
        self.quiet
    }
}

/// Where LeakSanitizer finds the address of what is leaked on purpose, and says nothing.
static LEAKED: std::sync::Mutex<Vec<usize>> = std::sync::Mutex::new(Vec::new());

pub(super) fn leaked_on_purpose(address: usize) {
    LEAKED.lock().unwrap().push(address);
}

static DROPS_QUIET: AtomicUsize = AtomicUsize::new(0);
static DROPS_STUCK: AtomicUsize = AtomicUsize::new(0);

struct CountsDrop(&'static AtomicUsize);

impl Drop for CountsDrop {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn owners_are_dropped_once_the_engine_is_quiet_and_leaked_if_it_never_is() {
    let config = Config {
        depth: 2,
        max_segments: 1,
    };
    for (quiet, drops, expected) in [(true, &DROPS_QUIET, 2), (false, &DROPS_STUCK, 0)] {
        let mut queue = IoQueue::with_backend(Box::new(Stuck { quiet, drops }), &config).unwrap();
        queue.queue_fdatasync(CountsDrop(drops)).unwrap();
        queue.queue_fdatasync(CountsDrop(drops)).unwrap();
        queue.submit();
        drop(queue);
        assert_eq!(drops.load(Ordering::Relaxed), expected, "quiet: {quiet}");
    }
}

#[test]
fn unsupported_without_a_blocking_file_fails_that_operation() {
    #[derive(Debug)]
    struct Incapable;
    impl Backend for Incapable {
        fn engine(&self) -> Engine {
            Engine::Null
        }
        fn submit(&mut self, _: &[u16], _: &Table) -> Submission {
            Submission::Unsupported
        }
        fn reap(&mut self, _: &mut [Completion]) -> usize {
            0
        }
        fn completions_pending(&self) -> bool {
            false
        }
        fn notifier(&self) -> Option<&Arc<Notifier>> {
            None
        }
        fn blocking(&self) -> Option<Arc<dyn BlockingFile>> {
            None
        }
        fn quiesce(&mut self) -> bool {
            true
        }
    }
    let config = Config {
        depth: 2,
        max_segments: 1,
    };
    let mut queue = IoQueue::with_backend(Box::new(Incapable), &config).unwrap();
    queue.queue_fdatasync(()).unwrap();
    let report = queue.submit();
    assert_eq!((report.submitted, report.refused, report.parked), (0, 1, 0));
    let mut errors = Vec::new();
    queue.reap(|(), result| errors.push(result.unwrap_err().errno()));
    assert_eq!(errors, [Some(libc::EOPNOTSUPP)]);
    assert!(queue.is_idle());
}

#[test]
fn bad_configurations_are_refused() {
    let null = |depth, max_segments| {
        IoQueue::<()>::null(&Config {
            depth,
            max_segments,
        })
    };
    assert!(matches!(null(0, 1), Err(SetupError::Depth)));
    assert!(matches!(
        null(1, 0),
        Err(SetupError::Segments { max_segments: 0 })
    ));
    assert!(matches!(
        null(1, 1025),
        Err(SetupError::Segments { max_segments: 1025 })
    ));
    assert!(null(u16::MAX, 1024).is_ok());
}

#[test]
fn queue_may_move_to_another_thread_if_its_owners_may() {
    fn is_send<T: Send>() {}
    is_send::<IoQueue<Vec<u8>>>();
}
