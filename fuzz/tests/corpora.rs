//! Every committed input still agrees with its oracle: with any compiler, and without the fuzzer.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use arbitrary::{Arbitrary, Unstructured};
use blk_dataplane_fuzz::vring_differential::{self, Difference};

/// What a corpus may have, so that the repository stays small and this test short.
const FILES_MAX: usize = 200;
const BYTES_MAX: u64 = 200 * 1024;

/// One test at a time: some targets count the process's descriptors.
static TURN: Mutex<()> = Mutex::new(());

/// A test for each target, by its name, that all inputs of its corpus run through.
macro_rules! targets {
    ($($target:ident),* $(,)?) => {
        const TARGETS: &[&str] = &[$(stringify!($target)),*];

        mod corpus_agrees_with_its_oracle {
            $(
                #[test]
                fn $target() {
                    use blk_dataplane_fuzz::$target::{Input, run};
                    super::alone(|| {
                        super::replay(stringify!($target), |input: Input| {
                            run(input);
                        });
                    });
                }
            )*
        }
    };
}

targets![
    blk_request,
    inflight,
    iosched,
    mem_table,
    vhost_message,
    vring_differential,
    vring_packed,
    vring_split,
];

fn files(target: &str) -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target);
    let entries = std::fs::read_dir(&directory)
        .unwrap_or_else(|error| panic!("no corpus in {}: {error}", directory.display()));
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// Does `work` while no other test runs, on a thread that has ended when this returns: what a target
/// keeps for its thread is closed only then.
fn alone<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let done = std::thread::spawn(work).join();
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Runs all inputs of a target; each is named before it is run, for the one that fails.
fn replay<I: for<'a> Arbitrary<'a>>(target: &str, mut run: impl FnMut(I)) {
    let files = files(target);
    for path in &files {
        println!("{}", path.display());
        let bytes = std::fs::read(path).unwrap();
        // As the fuzzer does it.
        run(I::arbitrary_take_rest(Unstructured::new(&bytes)).unwrap());
    }
    let count = files.len();
    assert!(count >= 50, "only {count} inputs for {target}");
}

#[test]
fn every_target_has_its_corpus_replayed_here() {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz_targets");
    let name = |path: PathBuf| path.file_stem().unwrap().to_str().unwrap().to_owned();
    let there: BTreeSet<String> = alone(move || {
        let entries = std::fs::read_dir(sources).unwrap();
        entries.map(|entry| name(entry.unwrap().path())).collect()
    });
    let here: BTreeSet<String> = TARGETS.iter().map(ToString::to_string).collect();
    assert_eq!(there, here, "`targets!` has to name every target");
}

#[test]
fn corpora_keep_to_their_limits() {
    alone(keep_to_their_limits);
}

fn keep_to_their_limits() {
    for target in TARGETS {
        let files = files(target);
        let bytes: u64 = files
            .iter()
            .map(|path| std::fs::metadata(path).unwrap().len())
            .sum();
        assert!(
            files.len() <= FILES_MAX && bytes <= BYTES_MAX,
            "{target}: {} files, {bytes} bytes: run ci/fuzz-minimise.sh {target}",
            files.len()
        );
    }
}

#[test]
fn every_explained_difference_is_met_by_the_corpus() {
    let met = alone(|| {
        let mut met = BTreeSet::new();
        replay("vring_differential", |input| {
            met.extend(vring_differential::run(input));
        });
        met
    });
    let missing: Vec<_> = Difference::ALL
        .iter()
        .filter(|difference| !met.contains(difference))
        .collect();
    assert!(missing.is_empty(), "nothing shows {missing:?}");
}

#[test]
fn every_explained_difference_is_in_the_readme() {
    let readme = include_str!("../README.md");
    for difference in Difference::ALL {
        let row = format!("| `{difference:?}` | {} |", difference.reason());
        assert!(readme.contains(&row), "README.md lacks this row:\n{row}");
    }
    let rows = readme.split("## Differences").nth(1).unwrap_or_default();
    let rows = rows.split("\n## ").next().unwrap_or_default();
    let rows = rows.lines().filter(|line| line.starts_with("| `")).count();
    assert_eq!(rows, Difference::ALL.len(), "README.md has a row too many");
}
