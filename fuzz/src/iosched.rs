//! Batches of requests through one [`Merger`]: the merged list does what the original did.

use std::collections::{BTreeMap, BTreeSet};

use arbitrary::{Arbitrary, Result, Unstructured};
use iosched::{
    Full, Limits, MAX_CAPACITY, Merger, Op, Part, PartOutcome, Request, split_completion,
};

use crate::pick;

/// A merger and its batches.
#[derive(Debug)]
pub struct Input {
    capacity: usize,
    limits: (u32, u64),
    batches: Vec<Vec<Item>>,
}

/// A request without its tag.
#[derive(Debug)]
struct Item {
    op: Op,
    offset: u64,
    len: u64,
    segments: u32,
}

impl<'a> Arbitrary<'a> for Input {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let capacity = match u.int_in_range(0..=15u8)? {
            0..=11 => 512,
            12..=14 => u.int_in_range(0..=32)?,
            _ => 0,
        };
        let max_segments = match u.int_in_range(0..=3u8)? {
            0 => u32::MAX,
            1 => u.int_in_range(0..=16)?,
            2 => 1024,
            _ => u.arbitrary()?,
        };
        let max_bytes = match u.int_in_range(0..=3u8)? {
            0 => u64::MAX,
            1 => u.int_in_range(0..=64)?,
            2 => 1 << 20,
            _ => u.arbitrary()?,
        };
        Ok(Self {
            capacity,
            limits: (max_segments, max_bytes),
            batches: batches(u)?,
        })
    }
}

/// Requests that mostly touch or overlap one of the requests before them.
fn batches(u: &mut Unstructured<'_>) -> Result<Vec<Vec<Item>>> {
    let mut batches = vec![Vec::new()];
    let mut ends = vec![0u64];
    while !u.is_empty() {
        let control = u.int_in_range(0..=63u8)?;
        let op = match control {
            0..=29 => Op::Read,
            30..=57 => Op::Write,
            58 => Op::Barrier,
            59 => Op::Flush,
            60 => Op::Discard,
            61 => Op::WriteZeroes,
            _ => {
                batches.push(Vec::new());
                continue;
            }
        };
        let len = match u.int_in_range(0..=15u8)? {
            0..=9 => u.int_in_range(1..=8)?,
            10..=12 => 8,
            13 => 0,
            14 => u64::from(u.arbitrary::<u32>()?),
            _ => u.arbitrary()?,
        };
        let near = ends[usize::from(u.arbitrary::<u8>()?) % ends.len()];
        let offset = match u.int_in_range(0..=15u8)? {
            0..=6 => near,
            7..=8 => near.wrapping_sub(len),
            9..=10 => near.wrapping_sub(u.int_in_range(0..=8)?),
            11..=13 => u.int_in_range(0..=128)?,
            14 => u64::MAX - u.int_in_range(0..=32)?,
            _ => u.arbitrary()?,
        };
        let segments = if pick::rarely(u, 32)? {
            u.arbitrary()?
        } else {
            u.int_in_range(1..=4)?
        };
        ends.push(offset.wrapping_add(len));
        batches.last_mut().expect("one at least").push(Item {
            op,
            offset,
            len,
            segments,
        });
    }
    Ok(batches)
}

/// A merged request that owns its parts.
struct Emitted {
    op: Op,
    offset: u64,
    len: u64,
    segments: u32,
    parts: Vec<Part>,
}

/// Runs one input; panics where a guarantee is broken.
pub fn run(input: Input) {
    let Input {
        capacity,
        limits: (max_segments, max_bytes),
        batches,
    } = input;
    let limits = Limits {
        max_segments,
        max_bytes,
    };
    let mut merger = Merger::new(capacity, limits);
    assert_eq!(merger.capacity(), capacity.min(MAX_CAPACITY));
    // Parts of each merged request so far.
    let mut sizes = Vec::new();
    let (mut batch_count, mut requests_in, mut bytes) = (0, 0, 0u64);
    for items in &batches {
        let mut requests = Vec::new();
        for (tag, item) in (0u32..).zip(items) {
            let &Item {
                op,
                offset,
                len,
                segments,
            } = item;
            // Scattered, so that a tag is not mistaken for a position.
            let tag = tag.wrapping_mul(0x9e37_79b1);
            let request = Request {
                op,
                offset,
                len,
                segments,
                tag,
            };
            match merger.plug(request) {
                Ok(()) => requests.push(request),
                Err(Full(back)) => {
                    assert_eq!((back, requests.len()), (request, capacity));
                }
            }
            assert_eq!(merger.len(), requests.len());
        }
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
        check(&requests, limits, &out);

        batch_count += u64::from(!requests.is_empty());
        requests_in += requests.len() as u64;
        let moved = out.iter().filter(|merged| merged.op.moves_data());
        bytes = moved.fold(bytes, |sum, merged| sum.saturating_add(merged.len));
        sizes.extend(out.iter().map(|merged| merged.parts.len() as u64));
        let stats = merger.stats();
        assert_eq!(stats.batches, batch_count);
        assert_eq!(stats.requests_in, requests_in);
        assert_eq!(stats.requests_out, sizes.len() as u64);
        assert_eq!(stats.bytes, bytes);
        let largest = sizes.iter().copied().max().unwrap_or(0);
        assert_eq!(stats.largest_merge, largest);
        let mut next = 1;
        for (range, count) in stats.merge_sizes() {
            assert_eq!(*range.start(), next);
            next = range.end() + 1;
            let expected = sizes.iter().filter(|&size| range.contains(size)).count();
            assert_eq!(count, expected as u64);
        }
        assert!(
            next > largest,
            "the histogram ends before the largest merge"
        );
    }
}

fn check(requests: &[Request], limits: Limits, out: &[Emitted]) {
    let by_tag: BTreeMap<u32, usize> = (0..).zip(requests).map(|(i, r)| (r.tag, i)).collect();
    // Arrival positions in the order of emission, and which merged request each is in.
    let mut order = Vec::new();
    let mut place = vec![None; requests.len()];
    for (index, merged) in out.iter().enumerate() {
        check_merged(merged, limits);
        for part in &merged.parts {
            let position = by_tag[&part.tag];
            let request = requests[position];
            let &Part {
                tag,
                segments,
                offset,
                len,
            } = part;
            assert_eq!(
                request,
                Request {
                    op: merged.op,
                    offset,
                    len,
                    segments,
                    tag
                }
            );
            assert_eq!(
                place[position].replace(index),
                None,
                "tag {tag} came out twice"
            );
            order.push(position);
        }
        check_completion(&merged.parts);
    }
    assert_eq!(order.len(), requests.len(), "a request was lost");
    // The crate tells the parts of any list apart, also of one that it did not merge.
    let parts = requests.iter().map(|request| {
        let &Request {
            offset,
            len,
            segments,
            tag,
            ..
        } = request;
        Part {
            tag,
            segments,
            offset,
            len,
        }
    });
    check_completion(&parts.collect::<Vec<_>>());

    // Conflicting requests keep their order, and are in different merged requests.
    for (later, b) in requests.iter().enumerate() {
        for (earlier, a) in requests[..later].iter().enumerate() {
            if conflict(a, b) {
                assert!(
                    place[earlier] < place[later],
                    "{a:?} and {b:?} were exchanged or merged"
                );
            }
        }
    }
    let original = apply(requests, 0..requests.len());
    assert_eq!(apply(requests, order.iter().copied()), original);
    check_nothing_left(requests, limits, out);
    check_retries(requests, out);
}

/// One merged request by itself.
fn check_merged(merged: &Emitted, limits: Limits) {
    let Emitted {
        op,
        offset,
        len,
        segments,
        parts,
    } = merged;
    assert!(!parts.is_empty());
    if let [part] = parts.as_slice() {
        // Alone it passes unchanged, beyond the limits or not.
        assert_eq!(
            (part.offset, part.len, part.segments),
            (*offset, *len, *segments)
        );
        return;
    }
    assert!(op.moves_data());
    let mut at = u128::from(*offset);
    for part in parts {
        assert!(part.len > 0);
        assert_eq!(u128::from(part.offset), at, "parts do not touch");
        at += u128::from(part.len);
    }
    assert!(at < 1 << 64);
    assert_eq!(at - u128::from(*offset), u128::from(*len));
    let sum: u64 = parts.iter().map(|part| u64::from(part.segments)).sum();
    assert_eq!(sum, u64::from(*segments));
    assert!(
        *segments <= limits.max_segments && *len <= limits.max_bytes,
        "beyond the limits"
    );
}

/// The parts a short transfer has completed are those it covers, from the first on.
fn check_completion(parts: &[Part]) {
    let sum = parts
        .iter()
        .fold(0u64, |sum, part| sum.saturating_add(part.len));
    for done in [0, sum / 2, sum.saturating_sub(1), sum, u64::MAX] {
        let mut covered = 0u128;
        let mut count = 0;
        let mut whole = true;
        for (part, outcome) in split_completion(parts, done) {
            assert_eq!(part, parts[count]);
            count += 1;
            covered += u128::from(part.len);
            // One that is empty is not complete behind one that is not.
            whole &= covered <= u128::from(done);
            assert_eq!(outcome == PartOutcome::Complete, whole);
        }
        assert_eq!(count, parts.len());
    }
}

/// On a disk with bad cells, a caller that retries singly what `split_completion` tells it to ends each
/// request once, and leaves the disk, as if none had been merged.
fn check_retries(requests: &[Request], out: &[Emitted]) {
    let mut merged_disk = BadDisk::new(requests);
    let mut single_disk = BadDisk::new(requests);
    let mut ended = BTreeMap::new();
    for merged in out {
        let done = merged_disk.transfer(merged.op, &merged.parts);
        if let [part] = merged.parts.as_slice() {
            // Its own failure: reported, not retried.
            ended.insert(part.tag, done == part.len);
            continue;
        }
        for (part, outcome) in split_completion(&merged.parts, done) {
            let ok = match outcome {
                PartOutcome::Complete => true,
                PartOutcome::Retry => merged_disk.transfer(merged.op, &[part]) == part.len,
            };
            assert_eq!(ended.insert(part.tag, ok), None);
        }
    }
    for request in requests {
        let &Request {
            op,
            offset,
            len,
            segments,
            tag,
        } = request;
        let part = Part {
            tag,
            segments,
            offset,
            len,
        };
        let ok = single_disk.transfer(op, &[part]) == len;
        assert_eq!(ended.remove(&tag), Some(ok), "{request:?}");
    }
    assert!(ended.is_empty());
    assert_eq!(merged_disk.cells, single_disk.cells);
}

/// As the disk of [`apply`], but a transfer ends at the first bad cell.
struct BadDisk {
    cuts: Vec<u128>,
    cells: Vec<Option<u32>>,
    /// Changes which are bad.
    salt: u128,
}

impl BadDisk {
    fn new(requests: &[Request]) -> Self {
        let cuts = cuts(requests);
        Self {
            cells: vec![None; cuts.len()],
            cuts,
            salt: requests.len() as u128,
        }
    }

    /// The bytes transferred from the beginning of the first part on.
    fn transfer(&mut self, op: Op, parts: &[Part]) -> u64 {
        let mut done = 0;
        for part in parts {
            let begin = u128::from(part.offset);
            let end = begin + u128::from(part.len);
            let from = self.cuts.partition_point(|&cut| cut < begin);
            let to = self.cuts.partition_point(|&cut| cut < end);
            for cell in from..to {
                // One in eight, scattered.
                let hash = (self.cuts[cell] ^ self.salt).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                if op.moves_data() && hash >> 32 & 7 == 0 {
                    let into = u64::try_from(self.cuts[cell] - begin);
                    return done + into.expect("less than the part's length");
                }
                if matches!(op, Op::Write | Op::Discard | Op::WriteZeroes) {
                    self.cells[cell] = Some(part.tag);
                }
            }
            done += part.len;
        }
        done
    }
}

/// The ends of all requests.
fn cuts(requests: &[Request]) -> Vec<u128> {
    let cuts: BTreeSet<u128> = requests
        .iter()
        .flat_map(|r| [u128::from(r.offset), end(r)])
        .collect();
    cuts.into_iter().collect()
}

fn end(request: &Request) -> u128 {
    u128::from(request.offset) + u128::from(request.len)
}

fn conflict(a: &Request, b: &Request) -> bool {
    let overlap = u128::from(a.offset.max(b.offset)) < end(a).min(end(b));
    !a.op.moves_data()
        || !b.op.moves_data()
        || (overlap && (a.op == Op::Write || b.op == Op::Write))
}

/// A disk with a cell between any two neighbouring ends of requests.
#[derive(Debug, PartialEq)]
struct Effect {
    /// The tag of the last write, discard or write-zeroes of each cell.
    disk: Vec<Option<u32>>,
    /// What each read found, and each flush made stable.
    reads: BTreeMap<u32, Vec<Option<u32>>>,
}

fn apply(requests: &[Request], order: impl Iterator<Item = usize>) -> Effect {
    let cuts = cuts(requests);
    let mut effect = Effect {
        disk: vec![None; cuts.len()],
        reads: BTreeMap::new(),
    };
    for position in order {
        let request = &requests[position];
        let from = cuts.partition_point(|&cut| cut < u128::from(request.offset));
        let to = cuts.partition_point(|&cut| cut < end(request));
        match request.op {
            Op::Write | Op::Discard | Op::WriteZeroes => {
                effect.disk[from..to].fill(Some(request.tag));
            }
            Op::Read => {
                effect
                    .reads
                    .insert(request.tag, effect.disk[from..to].to_vec());
            }
            Op::Flush | Op::Barrier => {
                effect.reads.insert(request.tag, effect.disk.clone());
            }
        }
    }
    effect
}

/// Where neither order nor limits forbid it, what can merge has merged.
fn check_nothing_left(requests: &[Request], limits: Limits, out: &[Emitted]) {
    let bytes: u128 = requests.iter().map(|r| u128::from(r.len)).sum();
    let segments: u64 = requests.iter().map(|r| u64::from(r.segments)).sum();
    let bound = bytes > u128::from(limits.max_bytes) || segments > u64::from(limits.max_segments);
    let ordered = requests
        .iter()
        .enumerate()
        .any(|(later, b)| requests[..later].iter().any(|a| conflict(a, b)));
    if bound || ordered {
        return;
    }
    let moves = |merged: &&Emitted| merged.op.moves_data() && merged.len > 0;
    let end = |merged: &Emitted| u128::from(merged.offset) + u128::from(merged.len);
    for merged in out.iter().filter(moves) {
        // One that passes the end of the address space may not follow.
        let left = out.iter().filter(moves).find(|next| {
            next.op == merged.op && u128::from(next.offset) == end(merged) && end(next) < 1 << 64
        });
        assert!(
            left.is_none(),
            "two neighbours were left apart at {:#x}",
            end(merged)
        );
    }
}
