//! The record of a split ring (vhost-user: `QueueRegionSplit`, `DescStateSplit`).
//!
//! ```text
//!   0 features u64 │ 8 version u16 │ 10 desc_num u16 │ 12 last_batch_head u16 │ 14 used_idx u16
//!   16 + 16 n: entry of head n
//!      0 inflight u8 │ 1 padding │ 6 next u16 │ 8 counter u64
//! ```
//!
//! A batch is the list of heads from `last_batch_head` on, linked by `next`, as many as the ring's index is
//! ahead of `used_idx`: made before the index moves, and over when `used_idx` has followed.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vring::{Head, QueueConfig, RingBase};

use super::words::Words;
use super::{InflightError, Left, VERSION};

const FEATURES: usize = 0;
const VERSION_AT: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
const HEADER_LEN: usize = 16;

const INFLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;
const ENTRY_LEN: usize = 16;

/// Bytes of the queue region of a ring of `entries`.
pub(super) const fn region_len(entries: u16) -> usize {
    HEADER_LEN + ENTRY_LEN * entries as usize
}

#[inline]
const fn entry(head: u16) -> usize {
    HEADER_LEN + ENTRY_LEN * head as usize
}

/// Offset of `used.idx` in a split ring's used ring (virtio 1.3 §2.7.8).
const RING_INDEX: u64 = 2;

/// The record while the ring runs.
#[derive(Debug)]
pub(super) struct SplitTracker {
    words: Words,
    /// What is pushed and not published yet. Room for all heads, allocated once.
    batch: Vec<u16>,
    /// Of the next chain popped: their order.
    counter: u64,
    last_batch_head: u16,
    /// The ring's index as published.
    used_idx: u16,
}

impl SplitTracker {
    #[inline]
    pub(super) fn popped(&mut self, head: &Head) {
        let entry = entry(head.index());
        self.words.store_u64(entry + COUNTER, self.counter);
        self.words.store_u8(entry + INFLIGHT, 1);
        self.counter = self.counter.wrapping_add(1);
    }

    /// A head is in flight no more and was not given back.
    #[cold]
    pub(super) fn forget(&mut self, head: u16) {
        self.words.store_u8(entry(head) + INFLIGHT, 0);
    }

    #[inline]
    pub(super) fn pushed(&mut self, head: u16) {
        debug_assert!(self.batch.len() < self.batch.capacity());
        self.batch.push(head);
    }

    /// Whether nothing can be pushed until something is published.
    #[inline]
    pub(super) fn is_full(&self) -> bool {
        self.batch.len() == self.batch.capacity()
    }

    #[inline]
    pub(super) fn before_publish(&mut self) {
        let view = &self.words;
        for &head in &self.batch {
            view.store_u16(entry(head) + NEXT, self.last_batch_head);
            self.last_batch_head = head;
        }
        view.store_u16(LAST_BATCH_HEAD, self.last_batch_head);
    }

    #[inline]
    pub(super) fn published(&mut self, count: usize) {
        if count == self.batch.len() {
            let view = &self.words;
            for &head in &self.batch {
                view.store_u8(entry(head) + INFLIGHT, 0);
            }
            let [low, high, ..] = count.to_le_bytes();
            self.used_idx = self.used_idx.wrapping_add(u16::from_le_bytes([low, high]));
            view.store_u16(USED_IDX, self.used_idx);
        }
        // A ring that is lost shows nothing to the driver: its chains are in flight for whoever finds it
        // again.
        self.batch.clear();
    }

    /// The record of a ring that is to be started, with where it goes on and what is left over.
    pub(super) fn recover<M: GuestMemoryBackend>(
        words: Words,
        entries: u16,
        memory: &M,
        config: &QueueConfig,
    ) -> Result<(Self, Option<RingBase>, Vec<Left>), InflightError> {
        let size = config.size.get();
        let used_idx = config.addresses.device_area.0.checked_add(RING_INDEX);
        let used_idx = used_idx
            .and_then(|addr| memory.load(GuestAddress(addr), Ordering::Acquire).ok())
            .map(u16::from_le)
            .ok_or(InflightError::RingUnmapped)?;
        let mut tracker = Self {
            words,
            batch: Vec::with_capacity(usize::from(size)),
            counter: 0,
            last_batch_head: 0,
            used_idx,
        };
        let words = tracker.words.clone();
        let view = words;
        let found = view.load_u16(VERSION_AT);
        if found == 0 {
            tracker.begin(&view, entries);
            return Ok((tracker, None, Vec::new()));
        }
        let (version, expected) = (found, entries);
        let entries = view.load_u16(DESC_NUM);
        if version != VERSION || entries != expected {
            return Err(InflightError::Foreign {
                version,
                entries,
                expected,
            });
        }
        let ahead = used_idx.wrapping_sub(view.load_u16(USED_IDX));
        if ahead > size {
            // Not the ring that this is about: the driver has set it up anew.
            tracing::warn!(
                "the record of requests in flight is not of this ring; starting it anew"
            );
            tracker.begin(&view, entries);
            return Ok((tracker, None, Vec::new()));
        }
        tracker.finish_batch(&view, size, ahead);
        let left = tracker.take_stock(&view, entries, size);
        // What is behind the ring's index or in flight has been popped, in this order, and nothing else.
        let [low, high, ..] = left.len().to_le_bytes();
        let next_avail = used_idx.wrapping_add(u16::from_le_bytes([low, high]));
        Ok((tracker, Some(RingBase::Split { next_avail }), left))
    }

    /// Initialises the region: the version last, as without it there is none.
    fn begin(&self, view: &Words, entries: u16) {
        view.store_u16(VERSION_AT, 0);
        for head in 0..entries {
            view.store_u8(entry(head) + INFLIGHT, 0);
        }
        view.store_u64(FEATURES, 0);
        view.store_u16(DESC_NUM, entries);
        view.store_u16(LAST_BATCH_HEAD, self.last_batch_head);
        view.store_u16(USED_IDX, self.used_idx);
        view.store_u16(VERSION_AT, VERSION);
    }

    /// Ends a batch that the driver can see and the entries do not know of, or not all.
    fn finish_batch(&mut self, view: &Words, size: u16, ahead: u16) {
        let mut head = view.load_u16(LAST_BATCH_HEAD);
        if ahead > 0 {
            // As often as the batch is long, so that a list without an end has one.
            for _ in 0..ahead {
                if head >= size {
                    break;
                }
                view.store_u8(entry(head) + INFLIGHT, 0);
                head = view.load_u16(entry(head) + NEXT);
            }
            view.store_u16(USED_IDX, self.used_idx);
        }
    }

    /// Finds what is in flight, in the order of the counters, each head once.
    fn take_stock(&mut self, view: &Words, entries: u16, size: u16) -> Vec<Left> {
        let mut found: Vec<(u64, u16)> = Vec::new();
        for head in 0..entries {
            let entry = entry(head);
            match view.load_u8(entry + INFLIGHT) {
                1 if head < size => found.push((view.load_u64(entry + COUNTER), head)),
                0 => {}
                // No head of this ring, or nothing that was ever written here.
                _ => view.store_u8(entry + INFLIGHT, 0),
            }
        }
        found.sort_unstable();
        self.counter = found.last().map_or(0, |&(last, _)| last.wrapping_add(1));
        found
            .into_iter()
            .map(|(_, head)| Left::Split(head))
            .collect()
    }
}
