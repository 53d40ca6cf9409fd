//! `HOSTILE-INPUTS.md` names the tests there are: each row has one, and each name is that of a test of its row.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const TABLE: &str = include_str!("../HOSTILE-INPUTS.md");

/// A crate of this workspace.
fn folder_of(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)
}

/// Names of the tests in a folder, with those of its folders.
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

/// The rows that a test is of: the ids its name starts with.
fn rows_of(test: &str) -> impl Iterator<Item = &str> {
    test.split('_').take_while(|part| {
        let number = part.strip_prefix(|first: char| first.is_ascii_lowercase());
        number.is_some_and(|digits| {
            !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
        })
    })
}

#[test]
fn every_row_names_tests_that_exist_and_are_of_that_row() {
    let mut found: Vec<(&str, BTreeSet<String>)> = Vec::new();
    for name in [
        "blk-dataplane",
        "event-poll",
        "hostmem",
        "ioq",
        "iosched",
        "vring",
    ] {
        let mut tests = BTreeSet::new();
        for part in ["src", "tests"] {
            tests_in(&folder_of(name).join(part), &mut tests);
        }
        found.push((name, tests));
    }
    let mut rows = Vec::new();
    for line in TABLE.lines() {
        let Some(cells) = line.strip_prefix("| ") else {
            continue;
        };
        let cells: Vec<&str> = cells.trim_end_matches(" |").split(" | ").collect();
        let &[id, _, tests] = &cells[..] else {
            panic!("not three cells: {line}");
        };
        if rows_of(&id.to_lowercase()).next().is_none() {
            continue;
        }
        rows.push(id);
        let pieces: Vec<&str> = tests.split('`').collect();
        assert!(pieces.len() > 1, "row {id} has no test");
        for piece in pieces.chunks_exact(2) {
            let before = piece[0].trim_matches([' ', ',', ';']);
            let name = if before.is_empty() {
                "blk-dataplane"
            } else {
                before
            };
            let (_, there) = found.iter().find(|(known, _)| *known == name).unwrap();
            assert!(
                there.contains(piece[1]),
                "row {id}: no test {} in {name}",
                piece[1]
            );
            let own = rows_of(piece[1]).any(|row| row == id.to_lowercase());
            assert!(own, "{} is not of row {id}", piece[1]);
        }
    }
    // 30 B, 3 T, 11 I, 6 X, 5 Z, 13 S, 9 F, 18 C, 18 M and 3 K, each once.
    assert_eq!(rows.len(), 116);
    assert_eq!(rows.iter().collect::<BTreeSet<_>>().len(), 116);
}
