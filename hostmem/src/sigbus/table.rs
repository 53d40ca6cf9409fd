//! Every mapping that the guard is responsible for.
//!
//! It is read by a signal handler, at any moment and on any thread: reading takes no lock, makes no
//! system call and allocates nothing. Filling and emptying slots is for the control path, one at a
//! time.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::slot::{Extent, Slot};

/// Slots allocated at a time. A guest has a handful of regions, and 64 slots take a page.
const CHUNK_SLOTS: usize = 64;

/// Slots, and more of them. Never freed, as the handler may be looking at them: the table stays as
/// large as the greatest number of mappings there ever was at one time (which the kernel bounds
/// by `vm.max_map_count`).
#[derive(Debug)]
struct Chunk {
    slots: [Slot; CHUNK_SLOTS],
    next: OnceLock<Box<Self>>,
}

impl Chunk {
    fn new() -> Box<Self> {
        Box::new(Self {
            slots: std::array::from_fn(|_| Slot::default()),
            next: OnceLock::new(),
        })
    }
}

#[derive(Debug)]
pub(super) struct Table {
    first: OnceLock<Box<Chunk>>,
    unused: Mutex<Unused>,
}

#[derive(Debug)]
struct Unused {
    /// Emptied, to be filled again.
    slots: Vec<&'static Slot>,
    /// Slots that have been in use at some time: the first so many.
    used: usize,
}

static TABLE: Table = Table {
    first: OnceLock::new(),
    unused: Mutex::new(Unused {
        slots: Vec::new(),
        used: 0,
    }),
};

pub(super) fn table() -> &'static Table {
    &TABLE
}

impl Table {
    /// Async-signal-safe: `OnceLock::get` is a load.
    fn slots(&self) -> impl Iterator<Item = &Slot> {
        let chunks = std::iter::successors(self.first.get(), |chunk| chunk.next.get());
        chunks.flat_map(|chunk| &chunk.slots)
    }

    /// The mapping that holds `addr`. Async-signal-safe.
    pub(super) fn find(&self, addr: usize) -> Option<(&Slot, Extent)> {
        self.slots().find_map(|slot| {
            let extent = slot.get().filter(|extent| extent.holds(addr))?;
            Some((slot, extent))
        })
    }

    pub(super) fn any_lost(&self, addr: usize, len: usize) -> bool {
        self.slots().any(|slot| {
            slot.is_lost() && slot.get().is_some_and(|extent| extent.overlaps(addr, len))
        })
    }

    fn lock(&self) -> MutexGuard<'_, Unused> {
        // Nothing under the lock leaves it half done when it panics.
        self.unused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fill(&'static self, extent: Extent) -> &'static Slot {
        let mut unused = self.lock();
        let slot = match unused.slots.pop() {
            Some(slot) => slot,
            None => {
                let mut chunk = self.first.get_or_init(Chunk::new);
                for _ in 0..unused.used / CHUNK_SLOTS {
                    chunk = chunk.next.get_or_init(Chunk::new);
                }
                let slot = &chunk.slots[unused.used % CHUNK_SLOTS];
                unused.used += 1;
                slot
            }
        };
        slot.set(Some(extent));
        slot
    }

    fn empty(&self, slot: &'static Slot) {
        let mut unused = self.lock();
        slot.set(None);
        unused.slots.push(slot);
    }
}

/// A mapping that is in the table, until this is dropped: before it is unmapped.
#[derive(Debug)]
pub(crate) struct Watched(&'static Slot);

impl Watched {
    /// `start` and `len` are multiples of the page size, which is a power of two.
    pub(crate) fn new(start: usize, len: usize, page_size: usize) -> Self {
        debug_assert!(start.is_multiple_of(page_size) && len.is_multiple_of(page_size));
        Self(TABLE.fill(Extent {
            start,
            len,
            page_size,
        }))
    }

    /// Whether zeroed memory has taken the mapping's place.
    #[inline]
    pub(crate) fn is_lost(&self) -> bool {
        self.0.is_lost()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        TABLE.empty(self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where nothing is mapped, so that no other test is in the way.
    const BASE: usize = 1 << 60;

    #[test]
    fn mapping_is_found_while_it_is_watched() {
        let watched = Watched::new(BASE, 0x2000, 0x1000);
        let (slot, extent) = TABLE.find(BASE + 0x1FFF).unwrap();
        assert!(std::ptr::eq(slot, watched.0));
        assert_eq!((extent.start, extent.len), (BASE, 0x2000));
        assert!(TABLE.find(BASE + 0x2000).is_none());
        drop(watched);
        assert!(TABLE.find(BASE).is_none());
    }

    #[test]
    fn loss_is_told_of_ranges_that_touch_the_mapping() {
        let base = BASE + (1 << 40);
        let lost = Watched::new(base, 0x1000, 0x1000);
        let intact = Watched::new(base + 0x1000, 0x1000, 0x1000);
        assert!(!TABLE.any_lost(base, 0x2000));
        assert!(lost.0.lose());
        assert!(lost.is_lost() && !intact.is_lost());
        assert!(TABLE.any_lost(base + 0xFFF, 2));
        assert!(!TABLE.any_lost(base + 0x1000, 0x1000));
        drop(lost);
        assert!(!TABLE.any_lost(base, 0x2000));
    }

    #[test]
    fn slots_are_used_again_and_grow_past_a_chunk() {
        let base = BASE + (2 << 40);
        let watch = |i: usize| Watched::new(base + i * 0x1000, 0x1000, 0x1000);
        for _ in 0..3 {
            let all: Vec<_> = (0..3 * CHUNK_SLOTS).map(watch).collect();
            for i in 0..all.len() {
                assert!(TABLE.find(base + i * 0x1000).is_some());
            }
        }
        // Other tests use a few at the same time.
        assert!(TABLE.lock().used < 4 * CHUNK_SLOTS);
        assert!(TABLE.find(base).is_none());
    }
}
