//! Each row of hostile-inputs.md that a front-end is behind has a test over the socket, whose name starts with its id.
#![cfg(feature = "vhost-user")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Letters of the rows, and how many there are of each.
const ROWS: [(char, u32); 6] = [
    ('s', 13),
    ('f', 9),
    ('c', 18),
    ('m', 18),
    ('x', 6),
    ('k', 3),
];

/// A pool of huge pages that runs dry is hostmem's to test: what over the socket would be another such pool.
const ELSEWHERE: [(&str, &str, &str); 1] = [(
    "m11",
    "../hostmem/tests",
    "m11_pool_of_huge_pages_that_runs_dry_is_an_error_and_not_the_end",
)];

/// Names of the functions that follow a `#[test]`, in a folder and those in it.
fn tests_in(folder: &Path, names: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            tests_in(&path, names);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            for after in text.split("#[test]").skip(1) {
                let name = after
                    .split_once("fn ")
                    .and_then(|(_, rest)| rest.split_once('('));
                names.extend(name.map(|(name, _)| name.to_owned()));
            }
        }
    }
}

/// The ids that a name starts with: several, if it is of several rows.
fn rows_of(name: &str) -> impl Iterator<Item = &str> {
    name.split('_').take_while(|part| {
        let mut rest = part.chars();
        rest.next().is_some_and(|first| first.is_ascii_lowercase())
            && part.len() > 1
            && rest.all(|next| next.is_ascii_digit())
    })
}

fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn every_row_has_a_test_over_the_socket() {
    let mut names = BTreeSet::new();
    tests_in(&here().join("tests/in_process"), &mut names);
    let tested: BTreeSet<&str> = names.iter().flat_map(|name| rows_of(name)).collect();
    for (letter, count) in ROWS {
        for number in 1..=count {
            let id = format!("{letter}{number}");
            let elsewhere = ELSEWHERE.iter().any(|(row, ..)| *row == id);
            assert_ne!(tested.contains(&*id), elsewhere, "row {id}");
        }
    }
}

#[test]
fn tests_said_to_be_elsewhere_are_there() {
    for (row, folder, test) in ELSEWHERE {
        let mut names = BTreeSet::new();
        tests_in(&here().join(folder), &mut names);
        assert!(names.contains(test), "row {row}: no {test} in {folder}");
    }
}
