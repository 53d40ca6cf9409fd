use vm_memory::GuestMemoryMmap;
use vring::driver::{SplitDriver, SplitLayout};
use vring::{QueueConfig, QueueSize, RingBase, RingFeatures, Segment, SplitQueue};

use super::*;
use crate::device::DeviceOptions;

type Memory = GuestMemoryMmap<()>;

const HEADER: GuestAddress = GuestAddress(0x1000);
const STATUS: GuestAddress = GuestAddress(0x2000);

/// Starts `count` flushes and lets `outcome` become of the one fdatasync behind them.
fn flush(count: u16, outcome: bool) -> (Vec<u32>, u8, u64) {
    let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap());
    let size = QueueSize::new(16).unwrap();
    let features = RingFeatures::default();
    let addresses = SplitLayout::new(GuestAddress(0), size).unwrap().addresses();
    let mut guest = SplitDriver::new(Arc::clone(&memory), addresses, size, features).unwrap();
    memory
        .write_obj(
            virtio_bindings::virtio_blk::VIRTIO_BLK_T_FLUSH.to_le(),
            HEADER,
        )
        .unwrap();
    memory.write_obj(0xeeu8, STATUS).unwrap();
    for _ in 0..count {
        let (addr, len) = (HEADER, 16);
        let header = Segment { addr, len };
        let (addr, len) = (STATUS, 1);
        let status = Segment { addr, len };
        guest.add_chain(&[header], &[status]).unwrap();
    }
    guest.publish();

    let device = Device::new(Backing::null(1 << 20), &DeviceOptions::default()).unwrap();
    let counters = Arc::new(Counters::default());
    let mut executor = Executor::new(&device, Arc::clone(&counters)).unwrap();
    let config = QueueConfig {
        size,
        addresses,
        features,
        base: RingBase::Split { next_avail: 0 },
    };
    let mut ring = SplitQueue::start(Arc::clone(&memory), &config).unwrap();
    let mut chain = Chain::for_queue(size);
    let map = MemoryRef::new(Arc::clone(&memory));
    while let Some(head) = ring.pop(&mut chain).unwrap() {
        let started = executor.start(0, head, &mut chain, &map);
        assert!(matches!(started, Started::InFlight));
    }
    executor.start_ready_flushes();
    assert_eq!(counters.snapshot().syncs, 1);
    // The null engine's own outcome is success; what comes back is `outcome` instead.
    let mut owners = Vec::new();
    executor.ioq.submit();
    executor.ioq.reap(|owner, _| owners.push(owner));
    let mut used = Vec::new();
    for owner in owners {
        executor.operation_done(owner, outcome, &mut |finished: Finished| {
            used.push(finished.used_len);
            ring.push(finished.head, finished.used_len);
        });
    }
    assert_eq!(executor.in_flight(), 0);
    let status = memory.read_obj(STATUS).unwrap();
    (used, status, counters.snapshot().io_errors)
}

#[test]
fn i6_failed_fdatasync_is_an_error_for_every_flush_that_shared_it() {
    assert_eq!(flush(3, true), (vec![1; 3], Status::Ok as u8, 0));
    assert_eq!(flush(3, false), (vec![1; 3], Status::IoErr as u8, 3));
}
