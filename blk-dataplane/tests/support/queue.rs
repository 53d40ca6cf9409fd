//! The guest's end of one queue: the ring, its notifiers, and the requests outstanding.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use event_poll::EventNotifier;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vm_memory::GuestAddress;
use vring::driver::{F_INDIRECT, F_NEXT, F_WRITE, Layout};
use vring::{QueueSize, RingAddresses, RingBase, RingFeatures, Segment};

use super::DEADLINE;
use super::embedded::Start;
use super::ram::{Arena, GuestRam};
use super::request::{Framing, POISON, Request, Table, cut};
use super::ring::Ring;

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const INDIRECT: u64 = 1 << 28;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const RING_PACKED: u64 = 1 << 34;
pub(crate) const BLK_FLUSH: u64 = 1 << 9;
pub(crate) const CONFIG_WCE: u64 = 1 << 11;
pub(crate) const BLK_DISCARD: u64 = 1 << 13;
pub(crate) const BLK_WRITE_ZEROES: u64 = 1 << 14;
pub(crate) const BLK_LIFETIME: u64 = 1 << 15;
pub(crate) const BLK_SECURE_ERASE: u64 = 1 << 16;
/// What the tests negotiate unless they say otherwise.
pub(crate) const FEATURES: u64 = VERSION_1 | INDIRECT | EVENT_IDX | BLK_FLUSH;

/// Poison after each writable buffer, to catch a device that writes too much.
const GUARD: usize = 16;

/// A request the guest waits for.
#[derive(Debug)]
struct Pending {
    writable: Vec<Segment>,
}

/// A request the device has answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Completed {
    pub(crate) head: u32,
    /// Used length.
    pub(crate) len: u32,
    /// Last writable byte; `None` if there was none.
    pub(crate) status: Option<u8>,
    /// The writable bytes before it.
    pub(crate) data: Vec<u8>,
}

pub(crate) struct GuestQueue {
    pub(crate) index: u16,
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) driver: Ring,
    pub(crate) addresses: RingAddresses,
    pub(crate) features: u64,
    pub(crate) kick: EventNotifier,
    pub(crate) call: EventNotifier,
    pub(crate) err: EventNotifier,
    pub(crate) arena: Arena,
    pending: HashMap<u32, Pending>,
}

impl GuestQueue {
    pub(crate) fn new(ram: &Arc<GuestRam>, index: u16, size: u32, features: u64) -> Self {
        let base = RingBase::fresh(RingFeatures::from_virtio(features));
        Self::starting_at(ram, index, size, features, base)
    }

    pub(crate) fn starting_at(
        ram: &Arc<GuestRam>,
        index: u16,
        size: u32,
        features: u64,
        base: impl Start,
    ) -> Self {
        let size = QueueSize::new(size).unwrap();
        let ring_features = RingFeatures::from_virtio(features);
        let layout = Layout::new(GuestRam::ring_base(index), size, ring_features).unwrap();
        let driver = Ring::starting_at(
            &ram.memory,
            layout.addresses(),
            size,
            ring_features,
            base.base(),
        );
        Self {
            index,
            ram: Arc::clone(ram),
            driver,
            addresses: layout.addresses(),
            features,
            kick: EventNotifier::new().unwrap(),
            call: EventNotifier::new().unwrap(),
            err: EventNotifier::new().unwrap(),
            arena: GuestRam::arena(index),
            pending: HashMap::new(),
        }
    }

    /// Where its ring starts.
    pub(crate) fn fresh(&self) -> RingBase {
        RingBase::fresh(RingFeatures::from_virtio(self.features))
    }

    pub(crate) fn size(&self) -> u32 {
        u32::from(self.driver.size().get())
    }

    pub(crate) fn outstanding(&self) -> usize {
        self.pending.len()
    }

    /// Puts each of `lens` somewhere in the arena.
    fn place(&mut self, lens: &[usize], skew: u64) -> Vec<Segment> {
        lens.iter()
            .map(|&len| Segment {
                addr: GuestAddress(self.arena.take(len + GUARD, 512, skew)),
                len: u32::try_from(len).unwrap(),
            })
            .collect()
    }

    /// The descriptors a request takes from the table.
    pub(crate) fn descriptors(request: &Request, framing: &Framing) -> usize {
        match framing.table {
            Table::Direct => {
                cut(request.readable.len(), &framing.readable).len()
                    + cut(request.writable, &framing.writable).len()
            }
            Table::Indirect => 1,
            Table::Mixed(direct) => direct + 1,
        }
    }

    /// Lays a request out in memory and stages it. Returns its head.
    pub(crate) fn add(&mut self, request: &Request, framing: &Framing) -> u32 {
        let readable = cut(request.readable.len(), &framing.readable);
        let readable = self.place(&readable, framing.skew);
        let writable = cut(request.writable, &framing.writable);
        let writable = self.place(&writable, framing.skew);
        let mut rest = &request.readable[..];
        for segment in &readable {
            let (part, after) = rest.split_at(usize::try_from(segment.len).unwrap());
            self.ram.write(segment.addr.0, part);
            rest = after;
        }
        self.add_segments(&readable, &writable, framing.table)
    }

    /// Stages a chain of buffers that are where they are. Writable ones are poisoned.
    pub(crate) fn add_segments(
        &mut self,
        readable: &[Segment],
        writable: &[Segment],
        table: Table,
    ) -> u32 {
        // A buffer of no bytes may be anywhere, also outside memory.
        let writable_bytes = writable.iter().filter(|segment| segment.len > 0);
        for segment in writable_bytes.clone() {
            let len = usize::try_from(segment.len).unwrap();
            self.ram.write(segment.addr.0, &vec![POISON; len + GUARD]);
        }
        let count = readable.len() + writable.len();
        let head = match table {
            Table::Direct => self.driver.add_chain(readable, writable).unwrap(),
            Table::Indirect => {
                let table = self.arena.take(16 * count, 16, 0);
                self.driver
                    .add_indirect(GuestAddress(table), readable, writable)
            }
            Table::Mixed(direct) => self.add_mixed(readable, writable, direct),
        };
        let pending = Pending {
            writable: writable_bytes.copied().collect(),
        };
        let earlier = self.pending.insert(u32::from(head), pending);
        assert!(earlier.is_none(), "head {head} is outstanding already");
        u32::from(head)
    }

    fn add_mixed(&mut self, readable: &[Segment], writable: &[Segment], direct: usize) -> u16 {
        assert!(self.pending.is_empty(), "only one mixed chain at a time");
        let all: Vec<(Segment, u16)> = readable
            .iter()
            .map(|&segment| (segment, 0))
            .chain(writable.iter().map(|&segment| (segment, F_WRITE)))
            .collect();
        let (direct, indirect) = all.split_at(direct);
        for (index, (segment, flags)) in (0u16..).zip(direct) {
            self.driver.write_desc(
                index,
                segment.addr.0,
                segment.len,
                flags | F_NEXT,
                index + 1,
            );
        }
        let table = self.arena.take(16 * indirect.len(), 16, 0);
        let last = indirect.len() - 1;
        for (index, (segment, flags)) in indirect.iter().enumerate() {
            let mut entry = [0u8; 16];
            entry[..8].copy_from_slice(&segment.addr.0.to_le_bytes());
            entry[8..12].copy_from_slice(&segment.len.to_le_bytes());
            let next = if index == last { 0 } else { F_NEXT };
            entry[12..14].copy_from_slice(&(flags | next).to_le_bytes());
            let following = u16::try_from(index + 1).unwrap();
            entry[14..].copy_from_slice(&following.to_le_bytes());
            self.ram
                .write(table + u64::try_from(16 * index).unwrap(), &entry);
        }
        let at = u16::try_from(direct.len()).unwrap();
        let len = u32::try_from(16 * indirect.len()).unwrap();
        self.driver.write_desc(at, table, len, F_INDIRECT, 0);
        self.driver.offer(0);
        0
    }

    /// Publishes what is staged, and kicks if the device wants to be.
    pub(crate) fn publish(&mut self) {
        self.driver.publish();
        if self.driver.needs_kick() {
            self.kick.notify().unwrap();
        }
    }

    /// A completion that is there already.
    pub(crate) fn poll(&mut self) -> Option<Completed> {
        let used = self.driver.poll_used()?;
        let pending = self
            .pending
            .remove(&used.id)
            .unwrap_or_else(|| panic!("{used:?} was not outstanding"));
        let mut bytes = Vec::new();
        for segment in &pending.writable {
            let len = usize::try_from(segment.len).unwrap();
            let with_guard = self.ram.read(segment.addr.0, len + GUARD);
            assert_eq!(
                with_guard[len..],
                [POISON; GUARD],
                "written past a buffer's end"
            );
            bytes.extend_from_slice(&with_guard[..len]);
        }
        let status = bytes.pop();
        Some(Completed {
            head: used.id,
            len: used.len,
            status,
            data: bytes,
        })
    }

    /// Waits for the next completion as a driver does: asks for an interrupt, looks once more,
    /// sleeps until it comes. A lost interrupt hangs here, and fails at the deadline.
    pub(crate) fn next(&mut self) -> Completed {
        let start = Instant::now();
        loop {
            if let Some(completed) = self.poll() {
                return completed;
            }
            assert!(
                start.elapsed() < DEADLINE,
                "deadline: {} requests not answered on queue {}: {:?}",
                self.pending.len(),
                self.index,
                self.driver
            );
            if self.driver.enable_interrupts() {
                let mut fds = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
                poll(&mut fds, PollTimeout::try_from(DEADLINE).unwrap()).unwrap();
                self.call.test_and_clear().unwrap();
            }
        }
    }

    /// Waits for everything outstanding, in the order of completion.
    pub(crate) fn finish(&mut self) -> Vec<Completed> {
        let mut completed = Vec::new();
        while !self.pending.is_empty() {
            completed.push(self.next());
        }
        completed
    }

    /// One request from start to end.
    pub(crate) fn run_framed(&mut self, request: &Request, framing: &Framing) -> Completed {
        let head = self.add(request, framing);
        self.publish();
        let completed = self.next();
        assert_eq!(completed.head, head);
        completed
    }

    /// One request from start to end, framed as Linux does it.
    pub(crate) fn run(&mut self, request: &Request) -> Completed {
        self.run_framed(request, &Framing::classic(request))
    }

    /// Status and used length of one request.
    pub(crate) fn answer(&mut self, request: &Request) -> (Option<u8>, u32) {
        let completed = self.run(request);
        (completed.status, completed.len)
    }

    /// The bytes of the ring and of this queue's buffers: for "nothing was written since".
    pub(crate) fn snapshot(&self) -> Vec<u8> {
        let mut bytes = self.ram.read(GuestRam::ring_base(self.index).0, 0x8000);
        let arena = GuestRam::arena(self.index);
        bytes.extend(self.ram.read(arena.start(), 1 << 20));
        bytes
    }
}
