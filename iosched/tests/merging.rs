//! The merger's behaviour, case by case.

use iosched::{Full, Limits, MAX_CAPACITY, Merger, Op, Request};

const LIMITS: Limits = Limits {
    max_segments: 1024,
    max_bytes: 1 << 20,
};

fn request(op: Op, tag: u32, offset: u64, len: u64) -> Request {
    Request {
        op,
        offset,
        len,
        segments: 1,
        tag,
    }
}

fn read(tag: u32, offset: u64, len: u64) -> Request {
    request(Op::Read, tag, offset, len)
}

fn write(tag: u32, offset: u64, len: u64) -> Request {
    request(Op::Write, tag, offset, len)
}

fn barrier(tag: u32) -> Request {
    request(Op::Barrier, tag, 0, 0)
}

/// The tags of each merged request, in the order they come out.
fn tags(requests: &[Request], limits: Limits) -> Vec<Vec<u32>> {
    let mut merger = Merger::new(requests.len(), limits);
    requests
        .iter()
        .for_each(|request| merger.plug(*request).unwrap());
    let mut out = Vec::new();
    merger.unplug(|merged| out.push(merged.parts.iter().map(|part| part.tag).collect()));
    out
}

#[test]
fn an_empty_batch_emits_nothing_and_is_not_counted() {
    let mut merger = Merger::new(4, LIMITS);
    merger.unplug(|_| panic!("nothing went in"));
    assert_eq!(merger.stats().batches, 0);
}

#[test]
fn a_sequential_run_becomes_one_request() {
    let run: Vec<_> = (0..100)
        .map(|tag| read(tag, u64::from(tag) * 512, 512))
        .collect();
    assert_eq!(tags(&run, LIMITS), [(0..100).collect::<Vec<_>>()]);
}

#[test]
fn a_run_in_any_order_becomes_one_request_in_the_order_of_offsets() {
    let backwards: Vec<_> = (0..100)
        .map(|tag| write(tag, u64::from(99 - tag) * 512, 512))
        .collect();
    assert_eq!(
        tags(&backwards, LIMITS),
        [(0..100).rev().collect::<Vec<_>>()]
    );
}

#[test]
fn two_interleaved_streams_become_two_requests() {
    let requests: Vec<_> = (0..8)
        .map(|tag| {
            read(
                tag,
                u64::from(tag % 2) * 1_000_000 + u64::from(tag / 2) * 512,
                512,
            )
        })
        .collect();
    assert_eq!(tags(&requests, LIMITS), [[0, 2, 4, 6], [1, 3, 5, 7]]);
}

#[test]
fn requests_with_a_gap_or_of_different_directions_do_not_merge() {
    assert_eq!(
        tags(&[read(0, 0, 512), read(1, 513, 512)], LIMITS),
        [[0], [1]]
    );
    assert_eq!(
        tags(&[read(0, 0, 512), write(1, 512, 512)], LIMITS),
        [[0], [1]]
    );
    assert_eq!(
        tags(&[write(0, 512, 512), read(1, 0, 512)], LIMITS),
        [[0], [1]]
    );
}

#[test]
fn requests_that_can_not_merge_come_out_as_they_came_in() {
    let requests = [read(0, 9000, 512), write(1, 1000, 512), read(2, 5000, 512)];
    assert_eq!(tags(&requests, LIMITS), [[0], [1], [2]]);
}

#[test]
fn b28_overlapping_writes_keep_their_order_and_do_not_merge() {
    // The same sectors, partly the same, and a neighbour of both.
    let requests = [
        write(0, 512, 512),
        write(1, 512, 512),
        write(2, 256, 512),
        write(3, 1024, 512),
    ];
    assert_eq!(tags(&requests, LIMITS), [vec![0, 3], vec![1], vec![2]]);
}

#[test]
fn b28_a_read_stays_behind_the_write_it_overlaps_and_before_the_next() {
    let requests = [
        write(0, 512, 512),
        read(1, 512, 512),
        write(2, 512, 512),
        read(3, 0, 512),
    ];
    assert_eq!(tags(&requests, LIMITS), [[3], [0], [1], [2]]);
}

#[test]
fn b28_a_merge_does_not_pull_a_part_across_an_overlapping_request() {
    // 0 and 2 touch, but 1 came between them and overlaps 2.
    let requests = [write(0, 0, 512), write(1, 700, 100), write(2, 512, 512)];
    assert_eq!(tags(&requests, LIMITS), [[0], [1], [2]]);
}

#[test]
fn b28_a_block_written_over_and_over_does_not_keep_the_stream_from_merging() {
    let requests: Vec<_> = (0..8)
        .map(|tag| match tag % 2 {
            0 => write(tag, u64::from(tag) * 256, 512),
            _ => write(tag, 1_000_000, 512),
        })
        .collect();
    assert_eq!(
        tags(&requests, LIMITS),
        [vec![0, 2, 4, 6], vec![1], vec![3], vec![5], vec![7]]
    );
}

#[test]
fn the_same_sectors_read_twice_merge_into_two_chains() {
    let requests = [
        read(0, 0, 512),
        read(1, 0, 512),
        read(2, 512, 512),
        read(3, 512, 512),
    ];
    assert_eq!(tags(&requests, LIMITS), [[0, 2], [1, 3]]);
}

#[test]
fn b28_reads_that_overlap_one_another_are_no_conflict_beside_one() {
    // 3 and 4 conflict; that 0 and 1 read the same bytes keeps 1 from nothing.
    let requests = [
        read(0, 0, 600),
        read(1, 0, 512),
        read(2, 512, 512),
        write(3, 9000, 512),
        write(4, 9000, 512),
    ];
    assert_eq!(
        tags(&requests, LIMITS),
        [vec![0], vec![1, 2], vec![3], vec![4]]
    );
}

#[test]
fn nothing_moves_or_merges_across_a_barrier() {
    let requests = [
        write(0, 512, 512),
        barrier(1),
        write(2, 0, 512),
        write(3, 512, 512),
        barrier(4),
    ];
    assert_eq!(
        tags(&requests, LIMITS),
        [vec![0], vec![1], vec![2, 3], vec![4]]
    );
    let ascending = [write(0, 0, 512), barrier(1), write(2, 512, 512)];
    assert_eq!(tags(&ascending, LIMITS), [[0], [1], [2]]);
}

#[test]
fn flush_discard_and_write_zeroes_keep_their_place_and_let_nothing_by() {
    for op in [Op::Flush, Op::Discard, Op::WriteZeroes, Op::Barrier] {
        // Far from the others: it is the operation that counts, not its range.
        let far = request(op, 2, 1 << 30, 512);
        let backwards = [
            write(0, 512, 512),
            write(1, 0, 512),
            far,
            write(3, 1536, 512),
            write(4, 1024, 512),
        ];
        assert_eq!(
            tags(&backwards, LIMITS),
            [vec![1, 0], vec![2], vec![4, 3]],
            "{op:?}"
        );
        let ascending = [
            write(0, 0, 512),
            request(op, 1, 512, 512),
            write(2, 512, 512),
        ];
        assert_eq!(tags(&ascending, LIMITS), [[0], [1], [2]], "{op:?}");
        assert_eq!(tags(&[far], LIMITS), [[2]]);
    }
}

#[test]
fn the_histogram_counts_merged_requests_by_their_parts() {
    let mut merger = Merger::new(64, LIMITS);
    let mut tag = 0;
    // Runs of 1, 2, 3, 4 and 7 parts, and a flush.
    for len in [1, 2, 3, 4, 7] {
        for index in 0..len {
            merger
                .plug(read(tag, (len * 1000 + index) * 512, 512))
                .unwrap();
            tag += 1;
        }
    }
    merger.plug(request(Op::Flush, tag, 0, 0)).unwrap();
    merger.unplug(|_| ());
    let stats = merger.stats();
    let sizes: Vec<_> = stats.merge_sizes().collect();
    assert_eq!(sizes, [(1..=1, 2), (2..=3, 2), (4..=7, 2)]);
    assert_eq!((stats.requests_in, stats.requests_out), (18, 6));
    assert_eq!((stats.bytes, stats.largest_merge), (17 * 512, 7));
}

#[test]
fn barriers_that_touch_are_not_merged_and_pass_their_range_through() {
    let mut merger = Merger::new(2, LIMITS);
    let discards = [
        request(Op::Barrier, 0, 0, 4096),
        request(Op::Barrier, 1, 4096, 4096),
    ];
    discards
        .iter()
        .for_each(|discard| merger.plug(*discard).unwrap());
    let mut out = Vec::new();
    merger.unplug(|merged| out.push((merged.op, merged.offset, merged.len, merged.parts.len())));
    assert_eq!(
        out,
        [(Op::Barrier, 0, 4096, 1), (Op::Barrier, 4096, 4096, 1)]
    );
    assert_eq!(merger.stats().bytes, 0);
}

#[test]
fn the_segment_limit_is_reached_and_not_passed() {
    let run: Vec<_> = (0..5)
        .map(|tag| read(tag, u64::from(tag) * 512, 512))
        .collect();
    let limits = Limits {
        max_segments: 2,
        ..LIMITS
    };
    assert_eq!(tags(&run, limits), [vec![0, 1], vec![2, 3], vec![4]]);
}

#[test]
fn the_byte_limit_is_reached_and_not_passed() {
    let run: Vec<_> = (0..5)
        .map(|tag| read(tag, u64::from(tag) * 512, 512))
        .collect();
    assert_eq!(
        tags(
            &run,
            Limits {
                max_bytes: 1024,
                ..LIMITS
            }
        ),
        [vec![0, 1], vec![2, 3], vec![4]]
    );
    assert_eq!(
        tags(
            &run,
            Limits {
                max_bytes: 1535,
                ..LIMITS
            }
        ),
        [vec![0, 1], vec![2, 3], vec![4]]
    );
}

#[test]
fn a_request_over_the_limits_passes_alone() {
    let limits = Limits {
        max_segments: 1,
        max_bytes: 600,
    };
    let requests = [read(0, 0, 512), read(1, 512, 4096), read(2, 4608, 512)];
    assert_eq!(tags(&requests, limits), [[0], [1], [2]]);
}

#[test]
fn empty_requests_pass_alone() {
    let requests = [read(0, 0, 512), read(1, 512, 0), read(2, 512, 512)];
    assert_eq!(tags(&requests, LIMITS), [vec![0, 2], vec![1]]);
    assert_eq!(tags(&[read(0, 7, 0)], LIMITS), [[0]]);
}

#[test]
fn requests_to_the_end_of_the_address_space_and_beyond_pass_alone() {
    let requests = [
        write(0, u64::MAX - 1023, 512),
        write(1, u64::MAX - 511, 512),
        write(2, u64::MAX - 511, u64::MAX),
        write(3, u64::MAX, 1),
    ];
    assert_eq!(tags(&requests, LIMITS), [[0], [1], [2], [3]]);
}

#[test]
fn a_full_batch_gives_the_request_back_and_stays_as_it_was() {
    let mut merger = Merger::new(1, LIMITS);
    assert_eq!((merger.capacity(), merger.is_empty()), (1, true));
    merger.plug(read(0, 0, 512)).unwrap();
    assert_eq!(merger.plug(read(1, 512, 512)), Err(Full(read(1, 512, 512))));
    assert_eq!(merger.len(), 1);
    merger.unplug(|merged| assert_eq!(merged.len, 512));
    merger.plug(read(1, 512, 512)).unwrap();
}

#[test]
fn capacities_of_zero_and_beyond_the_maximum_are_total() {
    let mut none = Merger::new(0, LIMITS);
    assert_eq!(none.plug(barrier(0)), Err(Full(barrier(0))));
    none.unplug(|_| panic!("nothing went in"));
    assert_eq!(Merger::new(usize::MAX, LIMITS).capacity(), MAX_CAPACITY);
}

#[test]
fn a_panic_in_emit_does_not_bring_a_request_out_twice() {
    let mut merger = Merger::new(4, LIMITS);
    for requests in [
        [read(0, 0, 512), read(1, 9000, 512)],
        [read(0, 512, 512), read(1, 0, 512)],
    ] {
        requests
            .iter()
            .for_each(|request| merger.plug(*request).unwrap());
        let unplug = std::panic::AssertUnwindSafe(|| merger.unplug(|_| panic!("refused")));
        assert!(std::panic::catch_unwind(unplug).is_err());
        assert!(merger.is_empty());
    }
    merger.plug(read(7, 4096, 512)).unwrap();
    let mut out = Vec::new();
    merger.unplug(|merged| out.push(merged.parts[0].tag));
    assert_eq!(out, [7]);
}

#[test]
fn a_full_sized_batch_aimed_at_the_worst_case_is_not_quadratic() {
    // All reads of two neighbouring blocks: every chain looks for its next part in one group. And
    // all writes of the same block: as many layers as requests. Quadratic, either takes 10^9 steps.
    let count = u32::try_from(MAX_CAPACITY).unwrap();
    let neighbours: Vec<_> = (0..count)
        .map(|tag| read(tag, u64::from(tag % 2 == 0) * 512, 512))
        .collect();
    let out = tags(&neighbours, LIMITS);
    assert_eq!(out.len(), MAX_CAPACITY / 2);
    assert!(out.iter().all(|parts| parts.len() == 2));

    let same: Vec<_> = (0..count)
        .map(|tag| write(tag, if tag == 0 { 512 } else { 0 }, 512))
        .collect();
    let out = tags(&same, LIMITS);
    assert_eq!(out.len(), MAX_CAPACITY - 1, "the first two touch");
}
