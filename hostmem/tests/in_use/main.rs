//! Memory in use while regions and logs come and go, by threads that meet as they happen to.
//!
//! Run under AddressSanitizer by `ci/asan.sh`: it knows what is on the heap, so that regions and logs
//! whose memory is there stand in for mapped ones in the crate's own code, and it reports what a
//! premature `munmap` leads to. The two ignored tests are mistakes that it must find.

// UNSAFETY: requests in flight hold addresses and not borrows, as the kernel does.
#![expect(unsafe_code)]

#[path = "../../src/barrier.rs"]
mod barrier;
#[path = "../../src/index.rs"]
mod index;
#[path = "../memfile/mod.rs"]
mod memfile;
#[path = "../../src/region_set.rs"]
#[expect(dead_code, reason = "the tests need part of it")]
mod region_set;
#[path = "../../src/dirty/switch.rs"]
#[expect(dead_code, reason = "the tests need part of it")]
mod switch;
#[path = "../../src/sync.rs"]
#[expect(unused_imports, reason = "the tests need part of it")]
mod sync;

use std::collections::VecDeque;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use hostmem::MemoryMap;
use index::Span;
use memfile::MemFile;
use region_set::{Placed, RegionSet};
use switch::Switch;
use vm_memory::{GuestAddress, GuestMemoryBackend};

const SIZE: u64 = 0x1000;
const FRONTEND: u64 = 0x7f00_0000_0000;
/// Regions that come and go.
const COMING: u64 = 6;
const ROUNDS: u64 = 2000;
/// Requests that a thread has in flight.
const DEPTH: usize = 8;

/// What a map is to these tests.
trait Map: Send + Sync + Sized {
    /// The word at the start of the region at `addr`.
    fn word(&self, addr: u64) -> Option<*const AtomicU64>;
    /// With or without a region, whichever it is not.
    fn toggle(&self, addr: u64) -> Self;
}

/// A request: an address and, unless it is a mistake, the map that it was looked up in.
struct InFlight<M> {
    word: *const AtomicU64,
    addr: u64,
    _map: Option<Arc<M>>,
}

impl<M> InFlight<M> {
    /// The transfer. Each region's word has its address in it, so that memory that is another's by now
    /// is told from its own.
    fn complete(self) {
        // SAFETY: the map keeps it. (The tests that are wrong on purpose have none.)
        let word = unsafe { &*self.word };
        assert_eq!(
            word.fetch_or(0, Ordering::AcqRel),
            self.addr,
            "not its memory"
        );
    }
}

fn add_and_remove_under_load<M: Map>(first: M, keeps_map: bool) {
    let current = RwLock::new(Arc::new(first));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let users = [0, 1].map(|user| {
            let (current, done) = (&current, &done);
            scope.spawn(move || {
                let mut in_flight = VecDeque::with_capacity(DEPTH);
                let (mut found, mut next) = (0, user);
                while !done.load(Ordering::Acquire) || found < ROUNDS / 10 {
                    next += 1;
                    let map = Arc::clone(&current.read().unwrap());
                    let addr = next % (COMING + 1) * SIZE;
                    let Some(word) = map.word(addr) else {
                        continue;
                    };
                    found += 1;
                    in_flight.push_back(InFlight {
                        word,
                        addr,
                        _map: keeps_map.then_some(map),
                    });
                    if in_flight.len() == DEPTH {
                        in_flight.drain(..DEPTH / 2).for_each(InFlight::complete);
                    }
                }
                in_flight.into_iter().for_each(InFlight::complete);
                found
            })
        });
        for round in 0..ROUNDS {
            // The region at 0 stays.
            let addr = (1 + round * 5 % COMING) * SIZE;
            let new = Arc::new(current.read().unwrap().toggle(addr));
            *current.write().unwrap() = new;
            if round % 64 == 0 {
                std::thread::yield_now();
            }
        }
        done.store(true, Ordering::Release);
        for user in users {
            assert!(user.join().unwrap() > 0);
        }
    });
}

/// A region on the heap.
struct Heap {
    addr: u64,
    word: Box<AtomicU64>,
}

impl Heap {
    fn new(addr: u64) -> Self {
        Self {
            addr,
            word: Box::new(AtomicU64::new(addr)),
        }
    }
}

impl Placed for Heap {
    fn guest_span(&self) -> Span {
        Span {
            start: self.addr,
            size: SIZE,
        }
    }

    fn frontend_span(&self) -> Span {
        self.guest_span()
    }
}

impl Map for RegionSet<Heap> {
    fn word(&self, addr: u64) -> Option<*const AtomicU64> {
        Some(&raw const *self.find(addr)?.0.word)
    }

    fn toggle(&self, addr: u64) -> Self {
        self.without(|region| region.addr == addr)
            .unwrap_or_else(|| self.with(Heap::new(addr)))
    }
}

fn heap() -> RegionSet<Heap> {
    RegionSet::default().with(Heap::new(0))
}

#[test]
fn regions_on_the_heap_are_not_freed_while_in_use() {
    add_and_remove_under_load(heap(), true);
}

#[test]
#[ignore = "a mistake that AddressSanitizer must find: see ci/asan.sh"]
fn planted_use_of_a_freed_region() {
    add_and_remove_under_load(heap(), false);
}

/// Regions in a memory file.
struct Mapped {
    map: MemoryMap,
    file: Arc<MemFile>,
}

impl Mapped {
    fn new(name: &str) -> Self {
        let file = MemFile::new(name, (COMING + 1) * SIZE);
        for addr in (0..=COMING).map(|i| i * SIZE) {
            file.file().write_all_at(&addr.to_ne_bytes(), addr).unwrap();
        }
        let map = MemoryMap::new(vec![file.region(0, SIZE, FRONTEND, 0)]).unwrap();
        Self {
            map,
            file: Arc::new(file),
        }
    }
}

impl Map for Mapped {
    fn word(&self, addr: u64) -> Option<*const AtomicU64> {
        let host = self.map.get_host_address(GuestAddress(addr)).ok()?;
        Some(host.cast_const().cast())
    }

    fn toggle(&self, addr: u64) -> Self {
        let frontend = FRONTEND + addr;
        let map = self
            .map
            .without_region(GuestAddress(addr), SIZE, frontend)
            .or_else(|_| {
                let region = self.file.region(addr, SIZE, frontend, addr);
                self.map.with_region(region)
            });
        Self {
            map: map.unwrap(),
            file: Arc::clone(&self.file),
        }
    }
}

#[test]
fn mapped_regions_are_not_unmapped_while_in_use() {
    let mapped = Mapped::new("hm-in-use");
    let file = Arc::clone(&mapped.file);
    add_and_remove_under_load(mapped, true);
    assert_eq!(file.mapped_bytes(), 0);
    assert_eq!(file.other_descriptors(), 0);
}

#[test]
#[ignore = "a mistake that AddressSanitizer must find: see ci/asan.sh"]
fn planted_use_of_an_unmapped_region() {
    add_and_remove_under_load(Mapped::new("hm-in-use-planted"), false);
}

#[test]
fn logs_on_the_heap_are_not_freed_while_in_use() {
    let switch = Switch::<AtomicU64>::default();
    let done = AtomicBool::new(false);
    let mut marked = 0;
    let markers: u64 = std::thread::scope(|scope| {
        let markers = [(); 2].map(|()| {
            let (switch, done) = (&switch, &done);
            scope.spawn(move || {
                let mut marked = 0;
                while !done.load(Ordering::Acquire) {
                    let mark = |log: &AtomicU64| log.fetch_add(1, Ordering::Relaxed);
                    marked += u64::from(switch.with(mark).is_some());
                }
                marked
            })
        });
        let mut collect = |old: Option<Arc<AtomicU64>>| {
            // Nobody else has it any more, nor adds to it.
            let old = old.map(|old| Arc::into_inner(old).expect("still in use"));
            marked += old.map_or(0, |old| old.load(Ordering::Relaxed));
        };
        for round in 0..ROUNDS {
            let new = (round % 3 != 0).then(|| Arc::new(AtomicU64::new(0)));
            collect(switch.replace(new).unwrap());
        }
        done.store(true, Ordering::Release);
        let sum = markers.map(|marker| marker.join().unwrap()).iter().sum();
        collect(switch.replace(None).unwrap());
        sum
    });
    assert_eq!(marked, markers, "every mark is in one log");
}
