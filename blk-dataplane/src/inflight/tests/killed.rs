//! A device that dies at any store, and its successors.

use std::cell::RefCell;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vring::{Chain, Head, QueueSize, RingBase};

use super::guest::Guest;
use super::{MEMORY_LEN, Memory, ON_STORE, config, features, memory};
use crate::inflight::{InflightRegion, TrackedQueue};

/// What outlives a process.
#[derive(Clone)]
struct Remains {
    memory: Vec<u8>,
    record: Vec<u8>,
}

/// The order of things, from a number.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % sides
    }
}

/// How many times in a row it dies.
const LIVES: usize = 3;

/// Steps of a life before it ends well.
const STEPS: usize = 24;

struct World {
    packed: bool,
    size: u16,
    /// All stores after which it may have died, over all lives.
    deaths: usize,
}

impl World {
    /// One life from `remains` on, and those that follow a death at a sample of its stores.
    fn live(&mut self, remains: &Remains, mut guest: Guest, life: usize, dice: &mut Dice) {
        let memory = Arc::new(memory());
        memory
            .write_slice(&remains.memory, GuestAddress(0))
            .unwrap();
        let (file, len) = InflightRegion::create(1, 8).unwrap();
        file.write_all_at(&remains.record, 0).unwrap();
        let region = InflightRegion::map(file.try_clone().unwrap(), 0, len, 1, 8).unwrap();

        let moments: Rc<RefCell<Vec<Remains>>> = Rc::default();
        let look = {
            let (memory, moments) = (Arc::clone(&memory), Rc::clone(&moments));
            let file = Arc::new(file);
            let len = usize::try_from(len).unwrap();
            move || {
                let mut now = Remains {
                    memory: vec![0; MEMORY_LEN],
                    record: vec![0; len],
                };
                memory.read_slice(&mut now.memory, GuestAddress(0)).unwrap();
                file.read_exact_at(&mut now.record, 0).unwrap();
                moments.borrow_mut().push(now);
            }
        };
        // What the front-end says: for a split ring where the driver's used ring is, for a packed one
        // nothing that is true.
        let base = if life == 0 || self.packed {
            RingBase::fresh(features(self.packed))
        } else {
            RingBase::Split {
                next_avail: memory.read_obj(GuestAddress(super::DEVICE + 2)).unwrap(),
            }
        };
        let config = config(self.packed, self.size, base);
        let inflight = region.queue(0).unwrap();
        ON_STORE.set(Some(Box::new(look.clone())));
        let mut queue = TrackedQueue::start(Arc::clone(&memory), &config, Some(&inflight)).unwrap();

        let mut chain = Chain::for_queue(QueueSize::try_from(self.size).unwrap());
        let mut popped: Vec<(Head, u64)> = Vec::new();
        let mut deaths: Vec<(Guest, Vec<Remains>)> = Vec::new();
        // Before the driver does anything, the moments so far are those of what it knows now.
        let mut gather = |guest: &Guest| {
            let moments = std::mem::take(&mut *moments.borrow_mut());
            deaths.push((guest.clone(), moments));
        };
        for step in 0.. {
            gather(&guest);
            // In the end all is served, and the driver offers nothing new.
            let ending = step >= STEPS;
            match dice.roll(if ending { 4 } else { 6 }) {
                0 | 1 => match queue.pop(&mut chain) {
                    Ok(Some(head)) => {
                        let name = chain.readable()[0].addr.0 >> 12;
                        let same = chain.readable().iter().all(|s| s.addr.0 >> 12 == name);
                        assert!(same, "parts of several chains");
                        if dice.roll(8) == 0 {
                            queue.unpop(head).unwrap();
                        } else {
                            popped.push((head, name));
                        }
                    }
                    Ok(None) if ending && popped.is_empty() && guest.waiting.is_empty() => break,
                    Ok(None) => {}
                    Err(error) => panic!("{error}"),
                },
                2 if !popped.is_empty() => {
                    let (head, name) = popped.swap_remove(dice.roll(popped.len()));
                    let waiting = guest.waiting.values().filter(|chain| chain.0 == name);
                    assert_eq!(waiting.count(), 1, "{name} served, and not waited for");
                    queue.push(head, 0);
                    look();
                }
                3 => {
                    queue.publish();
                    look();
                    gather(&guest);
                    if dice.roll(2) == 0 || ending {
                        guest.reap(&memory);
                    }
                }
                4 | 5 => guest.offer(&memory, 1 + u16::try_from(dice.roll(3)).unwrap()),
                _ => {}
            }
            assert!(step < 100_000, "something is lost: {:?}", guest.waiting);
        }
        gather(&guest);
        ON_STORE.set(None);
        assert!(!queue.has_left());

        self.deaths += deaths
            .iter()
            .map(|(_, moments)| moments.len())
            .sum::<usize>();
        if life + 1 == LIVES {
            return;
        }
        // The first death at every store; those of successors at some.
        for (guest, moments) in &deaths {
            for moment in moments {
                if life == 0 || dice.roll(24) == 0 {
                    self.live(moment, guest.clone(), life + 1, dice);
                }
            }
        }
    }
}

fn run(packed: bool, size: u16, seed: u64) -> usize {
    let mut world = World {
        packed,
        size,
        deaths: 0,
    };
    let remains = Remains {
        memory: vec![0; MEMORY_LEN],
        record: Vec::new(),
    };
    let guest = Guest::new(packed, size);
    world.live(&remains, guest, 0, &mut Dice(seed | 1));
    world.deaths
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn split_ring_completes_each_request_once_whichever_store_is_the_last(seed: u64) {
        prop_assert!(run(false, 4, seed) > 0);
        prop_assert!(run(false, 8, seed) > 0);
    }

    #[test]
    fn packed_ring_completes_each_request_once_whichever_store_is_the_last(seed: u64) {
        prop_assert!(run(true, 4, seed) > 0);
        prop_assert!(run(true, 8, seed) > 0);
    }
}

/// The memory type is that of the queue, whatever its bitmap.
#[test]
fn requests_left_over_are_served_in_the_order_they_were_popped_in() {
    for packed in [false, true] {
        let memory: Arc<Memory> = Arc::new(memory());
        let (file, len) = InflightRegion::create(1, 8).unwrap();
        let region = InflightRegion::map(file, 0, len, 1, 8).unwrap();
        let record = region.queue(0).unwrap();
        let config = config(packed, 8, RingBase::fresh(features(packed)));
        let mut guest = Guest::new(packed, 8);
        let mut chain = Chain::for_queue(config.size);
        let mut names = Vec::new();
        let mut queue = TrackedQueue::start(Arc::clone(&memory), &config, Some(&record)).unwrap();
        for _ in 0..5 {
            guest.offer(&memory, 1);
        }
        let mut heads: Vec<_> = (0..5)
            .map(|_| queue.pop(&mut chain).unwrap().unwrap())
            .collect();
        // Out of order, so that later heads have lower numbers.
        queue.push(heads.remove(1), 0);
        queue.push(heads.remove(0), 0);
        queue.publish();
        assert_eq!(guest.reap(&memory), 2);
        for _ in 0..2 {
            guest.offer(&memory, 1);
            let _head = queue.pop(&mut chain).unwrap().unwrap();
        }
        drop(queue);
        let mut queue = TrackedQueue::start(Arc::clone(&memory), &config, Some(&record)).unwrap();
        while let Some(head) = queue.pop(&mut chain).unwrap() {
            names.push(chain.readable()[0].addr.0 >> 12);
            queue.push(head, 0);
        }
        queue.publish();
        assert_eq!(names, [3, 4, 5, 6, 7], "packed: {packed}");
        assert_eq!(guest.reap(&memory), 5);
    }
}
