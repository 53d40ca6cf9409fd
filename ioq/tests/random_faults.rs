//! Random operations, faults and orders over a disk that injects faults, against a naive model.

use std::collections::HashMap;
use std::ops::Range;

use ioq::testing::{FaultDisk, Imitates, Step, SubmitStep};
use ioq::{Armed, Config, Durability, IoError, IoQueue, TRANSIENT_RETRIES_MAX, Unmap};
use proptest::prelude::*;

fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| u8::try_from((i * 7 + i / 512) % 251).unwrap())
        .collect()
}

/// Bytes of the region each random operation has to itself.
const REGION: u64 = 64;

#[derive(Clone, Debug)]
enum Kind {
    Read,
    Write(Durability),
    Fdatasync,
    Discard,
    WriteZeroes(Unmap, Durability),
}

#[derive(Clone, Debug)]
struct Planned {
    kind: Kind,
    refused: Option<i32>,
    steps: Vec<Step>,
}

#[derive(Clone, Debug)]
enum Act {
    Queue,
    Submit,
    Submitting(SubmitStep),
    Release(usize),
    Reap,
    Disarm,
    Arm,
}

fn planned() -> impl Strategy<Value = Planned> {
    let kind = prop_oneof![
        4 => Just(Kind::Read),
        3 => Just(Kind::Write(Durability::WriteBack)),
        1 => Just(Kind::Write(Durability::WriteThrough)),
        1 => Just(Kind::Fdatasync),
        1 => Just(Kind::Discard),
        1 => Just(Kind::WriteZeroes(Unmap::Allowed, Durability::WriteBack)),
        1 => Just(Kind::WriteZeroes(Unmap::Forbidden, Durability::WriteThrough)),
    ];
    let refused = prop_oneof![
        8 => Just(None),
        1 => prop_oneof![Just(libc::EINVAL), Just(libc::EFAULT), Just(libc::EBADF)]
            .prop_map(Some),
    ];
    let step = prop_oneof![
        4 => (0..REGION + 1).prop_map(Step::AtMost),
        1 => Just(Step::Fail(libc::EINTR)),
        1 => Just(Step::Fail(libc::EAGAIN)),
        1 => prop_oneof![Just(libc::EIO), Just(libc::ENOSPC)].prop_map(Step::Fail),
    ];
    // Few steps usually, sometimes enough transient errors in a row to exhaust the retries.
    let steps = prop_oneof![
        9 => prop::collection::vec(step, 0..4),
        1 => (7usize..11).prop_map(|n| vec![Step::Fail(libc::EINTR); n]),
    ];
    (kind, refused, steps).prop_map(|(kind, refused, steps)| Planned {
        kind,
        refused,
        steps,
    })
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        6 => Just(Act::Queue),
        3 => Just(Act::Submit),
        1 => Just(Act::Submitting(SubmitStep::Again)),
        1 => (0usize..5).prop_map(|n| Act::Submitting(SubmitStep::AtMost(n))),
        4 => (0usize..8).prop_map(Act::Release),
        3 => Just(Act::Reap),
        2 => Just(Act::Disarm),
        2 => Just(Act::Arm),
    ]
}

/// What an operation must come to, and how many bytes of it must have moved.
fn expected(plan: &Planned) -> (Result<u64, Option<i32>>, u64) {
    if let Kind::Fdatasync = plan.kind {
        return (Ok(0), 0);
    }
    let whole = matches!(plan.kind, Kind::Discard | Kind::WriteZeroes(..));
    if let Some(errno) = plan.refused
        // A worker does these: no submit call sees them.
        && !whole
    {
        return (Err(Some(errno)), 0);
    }
    let (mut done, mut transient) = (0, 0);
    for step in &plan.steps {
        match *step {
            // A range is done or it is not.
            Step::AtMost(_) if whole => return (Ok(REGION), REGION),
            Step::AtMost(0) => return (Err(None), done),
            Step::AtMost(most) => {
                done += most.min(REGION - done);
                transient = 0;
                if done == REGION {
                    return (Ok(REGION), done);
                }
            }
            Step::Fail(errno @ (libc::EINTR | libc::EAGAIN)) => {
                transient += 1;
                if transient > TRANSIENT_RETRIES_MAX {
                    return (Err(Some(errno)), done);
                }
            }
            Step::Fail(errno) => return (Err(Some(errno)), done),
            _ => unreachable!("not planned"),
        }
    }
    (Ok(REGION), REGION)
}

fn region(id: usize) -> Range<u64> {
    id as u64 * REGION..(id as u64 + 1) * REGION
}

proptest! {
    #[test]
    fn every_operation_completes_once_with_its_own_result_and_data(
        plans in prop::collection::vec(planned(), 1..40),
        acts in prop::collection::vec(act(), 0..200),
        depth in 1u16..10,
        syncs_on_worker in any::<bool>(),
        io_uring in any::<bool>(),
    ) {
        let original = pattern(plans.len() * usize::try_from(REGION).unwrap());
        let imitates = if io_uring { Imitates::IoUring } else { Imitates::LinuxAio };
        let disk = FaultDisk::new(original.clone()).imitating(imitates);
        for (id, plan) in plans.iter().enumerate() {
            if let Some(errno) = plan.refused {
                disk.refuse(region(id), errno);
            }
            disk.script(region(id), plan.steps.clone());
        }
        if syncs_on_worker {
            disk.refuse_fdatasync(libc::EINVAL);
        }
        disk.hold(true);
        let mut queue: IoQueue<(Vec<u8>, usize)> =
            disk.queue(&Config { depth, max_segments: 1 }).unwrap();
        let mut results = HashMap::new();
        let mut next = 0;

        let mut queue_next = |queue: &mut IoQueue<_>| {
            let Some(plan) = plans.get(next) else { return false };
            let size = usize::try_from(REGION).unwrap();
            let queued = match plan.kind {
                Kind::Read => queue.read(region(next).start, (vec![0; size], next)),
                Kind::Write(durability) => {
                    let data = vec![u8::try_from(next).unwrap() ^ 0xff; size];
                    queue.write(region(next).start, (data, next), durability)
                }
                Kind::Fdatasync => queue.queue_fdatasync((Vec::new(), next)),
                Kind::Discard => queue.queue_discard(region(next).start, REGION, (Vec::new(), next)),
                Kind::WriteZeroes(unmap, durability) => queue.queue_write_zeroes(
                    region(next).start, REGION, unmap, durability, (Vec::new(), next)),
            };
            match queued {
                Ok(()) => {
next += 1; true }
                Err(error) => {assert!(matches!(error, ioq::QueueError::Full { .. })); false }
            }
        };
        let mut reap = |queue: &mut IoQueue<(Vec<u8>, usize)>| {
            queue.reap(|(data, id), result| {
                let twice = results.insert(id, (data, result.map_err(IoError::errno)));
                assert!(twice.is_none(), "operation {id} completed twice");
            });
        };

        // The caller sleeps: whatever completes must wake it.
        let mut asleep = false;
        for act in &acts {
            asleep &= matches!(act, Act::Release(_));
            match *act {
                Act::Disarm => queue.disarm_completion_fd(),
                Act::Arm => {
                    asleep = queue.arm_completion_fd() == Armed::Sleep;
                    prop_assert!(!asleep || disk.ready() == 0, "slept for what was there");
                }
                Act::Release(nth) if asleep => {
                    prop_assert!(!disk.release(nth) || queue.clear_completion_fd(), "not woken");
                }
                Act::Queue => drop(queue_next(&mut queue)),
                Act::Submit => drop(queue.submit()),
                Act::Submitting(step) => disk.script_submit([step]),
                Act::Release(nth) => drop(disk.release(nth)),
                Act::Reap => reap(&mut queue),
            }
            prop_assert_eq!(
                queue.queued() + queue.in_flight() + queue.free_slots(),
                usize::from(depth)
            );
        }
        // Everything gets through from here on.
        disk.hold(false);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        loop {
            while queue_next(&mut queue) {}
            queue.submit();
            reap(&mut queue);
            if queue.is_idle() && !queue_next(&mut queue) {
                break;
            }
            std::thread::yield_now();
            // Not a measurement: a queue that is stuck shall fail, not hang.
            assert!(std::time::Instant::now() < deadline, "stuck: {queue:?}");
        }

        prop_assert_eq!(results.len(), plans.len());
        let image = disk.image();
        for (id, plan) in plans.iter().enumerate() {
            let (data, result) = &results[&id];
            let (wanted, moved) = expected(plan);
            prop_assert_eq!(*result, wanted, "operation {} {:?}", id, plan);
            let size = original.len() / plans.len();
            let range = id * size..(id + 1) * size;
            let moved = usize::try_from(moved).unwrap();
            let (before, after) = (&original[range.clone()], &image[range]);
            match plan.kind {
                Kind::Read => {
                    prop_assert_eq!(&data[..moved], &before[..moved]);
                    prop_assert!(data[moved..].iter().all(|&byte| byte == 0));
                    prop_assert_eq!(before, after);
                }
                Kind::Write(_) => {
                    prop_assert_eq!(&after[..moved], &data[..moved]);
                    prop_assert_eq!(&after[moved..], &before[moved..]);
                }
                Kind::Fdatasync => prop_assert_eq!(before, after),
                Kind::Discard | Kind::WriteZeroes(..) if result.is_ok() => {
                    prop_assert!(after.iter().all(|&byte| byte == 0));
                }
                Kind::Discard | Kind::WriteZeroes(..) => prop_assert_eq!(before, after),
            }
        }
    }
}
