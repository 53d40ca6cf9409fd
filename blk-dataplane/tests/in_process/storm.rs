//! Storms of host I/O errors under load: every request is answered once, and with the truth; afterwards all works.

use std::collections::VecDeque;

use blk_dataplane::Backing;
use blk_dataplane::testing::TestDisk;
use ioq::testing::{Disk, Faults, Operation, Outcome, Refusal};

use super::load::Bench;
use crate::support::embedded::{Embedded, single};
use crate::support::queue::{BLK_DISCARD, BLK_WRITE_ZEROES, FEATURES, GuestQueue, RING_PACKED};
use crate::support::request::{IOERR, OK, Request};
use crate::support::scratch::on_threads;

/// Requests of each of the four queues.
const COUNT: usize = 400;

const STORM: Faults = Faults {
    fail: 60,
    again: 60,
    short: 200,
    busy: 30,
    refuse: 20,
    fail_sync: 150,
    failed_sync_forgets: false,
};

/// A device on so many threads, and its queues: two split ones and two packed ones, of different sizes.
fn up(bench: &Bench, threads: u16) -> (Embedded, Vec<GuestQueue>) {
    let mut vmm = Embedded::new(&bench.device(threads));
    let queues = (0u16..4).map(|index| {
        let format = if index < 2 { 0 } else { RING_PACKED };
        let size = if index % 2 == 0 { 128 } else { 256 };
        vmm.queue_with(
            index,
            size,
            FEATURES | format | BLK_DISCARD | BLK_WRITE_ZEROES,
        )
    });
    let queues = queues.collect();
    (vmm, queues)
}

#[test]
fn i3_i4_i5_storm_of_errors_is_told_truly_request_by_request_and_passes() {
    for (seed, threads) in [(1, 1), (2, 2), (3, 4)] {
        let bench = Bench::new(seed);
        let (vmm, mut queues) = up(&bench, threads);
        bench.disk.set_faults(STORM);
        let (mut ok, mut failed) = (0, 0);
        std::thread::scope(|scope| {
            for load in bench.load_all(scope, &mut queues, seed, COUNT) {
                let tally = load.join().unwrap();
                (ok, failed) = (ok + tally.ok, failed + tally.failed);
            }
        });
        // The storm was one, and spared most.
        let deeds = bench.disk.deeds();
        let met = [
            deeds.failed,
            deeds.again,
            deeds.short,
            deeds.busy,
            deeds.refused,
            deeds.failed_syncs,
        ];
        assert!(met.iter().all(|&count| count > 0), "{deeds:?}");
        assert!(
            failed > 0 && ok > failed,
            "{ok} went well, {failed} did not"
        );
        let counters = vmm.plane.counters();
        assert!(counters.merged > 0 && counters.bounced > 0, "{counters:?}");
        assert_eq!(counters.io_errors, u64::try_from(failed).unwrap());

        // Nothing fails any more, on any queue.
        bench.disk.set_faults(Faults::default());
        std::thread::scope(|scope| {
            for load in bench.load_all(scope, &mut queues, seed + 10, COUNT / 4) {
                assert_eq!(load.join().unwrap().failed, 0);
            }
        });
        for queue in &mut queues {
            bench.read_all(queue);
        }
        bench.check();
        vmm.plane.stop().unwrap();
        bench.lose_power();
    }
}

#[test]
fn i6_flush_that_fails_fails_all_that_wait_for_it_and_the_next_one_is_asked_anew() {
    let bench = Bench::new(1);
    let (vmm, mut queues) = up(&bench, 2);
    for fail_sync in [1000, 0, 1000, 0] {
        bench.disk.set_faults(Faults {
            fail_sync,
            ..Faults::default()
        });
        let before = bench.disk.deeds();
        for queue in &mut queues {
            queue.arena.reset();
            let status = queue.answer(&Request::flush()).0;
            assert_eq!(status, Some(u8::from(fail_sync > 0)));
        }
        let after = bench.disk.deeds();
        // Each waited for the one before: none is told what another's was.
        let asked = (after.syncs - before.syncs) + (after.failed_syncs - before.failed_syncs);
        assert_eq!(asked, 4);
    }
    vmm.plane.stop().unwrap();
}

#[test]
fn i6_no_flush_succeeds_after_one_has_failed_in_a_page_cache() {
    let bench = Bench::new(1);
    let disk = TestDisk::from(&bench.disk).buffered();
    let device = on_threads(Backing::Testing(disk.clone()), 2);
    let mut vmm = Embedded::new(&device);
    let mut queues: Vec<GuestQueue> = (0..4).map(|index| vmm.queue(index, 16)).collect();
    let mut flush = |queue: usize| queues[queue].answer(&Request::flush()).0;
    assert_eq!(flush(0), Some(OK));
    bench.disk.set_faults(Faults {
        fail_sync: 1000,
        failed_sync_forgets: true,
        ..Faults::default()
    });
    assert_eq!(flush(1), Some(IOERR));
    bench.disk.set_faults(Faults::default());
    // On the thread that was told and on the other one.
    for queue in 0..4 {
        assert_eq!(flush(queue), Some(IOERR));
    }
    assert!(vmm.plane.stop().is_err(), "the image may not be whole");
    // Nor does another front-end get any, until the image is opened anew.
    for (device, status) in [(device, IOERR), (on_threads(Backing::Testing(disk), 2), OK)] {
        let (_vmm, mut queue) = single(&device);
        assert_eq!(queue.answer(&Request::flush()).0, Some(status));
    }
}

#[test]
fn power_lost_under_load_takes_nothing_that_was_acknowledged() {
    for (seed, threads) in [(1, 1), (2, 2), (3, 4), (4, 3)] {
        let bench = Bench::new(seed);
        let (vmm, mut queues) = up(&bench, threads);
        std::thread::scope(|scope| {
            let loads = bench.load_all(scope, &mut queues, seed, COUNT);
            while loads.iter().any(|load| !load.is_finished()) {
                // Every outcome of a loss of power at this moment.
                bench.check();
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            for load in loads {
                assert_eq!(load.join().unwrap().failed, 0);
            }
        });
        bench.lose_power();
        assert!(vmm.plane.stop().is_err(), "there is no disk any more");
    }
}

/// Its first fdatasync ends with `EAGAIN`, as that of a page cache does which was told so when it wrote: a FUSE file
/// system may say anything.
#[derive(Debug, Default)]
struct AgainOnce {
    ended: VecDeque<(u64, Outcome)>,
    told: bool,
}

impl Disk for AgainOnce {
    fn submit(&mut self, id: u64, operation: Operation) -> Result<(), Refusal> {
        assert_eq!(operation, Operation::Fdatasync);
        let outcome = if std::mem::replace(&mut self.told, true) {
            Outcome::Done
        } else {
            Outcome::Error(libc::EAGAIN)
        };
        self.ended.push_back((id, outcome));
        Ok(())
    }

    fn complete(&mut self) -> Option<(u64, Outcome)> {
        self.ended.pop_front()
    }

    fn completions_pending(&self) -> bool {
        !self.ended.is_empty()
    }
}

#[test]
fn i6_fdatasync_that_says_try_again_has_failed_like_any_other() {
    for (buffered, next) in [(true, IOERR), (false, OK)] {
        let disk = TestDisk::new(1 << 20, |_| Box::new(AgainOnce::default()));
        let disk = if buffered { disk.buffered() } else { disk };
        let (_vmm, mut queue) = single(&on_threads(Backing::Testing(disk), 1));
        let mut flush = || queue.answer(&Request::flush()).0;
        assert_eq!(flush(), Some(IOERR));
        assert_eq!(flush(), Some(next));
    }
}
