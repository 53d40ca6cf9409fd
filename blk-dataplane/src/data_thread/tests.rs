use crossbeam_channel::{bounded, unbounded};
use event_poll::EventNotifier;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vring::driver::SplitLayout;
use vring::{Queue, QueueConfig, QueueSize, RingBase, RingFeatures};

use super::*;
use crate::device::{Backing, DEFAULT_NUM_QUEUES, DeviceOptions};
use crate::request::Accepted;

type Memory = GuestMemoryMmap<()>;

fn queue_parts(memory: &Arc<Memory>, cache: CacheFeatures) -> Box<QueueParts<Memory>> {
    let size = QueueSize::new(4).unwrap();
    let config = QueueConfig {
        size,
        addresses: SplitLayout::new(GuestAddress(0), size).unwrap().addresses(),
        features: RingFeatures::default(),
        base: RingBase::Split { next_avail: 0 },
    };
    Box::new(QueueParts {
        ring: Queue::start(Arc::clone(memory), &config).unwrap().into(),
        addresses: config.addresses,
        kick: Some(EventNotifier::new().unwrap()),
        call: None,
        err: None,
        enabled: true,
        cache,
        accepted: Accepted::default(),
    })
}

#[test]
fn b30_writes_are_write_through_while_any_running_queue_needs_it() {
    let ranges = [(GuestAddress(0), 0x1000)];
    let memory = Arc::new(Memory::from_ranges(&ranges).unwrap());
    let device = Device::new(Backing::null(512), &DeviceOptions::default()).unwrap();
    let (_commands, receiver) = unbounded();
    let poll = EventPoll::new(EVENTS_MAX).unwrap();
    let mut thread = DataThread::new(ThreadParts {
        device,
        memory: Arc::clone(&memory),
        poll,
        commands: receiver,
        counters: Arc::new(Counters::default()),
        queue_counters: (0..DEFAULT_NUM_QUEUES)
            .map(|_| QueueCounters::default())
            .collect(),
        number: 0,
        desks: Arc::new(Desks::new(1)),
        paused: false,
        marks_dirty: true,
        writeback: true,
    })
    .unwrap();
    let start = |thread: &mut DataThread<Memory>, index, flush, config_wce| {
        let (reply, started) = bounded(1);
        let parts = queue_parts(&memory, CacheFeatures { flush, config_wce });
        thread.command(Command::StartQueue {
            index,
            parts,
            reply,
        });
        assert!(started.recv().unwrap().is_ok());
    };
    let stop = |thread: &mut DataThread<Memory>, index| {
        let (reply, stopped) = bounded(1);
        thread.command(Command::StopQueue { index, reply });
        assert!(!thread.settle());
        assert_eq!(stopped.recv(), Ok(Some(RingBase::Split { next_avail: 0 })));
    };
    let set_writeback = |thread: &mut DataThread<Memory>, writeback| {
        let (reply, set) = bounded(1);
        thread.command(Command::SetWriteback { writeback, reply });
        assert_eq!(set.recv(), Ok(()));
    };
    start(&mut thread, 0, true, false);
    assert!(!thread.executor.is_write_through());
    // A driver that cannot flush.
    start(&mut thread, 1, false, false);
    assert!(thread.executor.is_write_through());
    stop(&mut thread, 1);
    assert!(!thread.executor.is_write_through());
    // One that knows nothing of `writeback` has a cache that must be flushed (§5.2.5.1).
    set_writeback(&mut thread, false);
    assert!(!thread.executor.is_write_through());
    start(&mut thread, 1, true, true);
    assert!(thread.executor.is_write_through());
    set_writeback(&mut thread, true);
    assert!(!thread.executor.is_write_through());
    // It may turn the cache on that it cannot flush; it does not get it.
    start(&mut thread, 2, false, true);
    assert!(thread.executor.is_write_through());
}
