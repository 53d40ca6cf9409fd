//! However a guest orders a batch, the merger takes O(n log n) steps.

use crate::steps::steps_of;
use crate::{Limits, Merger, Op, Request};

/// Steps per request and per level of a binary tree over the batch. The general way sorts twice
/// (some 1.5 comparisons each), and looks up two positions and four paths through two trees.
const STEPS_PER_LEVEL: u64 = 20;

/// What the adversary may choose: an order for `n` requests.
type Order = fn(u32, u32) -> (Op, u64, u64);

const ORDERS: [(&str, Order); 14] = [
    ("ascending", |_, i| (Op::Write, u64::from(i) * 512, 512)),
    ("descending", |n, i| {
        (Op::Write, u64::from(n - i) * 512, 512)
    }),
    ("evens, then odds descending", |n, i| {
        let i = if i < n / 2 { i * 2 } else { 2 * (n - i) - 1 };
        (Op::Write, u64::from(i) * 512, 512)
    }),
    ("all the same sector", |_, _| (Op::Write, 4096, 512)),
    ("the same sector and one neighbour", |_, i| {
        (Op::Write, if i == 0 { 512 } else { 0 }, 512)
    }),
    ("the same two sectors read", |_, i| {
        (Op::Read, u64::from(i % 2) * 512, 512)
    }),
    (
        "the same two sectors read, the second ones first",
        |n, i| (Op::Read, u64::from(i < n / 2) * 512, 512),
    ),
    ("everything overlaps everything, growing", |_, i| {
        (Op::Write, 0, u64::from(i + 1) * 512)
    }),
    ("everything overlaps everything, nested", |n, i| {
        (Op::Write, u64::from(i) * 512, u64::from(2 * (n - i)) * 512)
    }),
    ("each overlaps the next, backwards", |n, i| {
        (Op::Write, u64::from(n - i) * 512, 1024)
    }),
    ("reads and writes of one sector by turns", |_, i| {
        let op = if i % 2 == 0 { Op::Read } else { Op::Write };
        (op, u64::from(i % 3) * 512, 512)
    }),
    ("reads in staircases that all end in one", |n, i| {
        let end = u64::from(n) * 512;
        let begin = u64::from(i % 32) * 512;
        (Op::Read, begin, if i % 2 == 0 { 512 } else { end - begin })
    }),
    (
        "a barrier after every two, which touch backwards",
        |_, i| match i % 3 {
            2 => (Op::Flush, 0, 0),
            odd => (Op::Write, u64::from(1 - odd) * 512, 512),
        },
    ),
    ("empty, endless and ordinary ones by turns", |n, i| {
        match i % 3 {
            0 => (Op::Write, u64::from(n - i) * 512, 0),
            1 => (Op::Write, u64::from(n - i) * 512, u64::MAX),
            _ => (Op::Write, u64::from(n - i) * 512, 1024),
        }
    }),
];

/// The last two touch, backwards and far from the others: without such a pair many an order is let
/// through unsorted, and shows nothing of the general way.
fn batch(n: u32, order: Order, with_pair: bool) -> Vec<Request> {
    const FAR: u64 = 1 << 40;
    (0..n)
        .map(|tag| {
            let (op, offset, len) = match n - tag {
                last @ 1..=2 if with_pair => (Op::Read, FAR + u64::from(last) * 512, 512),
                _ => order(n, tag),
            };
            Request {
                op,
                offset,
                len,
                segments: 1,
                tag,
            }
        })
        .collect()
}

fn cases() -> impl Iterator<Item = (&'static str, Order, bool, Limits)> {
    ORDERS.into_iter().flat_map(|(name, order)| {
        [false, true]
            .into_iter()
            .flat_map(move |with_pair| LIMITS.map(|limits| (name, order, with_pair, limits)))
    })
}

fn steps(requests: &[Request], limits: Limits) -> u64 {
    let mut merger = Merger::new(requests.len(), limits);
    for request in requests {
        merger.plug(*request).unwrap();
    }
    let mut parts = 0;
    let steps = steps_of(|| merger.unplug(|merged| parts += merged.parts.len()));
    assert_eq!(parts, requests.len());
    steps
}

const LIMITS: [Limits; 3] = [
    Limits {
        max_segments: u32::MAX,
        max_bytes: u64::MAX,
    },
    // Every run ends early, and its rest begins again.
    Limits {
        max_segments: 2,
        max_bytes: u64::MAX,
    },
    Limits {
        max_segments: 0,
        max_bytes: 0,
    },
];

#[test]
fn no_order_of_a_full_batch_takes_more_than_n_log_n_steps() {
    for n in [64u32, 1024, 4096] {
        for (name, order, with_pair, limits) in cases() {
            let steps = steps(&batch(n, order, with_pair), limits);
            let most = STEPS_PER_LEVEL * u64::from(n) * u64::from(n.ilog2() + 1);
            println!(
                "{n} {name} {with_pair}: {} steps each",
                steps / u64::from(n)
            );
            assert!(steps <= most, "{name}: {steps} steps for {n} requests");
        }
    }
}

#[test]
fn eight_times_the_batch_takes_at_most_sixteen_times_the_steps() {
    // A quadratic way takes 64 times as many; n log n, between 1024 and 8192, 10.4.
    for (name, order, with_pair, limits) in cases() {
        let small = steps(&batch(1024, order, with_pair), limits);
        let large = steps(&batch(8192, order, with_pair), limits);
        assert!(large <= 16 * small, "{name}: {small} grew to {large}");
    }
}

#[test]
fn offsets_aimed_at_the_filter_and_the_hash_table_cost_the_sort_and_no_more() {
    // All in one slot of the table and one word of the filter, and every second touches another.
    let mut aimed = Vec::new();
    let mut sector = 0;
    while aimed.len() < 1024 {
        if crate::touch::aims_at_the_first_slot(1024, sector * 1024) {
            aimed.push(sector * 1024);
        }
        sector += 1;
    }
    let requests: Vec<_> = (0u32..)
        .zip(aimed.iter().rev())
        .map(|(tag, &offset)| Request {
            op: Op::Read,
            offset,
            len: 1024,
            segments: 1,
            tag,
        })
        .collect();
    let most = STEPS_PER_LEVEL * 1024 * 11;
    let steps = steps(&requests, LIMITS[0]);
    assert!(steps <= most, "{steps} steps");
}
