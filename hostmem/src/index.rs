//! Which of several address ranges holds an address.

use std::sync::atomic::{AtomicUsize, Ordering};

/// `[start, start + size)`, of at least one byte, that ends at or below 2^64 - 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: u64,
    pub(crate) size: u64,
}

impl Span {
    /// How far into the span `addr` is, if it is in it.
    #[inline]
    pub(crate) fn offset_of(&self, addr: u64) -> Option<u64> {
        // Below `start` this wraps to more than any size, as start + size fits 64 bits.
        let offset = addr.wrapping_sub(self.start);
        (offset < self.size).then_some(offset)
    }

    /// The first address after the span.
    #[inline]
    pub(crate) fn end(&self) -> u64 {
        self.start + self.size
    }
}

/// Spans that do not overlap, in ascending order.
#[derive(Debug, Default)]
pub(crate) struct SpanIndex {
    spans: Box<[Span]>,
}

impl SpanIndex {
    /// `spans` must be sorted and free of overlaps.
    pub(crate) fn new(spans: Box<[Span]>) -> Self {
        debug_assert!(spans.iter().all(|span| span.size > 0));
        debug_assert!(spans.windows(2).all(|pair| pair[0].end() <= pair[1].start));
        Self { spans }
    }

    #[inline]
    pub(crate) fn get(&self, position: usize) -> Option<&Span> {
        self.spans.get(position)
    }

    /// The span that holds `addr`: its position, and how far into it `addr` is.
    #[inline]
    pub(crate) fn find(&self, addr: u64) -> Option<(usize, u64)> {
        let position = self
            .spans
            .partition_point(|span| span.start <= addr)
            .checked_sub(1)?;
        let offset = self.spans.get(position)?.offset_of(addr)?;
        Some((position, offset))
    }
}

/// A [`SpanIndex`] that remembers where it found the last address.
#[derive(Debug, Default)]
pub(crate) struct HintedIndex {
    index: SpanIndex,
    hint: Hint,
}

/// The position of the last hit, on cache lines of its own: it is the only word of a memory map
/// that is written while the map is in use, by any of the threads that share it, and what lies
/// beside it is read for each request. 128 bytes, as x86 fetches lines in pairs and some Arm cores
/// have lines of that size.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Hint(AtomicUsize);

impl HintedIndex {
    pub(crate) fn new(index: SpanIndex) -> Self {
        Self {
            index,
            hint: Hint::default(),
        }
    }

    #[inline]
    pub(crate) fn get(&self, position: usize) -> Option<&Span> {
        self.index.get(position)
    }

    /// Same as [`SpanIndex::find`].
    #[inline]
    pub(crate) fn find(&self, addr: u64) -> Option<(usize, u64)> {
        // Relaxed: the hint is a guess that is checked, and publishes nothing.
        let hint = self.hint.0.load(Ordering::Relaxed);
        if let Some(offset) = self.index.get(hint).and_then(|span| span.offset_of(addr)) {
            return Some((hint, offset));
        }
        let found = self.index.find(addr)?;
        // Only here, where it changes: a store at each hit would move the line between cores.
        self.hint.0.store(found.0, Ordering::Relaxed);
        Some(found)
    }
}
