//! Regions are added and removed while two threads look them up and requests are in flight.

mod sync {
    pub(crate) use loom::sync::Arc;
}
#[path = "../../src/index.rs"]
mod index;
#[path = "../../src/region_set.rs"]
#[expect(dead_code, reason = "the models need part of it")]
mod region_set;

use loom::sync::{Arc, Mutex};

use super::watched::Watched;
use index::Span;
use region_set::{Placed, RegionSet};

/// A region whose memory goes when it does. The memory is not the region itself, so that a request that
/// comes too late can still ask loom.
struct Region {
    start: u64,
    memory: std::sync::Arc<Watched>,
}

const SIZE: u64 = 0x1000;

impl Region {
    fn new(start: u64) -> Self {
        Self {
            start,
            memory: std::sync::Arc::default(),
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.memory.free();
    }
}

impl Placed for Region {
    fn guest_span(&self) -> Span {
        Span {
            start: self.start,
            size: SIZE,
        }
    }

    fn frontend_span(&self) -> Span {
        self.guest_span()
    }
}

type Map = RegionSet<Region>;

/// Looks an address up in the map in force and does the transfer. Keeps the map until it is over if
/// `keeps_map`, as the data thread does.
fn request(current: &Mutex<Arc<Map>>, addr: u64, keeps_map: bool) {
    let mut in_flight = Some(Arc::clone(&current.lock().unwrap()));
    let Some((region, offset)) = in_flight.as_ref().and_then(|map| map.find(addr)) else {
        return;
    };
    assert_eq!(region.start + offset, addr);
    let memory = std::sync::Arc::clone(&region.memory);
    if !keeps_map {
        in_flight = None;
    }
    memory.touch();
    drop(in_flight);
}

fn model(keeps_map: bool) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let first = Map::default().with(Region::new(0x1000));
        let current = Arc::new(Mutex::new(Arc::new(first)));
        let users = [0x1008, 0x8008].map(|addr| {
            let current = Arc::clone(&current);
            loom::thread::spawn(move || request(&current, addr, keeps_map))
        });
        let replace = |change: &dyn Fn(&Map) -> Map| {
            let old = Arc::clone(&current.lock().unwrap());
            let new = Arc::new(change(&old));
            let replaced = std::mem::replace(&mut *current.lock().unwrap(), new);
            drop((old, replaced));
        };
        replace(&|map| map.with(Region::new(0x8000)));
        replace(&|map| map.without(|region| region.start == 0x1000).unwrap());
        replace(&|map| map.without(|region| region.start == 0x8000).unwrap());
        for user in users {
            user.join().unwrap();
        }
    });
}

#[test]
fn memory_is_not_freed_under_lookups_and_requests_in_flight() {
    model(true);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn request_that_does_not_keep_its_map_is_found_out() {
    model(false);
}
