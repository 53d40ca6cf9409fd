//! What discards and write-zeroes in flight have still to do. The ranges of a request are done one after
//! the other, so that none takes more than one place in the I/O queue, whatever the guest asks for.

use super::SlotId;
use crate::ranges::{Range, RangeKind, SEGMENTS_MAX};

#[derive(Clone, Copy, Debug)]
struct Entry {
    kind: RangeKind,
    ranges: [Range; SEGMENTS_MAX],
    next: usize,
    count: usize,
}

/// The ranges of every request in flight, by slot; allocated once.
#[derive(Debug)]
pub(super) struct RangeTable {
    entries: Box<[Option<Entry>]>,
}

impl RangeTable {
    pub(super) fn new(slots: usize) -> Self {
        Self {
            entries: vec![None; slots].into_boxed_slice(),
        }
    }

    /// The first `count` of `ranges` are to be done.
    pub(super) fn fill(
        &mut self,
        slot: SlotId,
        kind: RangeKind,
        ranges: [Range; SEGMENTS_MAX],
        count: usize,
    ) {
        self.entries[slot.index()] = Some(Entry {
            kind,
            ranges,
            next: 0,
            count,
        });
    }

    /// The next range to be done, if any is left.
    pub(super) fn next(&mut self, slot: SlotId) -> Option<(RangeKind, Range)> {
        let entry = self.entries[slot.index()].as_mut()?;
        let range = entry.ranges[..entry.count].get(entry.next)?;
        entry.next += 1;
        Some((entry.kind, *range))
    }
}
