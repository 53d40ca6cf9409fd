use event_poll::EventPoll;
use virtio_bindings::virtio_blk as blk;
use vm_memory::{Address, Bytes, GuestMemoryMmap};
use vring::driver::{SplitDriver, SplitLayout};
use vring::{QueueConfig, QueueSize, RingBase, RingFeatures, Segment, SplitQueue};

use super::*;
use crate::data_thread::buffers::MemoryRef;
use crate::data_thread::peers::Desks;
use crate::device::DeviceOptions;
use crate::image::WearFiles;
use crate::request::VIRTIO_BLK_T_GET_LIFETIME;

type Memory = GuestMemoryMmap<()>;

const HEADER: GuestAddress = GuestAddress(0x1000);
const STATUS: GuestAddress = GuestAddress(0x2000);
const DATA: GuestAddress = GuestAddress(0x3000);

/// A data thread's executor without its loop, over a null device whose operations end when the test says
/// so, and the guest's end of its only queue.
struct Rig {
    memory: Arc<Memory>,
    map: MemoryRef<Memory>,
    guest: SplitDriver<Memory>,
    ring: SplitQueue<Memory>,
    chain: Chain,
    executor: Executor<Memory>,
    seat: Seat<Stopper>,
    counters: Arc<Counters>,
}

impl Rig {
    fn new(desks: &Arc<Desks<Stopper>>, me: usize) -> Self {
        let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap());
        let size = QueueSize::new(16).unwrap();
        let features = RingFeatures::default();
        let addresses = SplitLayout::new(GuestAddress(0), size).unwrap().addresses();
        let guest = SplitDriver::new(Arc::clone(&memory), addresses, size, features).unwrap();
        let device = Device::new(Backing::null_zeroes(1 << 20), &DeviceOptions::default()).unwrap();
        let counters = Arc::new(Counters::default());
        let mut executor = {
            let queues = [QueueCounters::default()].into_iter().collect();
            Executor::new(&device, Arc::clone(&counters), queues).unwrap()
        };
        executor.set_write_through(false);
        let config = QueueConfig {
            size,
            addresses,
            features,
            base: RingBase::Split { next_avail: 0 },
        };
        Self {
            guest,
            ring: SplitQueue::start(Arc::clone(&memory), &config).unwrap(),
            chain: Chain::for_queue(size),
            executor,
            seat: Seat::new(Arc::clone(desks), me, EventPoll::new(1).unwrap().stopper()),
            counters,
            map: MemoryRef::new(Arc::clone(&memory)),
            memory,
        }
    }

    fn alone() -> Self {
        Self::new(&Arc::new(Desks::new(1)), 0)
    }

    /// The guest sends a request, and the thread pops it.
    fn start(&mut self, kind: u32) {
        self.memory.write_obj(kind.to_le(), HEADER).unwrap();
        self.memory.write_obj(0xeeu8, STATUS).unwrap();
        let segment = |addr, len| Segment { addr, len };
        let mut readable = vec![segment(HEADER, 16)];
        if kind == blk::VIRTIO_BLK_T_OUT {
            readable.push(segment(DATA, 512));
        }
        if matches!(
            kind,
            blk::VIRTIO_BLK_T_DISCARD | blk::VIRTIO_BLK_T_SECURE_ERASE
        ) {
            // Two segments, of 8 sectors each.
            for segment in [DATA, DATA.unchecked_add(16)] {
                self.memory
                    .write_obj(8u32.to_le(), segment.unchecked_add(8))
                    .unwrap();
            }
            readable.push(segment(DATA, 32));
        }
        let mut writable = vec![segment(STATUS, 1)];
        if kind == blk::VIRTIO_BLK_T_IN {
            writable.insert(0, segment(DATA, 512));
        }
        if kind == VIRTIO_BLK_T_GET_LIFETIME {
            writable.insert(0, segment(DATA, 6));
        }
        self.guest.add_chain(&readable, &writable).unwrap();
        self.guest.publish();
        let accepted = Accepted::of(u64::MAX, u64::MAX);
        let mut memory = HotRegion::new(&self.map);
        let head = self.ring.pop(&mut self.chain).unwrap().unwrap();
        let started = self
            .executor
            .start(0, accepted, head, &mut self.chain, &mut memory);
        // What the device knows by itself.
        let at_once = kind == VIRTIO_BLK_T_GET_LIFETIME;
        assert_eq!(matches!(started, Started::InFlight), !at_once);
    }

    /// The part of a pass after fetching, completions left alone.
    fn submit(&mut self) {
        self.executor.submit(&mut self.seat);
    }

    /// The rest of a pass: all operations submitted complete. Returns the used lengths of the requests
    /// that have come to their end.
    fn reap(&mut self) -> Vec<u32> {
        let mut used = Vec::new();
        self.executor
            .reap(&mut HotRegion::new(&self.map), |finished| {
                used.push(finished.used_len);
            });
        used
    }

    /// All operations submitted end well or not, whatever the null engine says.
    fn end_all(&mut self, ok: bool) -> Vec<u32> {
        let outcome = outcome_of(ok);
        let mut owners = Vec::new();
        self.executor.ioq.reap(|owner, _| owners.push(owner));
        let mut used = Vec::new();
        let mut ending = Ending {
            memory: &mut HotRegion::new(&self.map),
            finished: |end: Finished| used.push(end.used_len),
        };
        for owner in owners {
            self.executor.operation_done(owner, outcome, &mut ending);
        }
        used
    }

    fn of_queue(&self) -> crate::counters::RequestSnapshot {
        self.executor.of_queue(0).snapshot().requests
    }

    fn status(&self) -> u8 {
        self.memory.read_obj(STATUS).unwrap()
    }
}

fn outcome_of(ok: bool) -> Outcome {
    if ok { Outcome::Done } else { Outcome::Failed }
}

#[test]
fn lifetime_is_what_the_storage_said_last() {
    let mut rig = Rig::alone();
    let card = tempfile::tempdir().unwrap();
    let says = |name: &str, what: &str| std::fs::write(card.path().join(name), what).unwrap();
    says("pre_eol_info", "0x02\n");
    says("life_time", "0x0a 0x03\n");
    let lifetime = Lifetime::new(WearFiles::of_mmc(card.path()));
    rig.executor.lifetime = Some(Arc::new(lifetime));
    rig.memory.write_slice(&[0xee; 8], DATA).unwrap();
    rig.start(VIRTIO_BLK_T_GET_LIFETIME);
    assert_eq!(rig.status(), Status::Ok as u8);
    let mut told = [0; 8];
    rig.memory.read_slice(&mut told, DATA).unwrap();
    // Three little-endian fields and nothing behind them.
    assert_eq!(told, [2, 0, 10, 0, 3, 0, 0xee, 0xee]);
    assert_eq!(rig.of_queue().get_lifetimes, 1);
}

#[test]
fn secure_erase_is_done_range_by_range_and_fails_as_the_host_does() {
    for (outcome, status) in [(true, Status::Ok), (false, Status::IoErr)] {
        let mut rig = Rig::alone();
        rig.start(blk::VIRTIO_BLK_T_SECURE_ERASE);
        rig.submit();
        let mut ended = rig.end_all(outcome);
        // The second range only after the first, and if that went well.
        assert_eq!(ended.is_empty(), outcome);
        rig.submit();
        ended.extend(rig.end_all(outcome));
        assert_eq!(ended, [1]);
        assert_eq!(rig.status(), status as u8);
        assert_eq!(rig.of_queue().secure_erases, 1);
    }
}

#[test]
fn i6_failed_fdatasync_is_an_error_for_every_flush_that_shared_it() {
    for (outcome, status, errors) in [(true, Status::Ok, 0), (false, Status::IoErr, 3)] {
        let mut rig = Rig::alone();
        for _ in 0..3 {
            rig.start(blk::VIRTIO_BLK_T_FLUSH);
        }
        rig.submit();
        assert_eq!(rig.counters.snapshot().syncs, 1);
        assert_eq!(rig.end_all(outcome), [1; 3]);
        assert_eq!(rig.executor.in_flight(), 0);
        assert_eq!(rig.status(), status as u8);
        assert_eq!(rig.counters.snapshot().io_errors, errors);
    }
}

#[test]
fn i10_flush_waits_for_the_writes_that_another_thread_has_popped_and_for_no_later_ones() {
    let desks = Arc::new(Desks::new(3));
    let [mut flusher, mut writer, mut idle] = [0, 1, 2].map(|me| Rig::new(&desks, me));
    writer.start(blk::VIRTIO_BLK_T_OUT);
    writer.submit();
    idle.submit();

    flusher.start(blk::VIRTIO_BLK_T_FLUSH);
    flusher.submit();
    // The writer has learnt of it, and pops more.
    writer.submit();
    writer.start(blk::VIRTIO_BLK_T_OUT);
    flusher.submit();
    assert_eq!(flusher.counters.snapshot().syncs, 0);
    // Its first write completes; the second has not been submitted.
    assert_eq!(writer.reap(), [1]);
    flusher.submit();
    assert_eq!(flusher.counters.snapshot().syncs, 0, "not answered yet");
    writer.submit();
    flusher.submit();
    assert_eq!(flusher.counters.snapshot().syncs, 1);
    assert_eq!(flusher.reap(), [1]);
    assert_eq!(flusher.status(), Status::Ok as u8);
    assert_eq!(writer.executor.in_flight(), 1);
}

#[test]
fn i10_flushes_of_two_threads_with_writes_do_not_wait_for_each_other() {
    let desks = Arc::new(Desks::new(2));
    let mut rigs = [0, 1].map(|me| Rig::new(&desks, me));
    for rig in &mut rigs {
        rig.start(blk::VIRTIO_BLK_T_OUT);
        rig.submit();
    }
    for rig in &mut rigs {
        rig.start(blk::VIRTIO_BLK_T_FLUSH);
        rig.submit();
    }
    let mut ended = [0, 0];
    for _ in 0..4 {
        for (rig, ended) in rigs.iter_mut().zip(&mut ended) {
            *ended += rig.reap().len();
            rig.submit();
        }
    }
    assert_eq!(ended, [2, 2]);
}

#[test]
fn i10_flush_that_comes_while_others_are_asked_is_asked_for_anew() {
    let desks = Arc::new(Desks::new(2));
    let [mut flusher, mut writer] = [0, 1].map(|me| Rig::new(&desks, me));
    writer.start(blk::VIRTIO_BLK_T_OUT);
    writer.submit();
    flusher.start(blk::VIRTIO_BLK_T_FLUSH);
    flusher.submit();
    // A write that the first flush does not cover, and the second does.
    writer.submit();
    writer.start(blk::VIRTIO_BLK_T_OUT);
    assert_eq!(writer.reap(), [1]);
    writer.submit();
    flusher.start(blk::VIRTIO_BLK_T_FLUSH);
    flusher.submit();
    // The answer to the first lets that one go, and the second is asked for.
    assert_eq!(flusher.counters.snapshot().syncs, 1);
    assert_eq!(flusher.reap(), [1]);
    flusher.submit();
    assert!(flusher.reap().is_empty());
    writer.submit();
    assert_eq!(writer.reap(), [1]);
    writer.submit();
    flusher.submit();
    assert_eq!(flusher.reap(), [1]);
}

#[test]
fn b30_write_through_writes_complete_behind_one_fdatasync_for_all_of_them() {
    for (outcome, status) in [(true, Status::Ok), (false, Status::IoErr)] {
        let mut rig = Rig::alone();
        rig.executor.set_write_through(true);
        let syncs = |rig: &Rig| rig.counters.snapshot().syncs;
        for _ in 0..3 {
            rig.start(blk::VIRTIO_BLK_T_OUT);
        }
        rig.submit();
        assert_eq!(syncs(&rig), 0);
        assert!(rig.end_all(true).is_empty(), "done and not yet stable");
        rig.submit();
        assert_eq!(syncs(&rig), 1);
        // One that comes while an fdatasync is under way may not be covered by it.
        rig.start(blk::VIRTIO_BLK_T_OUT);
        rig.submit();
        let mut owners = Vec::new();
        rig.executor.ioq.reap(|owner, _| owners.push(owner));
        // The write first, whatever order they came in.
        owners.sort_by_key(|owner| matches!(owner, Owner::Sync { .. }));
        let sync = owners.pop().unwrap();
        let write = owners.pop().unwrap();
        let mut nothing = Ending {
            memory: &mut HotRegion::new(&rig.map),
            finished: |_| panic!("not stable"),
        };
        rig.executor
            .operation_done(write, Outcome::Done, &mut nothing);
        rig.submit();
        assert_eq!(syncs(&rig), 1);
        let mut ended = 0;
        rig.executor.operation_done(
            sync,
            outcome_of(outcome),
            &mut Ending {
                memory: &mut HotRegion::new(&rig.map),
                finished: |_| ended += 1,
            },
        );
        assert_eq!((ended, rig.status()), (3, status as u8));
        rig.submit();
        assert_eq!(syncs(&rig), 2);
        assert_eq!(rig.end_all(true), [1]);
        assert_eq!(rig.status(), Status::Ok as u8);
        assert_eq!(rig.executor.in_flight(), 0);
    }
}

#[test]
fn b30_write_in_flight_when_the_cache_is_turned_off_is_made_stable() {
    let mut rig = Rig::alone();
    rig.start(blk::VIRTIO_BLK_T_OUT);
    rig.submit();
    rig.executor.set_write_through(true);
    assert!(rig.reap().is_empty());
    // Turned on again: what waits for its fdatasync gets it.
    rig.executor.set_write_through(false);
    rig.submit();
    assert_eq!(rig.counters.snapshot().syncs, 1);
    assert_eq!(rig.reap(), [1]);
    rig.start(blk::VIRTIO_BLK_T_OUT);
    rig.submit();
    assert_eq!(rig.reap(), [1]);
    assert_eq!(rig.counters.snapshot().syncs, 1);
}

#[test]
fn b30_flush_shares_the_fdatasync_of_the_writes_that_wait_for_one() {
    let mut rig = Rig::alone();
    rig.executor.set_write_through(true);
    rig.start(blk::VIRTIO_BLK_T_OUT);
    rig.submit();
    assert!(rig.reap().is_empty());
    rig.start(blk::VIRTIO_BLK_T_FLUSH);
    rig.submit();
    assert_eq!(rig.counters.snapshot().syncs, 1);
    assert_eq!(rig.reap(), [1, 1]);
}

#[test]
fn b30_failed_write_is_answered_without_an_fdatasync_and_reads_never_wait_for_one() {
    let mut rig = Rig::alone();
    rig.executor.set_write_through(true);
    rig.start(blk::VIRTIO_BLK_T_OUT);
    rig.submit();
    assert_eq!(rig.end_all(false), [1]);
    assert_eq!(rig.status(), Status::IoErr as u8);
    rig.start(blk::VIRTIO_BLK_T_IN);
    rig.submit();
    assert_eq!(rig.reap(), [513]);
    rig.submit();
    assert_eq!(rig.counters.snapshot().syncs, 0);
}

#[test]
fn discard_that_the_host_cannot_do_is_unsupported_and_one_that_fails_is_ioerr() {
    for (outcome, status) in [
        (Outcome::Unsupported, Status::Unsupported),
        (Outcome::Failed, Status::IoErr),
    ] {
        let mut rig = Rig::alone();
        rig.start(blk::VIRTIO_BLK_T_DISCARD);
        rig.submit();
        let mut owners = Vec::new();
        rig.executor.ioq.reap(|owner, _| owners.push(owner));
        assert_eq!(owners.len(), 1, "one range at a time");
        let mut ended = 0;
        for owner in owners {
            rig.executor.operation_done(
                owner,
                outcome,
                &mut Ending {
                    memory: &mut HotRegion::new(&rig.map),
                    finished: |_| ended += 1,
                },
            );
        }
        // The second range is not tried any more.
        assert_eq!((ended, rig.status()), (1, status as u8));
        assert_eq!(rig.executor.in_flight(), 0);
    }
}

#[test]
fn flush_waits_for_all_ranges_of_a_discard() {
    let mut rig = Rig::alone();
    rig.start(blk::VIRTIO_BLK_T_DISCARD);
    rig.start(blk::VIRTIO_BLK_T_FLUSH);
    rig.submit();
    assert!(rig.reap().is_empty());
    rig.submit();
    assert_eq!(rig.counters.snapshot().syncs, 0);
    assert_eq!(rig.reap(), [1]);
    rig.submit();
    assert_eq!(rig.counters.snapshot().syncs, 1);
    assert_eq!(rig.reap(), [1]);
}

#[test]
fn z5_status_that_cannot_be_written_is_counted_and_the_request_ends() {
    let mut rig = Rig::alone();
    rig.start(blk::VIRTIO_BLK_T_OUT);
    rig.start(blk::VIRTIO_BLK_T_OUT);
    let slot = SlotId::from_tag(0).unwrap();
    // As if the memory had gone since the pop.
    rig.executor.slots.get_mut(slot).unwrap().status = GuestAddress(u64::MAX);
    rig.submit();
    assert_eq!(rig.reap(), [1, 1]);
    assert_eq!(rig.counters.snapshot().lost_statuses, 1);
    assert_eq!(rig.status(), Status::Ok as u8, "the other one");
    assert_eq!(rig.executor.in_flight(), 0);
}
