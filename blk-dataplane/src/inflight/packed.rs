//! The record of a packed ring (vhost-user: `QueueRegionPacked`, `DescStatePacked`).
//!
//! ```text
//!   0 features u64 │ 8 version u16 │ 10 desc_num u16 │ 12 free_head u16 │ 14 old_free_head u16
//!   16 used_idx u16 │ 18 old_used_idx u16 │ 20 used_wrap u8 │ 21 old_used_wrap u8 │ 22 padding
//!   32 + 32 n: entry n
//!      0 inflight u8 │ 2 next u16 │ 4 last u16 │ 6 num u16 │ 8 counter u64
//!      16 id u16 │ 18 flags u16 │ 20 len u32 │ 24 addr u64
//! ```
//!
//! Each descriptor of a chain has an entry, taken from a free list in their order; the first of them has what
//! is said of the chain. A chain is in flight once the list no longer has its entries; a batch is given back
//! once the ring shows it. The `old_` fields are what is true without the update that is being made.
//!
//! Words that change together are stored as one here, which the specification leaves open: an index without
//! its wrap counter, if that is where the process is killed, is another position.

mod recovery;

use vring::{Head, PackedPosition, RingDescriptor};

use super::words::Words;

const FEATURES: usize = 0;
const VERSION_AT: usize = 8;
const DESC_NUM: usize = 10;
/// Both heads of the free list.
const FREE_HEADS: usize = 12;
const FREE_HEAD: usize = 12;
const OLD_FREE_HEAD: usize = 14;
/// Both positions with their wrap counters.
const POSITIONS: usize = 16;
const HEADER_LEN: usize = 32;

/// The state of a chain, in its first entry: `inflight`, `next`, `last`, `num`.
const STATE: usize = 0;
const INFLIGHT: usize = 0;
const NEXT: usize = 2;
const COUNTER: usize = 8;
const DESCRIPTOR: usize = 16;
const ADDRESS: usize = 24;
const ENTRY_LEN: usize = 32;

/// Bytes of the queue region of a ring of `entries`.
pub(super) const fn region_len(entries: u16) -> usize {
    HEADER_LEN + ENTRY_LEN * entries as usize
}

#[inline]
const fn entry(number: u16) -> usize {
    HEADER_LEN + ENTRY_LEN * number as usize
}

/// What the first entry of a chain says of it.
#[derive(Clone, Copy, Debug)]
struct State {
    inflight: u8,
    next: u16,
    last: u16,
    num: u16,
}

impl State {
    #[inline]
    const fn to_word(self) -> u64 {
        let [next0, next1] = self.next.to_ne_bytes();
        let [last0, last1] = self.last.to_ne_bytes();
        let [num0, num1] = self.num.to_ne_bytes();
        u64::from_ne_bytes([self.inflight, 0, next0, next1, last0, last1, num0, num1])
    }

    const fn from_word(word: u64) -> Self {
        let [inflight, _, next0, next1, last0, last1, num0, num1] = word.to_ne_bytes();
        Self {
            inflight,
            next: u16::from_ne_bytes([next0, next1]),
            last: u16::from_ne_bytes([last0, last1]),
            num: u16::from_ne_bytes([num0, num1]),
        }
    }
}

/// The positions in the header.
#[derive(Clone, Copy, Debug)]
struct Positions {
    used: PackedPosition,
    old_used: PackedPosition,
}

impl Positions {
    #[inline]
    fn to_word(self) -> u64 {
        let [used0, used1] = self.used.index.to_ne_bytes();
        let [old0, old1] = self.old_used.index.to_ne_bytes();
        let (wrap, old_wrap) = (u8::from(self.used.wrap), u8::from(self.old_used.wrap));
        u64::from_ne_bytes([used0, used1, old0, old1, wrap, old_wrap, 0, 0])
    }

    /// `None` if one of them is none of a ring of `size`.
    fn from_word(word: u64, size: u16) -> Option<Self> {
        let [used0, used1, old0, old1, wrap, old_wrap, ..] = word.to_ne_bytes();
        let position = |index: [u8; 2], wrap: u8| {
            let index = u16::from_ne_bytes(index);
            (index < size && wrap <= 1).then_some(PackedPosition {
                index,
                wrap: wrap == 1,
            })
        };
        Some(Self {
            used: position([used0, used1], wrap)?,
            old_used: position([old0, old1], old_wrap)?,
        })
    }
}

#[inline]
const fn descriptor_word(descriptor: RingDescriptor) -> u64 {
    let [id0, id1] = descriptor.id.to_ne_bytes();
    let [flags0, flags1] = descriptor.flags.to_ne_bytes();
    let [len0, len1, len2, len3] = descriptor.len.to_ne_bytes();
    u64::from_ne_bytes([id0, id1, flags0, flags1, len0, len1, len2, len3])
}

const fn descriptor_of(word: u64, address: u64) -> RingDescriptor {
    let [id0, id1, flags0, flags1, len0, len1, len2, len3] = word.to_ne_bytes();
    RingDescriptor {
        address,
        len: u32::from_ne_bytes([len0, len1, len2, len3]),
        id: u16::from_ne_bytes([id0, id1]),
        flags: u16::from_ne_bytes([flags0, flags1]),
    }
}

/// A chain in flight: its entries.
#[derive(Clone, Copy, Debug, Default)]
struct Entries {
    first: u16,
    last: u16,
    num: u16,
}

/// The record while the ring runs. What is in the shared memory is here too, and is read here.
#[derive(Debug)]
pub(super) struct PackedTracker {
    words: Words,
    /// By entry: the next of its chain, or of the free list.
    next: Box<[u16]>,
    /// By slot of the queue ([`Head::index`]): the chain in it.
    chains: Box<[Entries]>,
    /// What is pushed and not published yet: its slot may have another chain by then. Allocated once.
    batch: Vec<Entries>,
    /// Of the next chain popped: their order.
    counter: u64,
    free_head: u16,
    used: PackedPosition,
    /// As published.
    old_used: PackedPosition,
    /// Of the ring.
    size: u16,
}

impl PackedTracker {
    /// Takes the descriptors of the chain just popped from `describe`.
    #[inline]
    pub(super) fn popped(
        &mut self,
        head: &Head,
        describe: impl FnOnce(&mut dyn FnMut(RingDescriptor)),
    ) {
        let first = self.free_head;
        let (mut at, mut last, mut num) = (first, first, 0);
        let view = &self.words;
        let next = &self.next;
        describe(&mut |descriptor| {
            // There are as many entries as the ring has descriptors, or more.
            let Some(&after) = next.get(usize::from(at)) else {
                return;
            };
            let entry = entry(at);
            view.store_u64(entry + DESCRIPTOR, descriptor_word(descriptor));
            view.store_u64(entry + ADDRESS, descriptor.address);
            (last, at, num) = (at, after, num + 1);
        });
        if num == 0 {
            debug_assert!(false, "a chain has a descriptor");
            return;
        }
        let state = State {
            inflight: 1,
            next: self.next[usize::from(first)],
            last,
            num,
        };
        view.store_u64(entry(first) + COUNTER, self.counter);
        view.store_u64(entry(first) + STATE, state.to_word());
        // From here on it is in flight.
        store_free_heads(view, at);
        self.counter = self.counter.wrapping_add(1);
        self.free_head = at;
        self.set_chain(head.index(), Entries { first, last, num });
    }

    #[inline]
    fn set_chain(&mut self, slot: u16, entries: Entries) {
        if let Some(chain) = self.chains.get_mut(usize::from(slot)) {
            *chain = entries;
        }
    }

    #[inline]
    fn chain(&self, slot: u16) -> Entries {
        let chain = self.chains.get(usize::from(slot));
        debug_assert!(chain.is_some());
        chain.copied().unwrap_or_default()
    }

    /// The latest pop has been undone.
    #[cold]
    pub(super) fn unpopped(&mut self, slot: u16) {
        // Its entries are still linked, and the last of them to the head of the free list.
        self.free_head = self.chain(slot).first;
        store_free_heads(&self.words, self.free_head);
        self.words.store_u8(entry(self.free_head) + INFLIGHT, 0);
    }

    /// A chain that a predecessor has left is in flight as `head` now.
    pub(super) fn reclaimed(&mut self, first: u16, head: &Head) {
        let (mut last, mut num) = (first, 1);
        // Its links were checked: they end with one to itself.
        while let Some(&next) = self.next.get(usize::from(last))
            && next != last
        {
            (last, num) = (next, num + 1);
        }
        self.set_chain(head.index(), Entries { first, last, num });
    }

    /// A chain that a predecessor has left can not be in flight.
    pub(super) fn forget(&mut self, first: u16) {
        self.words.store_u8(entry(first) + INFLIGHT, 0);
    }

    #[inline]
    pub(super) fn pushed(&mut self, slot: u16) {
        debug_assert!(self.batch.len() < self.batch.capacity());
        let entries = self.chain(slot);
        self.batch.push(entries);
    }

    /// Whether nothing can be pushed until something is published.
    #[inline]
    pub(super) fn is_full(&self) -> bool {
        self.batch.len() == self.batch.capacity()
    }

    #[inline]
    pub(super) fn before_publish(&mut self) {
        for &Entries { first, last, num } in &self.batch {
            if let Some(next) = self.next.get_mut(usize::from(last)) {
                *next = self.free_head;
            }
            self.words.store_u16(entry(last) + NEXT, self.free_head);
            self.free_head = first;
            self.used = advanced(self.used, num, self.size);
        }
        if !self.batch.is_empty() {
            self.words.store_u16(FREE_HEAD, self.free_head);
            let positions = self.positions().to_word();
            self.words.store_u64(POSITIONS, positions);
        }
    }

    #[inline]
    pub(super) fn published(&mut self, count: usize) {
        if count == self.batch.len() && count != 0 {
            self.old_used = self.used;
            for chain in &self.batch {
                self.words.store_u8(entry(chain.first) + INFLIGHT, 0);
            }
            self.words.store_u16(OLD_FREE_HEAD, self.free_head);
            let positions = self.positions().to_word();
            self.words.store_u64(POSITIONS, positions);
        }
        // A ring that is lost shows nothing to the driver: its chains are in flight for whoever finds it
        // again.
        self.batch.clear();
    }

    #[inline]
    const fn positions(&self) -> Positions {
        Positions {
            used: self.used,
            old_used: self.old_used,
        }
    }
}

/// Both heads of the free list at once: with the entries before `head`, what they hold is in flight.
#[inline]
fn store_free_heads(view: &Words, head: u16) {
    let [low, high] = head.to_ne_bytes();
    view.store_u32(FREE_HEADS, u32::from_ne_bytes([low, high, low, high]));
}

/// The position `count` descriptors on, at most one pass.
#[inline]
const fn advanced(position: PackedPosition, count: u16, size: u16) -> PackedPosition {
    // At most 32767 + 32768.
    let index = position.index.wrapping_add(count);
    if index < size {
        PackedPosition {
            index,
            wrap: position.wrap,
        }
    } else {
        PackedPosition {
            index: index - size,
            wrap: !position.wrap,
        }
    }
}
