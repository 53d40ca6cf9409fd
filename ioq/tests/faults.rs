//! Faults of operations that the kernel has taken: short transfers, errors, interruptions, on demand.

mod scripted;

use ioq::testing::{Event, Step};
use ioq::{Armed, Durability, IoError, IoErrorKind, TRANSIENT_RETRIES_MAX, Unmap};
use scripted::{BOTH, disk, finish, pattern, queue, read, reap};

#[test]
fn i2_short_read_is_continued_to_its_end() {
    for imitates in BOTH {
        let disk = disk().imitating(imitates);
        disk.script(
            512..1024,
            [Step::AtMost(1), Step::AtMost(100), Step::AtMost(410)],
        );
        let mut queue = queue(&disk);
        read(&mut queue, 512, 0);
        queue.submit();
        let results = finish(&mut queue);
        assert_eq!(results[0].1, Ok(512));
        assert!(results[0].0.0 == pattern(4096)[512..1024]);
        let moved: Vec<_> = disk.log();
        let expected = [(512, 1), (513, 100), (613, 410), (1023, 1)]
            .map(|(offset, len)| Event::Read { offset, len });
        assert_eq!(moved, expected);
    }
}

#[test]
fn i2_short_write_is_continued_with_its_durability() {
    for imitates in BOTH {
        let disk = disk().imitating(imitates);
        disk.script(0..512, [Step::AtMost(200)]);
        let mut queue = queue(&disk);
        queue
            .write(0, (vec![9; 512], 0), Durability::WriteThrough)
            .unwrap();
        queue.submit();
        assert_eq!(finish(&mut queue)[0].1, Ok(512));
        let durability = Durability::WriteThrough;
        assert_eq!(
            disk.log(),
            [
                Event::Write {
                    offset: 0,
                    len: 200,
                    durability
                },
                Event::Write {
                    offset: 200,
                    len: 312,
                    durability
                },
            ]
        );
        assert!(disk.stable_image()[..512].iter().all(|&byte| byte == 9));
    }
}

#[test]
fn i2_no_progress_is_an_error_not_a_loop() {
    for imitates in BOTH {
        let disk = disk().imitating(imitates);
        disk.script(0..1024, [Step::AtMost(0), Step::AtMost(0)]);
        let mut queue = queue(&disk);
        read(&mut queue, 0, 0);
        queue
            .write(512, (vec![9; 512], 1), Durability::WriteBack)
            .unwrap();
        queue.submit();
        let results = reap(&mut queue);
        assert_eq!(results[0].1.unwrap_err().kind(), IoErrorKind::UnexpectedEof);
        assert_eq!(results[1].1.unwrap_err().kind(), IoErrorKind::WriteZero);
    }
}

#[test]
fn i2_continuation_waits_for_the_next_reap_and_keeps_its_slot() {
    for imitates in BOTH {
        let disk = disk().imitating(imitates);
        disk.script(0..512, [Step::AtMost(100)]);
        let mut queue = queue(&disk);
        read(&mut queue, 0, 0);
        queue.submit();
        assert!(reap(&mut queue).is_empty());
        assert_eq!((queue.in_flight(), queue.free_slots()), (1, 7));
        assert!(queue.completions_pending());
        assert_eq!(reap(&mut queue), [(0, Ok(512))]);
    }
}

#[test]
fn i2_continuation_does_not_wait_for_other_operations() {
    for imitates in BOTH {
        let disk = disk().imitating(imitates);
        disk.hold(true);
        disk.script(0..512, [Step::AtMost(100)]);
        let mut queue = queue(&disk);
        read(&mut queue, 0, 0);
        read(&mut queue, 512, 1);
        queue.submit();
        disk.release(0);
        assert!(reap(&mut queue).is_empty());
        // The other one, and the continuation.
        assert_eq!(disk.waiting(), 2);
    }
}

#[test]
fn i2_continuation_goes_before_what_was_never_submitted() {
    for imitates in BOTH {
        let disk = disk().imitating(imitates);
        disk.script(0..512, [Step::AtMost(100)]);
        let mut queue = queue(&disk);
        read(&mut queue, 0, 0);
        queue.submit();
        read(&mut queue, 512, 1);
        assert!(reap(&mut queue).is_empty());
        assert_eq!(reap(&mut queue), [(0, Ok(512))]);
        assert_eq!((queue.queued(), queue.in_flight()), (1, 0));
    }
}

#[test]
fn i3_error_on_completion_fails_that_operation_with_its_errno() {
    for imitates in BOTH {
        let disk = disk().imitating(imitates);
        for (block, errno) in [libc::EIO, libc::ENOSPC, libc::EROFS]
            .into_iter()
            .enumerate()
        {
            let start = block as u64 * 512;
            disk.script(start..start + 512, [Step::Fail(errno)]);
        }
        let mut queue = queue(&disk);
        for id in 0..4 {
            queue
                .write(
                    u64::from(id) * 512,
                    (vec![9; 512], id),
                    Durability::WriteBack,
                )
                .unwrap();
        }
        queue.submit();
        let results = reap(&mut queue);
        let errors: Vec<_> = results
            .iter()
            .map(|(_, r)| r.map_err(|e| (e.kind(), e.errno().unwrap())))
            .collect();
        assert_eq!(
            errors,
            [
                Err((IoErrorKind::Storage, libc::EIO)),
                Err((IoErrorKind::NoSpace, libc::ENOSPC)),
                Err((IoErrorKind::ReadOnly, libc::EROFS)),
                Ok(512),
            ]
        );
    }
}

#[test]
fn i6_failed_fdatasync_is_delivered_and_never_retried() {
    for imitates in BOTH {
        for errno in [libc::EIO, libc::ENOSPC, libc::EAGAIN] {
            let disk = disk().imitating(imitates);
            disk.script_fdatasync([Step::Fail(errno)]);
            let mut queue = queue(&disk);
            queue.queue_fdatasync((Vec::new(), 0)).unwrap();
            queue.submit();
            let results = finish(&mut queue);
            assert_eq!(results[0].1.unwrap_err().errno(), Some(errno));
            assert!(disk.log().is_empty(), "retried behind the caller's back");
        }
    }
}

#[test]
fn i6_refused_fdatasync_runs_on_the_worker_with_its_error() {
    for imitates in BOTH {
        for refusal in [libc::EINVAL, libc::EOPNOTSUPP] {
            let disk = disk().imitating(imitates);
            disk.refuse_fdatasync(refusal);
            disk.script_fdatasync([Step::Fail(libc::EIO)]);
            let mut queue = queue(&disk);
            queue
                .write(0, (vec![9; 512], 0), Durability::WriteBack)
                .unwrap();
            queue.submit();
            assert_eq!(finish(&mut queue)[0].1, Ok(512));
            assert!(disk.stable_image() == pattern(4096));

            let mut results = Vec::new();
            for id in 1..3 {
                queue.queue_fdatasync((Vec::new(), id)).unwrap();
                queue.submit();
                // Sleeping on the eventfd's side is tested with real files; here only the result.
                while !queue.is_idle() {
                    queue
                        .reap(|(_, id), result| results.push((id, result.map_err(IoError::errno))));
                    std::thread::yield_now();
                }
            }
            assert_eq!(results, [(1, Err(Some(libc::EIO))), (2, Ok(0))]);
            assert_eq!(
                disk.log().last(),
                Some(&Event::Fdatasync { blocking: true })
            );
            assert!(disk.stable_image()[..512].iter().all(|&byte| byte == 9));
        }
    }
}

#[test]
fn i6_fdatasync_refused_for_another_reason_is_not_tried_on_the_worker() {
    let disk = disk();
    disk.refuse_fdatasync(libc::EIO);
    let mut queue = queue(&disk);
    queue.queue_fdatasync((Vec::new(), 0)).unwrap();
    queue.submit();
    let results = finish(&mut queue);
    assert_eq!(results[0].1.unwrap_err().errno(), Some(libc::EIO));
    assert!(disk.log().is_empty());
}

#[test]
fn i9_interrupted_operation_is_retried_but_not_for_ever() {
    for imitates in BOTH {
        let tries = usize::from(TRANSIENT_RETRIES_MAX);
        for errno in [libc::EINTR, libc::EAGAIN] {
            for (failures, expected) in [(tries, Ok(512)), (tries + 1, Err(Some(errno)))] {
                let disk = disk().imitating(imitates);
                disk.script(0..512, vec![Step::Fail(errno); failures]);
                let mut queue = queue(&disk);
                read(&mut queue, 0, 0);
                queue.submit();
                let result = finish(&mut queue)[0].1;
                assert_eq!(
                    result.map_err(IoError::errno),
                    expected,
                    "{failures} of {errno}"
                );
            }
        }
    }
}

#[test]
fn i9_interrupted_fdatasync_is_retried() {
    for imitates in BOTH {
        let disk = disk().imitating(imitates);
        disk.script_fdatasync([Step::Fail(libc::EINTR)]);
        let mut queue = queue(&disk);
        queue.queue_fdatasync((Vec::new(), 0)).unwrap();
        queue.submit();
        assert_eq!(finish(&mut queue)[0].1, Ok(0));
        assert_eq!(disk.log(), [Event::Fdatasync { blocking: false }]);
    }
}

#[test]
fn nothing_completes_inside_queueing_or_submitting() {
    for imitates in BOTH {
        let disk = disk().imitating(imitates);
        let mut queue = queue(&disk);
        for id in 0..8 {
            read(&mut queue, 0, id);
            queue.submit();
        }
        assert_eq!((queue.free_slots(), queue.in_flight()), (0, 8));
        assert_eq!(reap(&mut queue).len(), 8);
    }
}

#[test]
fn a_panic_in_the_callback_loses_no_other_operation() {
    for imitates in BOTH {
        let disk = disk().imitating(imitates);
        let mut queue = queue(&disk);
        for id in 0..4 {
            read(&mut queue, 0, id);
        }
        queue.submit();
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            queue.reap(|(_, id), _| {
                assert_eq!(id, 0);
                panic!("the caller's mistake");
            });
        }));
        assert!(panicked.is_err());
        // Out of the engine, and not lost: nobody may sleep over them.
        assert_eq!((disk.ready(), queue.in_flight()), (0, 3));
        assert!(queue.completions_pending());
        assert_eq!(queue.arm_completion_fd(), Armed::Reap);
        // The slot of the owner that was given out is free, and takes another operation.
        read(&mut queue, 0, 9);
        queue.submit();
        let done = [1, 2, 3, 9].map(|id| (id, Ok(512)));
        assert_eq!(reap(&mut queue), done);
        assert!(queue.is_idle() && !queue.completions_pending());
    }
}

#[test]
fn offsets_beyond_what_the_kernel_can_express_are_refused() {
    let disk = disk();
    let mut queue = queue(&disk);
    let largest = i64::MAX as u64;
    for offset in [largest - 511, largest, u64::MAX - 511, u64::MAX] {
        let error = queue.read(offset, (vec![0; 512], 7)).unwrap_err();
        assert!(matches!(error, ioq::QueueError::OffsetTooLarge { offset: o, .. } if o == offset));
        assert_eq!(error.into_owner().1, 7);
    }
    assert!(queue.is_idle());
    queue.read(largest - 512, (vec![0; 512], 0)).unwrap();
}

#[test]
fn empty_transfer_succeeds_with_no_bytes() {
    for imitates in BOTH {
        let disk = disk().imitating(imitates);
        let mut queue = queue(&disk);
        queue.read(0, (Vec::new(), 0)).unwrap();
        queue
            .write(0, (Vec::new(), 1), Durability::WriteBack)
            .unwrap();
        queue.submit();
        assert_eq!(reap(&mut queue), [(0, Ok(0)), (1, Ok(0))]);
    }
}

#[test]
fn discards_and_zeroes_run_on_a_worker_with_their_errors() {
    for imitates in BOTH {
        let disk = disk().imitating(imitates);
        disk.script(0..512, [Step::Fail(libc::EIO)]);
        disk.script(
            512..1024,
            [Step::Fail(libc::EINTR), Step::Fail(libc::EAGAIN)],
        );
        let mut queue = queue(&disk);
        let owner = |id| (Vec::new(), id);
        queue.queue_discard(0, 512, owner(0)).unwrap();
        let (unmap, durability) = (Unmap::Forbidden, Durability::WriteThrough);
        queue
            .queue_write_zeroes(512, 512, unmap, durability, owner(1))
            .unwrap();
        queue.queue_discard(1024, 512, owner(2)).unwrap();
        assert_eq!(queue.submit().submitted, 3);
        let mut results = Vec::new();
        let started = std::time::Instant::now();
        while !queue.is_idle() {
            results.extend(reap(&mut queue));
            assert!(started.elapsed().as_secs() < 30, "stuck: {queue:?}");
        }
        results.sort_by_key(|(id, _)| *id);
        assert_eq!(results[0].1.unwrap_err().kind(), IoErrorKind::Storage);
        assert_eq!((results[1].1, results[2].1), (Ok(512), Ok(512)));
        assert!(disk.image()[512..1536].iter().all(|&byte| byte == 0));
        assert!(disk.image()[..512] == pattern(4096)[..512]);
        // Write-through reached the platter, a discard need not.
        assert!(disk.stable_image()[512..1024].iter().all(|&byte| byte == 0));
        assert!(disk.log().contains(&Event::WriteZeroes {
            offset: 512,
            len: 512,
            unmap,
            durability
        }));
    }
}
