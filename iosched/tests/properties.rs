//! The merger against a naive model that applies requests sector by sector.

use std::collections::{BTreeSet, HashMap};

use iosched::{Limits, Merger, Op, Part, PartOutcome, Request, split_completion};
use proptest::prelude::*;

/// Bytes of the model disk, each its own sector.
const DISK: u64 = 64;

const UNLIMITED: Limits = Limits {
    max_segments: u32::MAX,
    max_bytes: u64::MAX,
};

/// A merged request that owns its parts.
#[derive(Clone, Debug, PartialEq)]
struct Emitted {
    op: Op,
    offset: u64,
    len: u64,
    segments: u32,
    parts: Vec<Part>,
}

impl Emitted {
    /// Where a next part would begin.
    fn mergeable_end(&self) -> Option<u64> {
        let moves = self.op.moves_data() && self.len > 0;
        self.offset.checked_add(self.len).filter(|_| moves)
    }
}

fn merge_with(merger: &mut Merger, requests: &[Request]) -> Vec<Emitted> {
    for request in requests {
        merger.plug(*request).unwrap();
    }
    assert_eq!(merger.len(), requests.len());
    let mut out = Vec::new();
    merger.unplug(|merged| {
        out.push(Emitted {
            op: merged.op,
            offset: merged.offset,
            len: merged.len,
            segments: merged.segments,
            parts: merged.parts.to_vec(),
        });
    });
    assert!(merger.is_empty());
    out
}

fn merge(requests: &[Request], limits: Limits) -> Vec<Emitted> {
    merge_with(&mut Merger::new(requests.len(), limits), requests)
}

/// One byte range, moved in one direction under one name.
struct Access {
    op: Op,
    tag: u32,
    offset: u64,
    len: u64,
}

/// What there is to see of a list of requests.
#[derive(Debug, PartialEq)]
struct Effect {
    /// The tag of the last write, discard or write-zeroes of each byte.
    disk: Vec<Option<u32>>,
    /// What each read found, and each flush made stable, by its tag.
    reads: HashMap<u32, Vec<Option<u32>>>,
}

/// Applies accesses one after the other.
fn apply(accesses: impl Iterator<Item = Access>) -> Effect {
    let mut disk = vec![None; usize::try_from(DISK).unwrap()];
    let mut reads = HashMap::new();
    for access in accesses {
        // Beyond the model's disk nothing is stored; conflicts there are checked by pairs.
        let begin = usize::try_from(access.offset.min(DISK)).unwrap();
        let end = usize::try_from(access.offset.saturating_add(access.len).min(DISK)).unwrap();
        match access.op {
            // Each of these leaves bytes that tell whose they are.
            Op::Write | Op::Discard | Op::WriteZeroes => disk[begin..end].fill(Some(access.tag)),
            Op::Read => {
                let seen = disk[begin..end].to_vec();
                assert!(reads.insert(access.tag, seen).is_none());
            }
            // What it makes stable is everything that was written before, wherever.
            Op::Flush | Op::Barrier => {
                assert!(reads.insert(access.tag, disk.clone()).is_none());
            }
        }
    }
    Effect { disk, reads }
}

fn of_request(request: &Request) -> Access {
    Access {
        op: request.op,
        tag: request.tag,
        offset: request.offset,
        len: request.len,
    }
}

fn of_emitted(emitted: &Emitted) -> impl Iterator<Item = Access> {
    emitted.parts.iter().map(|part| Access {
        op: emitted.op,
        tag: part.tag,
        offset: part.offset,
        len: part.len,
    })
}

fn overlap(a: &Request, b: &Request) -> bool {
    let range = |r: &Request| {
        (
            u128::from(r.offset),
            u128::from(r.offset) + u128::from(r.len),
        )
    };
    let ((a_begin, a_end), (b_begin, b_end)) = (range(a), range(b));
    a_begin.max(b_begin) < a_end.min(b_end)
}

fn conflict(a: &Request, b: &Request) -> bool {
    !a.op.moves_data()
        || !b.op.moves_data()
        || (overlap(a, b) && (a.op == Op::Write || b.op == Op::Write))
}

/// Everything that holds for any batch and any limits.
fn check(requests: &[Request], limits: Limits, out: &[Emitted]) {
    // Every request once, unchanged; a merged request is its parts, end to end.
    let mut place = HashMap::new();
    for (position, emitted) in out.iter().enumerate() {
        assert!(!emitted.parts.is_empty());
        let mut end = Some(emitted.offset);
        let mut segments = 0u32;
        for part in &emitted.parts {
            let request = requests[part.tag as usize];
            assert_eq!(
                request,
                Request {
                    op: emitted.op,
                    offset: part.offset,
                    len: part.len,
                    segments: part.segments,
                    tag: part.tag
                }
            );
            assert_eq!(end, Some(part.offset), "parts touch exactly");
            end = part.offset.checked_add(part.len);
            segments = segments.checked_add(part.segments).unwrap();
            assert!(
                place.insert(part.tag, position).is_none(),
                "twice: {}",
                part.tag
            );
        }
        let len = emitted
            .parts
            .iter()
            .map(|part| part.len)
            .reduce(|a, b| a + b);
        assert_eq!(Some(emitted.len), len);
        assert_eq!(emitted.segments, segments);
        if emitted.parts.len() > 1 {
            assert!(emitted.op.moves_data());
            assert!(emitted.segments <= limits.max_segments);
            assert!(emitted.len <= limits.max_bytes);
            assert!(
                end.is_some(),
                "an end beyond the address space is not merged"
            );
            assert!(emitted.parts.iter().all(|part| part.len > 0));
        }
    }
    assert_eq!(place.len(), requests.len(), "lost requests");

    // Conflicting pairs in their order, never in one merged request.
    for (later, b) in requests.iter().enumerate() {
        for a in &requests[..later] {
            if conflict(a, b) {
                assert!(place[&a.tag] < place[&b.tag], "{a:?} before {b:?}");
            }
        }
    }

    // The same disk, and the same seen by each read.
    assert_eq!(
        apply(out.iter().flat_map(of_emitted)),
        apply(requests.iter().map(of_request)),
    );
}

/// No two merged requests between the same barriers could be one, for batches without conflicts.
fn check_complete(limits: Limits, out: &[Emitted]) {
    for piece in out.split(|emitted| !emitted.op.moves_data()) {
        for a in piece {
            for b in piece {
                let touch = a.mergeable_end() == Some(b.offset)
                    && b.mergeable_end().is_some()
                    && a.op == b.op;
                let fits = a
                    .segments
                    .checked_add(b.parts[0].segments)
                    .is_some_and(|segments| segments <= limits.max_segments)
                    && a.len + b.parts[0].len <= limits.max_bytes;
                assert!(!(touch && fits), "{a:?} and {b:?} are not merged");
            }
        }
    }
}

/// A disk some of whose bytes cannot be transferred: a transfer ends before the first of them.
#[derive(Debug)]
struct BadDisk {
    bad: BTreeSet<u64>,
    /// The tag of the last write of each byte.
    written: Vec<Option<u32>>,
}

impl BadDisk {
    fn new() -> Self {
        Self {
            bad: BTreeSet::new(),
            written: vec![None; usize::try_from(DISK).unwrap()],
        }
    }

    /// Bytes done.
    fn transfer(&mut self, emitted: &Emitted) -> u64 {
        if !emitted.op.moves_data() {
            return emitted.len;
        }
        let end = emitted.offset.saturating_add(emitted.len);
        // Of an empty range there is none.
        let stop = self
            .bad
            .iter()
            .copied()
            .find(|&bad| bad >= emitted.offset && bad < end);
        let done = stop.map_or(emitted.len, |stop| stop - emitted.offset);
        if emitted.op == Op::Write {
            for part in &emitted.parts {
                for byte in part.offset..part.offset.saturating_add(part.len).min(DISK) {
                    if byte - emitted.offset < done {
                        self.written[usize::try_from(byte).unwrap()] = Some(part.tag);
                    }
                }
            }
        }
        done
    }
}

fn numbered(requests: Vec<Request>) -> Vec<Request> {
    (0..)
        .zip(requests)
        .map(|(tag, request)| Request { tag, ..request })
        .collect()
}

fn barrier() -> impl Strategy<Value = Op> {
    proptest::sample::select(vec![Op::Flush, Op::Discard, Op::WriteZeroes, Op::Barrier])
}

fn op(barriers: u32) -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => Just(Op::Read),
        8 => Just(Op::Write),
        barriers => barrier(),
    ]
}

/// Any mix on a small disk: overlaps, equal offsets, zero lengths, and some at the end of the
/// address space.
fn anything() -> impl Strategy<Value = Vec<Request>> {
    let offset = prop_oneof![
        12 => 0..DISK,
        1 => (0..4u64).prop_map(|below| u64::MAX - below),
    ];
    let len = prop_oneof![
        12 => 0..9u64,
        1 => (0..4u64).prop_map(|below| u64::MAX - below),
    ];
    let segments = prop_oneof![12 => 1..4u32, 1 => Just(u32::MAX)];
    let request = (op(1), offset, len, segments).prop_map(|(op, offset, len, segments)| Request {
        op,
        offset,
        len,
        segments,
        tag: 0,
    });
    proptest::collection::vec(request, 0..40).prop_map(numbered)
}

/// The disk cut into pieces that do not overlap, in any order, some left out.
fn disjoint() -> impl Strategy<Value = Vec<Request>> {
    let pieces = proptest::collection::vec((op(0), 1..5u64, 1..4u32, 0..5u32), 1..60);
    pieces
        .prop_map(|pieces| {
            let mut offset = 0;
            let mut requests = Vec::new();
            for (op, len, segments, chance) in pieces {
                if chance > 0 {
                    requests.push(Request {
                        op,
                        offset,
                        len,
                        segments,
                        tag: 0,
                    });
                }
                offset += len;
            }
            requests
        })
        .prop_shuffle()
        .prop_map(numbered)
}

/// Reads only, that overlap at will and come between barriers.
fn reads() -> impl Strategy<Value = Vec<Request>> {
    let op = prop_oneof![9 => Just(Op::Read), 1 => barrier()];
    let request = (op, 0..8u64, 1..4u64).prop_map(|(op, offset, len)| Request {
        op,
        offset,
        len,
        segments: 1,
        tag: 0,
    });
    proptest::collection::vec(request, 0..60).prop_map(numbered)
}

fn limits() -> impl Strategy<Value = Limits> {
    prop_oneof![
        Just(UNLIMITED),
        (0..12u32, 0..24u64).prop_map(|(max_segments, max_bytes)| Limits {
            max_segments,
            max_bytes
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, failure_persistence: None, ..Default::default() })]

    #[test]
    fn b28_any_batch_has_the_effect_of_its_requests_one_by_one(
        requests in anything(),
        limits in limits(),
    ) {
        check(&requests, limits, &merge(&requests, limits));
    }

    #[test]
    fn disjoint_requests_merge_as_far_as_the_limits_go(
        requests in disjoint(),
        limits in limits(),
    ) {
        let out = merge(&requests, limits);
        check(&requests, limits, &out);
        check_complete(limits, &out);
    }

    #[test]
    fn overlapping_reads_merge_into_chains(requests in reads()) {
        let out = merge(&requests, UNLIMITED);
        check(&requests, UNLIMITED, &out);
        check_complete(UNLIMITED, &out);
    }

    #[test]
    fn a_batch_leaves_nothing_behind_for_the_next(
        batches in proptest::collection::vec(anything(), 1..5),
        limits in limits(),
    ) {
        let mut merger = Merger::new(64, limits);
        let mut sizes = Vec::new();
        let (mut count, mut requests_in, mut bytes) = (0, 0, 0u64);
        for requests in &batches {
            let out = merge_with(&mut merger, requests);
            prop_assert_eq!(&out, &merge(requests, limits));

            count += u64::from(!requests.is_empty());
            requests_in += requests.len() as u64;
            for emitted in out {
                sizes.push(emitted.parts.len() as u64);
                if emitted.op.moves_data() {
                    bytes = bytes.saturating_add(emitted.len);
                }
            }
            let stats = merger.stats();
            prop_assert_eq!(stats.batches, count);
            prop_assert_eq!((stats.requests_in, stats.requests_out), (requests_in, sizes.len() as u64));
            prop_assert_eq!(stats.bytes, bytes);
            prop_assert_eq!(stats.largest_merge, sizes.iter().copied().max().unwrap_or(0));
            let mut counted = 0;
            for (range, merges) in stats.merge_sizes() {
                let expected = sizes.iter().filter(|&size| range.contains(size)).count() as u64;
                prop_assert_eq!(merges, expected);
                counted += merges;
            }
            prop_assert_eq!(counted, sizes.len() as u64);
        }
    }

    #[test]
    fn i3_parts_complete_once_and_only_those_on_bad_bytes_fail(
        requests in anything(),
        limits in limits(),
        bad in proptest::collection::btree_set(0..DISK, 0..6),
    ) {
        // What a caller does: submit in order, split what came short, retry singly.
        let mut bad_disk = BadDisk { bad, ..BadDisk::new() };
        let mut ended: HashMap<u32, (bool, u64)> = HashMap::new();
        for emitted in merge(&requests, limits) {
            let done = bad_disk.transfer(&emitted);
            if let [part] = emitted.parts[..] {
                let ok = done == part.len;
                prop_assert!(ended.insert(part.tag, (ok, part.len)).is_none());
                continue;
            }
            for (part, outcome) in split_completion(&emitted.parts, done) {
                let ok = match outcome {
                    PartOutcome::Complete => true,
                    PartOutcome::Retry => {
                        let alone = Emitted { offset: part.offset, len: part.len, parts: vec![part], ..emitted };
                        bad_disk.transfer(&alone) == part.len
                    }
                };
                prop_assert!(ended.insert(part.tag, (ok, part.len)).is_none());
            }
        }
        prop_assert_eq!(ended.len(), requests.len());
        let mut alone = BadDisk { bad: bad_disk.bad.clone(), ..BadDisk::new() };
        for request in &requests {
            let single = Emitted {
                op: request.op,
                offset: request.offset,
                len: request.len,
                segments: request.segments,
                parts: vec![Part {
                    tag: request.tag,
                    segments: request.segments,
                    offset: request.offset,
                    len: request.len,
                }],
            };
            let ok = alone.transfer(&single) == request.len;
            prop_assert_eq!(ended[&request.tag], (ok, request.len), "{:?}", request);
        }
        prop_assert_eq!(bad_disk.written, alone.written);
    }

    #[test]
    fn i3_a_short_transfer_completes_each_part_or_retries_it_once(
        requests in disjoint(),
        done in 0..300u64,
    ) {
        for emitted in merge(&requests, UNLIMITED) {
            let split: Vec<_> = split_completion(&emitted.parts, done).collect();
            let parts: Vec<_> = split.iter().map(|(part, _)| *part).collect();
            prop_assert_eq!(&parts, &emitted.parts);
            for (part, outcome) in split {
                // By bytes: complete if and only if the kernel got past the part's last one.
                let complete = part.offset + part.len <= emitted.offset + done;
                prop_assert_eq!(outcome == PartOutcome::Complete, complete);
            }
        }
    }
}
