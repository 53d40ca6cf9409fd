//! Requests through a whole device, compared with a pure reference function.
//!
//! The devices run for the life of the process, each with its data thread; an input is a guest
//! that sets up a ring on one of them, sends batches of requests however framed, and leaves.
//! Whatever the framing: status, used length, every byte of guest memory and every byte of the
//! image are as the reference says, the counters agree, the interrupt comes, and nothing hangs.

mod expect;
mod framing;
mod input;
mod planes;
mod reference;

use std::sync::Arc;
use std::time::{Duration, Instant};

use blk_dataplane::{CounterSnapshot, QueueSetup};
use event_poll::EventNotifier;
use vm_memory::GuestAddress;
use vring::driver::{SplitDriver, SplitLayout};
use vring::{QueueSize, RingAddresses, RingBase, RingFeatures};

use self::expect::Certainty;
use self::framing::Framer;
pub use self::input::Input;
use self::input::{Batch, Control, Ending};
use self::planes::{Memory, Served, WORLD};
use self::reference::{Effect, Prediction, predict};
use crate::naive_memory::NaiveMemory;
use crate::naive_walk::walk;

/// Long enough for any machine; past it something has been lost.
const DEADLINE: Duration = Duration::from_secs(20);

/// Where the ring is.
const RING: GuestAddress = GuestAddress(0x1000);

/// Runs one input; panics where device and reference differ.
pub fn run(input: Input) {
    let mut world = WORLD
        .lock()
        .unwrap_or_else(|poisoned| panic!("after a failure: {poisoned}"));
    let memory = Arc::clone(&world.memory);
    let (served, naive) = world.device(input.kind);
    served.reset(input.kind);
    naive.reset(&*memory);
    let mut rig = Rig::new(memory, served, naive, &input);
    for batch in &input.batches {
        if !rig.batch(batch) {
            return;
        }
    }
    rig.end(input.ending);
}

struct Rig<'a> {
    memory: Arc<Memory>,
    served: &'a mut Served,
    naive: &'a mut NaiveMemory,
    guest: SplitDriver<Memory>,
    addresses: RingAddresses,
    size: QueueSize,
    features: u64,
    kick: EventNotifier,
    call: EventNotifier,
    err: EventNotifier,
    /// What `avail.idx` should be for the device.
    next_avail: u16,
}

impl<'a> Rig<'a> {
    fn new(
        memory: Arc<Memory>,
        served: &'a mut Served,
        naive: &'a mut NaiveMemory,
        input: &Input,
    ) -> Self {
        let size = QueueSize::new(u32::from(input.size)).expect("a power of two");
        let addresses = SplitLayout::new(RING, size).expect("it fits").addresses();
        let features = 1 << 32
            | u64::from(input.flush) << 9
            | u64::from(input.discard) << 13
            | u64::from(input.write_zeroes) << 14
            | u64::from(input.indirect_desc) << 28
            | u64::from(input.event_idx) << 29;
        let ring_features = RingFeatures::from_virtio(features);
        let index = input.index;
        let guest =
            SplitDriver::starting_at(Arc::clone(&memory), addresses, size, ring_features, index)
                .expect("it fits");
        let notifier = || EventNotifier::new().expect("descriptors are left");
        let mut rig = Self {
            memory,
            served,
            naive,
            guest,
            addresses,
            size,
            features,
            kick: notifier(),
            call: notifier(),
            err: notifier(),
            next_avail: index,
        };
        rig.start();
        rig
    }

    fn start(&mut self) {
        let setup = QueueSetup {
            size: u32::from(self.size.get()),
            addresses: self.addresses,
            base: self.base(),
            features: self.features,
            kick: Some(self.kick.try_clone().expect("descriptors are left")),
            call: Some(Box::new(
                self.call.try_clone().expect("descriptors are left"),
            )),
            err: Some(Box::new(
                self.err.try_clone().expect("descriptors are left"),
            )),
            enabled: true,
            inflight: None,
        };
        self.served
            .plane
            .start_queue(0, setup)
            .expect("a sound ring");
    }

    /// Serves one batch. False if the guest has broken its own ring, and all that could be checked
    /// is that the device has survived it.
    fn batch(&mut self, batch: &Batch) -> bool {
        let table = self.addresses.descriptor_area.0;
        let memory = Arc::clone(&self.memory);
        let mut framer = Framer::new(&memory, table, self.size.get());
        let mut heads = Vec::new();
        for request in &batch.requests {
            heads.extend(framer.add(&mut self.guest, request));
        }
        for &poke in &batch.pokes {
            framer.poke(poke);
        }
        self.guest.enable_interrupts();
        self.naive.refresh(&*memory);
        let predictions: Vec<Prediction> = heads
            .iter()
            .map(|&head| {
                let indirect = self.features & 1 << 28 != 0;
                let chain = walk(self.naive, (table, self.size.get()), indirect, head);
                predict(self.naive, chain, self.served, self.features)
            })
            .collect();
        let used_ring = self.addresses.device_area.0;
        let used_ring = used_ring..used_ring + 6 + 8 * u64::from(self.size.get());
        let ring = (table, used_ring.end - table);
        let certainty = expect::certainty(&predictions, ring, &framer.descriptors);
        self.call.test_and_clear().expect("an eventfd");
        let before = self.served.plane.counters();
        self.publish(batch.control);
        if certainty == Certainty::RingHit {
            self.served.plane.stop_queue(0).expect("it runs");
            self.served.disk = self.served.content();
            return false;
        }
        let used = self.completions(heads.len());
        self.next_avail = self.guest.next_avail();
        let avail_idx = self.addresses.driver_area.0 + 2;
        self.naive.write(avail_idx, &self.next_avail.to_le_bytes());
        for (head, prediction) in heads.iter().zip(&predictions) {
            let mut found = used.iter().filter(|(id, _)| *id == u32::from(*head));
            let len = found
                .next()
                .unwrap_or_else(|| panic!("head {head} did not come back"))
                .1;
            assert!(found.next().is_none(), "head {head} came back twice");
            if certainty == Certainty::Exact {
                assert_eq!(len, prediction.used_len, "used length of {prediction:?}");
            }
        }
        if certainty == Certainty::Exact {
            expect::settle(&predictions, self.served, self.naive, &memory);
            self.naive.compare(&*memory, |at| used_ring.contains(&at));
            self.check_counters(&before, &predictions);
        } else {
            self.naive.compare(&*memory, |at| {
                used_ring.contains(&at)
                    || predictions
                        .iter()
                        .any(|prediction| expect::may_write(prediction, at))
            });
            self.served.disk = self.served.content();
        }
        true
    }

    fn base(&self) -> RingBase {
        RingBase::Split {
            next_avail: self.next_avail,
        }
    }

    /// Makes the batch available while control does something else.
    fn publish(&mut self, control: Control) {
        let told = "the data thread lives";
        match control {
            Control::Restart => {
                let base = self.served.plane.stop_queue(0).expect("it runs");
                assert_eq!(base, self.base());
                self.guest.publish();
                self.start();
            }
            // What is published meanwhile is found without a kick.
            Control::Pause => {
                self.served.plane.pause().expect(told);
                self.guest.publish();
                self.guest.needs_kick();
                self.served.plane.resume().expect(told);
            }
            Control::Disable => {
                self.served.plane.enable_queue(0, false).expect(told);
                self.publish_and_kick();
                self.served.plane.enable_queue(0, true).expect(told);
            }
            Control::Drain => {
                self.publish_and_kick();
                self.served.plane.drain().expect(told);
            }
            Control::UpdateMemory => {
                self.publish_and_kick();
                let addresses = self.addresses;
                let memory = Arc::clone(&self.memory);
                self.served
                    .plane
                    .update_memory(memory, |_| Some(addresses))
                    .expect(told);
            }
            Control::SetKick => {
                self.publish_and_kick();
                self.kick = EventNotifier::new().expect("descriptors are left");
                let kick = self.kick.try_clone().expect("descriptors are left");
                self.served.plane.set_kick(0, Some(kick)).expect(told);
            }
            Control::Nothing => self.publish_and_kick(),
        }
    }

    fn publish_and_kick(&mut self) {
        self.guest.publish();
        if self.guest.needs_kick() {
            self.kick.notify().expect("an eventfd");
        }
    }

    /// Waits for so many completions and, if there are any, for the interrupt.
    fn completions(&mut self, count: usize) -> Vec<(u32, u32)> {
        let mut used = Vec::new();
        wait(|| {
            while let Some(next) = self.guest.poll_used() {
                used.push((next.id, next.len));
            }
            used.len() >= count
        });
        assert_eq!(used.len(), count);
        if count > 0 {
            wait(|| self.call.test_and_clear().expect("an eventfd"));
        }
        used
    }

    fn check_counters(&self, before: &CounterSnapshot, predictions: &[Prediction]) {
        let after = self.served.plane.counters();
        let count = |right: fn(&Prediction) -> bool| -> u64 {
            predictions
                .iter()
                .filter(|prediction| right(prediction))
                .count() as u64
        };
        let ended = |status: u8| -> u64 {
            let ends = predictions
                .iter()
                .filter_map(|prediction| prediction.status);
            ends.filter(|&(_, found)| found == status).count() as u64
        };
        assert_eq!(after.requests - before.requests, predictions.len() as u64);
        assert_eq!(
            after.bad_chains - before.bad_chains,
            count(|p| p.status.is_none())
        );
        assert_eq!(after.io_errors - before.io_errors, ended(1));
        assert_eq!(after.unsupported - before.unsupported, ended(2));
        assert_eq!(after.ring_faults, before.ring_faults);
        assert_eq!(after.lost_statuses, before.lost_statuses);
        // Write-through without FLUSH: then writes need one too.
        let through = self.features & 1 << 9 == 0;
        let flushes = count(|p| matches!(p.effect, Effect::Flush));
        let writes = count(|p| match &p.effect {
            Effect::Write { .. } => true,
            Effect::Zero(ranges) => !ranges.is_empty(),
            _ => false,
        });
        let stable = flushes + if through { writes } else { 0 };
        let syncs = after.syncs - before.syncs;
        assert!(
            syncs <= stable && (stable == 0 || syncs > 0),
            "{syncs} for {flushes} flushes, {writes} writes, write-through: {through}"
        );
    }

    fn end(mut self, ending: Ending) {
        let faults = self.served.plane.counters().ring_faults;
        match ending {
            Ending::Stop => {}
            Ending::Jump { by } => self.guest.set_avail_idx(self.next_avail.wrapping_add(by)),
            Ending::Head { beyond } => {
                let head = self.size.get().saturating_add(beyond);
                self.guest.write_avail_entry(self.next_avail, head);
                self.guest.set_avail_idx(self.next_avail.wrapping_add(1));
            }
        }
        if !matches!(ending, Ending::Stop) {
            self.kick.notify().expect("an eventfd");
            wait(|| self.err.test_and_clear().expect("an eventfd"));
            // Once, however often the guest kicks.
            self.kick.notify().expect("an eventfd");
            self.served.plane.drain().expect("the data thread lives");
            assert!(!self.err.test_and_clear().expect("an eventfd"));
            assert_eq!(self.served.plane.counters().ring_faults, faults + 1);
        }
        assert_eq!(
            self.served.plane.stop_queue(0).expect("it runs"),
            self.base()
        );
        assert!(self.guest.poll_used().is_none(), "a completion of nothing");
    }
}

/// Waits until `done`, or panics.
fn wait(mut done: impl FnMut() -> bool) {
    let mut start = None;
    let mut looks = 0u32;
    while !done() {
        looks += 1;
        if looks.is_multiple_of(64) {
            let start = *start.get_or_insert_with(Instant::now);
            assert!(start.elapsed() < DEADLINE, "something was lost");
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }
}
