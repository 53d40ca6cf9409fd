//! The chains the device owns, each in a slot of its own.

/// What a used descriptor needs to know of a chain in flight.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Slot {
    /// The driver's Buffer ID. In a free slot, the number of the next free one.
    pub(super) id: u16,
    /// Descriptors of the ring, which the used position passes. Zero in a free slot.
    pub(super) descriptors: u16,
}

/// The number after that of the last free slot: no queue has so many.
const END: u16 = u16::MAX;

/// Slots for as many chains as there are descriptors.
///
/// A Buffer ID is any 16 bits the driver likes (virtio 1.3 §2.8.13), so it can index neither the
/// caller's tables nor ours: [`Head::index`](crate::Head::index) is the number of a slot.
#[derive(Debug)]
pub(super) struct Outstanding {
    slots: Box<[Slot]>,
    /// The latest freed, which is warm in the cache.
    first_free: u16,
    count: u16,
    ids: IdSet,
}

/// A chain was not taken in: its Buffer ID is in flight already.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct SameId;

impl Outstanding {
    /// Room for `size` chains, at most 32768; the only allocation.
    pub(super) fn new(size: u16) -> Self {
        let next = (1..size).chain([END]);
        let free = next.map(|id| Slot { id, descriptors: 0 });
        Self {
            slots: free.collect(),
            first_free: 0,
            count: 0,
            ids: IdSet::new(),
        }
    }

    /// How many slots are taken.
    #[inline]
    pub(super) const fn count(&self) -> u16 {
        self.count
    }

    /// How many descriptors the chain in a slot has; 0 if the slot is free or is none.
    #[inline]
    pub(super) fn descriptors(&self, number: u16) -> u16 {
        let slot = self.slots.get(usize::from(number));
        slot.map_or(0, |slot| slot.descriptors)
    }

    /// Takes a chain of at least one descriptor in.
    ///
    /// There is a slot for it: all that are taken have a descriptor at least, and the walk lets no
    /// more of them be outstanding than the ring has. Were there none, the chain is refused.
    #[inline]
    pub(super) fn insert(&mut self, id: u16, descriptors: u16) -> Result<u16, SameId> {
        debug_assert_ne!(descriptors, 0);
        let number = self.first_free;
        let Some(slot) = self.slots.get_mut(usize::from(number)) else {
            return Err(SameId);
        };
        if !self.ids.insert(id) {
            return Err(SameId);
        }
        self.first_free = slot.id;
        *slot = Slot { id, descriptors };
        // At most the queue size.
        self.count = self.count.wrapping_add(1);
        Ok(number)
    }

    /// Frees a slot, and says what was in it; `None` if it was free or is none.
    #[inline]
    pub(super) fn remove(&mut self, number: u16) -> Option<Slot> {
        let slot = self.slots.get_mut(usize::from(number))?;
        let chain = *slot;
        if chain.descriptors == 0 {
            return None;
        }
        *slot = Slot {
            id: self.first_free,
            descriptors: 0,
        };
        self.first_free = number;
        self.count = self.count.wrapping_sub(1);
        self.ids.remove(chain.id);
        Some(chain)
    }
}

/// A set of Buffer IDs, one byte for each there may be, which takes half the steps of a bit. 64 KiB that
/// begin as untouched zero pages, of which a driver with small ids, as they all have, touches the first.
#[derive(Debug)]
struct IdSet {
    /// The length is part of the type, so no index needs a check.
    ids: Box<[bool; 1 << 16]>,
}

impl IdSet {
    fn new() -> Self {
        let ids = vec![false; 1 << 16].into_boxed_slice();
        Self {
            ids: ids.try_into().expect("as many as it was made with"),
        }
    }

    /// Adds an id; false if it is there already.
    #[inline]
    fn insert(&mut self, id: u16) -> bool {
        let present = &mut self.ids[usize::from(id)];
        !std::mem::replace(present, true)
    }

    #[inline]
    fn remove(&mut self, id: u16) {
        self.ids[usize::from(id)] = false;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_id_is_taken_in_once_and_again_after_it_left() {
        let mut outstanding = Outstanding::new(4);
        let slot = outstanding.insert(u16::MAX, 3).unwrap();
        assert_eq!(outstanding.insert(u16::MAX, 1), Err(SameId));
        assert_eq!(outstanding.count(), 1);
        let expected = Slot {
            id: u16::MAX,
            descriptors: 3,
        };
        assert_eq!(outstanding.remove(slot), Some(expected));
        assert_eq!(outstanding.remove(slot), None);
        assert_eq!(outstanding.insert(u16::MAX, 1), Ok(slot));
    }

    #[test]
    fn no_more_chains_are_taken_in_than_there_are_slots() {
        let mut outstanding = Outstanding::new(2);
        outstanding.insert(7, 1).unwrap();
        outstanding.insert(9, 1).unwrap();
        assert_eq!(outstanding.insert(8, 1), Err(SameId));
        assert_eq!(outstanding.count(), 2);
        assert_eq!(outstanding.remove(2), None);
    }

    #[test]
    fn every_chain_of_the_largest_queue_has_a_slot() {
        let mut outstanding = Outstanding::new(32768);
        for id in 32768..=u16::MAX {
            assert_eq!(outstanding.insert(id, 1), Ok(id - 32768));
        }
        assert_eq!(outstanding.count(), 32768);
    }

    proptest! {
        #[test]
        fn slots_agree_with_a_map(steps in proptest::collection::vec((any::<bool>(), 0u16..12), 0..200)) {
            let mut outstanding = Outstanding::new(8);
            let mut map: HashMap<u16, u16> = HashMap::new();
            for (insert, value) in steps {
                if insert {
                    let fits = map.len() < 8 && !map.values().any(|&id| id == value);
                    match outstanding.insert(value, 1) {
                        Ok(number) => {
                            prop_assert!(fits && number < 8);
                            prop_assert_eq!(map.insert(number, value), None);
                        }
                        Err(SameId) => prop_assert!(!fits),
                    }
                } else {
                    let removed = outstanding.remove(value).map(|slot| slot.id);
                    prop_assert_eq!(removed, map.remove(&value));
                }
                prop_assert_eq!(usize::from(outstanding.count()), map.len());
            }
        }
    }
}
