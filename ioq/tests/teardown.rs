//! What becomes of operations and their memory when the queue goes.
//!
//! AddressSanitizer sees what this process does to memory, which is what a queue over a [`FaultDisk`] does: a
//! planted mistake must be found there (`planted_...`, run by itself under the sanitizer). It does
//! not see the kernel's writes; for those a pipe that nobody writes to is the slow file, and what is left
//! in it tells.

// UNSAFETY: owners that only say when they are dropped, so that the memory can be looked at afterwards.
#![expect(unsafe_code)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use ioq::testing::{FaultDisk, Imitates};
use ioq::{AlignedBuf, Config, Durability, Engine, IoBuf, IoQueue, Unmap};
use proptest::prelude::*;
use tempfile::NamedTempFile;

const ENGINES: [Engine; 2] = [Engine::LinuxAio, Engine::IoUring];
const LEN: usize = 4096;

fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| u8::try_from((i * 7 + i / 512) % 251).unwrap())
        .collect()
}

fn file_with(dir: &str, bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new_in(dir).unwrap();
    file.write_all(bytes).unwrap();
    file.as_file().sync_all().unwrap();
    file
}

/// For reading, with `O_DIRECT`, which the build directory's file system has to take.
fn open_direct(path: &Path) -> File {
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_DIRECT);
    options.open(path).unwrap()
}

/// Counts its drops.
#[derive(Debug)]
struct Owner(Arc<AtomicUsize>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Drops the queue, which must not take for ever.
fn drop_within_deadline<O: Send + 'static>(queue: IoQueue<O>) {
    let (done, dropped) = mpsc::channel();
    std::thread::spawn(move || {
        drop(queue);
        done.send(()).unwrap();
    });
    dropped
        .recv_timeout(Duration::from_secs(30))
        .expect("the queue cannot be dropped");
}

#[test]
fn reads_that_never_complete_are_cancelled_and_nothing_is_written_after_their_owners_went() {
    for slots in [1, 7, 64] {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let config = Config {
            depth: slots,
            max_segments: 1,
        };
        let file = Arc::new(File::from(OwnedFd::from(reader.try_clone().unwrap())));
        let mut queue = IoQueue::open(file, Engine::IoUring, &config).unwrap();
        let drops = Arc::new(AtomicUsize::new(0));
        let mut memory = vec![0x55u8; LEN];
        for _ in 0..slots {
            let owner = Owner(Arc::clone(&drops));
            // SAFETY: `memory` outlives the queue, and is not looked at before that is gone.
            unsafe { queue.queue_readv(0, [memory.segment()], owner) }.unwrap();
        }
        assert_eq!(queue.submit().submitted, usize::from(slots));
        assert_eq!(
            queue.reap(|_, _| panic!("nothing was written to the pipe")),
            0
        );
        drop_within_deadline(queue);
        assert_eq!(drops.load(Ordering::SeqCst), usize::from(slots));

        // A read still in flight would take this.
        writer.write_all(&[0xaa; LEN]).unwrap();
        drop(writer);
        let mut left = Vec::new();
        let mut reader = reader;
        reader.read_to_end(&mut left).unwrap();
        assert_eq!(left, [0xaa; LEN]);
        assert_eq!(memory, [0x55; LEN]);
    }
}

#[test]
fn a_read_that_is_cancelled_midway_through_others_leaves_their_results_alone() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let file = Arc::new(File::from(OwnedFd::from(reader)));
    let mut queue = IoQueue::io_uring(file, &Config::default()).unwrap();
    writer.write_all(&[1; LEN]).unwrap();
    queue.read(0, vec![0u8; LEN]).unwrap();
    queue.read(0, vec![0u8; LEN]).unwrap();
    queue.submit();
    let mut done = 0;
    while done == 0 {
        done += queue.reap(|buf, result| {
            assert_eq!(result, Ok(LEN as u64));
            assert_eq!(buf, [1; LEN]);
        });
    }
    assert_eq!((done, queue.in_flight()), (1, 1));
    drop_within_deadline(queue);
}

#[test]
fn the_file_is_let_go_of_by_the_time_the_queue_is_gone() {
    // The far end learns of it: a pipe without a reader breaks.
    for engine in ENGINES {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let file = Arc::new(File::from(OwnedFd::from(reader)));
        let mut queue = IoQueue::open(file, engine, &Config::default()).unwrap();
        if engine == Engine::IoUring {
            queue.read(0, vec![0u8; LEN]).unwrap();
            queue.submit();
        }
        drop_within_deadline(queue);
        // The kernel may put the last of its references off to the thread's way out of a call.
        let error = writer.write(&[0; LEN]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe, "{engine}");
    }
}

/// A buffer's last byte of each page.
fn page_ends(memory: &[u8]) -> Vec<u8> {
    memory.iter().skip(4095).step_by(4096).copied().collect()
}

#[test]
fn reads_of_a_disk_are_over_by_the_time_their_owners_go() {
    const BUFFERS: usize = 64;
    const SIZE: usize = 1 << 20;
    /// Notes what has arrived by the time it is dropped.
    struct Witness {
        memory: Arc<Vec<AlignedBuf>>,
        number: usize,
        seen: mpsc::Sender<(usize, Vec<u8>)>,
    }
    impl Drop for Witness {
        fn drop(&mut self) {
            let now = page_ends(&self.memory[self.number]);
            self.seen.send((self.number, now)).unwrap();
        }
    }
    let named = file_with(env!("CARGO_TARGET_TMPDIR"), &vec![7; BUFFERS * SIZE]);
    for engine in ENGINES {
        let file = Arc::new(open_direct(named.path()));
        let mut queue = IoQueue::open(Arc::clone(&file), engine, &Config::default()).unwrap();
        let mut memory: Vec<_> = (0..BUFFERS)
            .map(|_| AlignedBuf::new(SIZE, 4096).unwrap())
            .collect();
        let segments: Vec<_> = memory.iter_mut().map(IoBuf::segment).collect();
        let memory = Arc::new(memory);
        let (seen, seen_by_all) = mpsc::channel();
        for (number, segment) in segments.into_iter().enumerate() {
            let witness = Witness {
                memory: Arc::clone(&memory),
                number,
                seen: seen.clone(),
            };
            // SAFETY: the memory outlives the queue; it is looked at while the kernel may write to
            // it, which is the question.
            unsafe { queue.queue_readv((number * SIZE) as u64, [segment], witness) }.unwrap();
        }
        assert_eq!(queue.submit().submitted, BUFFERS);
        drop_within_deadline(queue);
        drop(seen);
        let seen: Vec<_> = seen_by_all.iter().collect();
        assert_eq!(seen.len(), BUFFERS);
        // What was still under way has time to arrive: as much again is read behind it.
        let mut again = AlignedBuf::new(SIZE, 4096).unwrap();
        for number in 0..BUFFERS {
            file.read_exact_at(&mut again, (number * SIZE) as u64)
                .unwrap();
        }
        for (number, then) in seen {
            let now = page_ends(&memory[number]);
            assert!(now == then, "{engine}: buffer {number} was written to");
        }
    }
}

#[test]
fn buffers_outlive_a_queue_dropped_with_operations_in_flight() {
    const LEN: usize = 16 << 20;
    const BLOCK: usize = 1 << 20;
    let named = file_with(env!("CARGO_TARGET_TMPDIR"), &pattern(LEN));
    let file = Arc::new(open_direct(named.path()));
    /// On drop, says whether all of its block had arrived.
    struct Checked {
        buf: AlignedBuf,
        offset: usize,
        seen: mpsc::Sender<bool>,
    }
    impl Drop for Checked {
        fn drop(&mut self) {
            // Each page's last byte only: a thorough look would give late reads time to arrive.
            let arrived = (4095..BLOCK).step_by(4096).all(|at| {
                let i = self.offset + at;
                usize::from(self.buf[at]) == (i * 7 + i / 512) % 251
            });
            self.seen.send(arrived).unwrap();
        }
    }
    for _ in 0..3 {
        let (seen, results) = mpsc::channel();
        let mut queue = IoQueue::linux_aio(Arc::clone(&file), &Config::default()).unwrap();
        for i in 0..64 {
            let mut buf = AlignedBuf::new(BLOCK, 4096).unwrap();
            // A byte no block holds at any page's end.
            buf.fill(255);
            let segment = buf.segment();
            let offset = i * BLOCK % LEN;
            let owner = Checked {
                buf,
                offset,
                seen: seen.clone(),
            };
            // SAFETY: the owner keeps the memory, which stays in place.
            unsafe { queue.queue_readv(offset as u64, [segment], owner) }.unwrap();
        }
        assert_eq!(queue.submit().submitted, 64);
        drop(queue);
        drop(seen);
        // The kernel had finished with each buffer before it was dropped: all data was there.
        assert_eq!(results.iter().filter(|&complete| complete).count(), 64);
    }
}

#[test]
fn owners_go_after_everything_in_flight_has_completed() {
    /// The first one dropped reads how many completions the kernel has signalled.
    struct Observer {
        completions: Arc<File>,
        seen: mpsc::Sender<Option<u64>>,
    }
    impl Drop for Observer {
        fn drop(&mut self) {
            let mut count = [0; 8];
            let read = (&*self.completions).read_exact(&mut count);
            self.seen
                .send(read.ok().map(|()| u64::from_ne_bytes(count)))
                .unwrap();
        }
    }
    // Plenty of dirty pages, so that each fdatasync is still in flight when submit returns.
    let named = NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    named
        .as_file()
        .write_all_at(&pattern(1 << 24).repeat(4), 0)
        .unwrap();
    let mut queue =
        IoQueue::linux_aio(Arc::new(named.reopen().unwrap()), &Config::default()).unwrap();
    let descriptor = queue.completion_fd().unwrap().try_clone_to_owned().unwrap();
    let completions = Arc::new(File::from(descriptor));
    let (seen, results) = mpsc::channel();
    for _ in 0..4 {
        let owner = Observer {
            completions: Arc::clone(&completions),
            seen: seen.clone(),
        };
        queue.queue_fdatasync(owner).unwrap();
    }
    assert_eq!(queue.submit().submitted, 4);
    drop(queue);
    assert_eq!(results.recv().unwrap(), Some(4));
}

#[test]
fn operations_never_submitted_are_dropped_without_being_run() {
    for engine in ENGINES {
        let named = file_with("/dev/shm", &[1; 512]);
        let mut queue = IoQueue::open(
            Arc::new(named.reopen().unwrap()),
            engine,
            &Config::default(),
        )
        .unwrap();
        queue.write(0, vec![2; 512], Durability::WriteBack).unwrap();
        drop(queue);
        let mut now = [0; 512];
        named.as_file().read_exact_at(&mut now, 0).unwrap();
        assert_eq!(now, [1; 512]);
    }
}

/// What a program may do before it drops a queue.
#[derive(Clone, Copy, Debug)]
enum Act {
    Read,
    Write,
    Fdatasync,
    Discard,
    WriteZeroes,
    Submit,
    Release(usize),
    Reap,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => Just(Act::Read),
        4 => Just(Act::Write),
        1 => Just(Act::Fdatasync),
        1 => Just(Act::Discard),
        1 => Just(Act::WriteZeroes),
        4 => Just(Act::Submit),
        3 => (0usize..8).prop_map(Act::Release),
        2 => Just(Act::Reap),
    ]
}

proptest! {
    #[test]
    fn every_owner_goes_once_whenever_the_queue_is_dropped(
        acts in prop::collection::vec(act(), 0..60),
        io_uring in any::<bool>(),
        depth in 1u16..10,
    ) {
        let imitates = if io_uring { Imitates::IoUring } else { Imitates::LinuxAio };
        let disk = FaultDisk::new(vec![3; 1 << 16]).imitating(imitates);
        disk.hold(true);
        let drops = Arc::new(AtomicUsize::new(0));
        let mut queue: IoQueue<(Vec<u8>, Owner)> =
            disk.queue(&Config { depth, max_segments: 1 }).unwrap();
        let mut made = 0;
        for (i, &act) in acts.iter().enumerate() {
            let mut owner = |len| {
                made += 1;
                (vec![4; len], Owner(Arc::clone(&drops)))
            };
            let offset = i as u64 * 512;
            // One that finds no room is dropped here.
            let _ = match act {
                Act::Read => queue.read(offset, owner(512)),
                Act::Write => queue.write(offset, owner(512), Durability::WriteBack),
                Act::Fdatasync => queue.queue_fdatasync(owner(0)),
                Act::Discard => queue.queue_discard(offset, 512, owner(0)),
                Act::WriteZeroes => queue.queue_write_zeroes(
                    offset, 512, Unmap::Allowed, Durability::WriteBack, owner(0)),
                Act::Submit => { queue.submit(); Ok(()) }
                Act::Release(nth) => { disk.release(nth); Ok(()) }
                Act::Reap => { queue.reap(|_, _| {}); Ok(()) }
            };
        }
        let before = drops.load(Ordering::SeqCst);
        let held = queue.capacity() - queue.free_slots();
        prop_assert_eq!(before + held, made);
        drop(queue);
        prop_assert_eq!(drops.load(Ordering::SeqCst), made);
        // Nothing is left that would touch their memory.
        disk.hold(false);
        prop_assert_eq!(disk.waiting(), 0);
    }
}

/// Only under AddressSanitizer, which must report a heap-use-after-free: `ci/asan.sh ioq` runs it.
#[test]
#[ignore = "a mistake, planted to see AddressSanitizer find it"]
fn planted_buffer_freed_before_its_read_completes() {
    let disk = FaultDisk::new(vec![3; LEN]);
    disk.hold(true);
    let mut queue = disk.queue(&Config::default()).unwrap();
    let mut memory = vec![0u8; LEN];
    // SAFETY: none. The owner does not keep the memory, which is the mistake.
    unsafe { queue.queue_readv(0, [memory.segment()], ()) }.unwrap();
    queue.submit();
    drop(memory);
    disk.hold(false);
    queue.reap(|(), result| assert_eq!(result, Ok(LEN as u64)));
}
