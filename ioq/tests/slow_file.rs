//! Operations that a slow file holds for as long as the test wants, on both engines: what they need stays until
//! the file has answered, even if the caller drops everything.

// UNSAFETY: poll, and the mount of the slow file, are foreign calls.
#![expect(unsafe_code)]

mod fuse;

use std::os::fd::AsRawFd;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use fuse::SlowFile;
use ioq::{AlignedBuf, Armed, Config, Durability, Engine, IoQueue};

const ENGINES: [Engine; 2] = [Engine::LinuxAio, Engine::IoUring];
const BLOCK: usize = 4096;
/// Reads held at a time. io_uring hands each to a kernel thread, of which it has few.
const READS: usize = 4;

/// Block `n` holds `n + 1`.
fn content() -> Vec<u8> {
    (0..2 * READS * BLOCK)
        .map(|at| u8::try_from(at / BLOCK + 1).unwrap())
        .collect()
}

fn buf() -> AlignedBuf {
    AlignedBuf::new(BLOCK, BLOCK).unwrap()
}

/// Runs `test` with each engine, on a thread of its own as the mount demands.
fn with_each_engine(test: fn(Engine)) {
    for engine in ENGINES {
        if let Err(panic) = std::thread::spawn(move || test(engine)).join() {
            std::panic::resume_unwind(panic);
        }
    }
}

/// Queues and submits as many reads as are held at a time, and a write, and waits until the file has all of them.
fn hold<T>(queue: &mut IoQueue<(AlignedBuf, T)>, slow: &SlowFile, mut tag: impl FnMut(usize) -> T) {
    for block in 0..READS {
        let offset = (block * BLOCK) as u64;
        queue.read(offset, (buf(), tag(block))).unwrap();
    }
    let mut data = buf();
    data.fill(0xee);
    let behind = (READS * BLOCK) as u64;
    queue
        .write(behind, (data, tag(READS)), Durability::WriteBack)
        .unwrap();
    assert_eq!(queue.submit().submitted, READS + 1);
    slow.wait_for_held(READS + 1);
    assert_eq!(queue.reap(|_, _| panic!("nothing was answered")), 0);
}

#[test]
fn buffers_stay_until_a_slow_file_has_answered_even_if_the_caller_drops_everything() {
    /// Says, when it goes, how many operations had been answered by then.
    struct Witness<F: Fn() -> usize> {
        answered: F,
        seen: mpsc::Sender<usize>,
    }
    impl<F: Fn() -> usize> Drop for Witness<F> {
        fn drop(&mut self) {
            self.seen.send((self.answered)()).unwrap();
        }
    }
    with_each_engine(|engine| {
        let slow = SlowFile::new(content());
        let mut queue = IoQueue::open(Arc::new(slow.open()), engine, &Config::default()).unwrap();
        let (seen, seen_by_all) = mpsc::channel();
        hold(&mut queue, &slow, |_| Witness {
            answered: slow.answered(),
            seen: seen.clone(),
        });
        drop(seen);

        let (done, dropped) = mpsc::channel();
        std::thread::spawn(move || {
            drop(queue);
            done.send(()).unwrap();
        });
        // If an owner goes too early it most likely does so within this time; a slow machine passes.
        let early = seen_by_all.recv_timeout(Duration::from_millis(200));
        assert_eq!(early, Err(mpsc::RecvTimeoutError::Timeout), "{engine}");
        slow.answer();
        dropped
            .recv_timeout(Duration::from_secs(60))
            .expect("the queue cannot be dropped");
        let seen: Vec<_> = seen_by_all.iter().collect();
        assert_eq!(seen, [READS + 1; READS + 1], "{engine}");
        assert!(slow.content()[READS * BLOCK..][..BLOCK] == [0xee; BLOCK]);
    });
}

#[test]
fn a_slow_file_holds_up_neither_submit_nor_reap_and_wakes_the_sleeper_when_it_answers() {
    with_each_engine(|engine| {
        let slow = SlowFile::new(content());
        let mut queue = IoQueue::open(Arc::new(slow.open()), engine, &Config::default()).unwrap();
        hold(&mut queue, &slow, |block| block);
        let mut poll = libc::pollfd {
            fd: queue.completion_fd().unwrap().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        assert_eq!(queue.arm_completion_fd(), Armed::Sleep);
        // SAFETY: one pollfd that outlives the call.
        assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 0) }, 0);

        slow.answer();
        let mut seen = [false; READS + 1];
        while !queue.is_idle() {
            // SAFETY: as above.
            let ready = unsafe { libc::poll(&raw mut poll, 1, 60_000) };
            assert_eq!(ready, 1, "{engine}: not woken");
            queue.clear_completion_fd();
            queue.reap(|(buf, block), result| {
                assert_eq!(result, Ok(BLOCK as u64));
                assert!(!std::mem::replace(&mut seen[block], true), "{block} twice");
                if block < READS {
                    assert!(buf.iter().all(|&byte| usize::from(byte) == block + 1));
                }
            });
        }
        assert_eq!(seen, [true; READS + 1]);
        drop(queue);
        assert!(slow.content()[READS * BLOCK..][..BLOCK] == [0xee; BLOCK]);
    });
}
