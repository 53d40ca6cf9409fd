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

/// Up to this many spans are searched without a hint.
///
/// They fit one cache line, and the search takes two or three steps, so a hint that is right saves
/// next to nothing, while one that is wrong half the time (two threads, one in the memory below the
/// PCI hole and one above it) has its line go back and forth between their cores, which costs
/// more than the search. From about twice this many spans on a right hint pays several times over.
const SPANS_WITHOUT_HINT: usize = 4;

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
        if self.index.spans.len() <= SPANS_WITHOUT_HINT {
            return self.index.find(addr);
        }
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use proptest::prelude::*;

    use super::*;

    /// Spans from gaps and sizes, so sorted and apart by construction.
    fn spans(first: u64, gaps_and_sizes: &[(u64, u64)]) -> Box<[Span]> {
        let mut start = first;
        gaps_and_sizes
            .iter()
            .map(|&(gap, size)| {
                start += gap;
                let span = Span { start, size };
                start = span.end();
                span
            })
            .collect()
    }

    fn linear_scan(spans: &[Span], addr: u64) -> Option<(usize, u64)> {
        spans
            .iter()
            .position(|span| span.start <= addr && addr - span.start < span.size)
            .map(|position| (position, addr - spans[position].start))
    }

    fn layout() -> impl Strategy<Value = Box<[Span]>> {
        let gaps_and_sizes = prop::collection::vec((0..3_u64, 1..4_u64), 0..12);
        // Low, and so high that the last span can end right below 2^64.
        let first = prop_oneof![0..4_u64, u64::MAX - 100..u64::MAX - 60];
        (first, gaps_and_sizes).prop_map(|(first, list)| spans(first, &list))
    }

    fn address() -> impl Strategy<Value = u64> {
        prop_oneof![0..64_u64, u64::MAX - 110..=u64::MAX, any::<u64>()]
    }

    proptest! {
        #[test]
        fn search_agrees_with_linear_scan(spans in layout(), addr in address()) {
            let index = SpanIndex::new(spans.clone());
            prop_assert_eq!(index.find(addr), linear_scan(&spans, addr));
        }

        #[test]
        fn hint_never_changes_the_answer(
            spans in layout(),
            addrs in prop::collection::vec(address(), 1..40),
        ) {
            let index = HintedIndex::new(SpanIndex::new(spans.clone()));
            for addr in addrs {
                prop_assert_eq!(index.find(addr), linear_scan(&spans, addr));
            }
        }
    }

    #[test]
    fn no_spans_hold_no_address() {
        let index = HintedIndex::default();
        for addr in [0, 1, u64::MAX] {
            assert_eq!(index.find(addr), None);
        }
    }

    #[test]
    fn last_address_of_the_space_is_in_no_span() {
        let spans = spans(u64::MAX - 10, &[(0, 10)]);
        let index = SpanIndex::new(spans);
        assert_eq!(index.find(u64::MAX - 1), Some((0, 9)));
        assert_eq!(index.find(u64::MAX), None);
    }

    #[test]
    fn hint_follows_the_hits_and_ignores_the_misses() {
        let spans = spans(0x1000, &[(0x1000, 0x1000); SPANS_WITHOUT_HINT + 1]);
        let index = HintedIndex::new(SpanIndex::new(spans.clone()));
        let hint = || index.hint.0.load(Ordering::Relaxed);

        assert!(index.find(spans[3].start).is_some());
        assert_eq!(hint(), 3);
        assert_eq!(index.find(0), None);
        assert_eq!(index.find(spans[3].end()), None);
        assert_eq!(hint(), 3);
        assert!(index.find(spans[1].end() - 1).is_some());
        assert_eq!(hint(), 1);
    }

    #[test]
    fn hint_is_left_alone_by_few_spans() {
        let spans = spans(0x1000, &[(0x1000, 0x1000); SPANS_WITHOUT_HINT]);
        let index = HintedIndex::new(SpanIndex::new(spans.clone()));
        assert_eq!(index.find(spans[3].start), Some((3, 0)));
        assert_eq!(index.hint.0.load(Ordering::Relaxed), 0);
    }

    /// A hint out of bounds cannot come from `find`; that it would do no harm is what lets the
    /// hint be shared without any ordering.
    #[test]
    fn hint_out_of_bounds_is_harmless() {
        let spans = spans(0x1000, &[(0x1000, 0x1000); 9]);
        let index = HintedIndex::new(SpanIndex::new(spans.clone()));
        index.hint.0.store(usize::MAX, Ordering::Relaxed);
        assert_eq!(index.find(spans[8].start + 5), Some((8, 5)));
    }

    #[test]
    fn threads_that_share_a_hint_all_find_the_right_span() {
        let spans = spans(0x1000, &[(0x1000, 0x1000); 9]);
        let index = HintedIndex::new(SpanIndex::new(spans.clone()));
        let wrong = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for first in 0..3_usize {
                let (spans, index, wrong) = (&spans, &index, &wrong);
                scope.spawn(move || {
                    for step in 0..2000_usize {
                        let position = (first * 3 + step) % spans.len();
                        if index.find(spans[position].start + 1) != Some((position, 1)) {
                            wrong.store(true, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert!(!wrong.into_inner());
    }
}
