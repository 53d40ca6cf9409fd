//! The same guest, twice: one ring is served by `vring`, the other by virtio-queue 0.18. Chains,
//! used rings and notifications are the same, but for what [`Difference`] lists.
//!
//! The inputs are those of [`vring_split`](crate::vring_split); steps for which virtio-queue has no
//! counterpart are left out. After an explained difference the two are put in step again, so that
//! the rest of the input counts.

mod difference;
mod guest;
mod oracle;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::Arc;

use virtio_queue::{Queue as Oracle, QueueOwnedT, QueueT};
use vring::driver::SplitDriver;
use vring::{
    Chain, Head, Queue, QueueConfig, QueueSize, RingAddresses, RingBase, RingFault, RingFeatures,
};

pub use self::difference::Difference;
use self::difference::Then;
use self::oracle::{Fetched, set_word, word};
use crate::device::{Found, found};
use crate::naive_memory::NaiveMemory;
use crate::naive_walk::{Buffer, trace};
use crate::ring_input::{Buffers, Memory, REGIONS, memory};
pub use crate::vring_split::Input;
use crate::vring_split::addresses;
use crate::vring_split::input::{Op, Ring};

thread_local! {
    /// Mapped once: mapping costs more than everything else in a run.
    static MEMORY: RefCell<(Arc<Memory>, Arc<Memory>, NaiveMemory)> = RefCell::new((
        Arc::new(memory()),
        Arc::new(memory()),
        NaiveMemory::new(&REGIONS),
    ));
}

/// Runs one input, and returns the explained differences it met; panics at any other.
pub fn run(input: Input) -> BTreeSet<Difference> {
    MEMORY.with_borrow_mut(|(ours, theirs, naive)| {
        naive.reset(&**ours);
        naive.reset(&**theirs);
        let features = RingFeatures {
            indirect_desc: input.indirect_desc,
            event_idx: input.event_idx,
            // virtio-queue has neither.
            in_order: false,
            packed: false,
        };
        let mut met = BTreeSet::new();
        let memories = (Arc::clone(ours), Arc::clone(theirs));
        let place = (input.ring, input.index);
        if let Some(pair) = Pair::new(&memories, naive, place, features, &mut met) {
            let mut rig = Rig {
                memories,
                naive,
                stale: true,
                features,
                pair,
                met,
            };
            for op in input.ops {
                rig.step(op);
            }
            rig.finish();
            met = rig.met;
        }
        met
    })
}

/// Both guests and both devices.
struct Pair {
    guests: [SplitDriver<Memory>; 2],
    queue: Queue<Memory>,
    oracle: Oracle,
    size: QueueSize,
    addresses: RingAddresses,
    chain: Chain,
    heads: Vec<Head>,
    /// Entries that `vring` has seen to be available, and not fetched.
    seen: u16,
    /// Chains pushed and not published.
    staged: usize,
    /// There has been a decision, and so many chains were published since.
    decided: Option<usize>,
    /// `vring` has asked for no kicks.
    quiet: bool,
    /// `vring` has stopped.
    stopped: bool,
}

impl Pair {
    /// `None` if one of the two cannot be there.
    fn new(
        (ours, theirs): &(Arc<Memory>, Arc<Memory>),
        naive: &mut NaiveMemory,
        (ring, index): (Ring, u16),
        features: RingFeatures,
        met: &mut BTreeSet<Difference>,
    ) -> Option<Self> {
        let (size, addresses) = addresses(ring)?;
        let config = QueueConfig {
            size,
            addresses,
            features,
            base: RingBase::Split { next_avail: index },
        };
        let shape = (size.get(), features.event_idx);
        // Whether it can be there, on a ring that nobody has set up.
        let before = word_or_zero(naive, ours, addresses.device_area.0);
        let queue = Queue::start(Arc::clone(ours), &config);
        let oracle = oracle::start(theirs, shape, addresses, index);
        if let Ok(_queue) = &queue {
            if before != 0 {
                met.insert(Difference::FlagsClearedAtStart);
            }
            set_word(theirs, addresses.device_area.0, 0);
        }
        let entries = u64::from(size.get());
        let areas = [
            (addresses.descriptor_area, 16 * entries),
            (addresses.driver_area, 6 + 2 * entries),
            (addresses.device_area, 6 + 8 * entries),
        ];
        let whole = areas
            .iter()
            .all(|&(at, len)| naive.in_one_region(at.0, len));
        match (queue.is_ok(), oracle.is_some()) {
            (true, true) => assert!(whole, "an area in two regions is taken for one"),
            (false, false) => return None,
            (false, true) => {
                // All of it is memory, or virtio-queue would have noticed.
                assert!(areas.iter().all(|&(at, len)| naive.is_mapped(at.0, len)) && !whole);
                met.insert(Difference::AreaOverRegions);
                return None;
            }
            (true, false) => panic!("virtio-queue refuses {config:?}"),
        }
        if addresses.driver_area.0 == 0 {
            let not_ready = oracle?.iter(&**theirs).is_err();
            assert!(not_ready, "an available ring at address 0 is served");
            met.insert(Difference::AvailableRingAtZero);
            return None;
        }
        let guest = |memory: &Arc<Memory>| {
            SplitDriver::starting_at(Arc::clone(memory), addresses, size, features, index).unwrap()
        };
        let guests = [guest(ours), guest(theirs)];
        Some(Self {
            guests,
            // Anew, on a ring that is set up.
            queue: Queue::start(Arc::clone(ours), &config).unwrap(),
            oracle: oracle::start(theirs, shape, addresses, index)?,
            size,
            addresses,
            chain: Chain::for_queue(size),
            heads: Vec::new(),
            seen: 0,
            staged: 0,
            decided: None,
            quiet: false,
            stopped: false,
        })
    }
}

fn word_or_zero(naive: &NaiveMemory, memory: &Memory, at: u64) -> u16 {
    if naive.in_one_region(at, 2) {
        word(memory, at)
    } else {
        0
    }
}

struct Rig<'a> {
    /// `vring`'s and virtio-queue's.
    memories: (Arc<Memory>, Arc<Memory>),
    naive: &'a mut NaiveMemory,
    /// `naive` is not what memory is.
    stale: bool,
    features: RingFeatures,
    pair: Pair,
    met: BTreeSet<Difference>,
}

impl Rig<'_> {
    fn step(&mut self, op: Op) {
        match op {
            Op::Pop => {
                self.pop();
            }
            Op::Push { which, len } => self.push(which, len),
            Op::Publish => self.publish(),
            Op::Unpop { which } => self.unpop(which),
            Op::ShouldNotify => self.should_notify(),
            Op::EnableNotification => self.enable_notification(),
            Op::DisableNotification => self.disable_notification(),
            Op::HasAvailable => self.has_available(),
            Op::Resume { base } => self.resume(base),
            Op::StartFresh { ring, index } => self.start_fresh(ring, index),
            Op::RoundTrip { count, beyond } => self.round_trip(count, beyond),
            // virtio-queue has nothing like them.
            Op::Pass { .. }
            | Op::CopyFromReadable { .. }
            | Op::CopyToWritable { .. }
            | Op::SetMemory(_)
            | Op::Restore(_) => {}
            _ => {
                self.compare_memory();
                self.guest(op);
                self.stale = true;
            }
        }
    }

    fn round_trip(&mut self, count: u8, beyond: u16) {
        (0..count).for_each(|_| self.step(Op::AddDirect(Buffers::plain())));
        self.step(Op::GuestPublish);
        for _ in 0..count {
            self.step(Op::Pop);
            self.step(Op::Push { which: 0, len: 1 });
        }
        self.step(Op::Publish);
        self.step(Op::SetUsedEvent { beyond });
        self.step(Op::ShouldNotify);
        (0..count).for_each(|_| self.step(Op::PollUsed));
    }

    /// All of both memories is the same.
    fn compare_memory(&mut self) {
        if self.stale {
            self.naive.refresh(&*self.memories.1);
            self.naive.compare(&*self.memories.0, |_| false);
            self.stale = false;
        }
    }

    /// Pops from both. True if there was a chain, good or bad.
    fn pop(&mut self) -> bool {
        self.compare_memory();
        let (found, head) = found(self.pair.queue.pop(&mut self.pair.chain), &self.pair.chain);
        if self.pair.stopped {
            assert!(
                matches!(found, Found::Nothing),
                "{found:?} from a stopped ring"
            );
            return false;
        }
        let theirs = self.fetch();
        match (found, theirs) {
            (Found::Nothing, Fetched::Nothing) => return false,
            (Found::Broken(RingFault::AvailIndexJump { .. }), Fetched::Jump) => {
                self.stop(Difference::StoppedRing);
            }
            (Found::Broken(RingFault::HeadOutOfRange { head, size }), Fetched::Chain(chain)) => {
                assert!(head == chain.head && head >= size && chain.buffers.is_empty());
                self.pair.oracle.go_to_previous_position();
                self.stop(Difference::HeadOutOfRange);
            }
            (Found::Broken(RingFault::HeadInFlight { head }), Fetched::Chain(chain)) => {
                let mut heads = self.pair.heads.iter();
                assert!(head == chain.head && heads.any(|other| other.index() == head));
                self.pair.oracle.go_to_previous_position();
                self.stop(Difference::HeadInFlight);
            }
            (Found::Chain { head, buffers }, Fetched::Chain(chain)) => {
                assert_eq!(head, chain.head);
                let (met, fault) = self.trace(head);
                assert_eq!(fault, None);
                let reached = reached(&met);
                assert_eq!(chain.buffers, reached);
                if reached.len() < met.len() {
                    self.met.insert(Difference::FourGiB);
                }
                let not_empty = |buffer: &&Buffer| buffer.len > 0;
                let expected: Vec<_> = met.iter().filter(not_empty).copied().collect();
                assert_eq!(buffers, expected);
                if expected.len() < met.len() {
                    self.met.insert(Difference::EmptyBuffers);
                }
            }
            (Found::BadChain { head, fault }, Fetched::Chain(chain)) => {
                assert_eq!(head, chain.head);
                let (met, expected) = self.trace(head);
                assert_eq!(Some(fault), expected);
                let reached = reached(&met);
                let (difference, then) = Difference::of_fault(fault);
                match then {
                    Then::Ends => assert_eq!(chain.buffers, reached, "{fault}"),
                    Then::GoesOn => assert!(chain.buffers.starts_with(reached), "{fault}"),
                }
                self.met.insert(difference);
            }
            (found, _) => panic!("{found:?}, and not so virtio-queue"),
        }
        let popped = head.is_some();
        if popped {
            self.pair.seen -= 1;
        }
        self.pair.heads.extend(head);
        self.compare_position();
        popped
    }

    /// virtio-queue's next chain, with `vring`'s idea of how many there are.
    fn fetch(&mut self) -> Fetched {
        let theirs = &*self.memories.1;
        let Pair {
            oracle, seen, size, ..
        } = &mut self.pair;
        let next = oracle.next_avail();
        let available = word(theirs, oracle.avail_ring() + 2).wrapping_sub(next);
        let in_range = available <= size.get();
        if *seen == 0 {
            if in_range {
                *seen = available;
            }
            return oracle::fetch(oracle, theirs, None);
        }
        if in_range && available > 0 {
            return oracle::fetch(oracle, theirs, None);
        }
        self.met.insert(Difference::IndexReadOnce);
        let index = next.wrapping_add(*seen);
        oracle::fetch(oracle, theirs, Some(index))
    }

    fn stop(&mut self, difference: Difference) {
        self.met.insert(difference);
        self.pair.stopped = true;
        self.pair.seen = 0;
    }

    /// What the specification says of the chain: the buffers up to its end or its first fault.
    fn trace(&self, head: u16) -> (Vec<Buffer>, Option<vring::ChainFault>) {
        let table = (self.pair.addresses.descriptor_area.0, self.pair.size.get());
        let (met, fault) = trace(self.naive, table, self.features.indirect_desc, head);
        (met.all(), fault)
    }

    fn compare_position(&self) {
        let next_avail = self.pair.oracle.next_avail();
        assert_eq!(self.pair.queue.base(), RingBase::Split { next_avail });
    }

    fn push(&mut self, which: u8, len: u32) {
        let pair = &mut self.pair;
        if pair.heads.is_empty() {
            return;
        }
        let head = pair
            .heads
            .swap_remove(usize::from(which) % pair.heads.len());
        oracle::add_used(&mut pair.oracle, &self.memories.1, head.index(), len);
        pair.queue.push(head, len);
        pair.staged += 1;
        self.stale = true;
    }

    fn publish(&mut self) {
        let pair = &mut self.pair;
        let staged = std::mem::take(&mut pair.staged);
        assert_eq!(pair.queue.publish(), staged);
        if staged > 0 {
            let at = pair.oracle.used_ring() + 2;
            set_word(&self.memories.1, at, pair.oracle.next_used());
        }
        if staged > 1 {
            self.met.insert(Difference::IndexStoredOnce);
        }
        if let Some(published) = &mut pair.decided {
            *published += staged;
        }
        self.stale = true;
    }

    fn unpop(&mut self, which: u8) {
        let pair = &mut self.pair;
        if pair.heads.is_empty() {
            return;
        }
        // Mostly the latest, which is the one that can be taken back.
        let from_the_end = if which < 192 {
            0
        } else {
            usize::from(which) % pair.heads.len()
        };
        let head = pair.heads.remove(pair.heads.len() - 1 - from_the_end);
        match pair.queue.unpop(head) {
            Ok(()) => {
                pair.oracle.go_to_previous_position();
                if !pair.stopped {
                    pair.seen += 1;
                }
            }
            Err(head) => pair.heads.push(head),
        }
        self.compare_position();
    }

    /// Of what is published: virtio-queue knows nothing else.
    fn should_notify(&mut self) {
        self.publish();
        let theirs = &*self.memories.1;
        let pair = &mut self.pair;
        let yes = pair.queue.should_notify();
        let theirs_is_yes = pair.oracle.needs_notification(theirs).unwrap();
        let published = pair.decided.replace(0);
        let silenced = word(theirs, pair.oracle.avail_ring()) & 1 == 1;
        let (expected, difference) = match (self.features.event_idx, published) {
            (true, None) => (true, Difference::FirstDecision),
            (true, Some(_)) => {
                assert_eq!(yes, theirs_is_yes, "{published:?} published");
                return;
            }
            (false, Some(0)) => (false, Difference::NothingPublished),
            (false, _) if silenced => (false, Difference::NoInterruptFlag),
            (false, _) => {
                assert!(yes && theirs_is_yes, "without EVENT_IDX, and not silenced");
                return;
            }
        };
        assert_eq!(yes, expected, "{difference:?}");
        if yes != theirs_is_yes {
            self.met.insert(difference);
        }
    }

    fn enable_notification(&mut self) {
        let pair = &mut self.pair;
        let empty = pair.queue.enable_notification();
        if pair.stopped {
            assert!(empty, "a stopped ring is never looked at");
            self.met.insert(Difference::StoppedRing);
            return;
        }
        let more = pair.oracle.enable_notification(&*self.memories.1).unwrap();
        assert_eq!(empty, !more);
        pair.quiet = false;
        self.stale = true;
    }

    fn disable_notification(&mut self) {
        let (ours, theirs) = &self.memories;
        let pair = &mut self.pair;
        let at = pair.oracle.used_ring();
        let before = word(ours, at);
        pair.queue.disable_notification();
        pair.oracle.disable_notification(&**theirs).unwrap();
        if self.features.event_idx {
            return;
        }
        if pair.quiet {
            assert_eq!(word(ours, at), before, "it has said so already");
            if before != word(theirs, at) {
                self.met.insert(Difference::FlagsStoredOnce);
                set_word(theirs, at, before);
            }
        }
        pair.quiet = true;
        self.stale = true;
    }

    fn has_available(&mut self) {
        let theirs = &*self.memories.1;
        let pair = &mut self.pair;
        let found = pair.queue.has_available();
        if pair.stopped {
            assert!(!found, "a stopped ring is never looked at");
            return;
        }
        let index = word(theirs, pair.oracle.avail_ring() + 2);
        assert_eq!(found, pair.seen > 0 || index != pair.oracle.next_avail());
    }

    /// New devices on the same rings: what was in flight stays with the guest.
    fn resume(&mut self, base: Option<u16>) {
        let (ours, theirs) = &self.memories;
        let pair = &mut self.pair;
        let next_avail = base.unwrap_or_else(|| pair.oracle.next_avail());
        let config = QueueConfig {
            size: pair.size,
            addresses: pair.addresses,
            features: self.features,
            base: RingBase::Split { next_avail },
        };
        let shape = (pair.size.get(), self.features.event_idx);
        let oracle = oracle::start(theirs, shape, pair.addresses, next_avail);
        pair.oracle = oracle.expect("it was there before");
        if word(theirs, pair.oracle.used_ring()) != 0 {
            self.met.insert(Difference::FlagsClearedAtStart);
            set_word(theirs, pair.oracle.used_ring(), 0);
        }
        pair.queue = Queue::start(Arc::clone(ours), &config).unwrap();
        pair.heads.clear();
        (pair.seen, pair.staged, pair.decided) = (0, 0, None);
        (pair.quiet, pair.stopped) = (false, false);
        self.stale = true;
    }

    /// Guests and devices begin anew, elsewhere; or stay, if the ring cannot be there.
    fn start_fresh(&mut self, ring: Ring, index: u16) {
        self.compare_memory();
        let place = (ring, index);
        let fresh = Pair::new(
            &self.memories,
            self.naive,
            place,
            self.features,
            &mut self.met,
        );
        if let Some(pair) = fresh {
            self.pair = pair;
        }
        self.stale = true;
    }

    fn finish(&mut self) {
        let mut pops = 0;
        while self.pop() {
            pops += 1;
            assert!(pops <= self.pair.size.get(), "more chains than entries");
        }
        while !self.pair.heads.is_empty() {
            self.push(u8::MAX, 0);
        }
        self.publish();
        self.should_notify();
        self.compare_memory();
        self.poll_used();
    }
}

/// As far as virtio-queue goes: until the bytes no longer fit its counter.
fn reached(buffers: &[Buffer]) -> &[Buffer] {
    let mut total = 0u64;
    let end = buffers.iter().position(|buffer| {
        total += u64::from(buffer.len);
        total > u64::from(u32::MAX)
    });
    &buffers[..end.unwrap_or(buffers.len())]
}
