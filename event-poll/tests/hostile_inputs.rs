//! `README.md` names the tests that answer the hostile inputs about notifications and host I/O: every row has one,
//! each is there, and each begins with its row.

use std::fs;
use std::path::{Path, PathBuf};

const README: &str = include_str!("../README.md");

/// The text of every source file below `folder`.
fn sources(folder: &Path, text: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            *text += &fs::read_to_string(&path).unwrap();
        }
    }
}

/// This crate's folder, or that of the crate of the same workspace that the word before a test names.
fn folder_of(before: &str) -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut words = before.split([' ', ';']).filter(|word| !word.is_empty());
    let other = words.next_back().map(|word| own.with_file_name(word));
    other
        .filter(|folder| folder.join("Cargo.toml").exists())
        .unwrap_or_else(|| own.to_owned())
}

#[test]
fn every_row_has_a_test_that_begins_with_it() {
    let rows = (1..=9).map(|row| format!("N{row}"));
    let rows = rows.chain((1..=11).map(|row| format!("I{row}")));
    for row in rows.chain(["M10".to_owned()]) {
        let line = README
            .lines()
            .find(|line| line.starts_with(&format!("| {row} | ")))
            .unwrap_or_else(|| panic!("README.md has no row {row}"));
        // The input may have code in it too, but no test.
        let tests = line.splitn(4, " | ").last().unwrap();
        let pieces: Vec<_> = tests.split('`').collect();
        let mut named = 0;
        let mut folder = folder_of("");
        for piece in pieces.chunks_exact(2) {
            let (before, test) = (piece[0], piece[1]);
            // One that follows another after a comma is of the same crate.
            if before.trim() != "," {
                folder = folder_of(before);
            }
            if !test.starts_with(&format!("{}_", row.to_lowercase())) {
                continue;
            }
            named += 1;
            let mut text = String::new();
            for part in ["src", "tests"].map(|part| folder.join(part)) {
                if part.exists() {
                    sources(&part, &mut text);
                }
            }
            let there = match test.strip_suffix('*') {
                Some(beginning) => text.contains(&format!("fn {beginning}")),
                None => text.contains(&format!("fn {test}(")),
            };
            assert!(there, "{row}: no test {test} in {}", folder.display());
        }
        assert!(named > 0, "row {row} names no test of its own");
    }
}
