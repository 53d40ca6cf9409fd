// The real engines over real files, while the kernel's submit calls take part of a batch, have no room,
// are interrupted or fail.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use proptest::prelude::*;

use super::super::*;
use crate::backend::kernel_faults;
use crate::error::{IoError, QueueError};
use crate::op::{Durability, Unmap};

const BLOCK: u64 = 512;
const SIZE: usize = 512;

fn block(number: usize, salt: u8) -> Vec<u8> {
    vec![u8::try_from(number).unwrap() ^ salt; SIZE]
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Read,
    Write(Durability),
    Fdatasync,
    WriteZeroes(Unmap),
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        5 => Just(Kind::Read),
        4 => Just(Kind::Write(Durability::WriteBack)),
        1 => Just(Kind::Write(Durability::WriteThrough)),
        1 => Just(Kind::Fdatasync),
        1 => Just(Kind::WriteZeroes(Unmap::Allowed)),
        1 => Just(Kind::WriteZeroes(Unmap::Forbidden)),
    ]
}

/// What passes: no operation may notice.
fn passing() -> impl Strategy<Value = Result<usize, i32>> {
    prop_oneof![
        4 => (0usize..5).prop_map(Ok),
        1 => Just(Err(libc::EAGAIN)),
        1 => Just(Err(libc::EINTR)),
    ]
}

/// What ends an operation or a ring.
fn hard() -> impl Strategy<Value = Result<usize, i32>> {
    prop_oneof![Just(Err(libc::EBADF)), Just(Err(libc::EFAULT))]
}

/// Runs `kinds`, one on each block, and checks everything but which of them failed.
fn run(
    engine: Engine,
    kinds: &[Kind],
    faults: Vec<Result<usize, i32>>,
    depth: u16,
    submit_each: bool,
) -> HashMap<usize, Result<u64, IoError>> {
    let file = Arc::new(tempfile::tempfile_in("/dev/shm").unwrap());
    for number in 0..kinds.len() {
        file.write_all_at(&block(number, 0), number as u64 * BLOCK)
            .unwrap();
    }
    let config = Config {
        depth,
        max_segments: 1,
    };
    let mut queue: IoQueue<(Vec<u8>, usize)> =
        IoQueue::open(Arc::clone(&file), engine, &config).unwrap();
    kernel_faults::script(faults);
    let mut results = HashMap::new();
    let mut next = 0;
    let started = Instant::now();
    loop {
        while let Some(kind) = kinds.get(next) {
            let offset = next as u64 * BLOCK;
            let queued = match *kind {
                Kind::Read => queue.read(offset, (vec![0; SIZE], next)),
                Kind::Write(durability) => {
                    queue.write(offset, (block(next, 0xff), next), durability)
                }
                Kind::Fdatasync => queue.queue_fdatasync((Vec::new(), next)),
                Kind::WriteZeroes(unmap) => queue.queue_write_zeroes(
                    offset,
                    BLOCK,
                    unmap,
                    Durability::WriteBack,
                    (Vec::new(), next),
                ),
            };
            match queued {
                Ok(()) => next += 1,
                Err(QueueError::Full { .. }) => break,
                Err(error) => panic!("{error}"),
            }
            if submit_each {
                queue.submit();
            }
        }
        queue.submit();
        queue.reap(|(data, id), result| {
            if let (Ok(_), Kind::Read) = (result, kinds[id]) {
                assert_eq!(data, block(id, 0));
            }
            assert!(results.insert(id, result).is_none(), "{id} completed twice");
        });
        if next == kinds.len() && queue.is_idle() {
            break;
        }
        // Not a measurement: a queue that is stuck shall fail, not hang.
        assert!(started.elapsed().as_secs() < 60, "stuck: {queue:?}");
    }
    assert_eq!(results.len(), kinds.len());
    drop(queue);
    for (number, kind) in kinds.iter().enumerate() {
        let mut now = vec![0; SIZE];
        file.read_exact_at(&mut now, number as u64 * BLOCK).unwrap();
        let done = results[&number].is_ok();
        let expected = match kind {
            Kind::Write(_) if done => block(number, 0xff),
            Kind::WriteZeroes(_) if done => vec![0; SIZE],
            _ => block(number, 0),
        };
        assert_eq!(now, expected, "block {number} {kind:?}");
    }
    results
}

proptest! {
    #[test]
    fn i4_i9_short_submits_eagain_and_eintr_are_never_noticed(
        kinds in prop::collection::vec(kind(), 1..40),
        faults in prop::collection::vec(passing(), 0..40),
        depth in 1u16..12,
        submit_each in any::<bool>(),
    ) {
        for engine in [Engine::LinuxAio, Engine::IoUring] {
            let results = run(engine, &kinds, faults.clone(), depth, submit_each);
            for (id, result) in results {
                let expected = match kinds[id] { Kind::Fdatasync => 0, _ => BLOCK };
                prop_assert_eq!(result, Ok(expected), "{} {}", engine, id);
            }
        }
    }

    #[test]
    fn i5_a_submit_call_that_fails_fails_operations_once_and_with_its_errno(
        kinds in prop::collection::vec(kind(), 1..40),
        faults in prop::collection::vec(
            prop_oneof![3 => passing().boxed(), 1 => hard().boxed()], 0..40),
        depth in 1u16..12,
        submit_each in any::<bool>(),
    ) {
        for engine in [Engine::LinuxAio, Engine::IoUring] {
            let results = run(engine, &kinds, faults.clone(), depth, submit_each);
            let met = faults.len() - kernel_faults::left();
            let mut hard = faults[..met].iter().filter_map(|fault| match fault {
                Err(libc::EAGAIN | libc::EINTR) | Ok(_) => None,
                Err(errno) => Some(*errno),
            });
            let failed: Vec<_> = results
                .values()
                .filter_map(|result| result.err().map(IoError::errno))
                .collect();
            match engine {
                // Each failed call is about one operation.
                Engine::LinuxAio => prop_assert_eq!(failed.len(), hard.count()),
                // The first one ends the ring.
                _ => {
                    let first = hard.next();
                    prop_assert!(failed.iter().all(|&errno| errno == first));
                    prop_assert_eq!(failed.is_empty(), first.is_none());
                }
            }
        }
    }
}

#[test]
fn i4_the_rest_of_a_short_enter_stays_in_the_ring_and_counts_as_parked() {
    let file = Arc::new(tempfile::tempfile_in("/dev/shm").unwrap());
    file.set_len(4 * BLOCK).unwrap();
    let config = Config {
        depth: 4,
        max_segments: 1,
    };
    let mut queue = IoQueue::io_uring(file, &config).unwrap();
    for number in 0..3 {
        queue.read(number * BLOCK, vec![1u8; SIZE]).unwrap();
    }
    kernel_faults::script([Err(libc::EAGAIN)]);
    let report = queue.submit();
    assert_eq!((report.submitted, report.parked, report.refused), (0, 3, 0));
    assert!(queue.needs_retry());
    kernel_faults::script([Ok(2), Err(libc::EAGAIN)]);
    let report = queue.submit();
    assert_eq!((report.submitted, report.parked), (2, 1));
    assert!(!queue.needs_retry(), "two completions come first");
    let mut done = 0;
    while !queue.is_idle() {
        // The first completion makes it try again, without another submit.
        done += queue.reap(|buf, result| {
            assert_eq!(result, Ok(BLOCK));
            assert_eq!(buf, [0; SIZE]);
        });
    }
    assert_eq!(done, 3);
}

#[test]
fn dropping_a_queue_whose_operations_never_left_the_ring_runs_none_of_them() {
    let file = Arc::new(tempfile::tempfile_in("/dev/shm").unwrap());
    file.write_all_at(&[7; SIZE], 0).unwrap();
    let mut queue = IoQueue::io_uring(Arc::clone(&file), &Config::default()).unwrap();
    queue
        .write(0, vec![9u8; SIZE], Durability::WriteBack)
        .unwrap();
    kernel_faults::script([Err(libc::EAGAIN)]);
    assert_eq!(queue.submit().parked, 1);
    drop(queue);
    let mut now = [0; SIZE];
    file.read_exact_at(&mut now, 0).unwrap();
    assert_eq!(now, [7; SIZE]);
}
