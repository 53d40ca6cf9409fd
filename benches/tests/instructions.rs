//! Instructions per chain and per lookup against their bars. Of an optimised build, and under valgrind, so
//! not among the tests that `cargo test` runs by itself: `cargo test --release -p benches --test instructions`.

use std::path::Path;

use benches::{instructions, workload};

/// Instructions of virtio-queue for each one of vring, at least. The figures are exact and the same
/// everywhere for one compiler; they were 3.9 to 4.7 when this was written.
const BAR: f64 = 2.0;

/// Instructions of a lookup in [`hostmem::MAX_REGIONS`] regions for each one of a lookup in a single region,
/// at most. They were 1.5 when this was written.
const LOOKUP_BAR: f64 = 2.0;

fn per_unit(workload: &str) -> f64 {
    assert!(
        !cfg!(debug_assertions),
        "only an optimised build has figures that mean anything: run with --release"
    );
    let load = Path::new(env!("CARGO_BIN_EXE_load"));
    instructions::per_unit(load, workload, workload::counted_within(workload))
        .expect("valgrind is installed (ci/install-test-deps.sh) and counts")
}

fn per_chain(workload: &str) -> f64 {
    let within = workload::counted_within(workload);
    assert!(within.is_some(), "the guest's side is not to count");
    per_unit(workload)
}

#[test]
fn vring_takes_at_most_half_the_instructions_of_virtio_queue() {
    for layout in ["direct", "indirect"] {
        // The peer as its users have it, and as it is fastest.
        let peers = ["virtio-queue", "virtio-queue-iter"];
        let peer = peers
            .map(|peer| per_chain(&format!("{peer}-{layout}")))
            .into_iter()
            .fold(f64::INFINITY, f64::min);
        for format in ["vring-split", "vring-packed"] {
            let ours = per_chain(&format!("{format}-{layout}"));
            println!("{format}, {layout}: {ours:.1} instructions, virtio-queue {peer:.1}");
            assert!(
                BAR * ours <= peer,
                "{format}, {layout}: {ours:.1} instructions, virtio-queue {peer:.1}"
            );
        }
    }
}

#[test]
fn lookup_in_509_regions_takes_at_most_twice_the_instructions_of_one_in_one() {
    // Without the loop that measures, which would make the difference look smaller.
    let around = per_unit("lookup-none");
    let of_lookup = |workload| per_unit(workload) - around;
    let one = of_lookup("lookup-1");
    assert!(one > 0.0, "nothing is left of {one:.1} without {around:.1}");
    for workload in ["lookup-509", "lookup-pc-509"] {
        let all = of_lookup(workload);
        println!("{workload}: {all:.1} instructions, in one region {one:.1}");
        assert!(
            all <= LOOKUP_BAR * one,
            "{workload}: {all:.1} instructions, in one region {one:.1}"
        );
    }
}
