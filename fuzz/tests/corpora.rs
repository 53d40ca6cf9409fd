//! Every committed input still agrees with its oracle: with any compiler, and without the fuzzer.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use arbitrary::{Arbitrary, Unstructured};
use blk_dataplane_fuzz::{blk_request, iosched, mem_table, vring_split};

/// One target at a time: `mem_table` counts the process's descriptors.
static TURN: Mutex<()> = Mutex::new(());

/// Runs all inputs of a target; each is named before it is run, for the one that fails.
fn replay<I: for<'a> Arbitrary<'a>>(target: &str, run: fn(I)) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target);
    let mut count = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        let bytes = std::fs::read(&path).unwrap();
        // As the fuzzer does it.
        run(I::arbitrary_take_rest(Unstructured::new(&bytes)).unwrap());
        count += 1;
    }
    assert!(count >= 50, "only {count} inputs for {target}");
}

#[test]
fn blk_request_corpus_agrees_with_its_oracle() {
    replay("blk_request", blk_request::run);
}

#[test]
fn iosched_corpus_agrees_with_its_oracle() {
    replay("iosched", iosched::run);
}

#[test]
fn mem_table_corpus_agrees_with_its_oracle() {
    replay("mem_table", mem_table::run);
}

#[test]
fn vring_split_corpus_agrees_with_its_oracle() {
    replay("vring_split", vring_split::run);
}
