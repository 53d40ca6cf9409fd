//! What a predecessor has left in the record of a packed ring.

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::{VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vring::{PackedPosition, QueueConfig, RingBase, RingDescriptor};

use super::{
    ADDRESS, COUNTER, DESC_NUM, DESCRIPTOR, Entries, FEATURES, FREE_HEAD, INFLIGHT, NEXT,
    OLD_FREE_HEAD, POSITIONS, PackedTracker, Positions, STATE, State, VERSION_AT, advanced,
    descriptor_of, entry, store_free_heads,
};
use crate::inflight::words::Words;
use crate::inflight::{InflightError, Left, VERSION};

/// Offset of a descriptor's flags (virtio 1.3 §2.8.13), and its length.
const RING_FLAGS: u64 = 14;
const RING_DESCRIPTOR_LEN: u64 = 16;

/// What a walk over the entries knows of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Unknown,
    Free,
    Taken,
}

impl PackedTracker {
    /// The record of a ring that is to be started, with where it goes on and what is left over.
    pub(in crate::inflight) fn recover<M: GuestMemoryBackend>(
        words: Words,
        entries: u16,
        memory: &M,
        config: &QueueConfig,
    ) -> Result<(Self, Option<RingBase>, Vec<Left>), InflightError> {
        let size = config.size.get();
        let used = match config.base {
            RingBase::Packed { used, .. } => used,
            // Refused when the ring is started.
            RingBase::Split { .. } => PackedPosition::FIRST,
        };
        let mut tracker = Self {
            words,
            next: (1..=entries).collect(),
            chains: vec![Entries::default(); usize::from(size)].into_boxed_slice(),
            batch: Vec::with_capacity(usize::from(size)),
            counter: 0,
            free_head: 0,
            used,
            old_used: used,
            size,
        };
        let words = tracker.words.clone();
        let view = words;
        let version = view.load_u16(VERSION_AT);
        if version == 0 {
            tracker.begin(&view);
            return Ok((tracker, None, Vec::new()));
        }
        let found = view.load_u16(DESC_NUM);
        if version != VERSION || found != entries {
            return Err(InflightError::Foreign {
                version,
                entries: found,
                expected: entries,
            });
        }
        let Some(positions) = Positions::from_word(view.load_u64(POSITIONS), size) else {
            tracing::warn!(
                "the record of requests in flight has no position in this ring; starting it anew"
            );
            tracker.begin(&view);
            return Ok((tracker, None, Vec::new()));
        };
        let published = is_published(memory, config, positions)?;
        let (head, used) = if published {
            (view.load_u16(FREE_HEAD), positions.used)
        } else {
            (view.load_u16(OLD_FREE_HEAD), positions.old_used)
        };
        (tracker.used, tracker.old_used) = (used, used);
        let mut places = vec![Place::Unknown; usize::from(entries)];
        find_free(&view, head, &mut places);
        // In this order: until the last of them, a successor comes to the same end.
        for (number, _) in free(&places) {
            view.store_u8(entry(number) + INFLIGHT, 0);
        }
        store_free_heads(&view, head);
        view.store_u64(POSITIONS, tracker.positions().to_word());

        let (left, outstanding) = tracker.take_stock(&view, &mut places);
        tracker.rebuild_free_list(&view, &places);
        let base = RingBase::Packed {
            avail: advanced(used, outstanding, size),
            used,
        };
        Ok((tracker, Some(base), left))
    }

    /// Initialises the region: the version last, as without it there is none.
    fn begin(&mut self, view: &Words) {
        view.store_u16(VERSION_AT, 0);
        let entries = self.next.len();
        let places = vec![Place::Unknown; entries];
        for number in (0..).take(entries) {
            view.store_u64(entry(number) + STATE, 0);
        }
        self.rebuild_free_list(view, &places);
        view.store_u64(FEATURES, 0);
        view.store_u64(POSITIONS, self.positions().to_word());
        view.store_u16(DESC_NUM, u16::try_from(entries).unwrap_or(u16::MAX));
        view.store_u16(VERSION_AT, VERSION);
    }

    /// Finds what is in flight, in the order of the counters, and how many descriptors that is. No entry is
    /// in two chains.
    fn take_stock(&mut self, view: &Words, places: &mut [Place]) -> (Vec<Left>, u16) {
        let mut heads: Vec<(u64, u16, u16)> = Vec::new();
        for (number, place) in (0..).zip(&*places) {
            if *place == Place::Free {
                continue;
            }
            let entry = entry(number);
            let state = State::from_word(view.load_u64(entry + STATE));
            match state.inflight {
                1 => heads.push((view.load_u64(entry + COUNTER), number, state.num)),
                0 => {}
                // Nothing that was ever written here.
                _ => view.store_u8(entry + INFLIGHT, 0),
            }
        }
        heads.sort_unstable();
        self.counter = heads.last().map_or(0, |&(last, ..)| last.wrapping_add(1));
        let mut left = Vec::with_capacity(heads.len());
        let mut outstanding = 0;
        for (_, head, num) in heads {
            let room = self.size - outstanding;
            match self.read_chain(view, head, num, room, places) {
                Some(descriptors) => {
                    outstanding += num;
                    left.push(Left::Packed {
                        entry: head,
                        descriptors,
                    });
                }
                None => view.store_u8(entry(head) + INFLIGHT, 0),
            }
        }
        (left, outstanding)
    }

    /// Reads the chain of `num` entries from `head` on, if that can be one.
    fn read_chain(
        &mut self,
        view: &Words,
        head: u16,
        num: u16,
        room: u16,
        places: &mut [Place],
    ) -> Option<Box<[RingDescriptor]>> {
        if num == 0 || num > room {
            return None;
        }
        let mut numbers = Vec::with_capacity(usize::from(num));
        let mut descriptors = Vec::with_capacity(usize::from(num));
        let mut at = head;
        for _ in 0..num {
            let place = places.get_mut(usize::from(at));
            let Some(place) = place.filter(|place| **place == Place::Unknown) else {
                for number in numbers {
                    places[usize::from(number)] = Place::Unknown;
                }
                return None;
            };
            *place = Place::Taken;
            numbers.push(at);
            let entry = entry(at);
            let (word, address) = (
                view.load_u64(entry + DESCRIPTOR),
                view.load_u64(entry + ADDRESS),
            );
            descriptors.push(descriptor_of(word, address));
            at = view.load_u16(entry + NEXT);
        }
        for pair in numbers.windows(2) {
            self.next[usize::from(pair[0])] = pair[1];
        }
        // The last is linked to itself until it is freed; see `reclaimed`.
        if let Some(&last) = numbers.last() {
            self.next[usize::from(last)] = last;
        }
        Some(descriptors.into())
    }

    /// Links all entries that no chain has taken, whatever they were before.
    fn rebuild_free_list(&mut self, view: &Words, places: &[Place]) {
        let free: Vec<u16> = (0..)
            .zip(places)
            .filter(|(_, place)| **place != Place::Taken)
            .map(|(number, _)| number)
            .collect();
        // The end of the list is the number of no entry.
        let mut after = u16::try_from(self.next.len()).unwrap_or(u16::MAX);
        for &number in free.iter().rev() {
            self.next[usize::from(number)] = after;
            view.store_u16(entry(number) + NEXT, after);
            after = number;
        }
        self.free_head = after;
        store_free_heads(view, after);
    }
}

/// Whether the driver can see the batch that was being given back: then the descriptor at its start is not
/// available any more in the pass that it was in.
fn is_published<M: GuestMemoryBackend>(
    memory: &M,
    config: &QueueConfig,
    positions: Positions,
) -> Result<bool, InflightError> {
    let Positions { used, old_used } = positions;
    // The wrap counters too: a batch may be as long as the ring.
    if used == old_used {
        return Ok(false);
    }
    let offset = RING_DESCRIPTOR_LEN * u64::from(old_used.index) + RING_FLAGS;
    let flags = config.addresses.descriptor_area.0.checked_add(offset);
    let flags = flags
        .and_then(|addr| {
            memory
                .load::<u16>(GuestAddress(addr), Ordering::Acquire)
                .ok()
        })
        .map(u16::from_le)
        .ok_or(InflightError::RingUnmapped)?;
    let (avail, used) = (
        1 << VRING_PACKED_DESC_F_AVAIL,
        1 << VRING_PACKED_DESC_F_USED,
    );
    let available = if old_used.wrap { avail } else { used };
    Ok(flags & (avail | used) != available)
}

/// Marks the entries of the free list, which may have no end.
fn find_free(view: &Words, head: u16, places: &mut [Place]) {
    let mut at = head;
    while let Some(place) = places.get_mut(usize::from(at))
        && *place == Place::Unknown
    {
        *place = Place::Free;
        at = view.load_u16(entry(at) + NEXT);
    }
}

fn free(places: &[Place]) -> impl Iterator<Item = (u16, &Place)> {
    (0..)
        .zip(places)
        .filter(|(_, place)| **place == Place::Free)
}
