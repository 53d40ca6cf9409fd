//! `HOSTILE-INPUTS.md` names the tests there are: each row has one, each name is that of a test, and no
//! test of a row is left out.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

const TABLES: &str = include_str!("../HOSTILE-INPUTS.md");

/// Names of the tests in a folder of this crate, with those of its folders.
fn tests_in(folder: &Path, names: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            tests_in(&path, names);
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            // What follows `#[test]` up to the parameters, with other attributes in between.
            for after in text.split("#[test]").skip(1) {
                let name = after
                    .split_once("fn ")
                    .and_then(|(_, rest)| rest.split_once('('));
                if let Some((name, _)) = name {
                    names.insert(name.to_owned());
                }
            }
        }
    }
}

/// The row that a test is of: the letter and number its name starts with.
fn row_of(name: &str) -> Option<&str> {
    let (row, _) = name.split_once('_')?;
    let number = row.strip_prefix(['a', 'd', 'm', 'n', 'p', 'r', 't'])?;
    (!number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())).then_some(row)
}

/// Every row of the tables: its id, and the tests it names with the word before each.
fn rows() -> Vec<(&'static str, Vec<(&'static str, &'static str)>)> {
    let rows = TABLES.lines().filter_map(|line| {
        let cells: Vec<_> = line.strip_prefix("| ")?.split(" | ").collect();
        let (id, tests) = (*cells.first()?, *cells.last()?);
        row_of(&format!("{}_", id.to_lowercase()))?;
        let pieces: Vec<_> = tests.split('`').collect();
        let named = pieces
            .chunks_exact(2)
            .map(|piece| (piece[0].trim(), piece[1]));
        Some((id, named.collect()))
    });
    rows.collect()
}

#[test]
fn every_row_names_tests_that_exist_and_every_test_of_a_row_is_named() {
    let mut there = BTreeSet::new();
    for folder in ["src", "tests"] {
        tests_in(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join(folder),
            &mut there,
        );
    }
    let mut named = BTreeSet::new();
    let rows = rows();
    for (id, tests) in &rows {
        assert!(!tests.is_empty(), "row {id} has no test");
        for (before, test) in tests {
            // Another crate's is named with the crate.
            if !before.ends_with(|last: char| last.is_ascii_lowercase()) {
                assert!(there.contains(*test), "row {id}: no test {test}");
                assert_eq!(row_of(test), Some(&*id.to_lowercase()), "{test}");
                named.insert((*test).to_owned());
            }
        }
    }
    // 15 R, 12 A, 24 D, 3 T, 9 N and 2 M of the list, and 25 beyond it.
    assert_eq!(rows.len(), 90);
    let left_out: Vec<_> = there
        .iter()
        .filter(|test| row_of(test).is_some() && !named.contains(*test))
        .collect();
    assert!(left_out.is_empty(), "not in the tables: {left_out:?}");
}
