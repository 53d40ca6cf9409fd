//! A guest and a device on one ring, in a small memory with two adjacent regions and a hole.

#![expect(dead_code, reason = "each test binary uses its own part")]

use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vring::driver::{Driver, F_INDIRECT, F_NEXT, Layout, PackedDriver, RawDescriptor, SplitDriver};
use vring::{
    Chain, ChainFault, Head, PackedPosition, PopError, Queue, QueueConfig, QueueSize,
    RingAddresses, RingBase, RingFault, RingFeatures, Segment,
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

/// The same features with either ring format.
pub(crate) fn both(features: RingFeatures) -> [RingFeatures; 2] {
    [false, true].map(|packed| RingFeatures { packed, ..features })
}

/// Either format, with and without `VIRTIO_F_EVENT_IDX`.
pub(crate) fn all() -> [RingFeatures; 4] {
    let [split, packed] = both(PLAIN);
    let [split_event_idx, packed_event_idx] = both(EVENT_IDX);
    [split, packed, split_event_idx, packed_event_idx]
}

/// The features with the packed format.
pub(crate) const fn packed(features: RingFeatures) -> RingFeatures {
    RingFeatures {
        packed: true,
        ..features
    }
}

/// Long enough for the slowest machine, short enough to end a hung suite.
const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) struct Rig {
    pub(crate) memory: Arc<Memory>,
    pub(crate) guest: Driver<Memory>,
    pub(crate) queue: Queue<Memory>,
    pub(crate) chain: Chain,
    pub(crate) config: QueueConfig,
    /// Id of the latest raw chain that the driver keeps an account of.
    raw: Option<u16>,
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

pub(crate) fn addresses(entries: u32, features: RingFeatures) -> RingAddresses {
    Layout::new(GuestAddress(RING), size(entries), features)
        .unwrap()
        .addresses()
}

/// Where an idle ring of `entries` is after `count` descriptors, or for a split ring chains.
pub(crate) fn base_after(count: u16, entries: u16, features: RingFeatures) -> RingBase {
    if !features.packed {
        return RingBase::Split { next_avail: count };
    }
    let position = PackedPosition {
        index: count % entries,
        wrap: (count / entries).is_multiple_of(2),
    };
    RingBase::Packed {
        avail: position,
        used: position,
    }
}

impl Rig {
    pub(crate) fn new(entries: u32, features: RingFeatures) -> Self {
        Self::starting_at(entries, features, 0)
    }

    /// As after `count` descriptors, or for a split ring chains.
    pub(crate) fn starting_at(entries: u32, features: RingFeatures, count: u16) -> Self {
        let memory = memory();
        let size = size(entries);
        let addresses = addresses(entries, features);
        let base = base_after(count, size.get(), features);
        let config = QueueConfig {
            size,
            addresses,
            features,
            base,
        };
        let guest =
            Driver::starting_at(Arc::clone(&memory), addresses, size, features, base).unwrap();
        Self {
            guest,
            queue: Queue::start(Arc::clone(&memory), &config).unwrap(),
            chain: Chain::for_queue(size),
            memory,
            config,
            raw: None,
        }
    }

    /// Resets the device: both sides start anew on the same ring.
    pub(crate) fn reset(&mut self) {
        let QueueConfig {
            size,
            addresses,
            features,
            base,
        } = self.config;
        let memory = Arc::clone(&self.memory);
        self.guest = Driver::starting_at(memory, addresses, size, features, base).unwrap();
        self.restart(base);
    }

    /// Starts the device side anew on the same ring.
    pub(crate) fn restart(&mut self, base: RingBase) {
        let config = QueueConfig {
            base,
            ..self.config
        };
        self.queue = Queue::start(Arc::clone(&self.memory), &config).unwrap();
    }

    /// What only the driver of a split ring can do.
    pub(crate) fn split(&mut self) -> &mut SplitDriver<Memory> {
        match &mut self.guest {
            Driver::Split(guest) => guest,
            Driver::Packed(_) => panic!("this test is for split rings"),
        }
    }

    /// A split ring's base.
    pub(crate) fn next_avail(&self) -> u16 {
        match self.queue.base() {
            RingBase::Split { next_avail } => next_avail,
            RingBase::Packed { .. } => panic!("this test is for split rings"),
        }
    }

    /// What only the driver of a packed ring can do.
    pub(crate) fn packed(&mut self) -> &mut PackedDriver<Memory> {
        match &mut self.guest {
            Driver::Packed(guest) => guest,
            Driver::Split(_) => panic!("this test is for packed rings"),
        }
    }

    /// Makes what is in a split ring's descriptor table at `head` available.
    pub(crate) fn offer(&mut self, head: u16) {
        self.raw = None;
        self.split().offer(head);
        self.guest.publish();
    }

    /// Makes a chain of descriptors available as they are, one after the other: address, length,
    /// flags.
    pub(crate) fn offer_raw(&mut self, descriptors: &[(u64, u32, u16)]) -> u16 {
        let raw: Vec<_> = descriptors
            .iter()
            .map(|&(address, len, flags)| RawDescriptor {
                address,
                len,
                flags,
            })
            .collect();
        let id = self.guest.add_raw(&raw).unwrap();
        self.raw = Some(id);
        self.guest.publish();
        id
    }

    /// Makes a one-buffer chain available.
    pub(crate) fn offer_buffer(&mut self) -> u16 {
        offer_buffer(&mut self.guest)
    }

    /// Offers an indirect table of `len` bytes at `table`.
    pub(crate) fn offer_table(&mut self, table: u64, len: u32, extra_flags: u16) {
        self.offer_raw(&[(table, len, F_INDIRECT | extra_flags)]);
    }

    pub(crate) fn pop(&mut self) -> Result<Option<Head>, PopError> {
        self.queue.pop(&mut self.chain)
    }

    pub(crate) fn pop_head(&mut self) -> Head {
        self.pop().unwrap().expect("a chain is available")
    }

    /// Pops all there are.
    pub(crate) fn pop_all(&mut self) -> Vec<Head> {
        std::iter::from_fn(|| self.pop().unwrap()).collect()
    }

    /// Pops until there are none, or a ring fault.
    pub(crate) fn pop_all_until_fault(&mut self) -> Vec<Head> {
        std::iter::from_fn(|| self.pop().ok().flatten()).collect()
    }

    /// Gives a chain back at once.
    pub(crate) fn complete(&mut self, head: Head, len: u32) {
        self.queue.push(head, len);
        assert_eq!(self.queue.publish(), 1);
    }

    /// The fault of the chain offered; its head goes back with length 0, and the guest gets it.
    pub(crate) fn chain_fault(&mut self) -> ChainFault {
        match self.pop() {
            Err(PopError::Chain { head, fault }) => {
                let index = head.index();
                assert!(index < self.config.size.get());
                self.complete(head, 0);
                let used = self.guest.poll_used().expect("the head was published");
                assert_eq!(used.len, 0);
                match self.raw {
                    Some(id) => assert_eq!((used.id, used.expected), (u32::from(id), true)),
                    None => assert_eq!(used.id, u32::from(index)),
                }
                assert_eq!(self.queue.in_flight(), 0);
                fault
            }
            other => panic!("expected a chain fault, got {other:?}"),
        }
    }

    /// The ring fault, after checking that it is reported once and nothing is fetched any more.
    pub(crate) fn ring_fault(&mut self) -> RingFault {
        let base = self.queue.base();
        match self.pop() {
            Err(PopError::Ring(fault)) => {
                assert_eq!(self.queue.fault(), Some(fault));
                assert_eq!(self.queue.base(), base, "nothing consumed");
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

    /// Makes the next pop of a ring of 8, with nothing else available, a ring fault.
    pub(crate) fn break_ring(&mut self) {
        match &mut self.guest {
            Driver::Split(guest) => guest.set_avail_idx(100),
            Driver::Packed(guest) => {
                let endless = RawDescriptor {
                    address: BUFFERS,
                    len: 1,
                    flags: F_NEXT,
                };
                guest.add_raw(&[endless; 8]).unwrap();
                guest.publish();
            }
        }
    }

    /// The ring works: one more buffer makes it to the device and back.
    pub(crate) fn assert_ring_goes_on(&mut self) {
        let id = self.guest.add_chain(&[], &[segment(BUFFERS, 16)]).unwrap();
        self.guest.publish();
        let popped = self.pop_head();
        assert_eq!(self.chain.writable(), [segment(BUFFERS, 16)]);
        self.complete(popped, 16);
        let used = self.guest.poll_used().unwrap();
        assert_eq!((used.id, used.len), (u32::from(id), 16));
    }
}

/// Makes a one-buffer chain available.
pub(crate) fn offer_buffer(guest: &mut Driver<Memory>) -> u16 {
    let id = guest.add_chain(&[segment(BUFFERS, 512)], &[]).unwrap();
    guest.publish();
    id
}

pub(crate) fn segment(addr: u64, len: u32) -> Segment {
    Segment {
        addr: GuestAddress(addr),
        len,
    }
}

/// One entry of an indirect table of a split ring.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Entry {
    pub(crate) fn bytes(self) -> [u8; 16] {
        entry_bytes(self.address, self.len, [self.flags, self.next])
    }
}

/// 16 bytes: address, length, and two 16-bit fields that are flags and next in a split ring, id and
/// flags in a packed one.
fn entry_bytes(address: u64, len: u32, fields: [u16; 2]) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&fields[0].to_le_bytes());
    bytes[14..].copy_from_slice(&fields[1].to_le_bytes());
    bytes
}

impl Rig {
    /// Writes an indirect table at `table` in the ring's format, its entries one after the other:
    /// address, length, flags. A split ring's are linked, a packed ring's have a meaningless id.
    pub(crate) fn write_table(&self, table: u64, entries: &[(u64, u32, u16)]) {
        for (index, &(address, len, flags)) in (0..).zip(entries) {
            let last = usize::from(index) + 1 == entries.len();
            let fields = match (self.config.features.packed, last) {
                (true, _) => [0xdead, flags],
                (false, true) => [flags, 0],
                (false, false) => [flags | F_NEXT, index + 1],
            };
            let bytes = entry_bytes(address, len, fields);
            let at = GuestAddress(table + 16 * u64::from(index));
            self.memory.write_slice(&bytes, at).unwrap();
        }
    }

    /// Writes a table of `count` readable buffers of `len` bytes.
    pub(crate) fn write_plain_table(&self, table: u64, count: u16, len: u32) {
        self.write_table(table, &vec![(BUFFERS, len, 0); usize::from(count)]);
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
