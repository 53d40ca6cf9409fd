//! Instructions per unit against the committed figures, and of some against bars. Of an optimised build, and under valgrind, so
//! not among the tests that `cargo test` runs by itself: `cargo test --release -p benches --test instructions`.

use std::io::Write;
use std::path::Path;

use benches::figures::{Figures, WRITE};
use benches::{instructions, workload};

/// Instructions of virtio-queue for each one of vring, at least. The figures are exact and the same
/// everywhere for one compiler; they were 3.9 to 4.7 when this was written.
const BAR: f64 = 2.0;

/// Instructions of a lookup in [`hostmem::MAX_REGIONS`] regions for each one of a lookup in a single region,
/// at most. They were 1.5 when this was written.
const LOOKUP_BAR: f64 = 2.0;

/// Set: the figures that are counted are written to the file, and compared with nothing.
const WRITES: &str = "BENCH_WRITE_FIGURES";

fn load() -> &'static Path {
    assert!(
        !cfg!(debug_assertions),
        "only an optimised build has figures that mean anything: run with --release"
    );
    Path::new(env!("CARGO_BIN_EXE_load"))
}

fn per_unit(workload: &str) -> f64 {
    instructions::per_unit(load(), workload)
        .expect("valgrind is installed (ci/install-test-deps.sh) and counts")
}

/// Says it also when the test passes.
fn say(what: &str) {
    let _ = writeln!(std::io::stderr(), "{what}");
}

#[test]
fn no_workload_takes_more_than_five_per_cent_above_its_committed_figures() {
    let counted = instructions::count_all(load())
        .expect("valgrind is installed (ci/install-test-deps.sh) and counts");
    println!("{counted}");
    let path = Figures::path();
    if std::env::var_os(WRITES).is_some() {
        std::fs::write(&path, counted.to_string()).expect("the file can be written");
        say(&format!("{} is written; read its diff", path.display()));
        return;
    }
    let committed = std::fs::read_to_string(&path)
        .map_err(Into::into)
        .and_then(|text| Figures::parse(&text))
        .unwrap_or_else(|error| panic!("{}: {error}; to write it: {WRITE}", path.display()));
    let notices = committed
        .compare(&counted)
        .unwrap_or_else(|message| panic!("{message}"));
    for notice in &notices {
        say(notice);
    }
    if !notices.is_empty() {
        say(&format!(
            "fell by more than 5 %: commit the new figures, or a rise up to the old ones goes unnoticed. {WRITE}"
        ));
    }
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
