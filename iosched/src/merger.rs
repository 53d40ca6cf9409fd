//! The merger.

use std::fmt;

use crate::layers::{Key, Layers, any_conflict};
use crate::request::{Limits, Merged, Op, Part, Request};
use crate::stats::Stats;
use crate::steps::step;
use crate::touch::TouchTable;

/// Most requests in a batch. Twice the largest virtqueue (32768), which is more than one look at a
/// queue can bring; keeps positions in 32 bits and the storage below 10 MiB.
pub const MAX_CAPACITY: usize = 65_536;

/// The batch is full; the request comes back. Unplug, then plug it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full(pub Request);

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the batch is full: request {} does not fit", self.0.tag)
    }
}

impl std::error::Error for Full {}

/// Collects the requests of a batch and merges them. See the [crate's page](crate) for what is
/// guaranteed and how it works.
///
/// All storage is allocated by [`new`](Self::new), about 150 bytes per request of the capacity.
///
/// # Example
///
/// ```
/// use iosched::{Full, Limits, Merger, Op, Request};
///
/// let mut merger = Merger::new(2, Limits { max_segments: 126, max_bytes: 1 << 20 });
/// let write = |tag: u32| Request {
///     op: Op::Write,
///     offset: u64::from(tag) * 4096,
///     len: 4096,
///     segments: 1,
///     tag,
/// };
/// merger.plug(write(0)).unwrap();
/// merger.plug(write(1)).unwrap();
/// assert_eq!(merger.plug(write(2)), Err(Full(write(2))));
///
/// merger.unplug(|merged| {
///     assert_eq!((merged.offset, merged.len, merged.segments), (0, 8192, 2));
///     assert_eq!(merged.parts.len(), 2);
/// });
/// assert!(merger.is_empty());
/// assert_eq!(merger.stats().requests_out, 1);
/// ```
#[derive(Debug)]
pub struct Merger {
    limits: Limits,
    /// Room for the batch, in order of arrival.
    batch: Box<[Request]>,
    /// Of the batch.
    len: usize,
    /// Each of the batch begins at or after the end of the one before it, and may be merged.
    ascending: bool,
    /// End of the last of the batch, while `ascending`.
    end: u64,
    touch: TouchTable,
    layers: Layers,
    /// The piece of the batch between two barriers, sorted.
    keys: Vec<Key>,
    /// Scratch of [`Layers::assign`].
    arrival: Vec<u32>,
    /// Scratch of [`chain`].
    chained: Vec<u32>,
    /// Of the merged request being built.
    parts: Vec<Part>,
    stats: Stats,
}

impl Merger {
    /// Makes an empty merger for batches of up to `capacity` requests. More than [`MAX_CAPACITY`] is
    /// cut to that, see [`capacity`](Self::capacity); with 0 every request is [`Full`].
    pub fn new(capacity: usize, limits: Limits) -> Self {
        let capacity = capacity.min(MAX_CAPACITY);
        let nothing = Request {
            op: Op::Barrier,
            offset: 0,
            len: 0,
            segments: 0,
            tag: 0,
        };
        Self {
            limits,
            batch: vec![nothing; capacity].into_boxed_slice(),
            len: 0,
            ascending: true,
            end: 0,
            touch: TouchTable::new(capacity),
            layers: Layers::new(capacity),
            keys: Vec::with_capacity(capacity),
            arrival: Vec::with_capacity(capacity),
            chained: Vec::with_capacity(capacity),
            parts: Vec::with_capacity(capacity),
            stats: Stats::default(),
        }
    }

    /// Adds a request to the batch. O(1).
    ///
    /// # Errors
    ///
    /// [`Full`]: [`unplug`](Self::unplug) first.
    // Called, it would be given a request in memory, just written in parts and then read as a whole, which stalls.
    #[inline(always)]
    pub fn plug(&mut self, request: Request) -> Result<(), Full> {
        let Some(place) = self.batch.get_mut(self.len) else {
            return Err(Full(request));
        };
        *place = request;
        self.len += 1;
        if self.ascending {
            match request.mergeable_end() {
                Some(end) if request.offset >= self.end => self.end = end,
                _ => self.ascending = false,
            }
        }
        Ok(())
    }

    /// Empties the batch: hands the merged requests to `emit` in the order to submit them. The batch
    /// is empty afterwards even if `emit` panics.
    ///
    /// The parts are borrowed for the call only; copy what is needed to complete them.
    pub fn unplug(&mut self, emit: impl FnMut(Merged<'_>)) {
        // Emptied first: a panic in `emit` must not make the next unplug submit a request twice.
        let len = std::mem::take(&mut self.len);
        let ascending = std::mem::replace(&mut self.ascending, true);
        self.end = 0;
        let batch = &self.batch[..len];
        if batch.is_empty() {
            return;
        }

        self.stats.count_batch(batch.len());
        let mut out = Out {
            limits: self.limits,
            parts: &mut self.parts,
            stats: &mut self.stats,
            emit,
        };

        if len == 1 {
            out.all_alone(batch);
        } else if ascending {
            out.neighbours(batch);
        } else if !self.touch.may_touch(batch) {
            out.all_alone(batch);
        } else {
            let mut sorter = Sorter {
                layers: &mut self.layers,
                keys: &mut self.keys,
                arrival: &mut self.arrival,
                chained: &mut self.chained,
            };
            for piece in batch.chunk_by(|a, b| a.op.moves_data() && b.op.moves_data()) {
                match piece {
                    [_] => out.all_alone(piece),
                    _ => {
                        sorter.sort(piece);
                        sorter.chains(piece, &mut out);
                    }
                }
            }
        }
    }

    /// Requests in the batch.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the batch is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Most requests in a batch.
    pub fn capacity(&self) -> usize {
        self.batch.len()
    }

    /// Counters since [`new`](Self::new).
    pub fn stats(&self) -> &Stats {
        &self.stats
    }
}

/// Builds merged requests and hands them out.
struct Out<'a, F> {
    limits: Limits,
    parts: &'a mut Vec<Part>,
    stats: &'a mut Stats,
    emit: F,
}

impl<F: FnMut(Merged<'_>)> Out<'_, F> {
    /// Merges requests that come in the order of their offsets and do not overlap.
    fn neighbours(&mut self, requests: &[Request]) {
        let mut rest = requests.iter();
        let Some(first) = rest.next() else { return };
        let mut run = self.begin(first);
        for request in rest {
            if !self.extend(&mut run, request) {
                self.finish(run);
                run = self.begin(request);
            }
        }
        self.finish(run);
    }

    /// Hands the requests out in their order, unmerged.
    fn all_alone(&mut self, requests: &[Request]) {
        // Counted for all at once, which a panic in `emit` prevents.
        let mut bytes = 0u64;
        for request in requests {
            step();
            if request.op.moves_data() {
                bytes = bytes.saturating_add(request.len);
            }
            (self.emit)(Merged {
                op: request.op,
                offset: request.offset,
                len: request.len,
                segments: request.segments,
                parts: std::slice::from_ref(&request.into()),
            });
        }
        self.stats.count_alone(requests.len(), bytes);
    }

    fn begin(&mut self, request: &Request) -> Run {
        step();
        self.parts.clear();
        self.parts.push(request.into());
        Run {
            op: request.op,
            offset: request.offset,
            len: request.len,
            segments: request.segments,
            end: request.mergeable_end(),
        }
    }

    /// Adds `request` to the end of `run` if it may.
    fn extend(&mut self, run: &mut Run, request: &Request) -> bool {
        step();
        let Some(end) = request.mergeable_end() else {
            return false;
        };
        if run.op != request.op || run.end != Some(request.offset) {
            return false;
        }
        let Some(segments) = run.segments.checked_add(request.segments) else {
            return false;
        };
        // Both ends fit in 64 bits, so their distance does.
        let len = end - run.offset;
        if segments > self.limits.max_segments || len > self.limits.max_bytes {
            return false;
        }
        *run = Run {
            segments,
            len,
            end: Some(end),
            ..*run
        };
        self.parts.push(request.into());
        true
    }

    fn finish(&mut self, run: Run) {
        self.stats.count_merged(run.op, run.len, self.parts.len());
        (self.emit)(Merged {
            op: run.op,
            offset: run.offset,
            len: run.len,
            segments: run.segments,
            parts: self.parts,
        });
    }
}

/// A merged request being built; its parts are in [`Out`].
struct Run {
    op: Op,
    offset: u64,
    len: u64,
    segments: u32,
    /// Where the next part has to begin; `None` if nothing may follow.
    end: Option<u64>,
}

/// The general way, for a piece of the batch without barriers.
struct Sorter<'a> {
    layers: &'a mut Layers,
    keys: &'a mut Vec<Key>,
    arrival: &'a mut Vec<u32>,
    chained: &'a mut Vec<u32>,
}

impl Sorter<'_> {
    /// Fills `keys`, sorted by layer and offset.
    fn sort(&mut self, piece: &[Request]) {
        self.keys.clear();
        let numbered = (0u32..).zip(piece);
        self.keys
            .extend(numbered.map(|(index, request)| Key::new(request.offset, index)));
        sort_keys(self.keys);
        let conflict = any_conflict(self.keys.iter().map(|key| &piece[key.index()]));
        if conflict {
            self.layers.assign(self.keys, piece, self.arrival);
        }
        let mut any_alone = false;
        for key in &mut *self.keys {
            if piece[key.index()].mergeable_end().is_none() {
                key.set_alone();
                any_alone = true;
            }
        }
        if conflict || any_alone {
            sort_keys(self.keys);
        }
    }

    /// Emits layer by layer.
    fn chains<F: FnMut(Merged<'_>)>(&mut self, piece: &[Request], out: &mut Out<'_, F>) {
        for layer in self.keys.chunk_by(|a, b| a.is_with(*b)) {
            chain(layer, piece, self.chained, out);
        }
    }
}

fn sort_keys(keys: &mut [Key]) {
    keys.sort_unstable_by(|a, b| {
        step();
        a.cmp(b)
    });
}

/// Merges the requests of one layer, given in the order of their offsets.
///
/// `chained` is scratch storage. At the first position of each group of equal offset (they are reads
/// then) it counts how many, from the first on, are in a chain that began below. No more is needed:
/// a chain takes the first free one of a group, and reaches only groups above its head, which have
/// had no heads yet.
fn chain<F: FnMut(Merged<'_>)>(
    layer: &[Key],
    piece: &[Request],
    chained: &mut Vec<u32>,
    out: &mut Out<'_, F>,
) {
    let request = |position: usize| &piece[layer[position].index()];
    chained.clear();
    chained.resize(layer.len(), 0);
    let mut first = 0;
    for group in layer.chunk_by(|a, b| {
        step();
        a.offset() == b.offset()
    }) {
        for head in first + chained[first] as usize..first + group.len() {
            let mut run = out.begin(request(head));
            let mut position = head;
            while let Some(group) = run.end.and_then(|end| find(layer, position + 1, end)) {
                let next = group + chained[group] as usize;
                // A used-up group leads to the one after it, whose offset `extend` refuses.
                if next == layer.len() || !out.extend(&mut run, request(next)) {
                    break;
                }
                chained[group] += 1;
                position = next;
            }
            out.finish(run);
        }
        first += group.len();
    }
}

/// First position at or after `from` whose offset is `offset`.
fn find(layer: &[Key], from: usize, offset: u64) -> Option<usize> {
    let rest = layer.get(from..)?;
    // Without overlapping reads it is the very next, or none.
    let skip = if rest.first()?.offset() >= offset {
        0
    } else {
        rest.partition_point(|key| {
            step();
            key.offset() < offset
        })
    };
    (rest.get(skip)?.offset() == offset).then_some(from + skip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_batch_starts_over_on_the_fast_path() {
        let limits = Limits {
            max_segments: 8,
            max_bytes: 8192,
        };
        let mut merger = Merger::new(2, limits);
        let read = |offset| Request {
            op: Op::Read,
            offset,
            len: 512,
            segments: 1,
            tag: 0,
        };
        for _ in 0..2 {
            merger.plug(read(4096)).unwrap();
            assert!(merger.ascending);
            merger.plug(read(0)).unwrap();
            assert!(!merger.ascending);
            merger.unplug(|_| ());
        }
        for _ in 0..2 {
            merger.plug(read(4096)).unwrap();
            merger.plug(read(4608)).unwrap();
            assert!(merger.ascending, "touching is no step back");
            merger.unplug(|_| ());
        }
    }
}
