//! Completion descriptors armed and disarmed: what is not signalled is never slept for.

// UNSAFETY: poll is a foreign call.
#![expect(unsafe_code)]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use ioq::{AlignedBuf, Armed, Config, Durability, Engine, IoQueue, Unmap};
use tempfile::NamedTempFile;

const ENGINES: [Engine; 2] = [Engine::LinuxAio, Engine::IoUring];
const BLOCK: usize = 4096;

/// Submit calls that are enough for Linux AIO to expect completions inside them.
const MANY: usize = 100;

fn file(dir: &str, flags: i32) -> Arc<File> {
    let mut named = NamedTempFile::new_in(dir).unwrap();
    named.write_all(&[7; 1 << 20]).unwrap();
    named.as_file().sync_all().unwrap();
    let mut options = File::options();
    options.read(true).write(true).custom_flags(flags);
    Arc::new(options.open(named.path()).unwrap())
}

fn tmpfs() -> Arc<File> {
    file("/dev/shm", 0)
}

/// Where completions come later.
fn disk() -> Arc<File> {
    file(env!("CARGO_TARGET_TMPDIR"), libc::O_DIRECT)
}

fn buf() -> AlignedBuf {
    AlignedBuf::new(BLOCK, BLOCK).unwrap()
}

/// Whether the completion descriptor is readable within `timeout` milliseconds.
fn readable<O>(queue: &IoQueue<O>, timeout: i32) -> bool {
    let mut poll = libc::pollfd {
        fd: queue.completion_fd().unwrap().as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    loop {
        // SAFETY: one pollfd that outlives the call.
        match unsafe { libc::poll(&raw mut poll, 1, timeout) } {
            0 => return false,
            1 => return true,
            _ => assert_eq!(
                std::io::Error::last_os_error().kind(),
                std::io::ErrorKind::Interrupted
            ),
        }
    }
}

fn wait_for_pending<O>(queue: &IoQueue<O>) {
    let started = std::time::Instant::now();
    while !queue.completions_pending() {
        assert!(started.elapsed().as_secs() < 30, "nothing completes");
        std::hint::spin_loop();
    }
}

#[test]
fn an_armed_queue_signals_every_completion() {
    for engine in ENGINES {
        for file in [tmpfs(), disk()] {
            let mut queue = IoQueue::open(file, engine, &Config::default()).unwrap();
            for _ in 0..MANY {
                queue.read(0, buf()).unwrap();
                queue.submit();
                assert!(readable(&queue, 30_000));
                assert!(queue.clear_completion_fd());
                wait_for_pending(&queue);
                assert_eq!(queue.reap(|_, result| assert_eq!(result, Ok(4096))), 1);
            }
        }
    }
}

#[test]
fn a_disarmed_queue_does_not_signal_what_completes_while_it_is_submitted() {
    let mut queue = IoQueue::linux_aio(tmpfs(), &Config::default()).unwrap();
    for round in 0..MANY {
        queue.disarm_completion_fd();
        queue.read(0, buf()).unwrap();
        queue.submit();
        assert!(queue.completions_pending());
        let signalled = queue.clear_completion_fd();
        // It takes a while to be sure.
        assert!(!signalled || round < 20, "round {round}");
        assert_eq!(queue.arm_completion_fd(), Armed::Reap);
        queue.reap(|_, _| {});
        assert_eq!(queue.arm_completion_fd(), Armed::Sleep);
    }
    // What is submitted armed signals again.
    queue.read(0, buf()).unwrap();
    queue.submit();
    assert!(readable(&queue, 0));
}

#[test]
fn a_disarmed_ring_does_not_signal() {
    for file in [tmpfs(), disk()] {
        let mut queue = IoQueue::io_uring(file, &Config::default()).unwrap();
        let mut signals = 0;
        for _ in 0..MANY {
            queue.disarm_completion_fd();
            queue.read(0, buf()).unwrap();
            queue.submit();
            wait_for_pending(&queue);
            signals += usize::from(queue.clear_completion_fd());
            assert_eq!(queue.arm_completion_fd(), Armed::Reap);
            assert_eq!(queue.reap(|_, _| {}), 1);
            assert_eq!(queue.arm_completion_fd(), Armed::Sleep);
        }
        // The kernel shows a completion before it looks at the flag: when its worker is interrupted in between it
        // finds the ring armed again. A signal too many does no harm; as many as operations would mean that the
        // flag does nothing.
        assert!(signals < MANY / 2, "{signals} signals");
    }
}

#[test]
fn arming_takes_the_signal_of_what_was_reaped_already() {
    let mut queue = IoQueue::linux_aio(tmpfs(), &Config::default()).unwrap();
    queue.read(0, buf()).unwrap();
    queue.submit();
    assert!(readable(&queue, 0));
    assert_eq!(queue.reap(|_, _| {}), 1);
    assert_eq!(queue.arm_completion_fd(), Armed::Sleep);
    assert!(!readable(&queue, 0), "woken for nothing");
}

#[test]
fn operations_that_will_not_signal_are_never_slept_for() {
    let file = disk();
    // A hole is read at once even directly, and gives the wrong expectation of a disk.
    file.set_len(2 << 20).unwrap();
    let hole = 1 << 20;
    let mut seen = 0;
    for _ in 0..20 {
        let mut queue = IoQueue::linux_aio(Arc::clone(&file), &Config::default()).unwrap();
        queue.disarm_completion_fd();
        for _ in 0..MANY {
            queue.read(hole, buf()).unwrap();
            queue.submit();
            wait_for_pending(&queue);
            queue.reap(|_, _| {});
        }
        for i in 0..8 {
            queue.read(i * 4096, buf()).unwrap();
        }
        queue.submit();
        let mut late = false;
        while !queue.is_idle() {
            match queue.arm_completion_fd() {
                Armed::Sleep => panic!("{} in flight without a signal", queue.in_flight()),
                Armed::Silent(count) => {
                    assert!((1..=8).contains(&count));
                    late = true;
                }
                _ => {}
            }
            queue.reap(|_, result| assert_eq!(result, Ok(4096)));
        }
        // On a busy machine a disk may be done before the thread is back from its call.
        if !late {
            continue;
        }
        seen += 1;
        // The lesson is learnt.
        queue.disarm_completion_fd();
        queue.read(0, buf()).unwrap();
        queue.submit();
        assert!(readable(&queue, 30_000));
    }
    assert!(seen > 0, "this test wants a build directory on a disk");
}

#[test]
fn no_wake_up_is_lost_between_polling_and_sleeping() {
    for engine in ENGINES {
        for file in [tmpfs(), disk()] {
            let config = Config {
                depth: 4,
                max_segments: 1,
            };
            let mut queue = IoQueue::open(file, engine, &config).unwrap();
            let (mut slept, mut done) = (0, 0u32);
            let mut spare: Vec<_> = (0..4).map(|_| buf()).collect();
            while done < 5_000 {
                queue.disarm_completion_fd();
                // Now one and now four, so that some are in flight while others complete.
                while let Some(buf) = spare.pop() {
                    match done % 7 {
                        0 => queue.queue_fdatasync(buf).unwrap(),
                        1 => queue.queue_discard(0, 4096, buf).unwrap(),
                        2 => queue
                            .queue_write_zeroes(
                                4096,
                                4096,
                                Unmap::Forbidden,
                                Durability::WriteBack,
                                buf,
                            )
                            .unwrap(),
                        3 => queue.write(8192, buf, Durability::WriteBack).unwrap(),
                        _ => queue.read(u64::from(done % 200) * 4096, buf).unwrap(),
                    }
                    if done % 2 == 0 {
                        break;
                    }
                }
                queue.submit();
                let count = queue.reap(|buf, result| {
                    result.unwrap();
                    spare.push(buf);
                });
                done += u32::try_from(count).unwrap();
                if count == 0 && queue.arm_completion_fd() == Armed::Sleep {
                    slept += 1;
                    assert!(readable(&queue, 30_000), "{engine}: slept for ever");
                    queue.clear_completion_fd();
                }
            }
            assert!(slept > 0, "{engine}: it was never tried");
        }
    }
}

#[test]
fn a_refused_operation_keeps_the_caller_awake() {
    // A directory can be opened, and not read.
    let file = Arc::new(File::open("/dev/shm").unwrap());
    for engine in ENGINES {
        let mut queue = IoQueue::open(Arc::clone(&file), engine, &Config::default()).unwrap();
        queue.disarm_completion_fd();
        queue.read(0, buf()).unwrap();
        queue.submit();
        wait_for_pending(&queue);
        assert_eq!(queue.arm_completion_fd(), Armed::Reap);
        assert_eq!(queue.reap(|_, result| assert!(result.is_err())), 1);
        assert_eq!(queue.arm_completion_fd(), Armed::Sleep);
        assert!(!readable(&queue, 0));
    }
}
