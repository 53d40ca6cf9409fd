//! Which of several address ranges holds an address.

use std::ops::Range;

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

/// Up to this many spans are searched without a table: they lie in one cache line, and finding the
/// right one takes two or three comparisons.
const SPANS_WITHOUT_TABLE: usize = 4;

/// Buckets of the first level: 8 KiB, a quarter of a first-level cache. Eight times as many as there
/// can be spans, so that spans of the same size have one each even with holes between them.
const FIRST_LEVEL_BUCKETS: u64 = 4096;

/// Buckets of a further level. With spans in pairs, and each pair in a level of its own, 32 KiB.
const NEXT_LEVEL_BUCKETS: u64 = 64;

/// Levels below one another: one for most spans, one for those that are small or far away, one for the
/// small ones among these. Spans that three do not tell apart are searched, which then costs less than
/// more levels.
const LEVELS_BELOW_ONE_ANOTHER: usize = 3;

/// Entries below this are positions of spans; from it on, numbers of levels.
const LEVEL: u16 = 0x8000;

/// An entry: too many spans start here.
const CROWDED: u16 = u16::MAX;

/// Spans that do not overlap, in ascending order, and a table that leads to the right one without
/// a search.
///
/// Addresses from the first span's start on are divided into buckets of equal size, a power of two,
/// chosen so that as few spans as can be start in the same. A bucket's entry is the last span that
/// starts in it or before; an address in the bucket is in that one or, if it is below its start, in
/// the one before. Where several spans start in one bucket (small ones between large, or all beyond
/// the last bucket, if some are far away), a further level divides it in the same way.
///
/// ```text
///  addr ── - base, >> shift ──> entry ──> span ── addr < start? ──> the one before
///                                 └─ level ── - base, >> shift ──> entry ──> ...
/// ```
#[derive(Debug, Default)]
pub(crate) struct SpanIndex {
    spans: Box<[Span]>,
    first_level: Level,
    next_levels: Box<[Level]>,
    entries: Box<[u16]>,
}

/// Buckets that follow one another.
#[derive(Clone, Copy, Debug, Default)]
struct Level {
    /// Where the first begins.
    base: u64,
    /// They are 2^shift addresses each.
    shift: u32,
    /// The number of the last.
    last: u64,
    /// Where in the table their entries are.
    entries: usize,
}

impl Level {
    /// The bucket that `addr` is in. What is beyond the last counts as in the last: it holds the starts
    /// of all spans there are beyond. What is below the first counts as in the first, and is in the
    /// span before it if in any.
    #[inline]
    fn bucket(&self, addr: u64) -> u64 {
        (addr.saturating_sub(self.base) >> self.shift).min(self.last)
    }
}

impl SpanIndex {
    /// `spans` must be sorted and free of overlaps.
    pub(crate) fn new(spans: Box<[Span]>) -> Self {
        debug_assert!(spans.iter().all(|span| span.size > 0));
        debug_assert!(spans.windows(2).all(|pair| pair[0].end() <= pair[1].start));
        let mut index = Self {
            spans,
            ..Self::default()
        };
        if index.spans.len() > SPANS_WITHOUT_TABLE {
            index.build();
        }
        index
    }

    #[inline]
    pub(crate) fn get(&self, position: usize) -> Option<&Span> {
        self.spans.get(position)
    }

    /// The span that holds `addr`: its position, and how far into it `addr` is.
    #[inline]
    pub(crate) fn find(&self, addr: u64) -> Option<(usize, u64)> {
        self.find_counting(addr, || ())
    }

    /// As [`find`](Self::find). Calls `step` for each entry and each span that it looks at.
    #[inline(always)]
    fn find_counting(&self, addr: u64, mut step: impl FnMut()) -> Option<(usize, u64)> {
        let position = if self.spans.len() <= SPANS_WITHOUT_TABLE {
            self.search(addr, &mut step)?
        } else {
            self.look_up(addr, &mut step)?
        };
        step();
        let offset = self.spans.get(position)?.offset_of(addr)?;
        Some((position, offset))
    }

    /// The last span that starts at `addr` or below.
    #[inline(always)]
    fn search(&self, addr: u64, step: &mut impl FnMut()) -> Option<usize> {
        let after = self.spans.partition_point(|span| {
            step();
            span.start <= addr
        });
        after.checked_sub(1)
    }

    /// The same for addresses in any span; for others, any span.
    #[inline(always)]
    fn look_up(&self, addr: u64, step: &mut impl FnMut()) -> Option<usize> {
        let mut level = &self.first_level;
        // Ends: a level's entries lead to levels that were made later only.
        loop {
            // Less than there are entries.
            let bucket = usize::try_from(level.bucket(addr)).ok()?;
            step();
            let entry = *self.entries.get(level.entries + bucket)?;
            if entry < LEVEL {
                let position = usize::from(entry);
                let before = addr < self.spans.get(position)?.start;
                step();
                return position.checked_sub(usize::from(before));
            }
            if entry == CROWDED {
                return self.search_crowd(addr, step);
            }
            level = self.next_levels.get(usize::from(entry - LEVEL))?;
        }
    }

    #[cold]
    fn search_crowd(&self, addr: u64, step: &mut impl FnMut()) -> Option<usize> {
        self.search(addr, step)
    }

    fn build(&mut self) {
        let (mut entries, mut next_levels) = (Vec::new(), Vec::new());
        let all = 0..self.spans.len();
        let depth = LEVELS_BELOW_ONE_ANOTHER;
        self.first_level = self.level(all, depth, &mut entries, &mut next_levels);
        self.entries = entries.into_boxed_slice();
        self.next_levels = next_levels.into_boxed_slice();
    }

    /// Makes the level for addresses around `spans`, of which there is one at least, and the levels
    /// below it. `depth` is how many there may be below one another.
    fn level(
        &self,
        spans: Range<usize>,
        depth: usize,
        entries: &mut Vec<u16>,
        next_levels: &mut Vec<Level>,
    ) -> Level {
        let buckets_max = if depth == LEVELS_BELOW_ONE_ANOTHER {
            FIRST_LEVEL_BUCKETS
        } else {
            NEXT_LEVEL_BUCKETS
        };
        let mut level = best_buckets(&self.spans[spans.clone()], buckets_max);
        level.entries = entries.len();
        let buckets = level.last + 1;
        entries.extend((0..buckets).map(|_| CROWDED));
        let mut next = spans.start;
        for (slot, bucket) in (level.entries..).zip(0..buckets) {
            let inside = next;
            while next < spans.end && level.bucket(self.spans[next].start) == bucket {
                next += 1;
            }
            entries[slot] = match next - inside {
                // In the first bucket there is one.
                0 | 1 => entry(next - 1).unwrap_or(CROWDED),
                _ if depth == 1 => CROWDED,
                _ => {
                    let below = self.level(inside..next, depth - 1, entries, next_levels);
                    next_levels.push(below);
                    entry(next_levels.len() - 1).map_or(CROWDED, |number| LEVEL | number)
                }
            };
        }
        level
    }
}

/// Buckets with as few of `spans` as can be starting in one together, and among those the fewest. Two
/// small crowds count for less than a large one (the sum of squares): spans in clusters are divided
/// by cluster first.
fn best_buckets(spans: &[Span], buckets_max: u64) -> Level {
    let (Some(first), Some(last)) = (spans.first(), spans.last()) else {
        return Level::default();
    };
    let with_shift = |shift: u32| {
        // A bucket starts at a multiple of its size: spans that do as well fill whole buckets, and
        // none is shared with the span before.
        let base = first.start >> shift << shift;
        Level {
            base,
            shift,
            last: ((last.start - base) >> shift).min(buckets_max - 1),
            entries: 0,
        }
    };
    let together = |level: &Level| {
        spans
            .chunk_by(|a, b| level.bucket(a.start) == level.bucket(b.start))
            .filter(|chunk| chunk.len() > 1)
            .map(|chunk| chunk.len() * chunk.len())
            .sum::<usize>()
    };
    // The largest buckets first, and so the fewest: of equals the first is taken.
    (0..u64::BITS)
        .rev()
        .map(with_shift)
        .min_by_key(together)
        .unwrap_or_default()
}

/// As an entry that is no level.
fn entry(number: usize) -> Option<u16> {
    u16::try_from(number).ok().filter(|&number| number < LEVEL)
}

#[cfg(test)]
mod tests {
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

    /// Gaps and sizes of any magnitude, so that some spans are close together and others far apart.
    fn spread_layout() -> impl Strategy<Value = Box<[Span]>> {
        let magnitude =
            |max: u32| (0..max, any::<u64>()).prop_map(|(bits, n)| n & ((1 << bits) - 1));
        let pair = (magnitude(53), magnitude(53).prop_map(|size| size + 1));
        (any::<u32>(), prop::collection::vec(pair, 1..509))
            .prop_map(|(first, list)| spans(u64::from(first), &list))
    }

    /// How many entries and spans `find` looks at.
    fn counted(index: &SpanIndex, addr: u64) -> (usize, Option<(usize, u64)>) {
        let mut steps = 0;
        let found = index.find_counting(addr, || steps += 1);
        (steps, found)
    }

    /// For any layout of 509 spans: three entries, then a binary search, and the span itself.
    const STEPS_MAX: usize = LEVELS_BELOW_ONE_ANOTHER + 10 + 1;

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
        fn look_up_agrees_with_linear_scan_however_spans_are_spread(
            spans in spread_layout(),
            picks in prop::collection::vec((any::<prop::sample::Index>(), -2..3_i64, any::<bool>()), 1..40),
        ) {
            let index = SpanIndex::new(spans.clone());
            for (pick, nudge, at_end) in picks {
                let span = spans[pick.index(spans.len())];
                let edge = if at_end { span.end() } else { span.start };
                let addr = edge.wrapping_add_signed(nudge);
                let (steps, found) = counted(&index, addr);
                prop_assert_eq!(found, linear_scan(&spans, addr));
                prop_assert!(steps <= STEPS_MAX, "{steps} steps");
            }
        }
    }

    #[test]
    fn no_spans_hold_no_address() {
        let index = SpanIndex::default();
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

    /// The most steps for the first and last address of any span, and of those beside them.
    fn most_steps(spans: &[Span]) -> usize {
        let index = SpanIndex::new(spans.into());
        let edges = spans.iter().flat_map(|span| {
            [
                span.start.wrapping_sub(1),
                span.start,
                span.end() - 1,
                span.end(),
            ]
        });
        edges
            .map(|addr| {
                let (steps, found) = counted(&index, addr);
                assert_eq!(found, linear_scan(spans, addr));
                steps
            })
            .max()
            .unwrap()
    }

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    /// One look into the table, the span, and the span once more: as many steps as one span takes
    /// and one, whatever the number of spans.
    #[test]
    fn spans_of_one_size_take_one_entry_however_many_there_are() {
        assert_eq!(most_steps(&spans(0, &[(0, GIB)])), 2);
        for (gap, size) in [(0, 128 * MIB), (MIB, MIB), (0, 0x1000), (0x1000, 0x11_3000)] {
            for count in [5, 8, 64, 509] {
                let spans = spans(4 * GIB, &vec![(gap, size); count]);
                assert_eq!(most_steps(&spans), 3, "{count} of {size:#x}");
            }
        }
    }

    /// Low memory in pieces, a hole for PCI, DIMMs of two sizes, and device memory far above.
    #[test]
    fn spans_of_a_pc_take_a_further_level_at_most() {
        let mut layout = vec![(0, 0xA_0000), (0x2_0000, 0x4_0000), (0, 3 * GIB - MIB)];
        layout.extend([(GIB, 128 * MIB)]);
        layout.extend([(0, 128 * MIB); 400]);
        layout.extend([(0, GIB); 100]);
        layout.extend([(1 << 40, 16 * MIB), (16 * MIB, 4 * GIB)]);
        assert!(most_steps(&spans(0, &layout)) <= 4);
    }

    #[test]
    fn spans_in_clusters_take_a_further_level() {
        let mut layout = vec![(0, 128 * MIB); 63];
        for _ in 1..8 {
            layout.push((1 << 44, 128 * MIB));
            layout.extend([(0, 128 * MIB); 62]);
        }
        assert_eq!(most_steps(&spans(0, &layout)), 4);
    }

    #[test]
    fn m23_layout_that_defeats_the_table_is_searched() {
        let layout: Vec<_> = (1..=256_u32)
            .map(|i| (1 << (10 + 12 * (i.trailing_zeros() / 2)), 16))
            .collect();
        let steps = most_steps(&spans(0, &layout));
        assert!((10..=STEPS_MAX).contains(&steps), "{steps}");
    }

    /// Entries and levels, so that no layout makes a table without bound.
    #[test]
    fn m23_table_of_any_layout_is_small() {
        let pairs: Vec<_> = (0..254).flat_map(|_| [(1 << 54, 1), (0, 1)]).collect();
        let powers: Vec<_> = (1..62).map(|bits| ((1_u64 << bits) - 1, 1)).collect();
        for layout in [pairs, powers] {
            let index = SpanIndex::new(spans(0, &layout));
            assert!(index.entries.len() <= 36 << 10, "{}", index.entries.len());
            assert!(most_steps(&index.spans) <= STEPS_MAX);
        }
    }
}
