//! A guest with two queues that remembers what it has written. Each block has one request at most in flight, so what
//! it holds is known exactly whenever one is answered.

use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vring::driver::{Driver, Layout};
use vring::{QueueSize, RingAddresses, RingBase, RingFeatures, Segment};

pub(crate) const BLOCK_LEN: usize = 4096;
pub(crate) const BLOCKS: u64 = 1024;
pub(crate) const QUEUES: u16 = 2;
pub(crate) const QUEUE_SIZE: u16 = 64;
pub(crate) const MEMORY_LEN: u64 = 32 << 20;

/// VERSION_1, INDIRECT_DESC, EVENT_IDX, FLUSH.
const FEATURES: u64 = 1 << 32 | 1 << 28 | 1 << 29 | 1 << 9;
const RING_PACKED: u64 = 1 << 34;

/// Requests a queue has in flight at most.
const DEPTH: usize = 20;
const BLOCKS_PER_REQUEST: u64 = 4;
/// Header, status and an indirect table, then the data.
const SLOT_LEN: u64 = 4096 + BLOCKS_PER_REQUEST * BLOCK_LEN as u64;

pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) % end
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
}

#[derive(Debug)]
struct Pending {
    kind: Kind,
    slot: usize,
    first: u64,
    count: u64,
}

pub(crate) struct Queue {
    driver: Driver<GuestMemoryMmap>,
    pub(crate) addresses: RingAddresses,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    pending: HashMap<u32, Pending>,
    free_slots: Vec<usize>,
    /// Of its own blocks.
    busy: Vec<bool>,
}

pub(crate) struct Guest {
    pub(crate) file: File,
    memory: Arc<GuestMemoryMmap>,
    pub(crate) features: u64,
    pub(crate) queues: Vec<Queue>,
    /// How often each block has been written, as far as was acknowledged.
    versions: Vec<u64>,
    dice: Dice,
    pub(crate) completed: u64,
    last: Instant,
}

/// What version `version` of a block holds: different in every 8 bytes, and from any other version or block.
fn content(block: u64, version: u64) -> Vec<u8> {
    if version == 0 {
        return vec![0; BLOCK_LEN];
    }
    let words = BLOCK_LEN as u64 / 8;
    (0..words)
        .flat_map(|word| {
            let name = (block << 40 | version << 12 | word).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            name.to_le_bytes()
        })
        .collect()
}

fn slot_addr(queue: usize, slot: usize) -> u64 {
    (4 << 20) + ((queue * DEPTH + slot) as u64) * SLOT_LEN
}

impl Guest {
    pub(crate) fn new(packed: bool, seed: u64) -> Self {
        let file = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(MEMORY_LEN).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let len = usize::try_from(MEMORY_LEN).unwrap();
        let ranges = [(GuestAddress(0), len, Some(offset))];
        let memory = Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap());
        let features = FEATURES | if packed { RING_PACKED } else { 0 };
        let size = QueueSize::try_from(QUEUE_SIZE).unwrap();
        let ring = RingFeatures::from_virtio(features);
        let queues = (0..u64::from(QUEUES))
            .map(|index| {
                let base = GuestAddress(0x10000 * (index + 1));
                let addresses = Layout::new(base, size, ring).unwrap().addresses();
                Queue {
                    driver: Driver::new(Arc::clone(&memory), addresses, size, ring).unwrap(),
                    addresses,
                    kick: EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap(),
                    call: EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap(),
                    pending: HashMap::new(),
                    free_slots: (0..DEPTH).collect(),
                    busy: vec![false; usize::try_from(BLOCKS).unwrap()],
                }
            })
            .collect();
        Self {
            file,
            memory,
            features,
            queues,
            versions: vec![0; usize::try_from(BLOCKS).unwrap()],
            dice: Dice::new(seed),
            completed: 0,
            last: Instant::now(),
        }
    }

    /// Where a front-end says that the ring goes on after its back-end has gone, as QEMU does: of a split ring what
    /// the driver's used ring says, of a packed ring it does not know.
    pub(crate) fn base(&self, queue: usize) -> u32 {
        let features = RingFeatures::from_virtio(self.features);
        if features.packed {
            return RingBase::fresh(features).to_vhost_user();
        }
        let used = self.queues[queue].addresses.device_area.0 + 2;
        u32::from(self.memory.read_obj::<u16>(GuestAddress(used)).unwrap())
    }

    pub(crate) fn outstanding(&self) -> u64 {
        self.queues
            .iter()
            .map(|queue| queue.pending.len() as u64)
            .sum()
    }

    /// Takes what has been answered and asks for more.
    pub(crate) fn turn(&mut self, deadline: Duration) {
        for queue in 0..usize::from(QUEUES) {
            self.reap(queue);
            let more = self.dice.below(4);
            for _ in 0..more {
                self.ask(queue);
            }
            self.publish(queue);
        }
        assert!(
            self.outstanding() == 0 || self.last.elapsed() < deadline,
            "{} requests are not answered",
            self.outstanding()
        );
        std::thread::yield_now();
    }

    /// Waits for everything.
    pub(crate) fn finish(&mut self, deadline: Duration) {
        while self.outstanding() > 0 {
            for queue in 0..usize::from(QUEUES) {
                self.reap(queue);
            }
            assert!(
                self.last.elapsed() < deadline,
                "{} requests are not answered",
                self.outstanding()
            );
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn ask(&mut self, queue: usize) {
        let dice = &mut self.dice;
        let kind = match dice.below(16) {
            0 => Kind::Flush,
            1..=7 => Kind::Read,
            _ => Kind::Write,
        };
        // Each queue has half of the blocks.
        let half = BLOCKS / u64::from(QUEUES);
        let count = 1 + dice.below(BLOCKS_PER_REQUEST);
        let first = queue as u64 * half + dice.below(half - count);
        let (first, count) = if kind == Kind::Flush {
            (0, 0)
        } else {
            (first, count)
        };
        let blocks = usize::try_from(first).unwrap()..usize::try_from(first + count).unwrap();
        let state = &mut self.queues[queue];
        if blocks.clone().any(|block| state.busy[block]) {
            return;
        }
        let Some(slot) = state.free_slots.pop() else {
            return;
        };
        let addr = slot_addr(queue, slot);
        let number: u32 = match kind {
            Kind::Read => 0,
            Kind::Write => 1,
            Kind::Flush => 4,
        };
        let sector = first * (BLOCK_LEN as u64 / 512);
        self.memory.write_obj(number, GuestAddress(addr)).unwrap();
        self.memory.write_obj(0u32, GuestAddress(addr + 4)).unwrap();
        self.memory
            .write_obj(sector, GuestAddress(addr + 8))
            .unwrap();
        self.memory
            .write_obj(0xFFu8, GuestAddress(addr + 16))
            .unwrap();
        let data = addr + 4096;
        for (i, block) in (first..first + count).enumerate() {
            let at = GuestAddress(data + (i * BLOCK_LEN) as u64);
            let bytes = if kind == Kind::Write {
                content(block, self.versions[usize::try_from(block).unwrap()] + 1)
            } else {
                vec![0xA5; BLOCK_LEN]
            };
            self.memory.write_slice(&bytes, at).unwrap();
        }
        let header = Segment {
            addr: GuestAddress(addr),
            len: 16,
        };
        let status = Segment {
            addr: GuestAddress(addr + 16),
            len: 1,
        };
        // In pieces of a block.
        let data = (0..count).map(|i| Segment {
            addr: GuestAddress(data + i * BLOCK_LEN as u64),
            len: u32::try_from(BLOCK_LEN).unwrap(),
        });
        let (mut readable, mut writable) = (vec![header], Vec::new());
        if kind == Kind::Read {
            writable.extend(data);
        } else {
            readable.extend(data);
        }
        writable.push(status);
        // Some direct: those take several entries of a packed ring's record.
        let table = GuestAddress(addr + 64);
        let direct = self.dice.below(3) == 0;
        let added = if direct {
            state.driver.add_chain(&readable, &writable).ok()
        } else {
            state.driver.add_indirect(table, &readable, &writable).ok()
        };
        let Some(id) = added else {
            state.free_slots.push(slot);
            return;
        };
        for block in blocks {
            state.busy[block] = true;
        }
        let pending = Pending {
            kind,
            slot,
            first,
            count,
        };
        assert!(state.pending.insert(u32::from(id), pending).is_none());
    }

    fn publish(&mut self, queue: usize) {
        let state = &mut self.queues[queue];
        if state.driver.publish() > 0 && state.driver.needs_kick() {
            state.kick.write(1).unwrap();
        }
    }

    fn reap(&mut self, queue: usize) {
        while let Some(used) = self.queues[queue].driver.poll_used() {
            let pending = self.queues[queue].pending.remove(&used.id);
            let Pending {
                kind,
                slot,
                first,
                count,
            } = pending.unwrap_or_else(|| panic!("{used:?} completed, and not waited for"));
            let addr = slot_addr(queue, slot);
            let status: u8 = self.memory.read_obj(GuestAddress(addr + 16)).unwrap();
            assert_eq!(status, 0, "{kind:?} of {count} blocks at {first}");
            for (i, block) in (first..first + count).enumerate() {
                let index = usize::try_from(block).unwrap();
                let version = &mut self.versions[index];
                if kind == Kind::Write {
                    *version += 1;
                } else {
                    let mut bytes = vec![0; BLOCK_LEN];
                    let at = GuestAddress(addr + 4096 + (i * BLOCK_LEN) as u64);
                    self.memory.read_slice(&mut bytes, at).unwrap();
                    assert!(
                        bytes == content(block, *version),
                        "block {block} is not version {version}"
                    );
                }
                self.queues[queue].busy[index] = false;
            }
            self.queues[queue].free_slots.push(slot);
            self.completed += 1;
            self.last = Instant::now();
        }
    }

    /// Every block, with nothing in flight.
    pub(crate) fn check_image(&self, image: &[u8]) {
        for (block, &version) in (0u64..).zip(&self.versions) {
            let at = usize::try_from(block).unwrap() * BLOCK_LEN;
            assert!(
                image[at..at + BLOCK_LEN] == content(block, version),
                "block {block} is not version {version} on the disk"
            );
        }
    }

    /// The program was not running: the time it took is not held against it.
    pub(crate) fn restart_clock(&mut self) {
        self.last = Instant::now();
    }
}
