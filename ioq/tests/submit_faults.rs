//! Faults of the calls that submit: no room, room for some, an operation refused, on demand.

mod scripted;

use std::time::{Duration, Instant};

use ioq::testing::{Event, Imitates, SubmitStep};
use scripted::{BOTH, disk, finish, queue, read, reap};

#[test]
fn i4_eagain_parks_everything_in_order_until_the_caller_retries() {
    let disk = disk();
    disk.script_submit([SubmitStep::Again, SubmitStep::Again]);
    let mut queue = queue(&disk);
    for id in 0..4 {
        read(&mut queue, u64::from(id) * 512, id);
    }
    let report = queue.submit();
    assert_eq!((report.submitted, report.parked), (0, 4));
    assert!(queue.needs_retry());
    assert!(!queue.completions_pending());
    assert_eq!(queue.submit().parked, 4);
    assert_eq!(queue.submit().submitted, 4);
    assert!(!queue.needs_retry());
    assert_eq!(reap(&mut queue).len(), 4);
    let offsets: Vec<_> = disk.log();
    let expected = [0, 512, 1024, 1536].map(|offset| Event::Read { offset, len: 512 });
    assert_eq!(offsets, expected);
}

#[test]
fn i4_short_submit_is_followed_up_at_once_and_parked_if_that_fails() {
    let disk = disk();
    disk.script_submit([SubmitStep::AtMost(3), SubmitStep::Again]);
    let mut queue = queue(&disk);
    for id in 0..5 {
        read(&mut queue, u64::from(id) * 512, id);
    }
    let report = queue.submit();
    assert_eq!((report.submitted, report.refused, report.parked), (3, 0, 2));
    assert_eq!((queue.queued(), queue.in_flight()), (2, 3));
    // Three completions will trigger the retry.
    assert!(!queue.needs_retry());
    assert_eq!(reap(&mut queue).len(), 3);
    assert_eq!(queue.queued(), 0);
    assert_eq!(reap(&mut queue), [(3, Ok(512)), (4, Ok(512))]);
}

#[test]
fn i4_reap_without_completions_does_not_hammer_the_kernel() {
    for imitates in BOTH {
        let disk = disk().imitating(imitates);
        disk.hold(true);
        disk.script_submit([SubmitStep::AtMost(1), SubmitStep::Again]);
        let mut queue = queue(&disk);
        read(&mut queue, 0, 0);
        read(&mut queue, 512, 1);
        queue.submit();
        let calls = disk.submit_calls();
        for _ in 0..100 {
            assert!(reap(&mut queue).is_empty());
        }
        assert_eq!(disk.submit_calls(), calls);
        disk.release(0);
        assert_eq!(reap(&mut queue).len(), 1);
        assert_eq!(disk.submit_calls(), calls + 1);
    }
}

#[test]
fn i4_reap_leaves_alone_what_was_never_submitted() {
    for imitates in BOTH {
        let disk = disk().imitating(imitates);
        let mut queue = queue(&disk);
        read(&mut queue, 0, 0);
        queue.submit();
        read(&mut queue, 512, 1);
        assert_eq!(reap(&mut queue).len(), 1);
        assert!(reap(&mut queue).is_empty());
        assert_eq!((queue.queued(), disk.log().len()), (1, 1));
    }
}

#[test]
fn i5_refused_operation_fails_alone_wherever_it_stands() {
    for bad in 0..5u32 {
        let disk = disk();
        let start = u64::from(bad) * 512;
        disk.refuse(start..start + 512, libc::EFAULT);
        let mut queue = queue(&disk);
        for id in 0..5 {
            read(&mut queue, u64::from(id) * 512, id);
        }
        let report = queue.submit();
        assert_eq!((report.submitted, report.refused, report.parked), (4, 1, 0));
        assert!(queue.completions_pending());
        assert!(queue.clear_completion_fd(), "a refusal wakes the caller");
        for (id, result) in reap(&mut queue) {
            if id == bad {
                assert_eq!(result.unwrap_err().errno(), Some(libc::EFAULT));
            } else {
                assert_eq!(result, Ok(512));
            }
        }
        assert!(queue.is_idle());
    }
}

#[test]
fn i5_refusals_alone_wake_the_caller() {
    let disk = disk();
    disk.refuse(0..4096, libc::EBADF);
    let mut queue = queue(&disk);
    for id in 0..8 {
        read(&mut queue, 0, id);
    }
    queue.submit();
    assert!(!queue.needs_retry());
    assert!(queue.clear_completion_fd());
    assert_eq!(reap(&mut queue).len(), 8);
}

#[test]
fn i5_operation_refused_by_a_ring_is_taken_and_fails_alone_wherever_it_stands() {
    for bad in 0..5 {
        let disk = disk().imitating(Imitates::IoUring);
        disk.refuse(bad * 512..bad * 512 + 1, libc::EINVAL);
        let mut queue = queue(&disk);
        for id in 0..5 {
            read(&mut queue, u64::from(id) * 512, id);
        }
        let report = queue.submit();
        assert_eq!((report.submitted, report.refused, report.parked), (5, 0, 0));
        assert_eq!(disk.submit_calls(), 1);
        for (id, result) in reap(&mut queue) {
            if u64::from(id) == bad {
                assert_eq!(result.unwrap_err().errno(), Some(libc::EINVAL));
            } else {
                assert_eq!(result, Ok(512));
            }
        }
        assert!(queue.is_idle());
    }
}

#[test]
fn i4_what_a_ring_has_no_room_for_stays_in_it_and_goes_before_what_comes_later() {
    let disk = disk().imitating(Imitates::IoUring);
    disk.script_submit([SubmitStep::Again, SubmitStep::AtMost(3)]);
    let mut queue = queue(&disk);
    for id in 0..2 {
        read(&mut queue, u64::from(id) * 512, id);
    }
    let report = queue.submit();
    assert_eq!((report.submitted, report.parked), (0, 2));
    assert!(queue.needs_retry());
    for id in 2..5 {
        read(&mut queue, u64::from(id) * 512, id);
    }
    // Three of five, the two left over first.
    let report = queue.submit();
    assert_eq!((report.submitted, report.parked), (3, 2));
    assert!(!queue.needs_retry());
    let first: Vec<_> = reap(&mut queue).iter().map(|(id, _)| *id).collect();
    assert_eq!(first, [0, 1, 2]);
    // That reap has tried the rest again.
    assert_eq!(finish(&mut queue).len(), 2);
    let offsets: Vec<_> = disk
        .log()
        .iter()
        .map(|event| match event {
            Event::Read { offset, .. } => *offset,
            event => panic!("{event:?}"),
        })
        .collect();
    assert_eq!(offsets, [0, 512, 1024, 1536, 2048]);
}

#[test]
fn i4_what_is_parked_does_not_wait_for_a_worker_thread() {
    for imitates in BOTH {
        let disk = disk().imitating(imitates);
        let mut queue = queue(&disk);
        // Taken by a worker, whose result nobody has fetched yet: a discard may take minutes.
        queue.queue_discard(512, 512, (vec![], 0)).unwrap();
        assert_eq!(queue.submit().submitted, 1);
        disk.script_submit([SubmitStep::Again]);
        read(&mut queue, 0, 1);
        assert_eq!(queue.submit().parked, 1);
        assert!(queue.needs_retry());
        assert_eq!(queue.submit().submitted, 1);
        assert!(!queue.needs_retry());
        let mut done = 0;
        let started = Instant::now();
        while !queue.is_idle() {
            done += reap(&mut queue).len();
            assert!(started.elapsed() < Duration::from_secs(60), "stuck");
        }
        assert_eq!(done, 2);
    }
}
