//! A guest and a device on one ring, in a small memory with two adjacent regions and a hole.

#![expect(dead_code, reason = "each test binary uses its own part")]

use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use vm_memory::{GuestAddress, GuestMemoryMmap};
use vring::driver::{F_INDIRECT, F_NEXT, SplitDriver, SplitLayout};
use vring::{
    Chain, ChainFault, Head, PopError, QueueConfig, QueueSize, RingAddresses, RingBase, RingFault,
    RingFeatures, Segment, SplitQueue,
};

pub(crate) type Memory = GuestMemoryMmap<()>;

/// Where the ring is.
pub(crate) const RING: u64 = 0x1000;
/// Free for buffers.
pub(crate) const BUFFERS: u64 = 0x20000;
/// Free for indirect tables.
pub(crate) const TABLE: u64 = 0x30000;
/// Where the second region starts, right after the first.
pub(crate) const SEAM: u64 = 0x40000;
/// Where memory ends.
pub(crate) const END: u64 = 0x80000;

pub(crate) const PLAIN: RingFeatures = RingFeatures {
    indirect_desc: false,
    event_idx: false,
    in_order: false,
    packed: false,
};
pub(crate) const INDIRECT: RingFeatures = RingFeatures {
    indirect_desc: true,
    event_idx: false,
    in_order: false,
    packed: false,
};
pub(crate) const EVENT_IDX: RingFeatures = RingFeatures {
    indirect_desc: false,
    event_idx: true,
    in_order: false,
    packed: false,
};

/// Long enough for the slowest machine, short enough to end a hung suite.
const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) struct Rig {
    pub(crate) memory: Arc<Memory>,
    pub(crate) guest: SplitDriver<Memory>,
    pub(crate) queue: SplitQueue<Memory>,
    pub(crate) chain: Chain,
    pub(crate) config: QueueConfig,
}

pub(crate) fn memory() -> Arc<Memory> {
    let ranges = [
        (GuestAddress(0), usize::try_from(SEAM).unwrap()),
        (GuestAddress(SEAM), usize::try_from(END - SEAM).unwrap()),
    ];
    Arc::new(Memory::from_ranges(&ranges).unwrap())
}

pub(crate) fn size(entries: u32) -> QueueSize {
    QueueSize::new(entries).unwrap()
}

pub(crate) fn addresses(entries: u32) -> RingAddresses {
    SplitLayout::new(GuestAddress(RING), size(entries))
        .unwrap()
        .addresses()
}

impl Rig {
    pub(crate) fn new(entries: u32, features: RingFeatures) -> Self {
        Self::starting_at(entries, features, 0)
    }

    pub(crate) fn starting_at(entries: u32, features: RingFeatures, index: u16) -> Self {
        let memory = memory();
        let size = size(entries);
        let addresses = addresses(entries);
        let config = QueueConfig {
            size,
            addresses,
            features,
            base: RingBase::Split { next_avail: index },
        };
        let guest = SplitDriver::starting_at(Arc::clone(&memory), addresses, size, features, index)
            .unwrap();
        Self {
            guest,
            queue: SplitQueue::start(Arc::clone(&memory), &config).unwrap(),
            chain: Chain::for_queue(size),
            memory,
            config,
        }
    }

    /// Makes one raw descriptor chain at `head` available.
    pub(crate) fn offer(&mut self, head: u16) {
        self.guest.offer(head);
        self.guest.publish();
    }

    /// Makes a one-buffer chain available.
    pub(crate) fn offer_buffer(&mut self) -> u16 {
        let head = self.guest.add_chain(&[segment(BUFFERS, 512)], &[]).unwrap();
        self.guest.publish();
        head
    }

    /// Offers an indirect table of `len` bytes at `table` through descriptor 0.
    pub(crate) fn offer_table(&mut self, table: u64, len: u32, extra_flags: u16) {
        self.guest
            .write_desc(0, table, len, F_INDIRECT | extra_flags, 0);
        self.offer(0);
    }

    pub(crate) fn pop(&mut self) -> Result<Option<Head>, PopError> {
        self.queue.pop(&mut self.chain)
    }

    pub(crate) fn pop_head(&mut self) -> Head {
        self.pop().unwrap().expect("a chain is available")
    }

    /// The fault of the chain offered; its head goes back with length 0, and the guest gets it.
    pub(crate) fn chain_fault(&mut self) -> ChainFault {
        match self.pop() {
            Err(PopError::Chain { head, fault }) => {
                let index = head.index();
                self.queue.push(head, 0);
                assert_eq!(self.queue.publish(), 1);
                let used = self.guest.poll_used().expect("the head was published");
                assert_eq!((used.id, used.len), (u32::from(index), 0));
                assert_eq!(self.queue.in_flight(), 0);
                fault
            }
            other => panic!("expected a chain fault, got {other:?}"),
        }
    }

    /// The ring fault, after checking that it is reported once and nothing is fetched any more.
    pub(crate) fn ring_fault(&mut self) -> RingFault {
        let next_avail = self.queue.next_avail();
        match self.pop() {
            Err(PopError::Ring(fault)) => {
                assert_eq!(self.queue.fault(), Some(fault));
                assert_eq!(self.queue.next_avail(), next_avail, "nothing consumed");
                for _ in 0..3 {
                    assert_eq!(self.pop(), Ok(None));
                }
                assert!(!self.queue.has_available());
                assert!(self.queue.enable_notification());
                fault
            }
            other => panic!("expected a ring fault, got {other:?}"),
        }
    }

    /// The chain ring works: one more buffer makes it to the device and back.
    pub(crate) fn assert_ring_goes_on(&mut self) {
        let head = self.guest.add_chain(&[], &[segment(BUFFERS, 16)]).unwrap();
        self.guest.publish();
        let popped = self.pop_head();
        assert_eq!(popped.index(), head);
        self.queue.push(popped, 16);
        self.queue.publish();
        let used = self.guest.poll_used().unwrap();
        assert_eq!((used.id, used.len), (u32::from(head), 16));
    }
}

pub(crate) fn segment(addr: u64, len: u32) -> Segment {
    Segment {
        addr: GuestAddress(addr),
        len,
    }
}

/// One entry of an indirect table.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Entry {
    pub(crate) fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// Writes `entries` linked one to the next, each `len` bytes long.
pub(crate) fn write_linked_table(memory: &Memory, table: u64, entries: u16, len: u32) {
    use vm_memory::Bytes;
    for index in 0..entries {
        let last = index + 1 == entries;
        let entry = Entry {
            address: BUFFERS,
            len,
            flags: if last { 0 } else { F_NEXT },
            next: if last { 0 } else { index + 1 },
        };
        let at = GuestAddress(table + 16 * u64::from(index));
        memory.write_slice(&entry.bytes(), at).unwrap();
    }
}

/// Runs `work` on a thread of its own and fails if it does not end: a spin fails the test
/// instead of hanging the suite.
pub(crate) fn ends<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    let worker = std::thread::spawn(move || {
        // The receiver is gone only once the deadline has failed the test.
        let _ = done.send(work());
    });
    match result.recv_timeout(DEADLINE) {
        Ok(value) => value,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("still running after {DEADLINE:?}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            std::panic::resume_unwind(worker.join().unwrap_err())
        }
    }
}
