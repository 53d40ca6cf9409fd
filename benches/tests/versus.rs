//! That the comparison runs: one short round, of this back-end and whatever peers are installed, over null and tmpfs.
//! Nothing is said of the figures, but that they are all there.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Rows of every kind: a load that sleeps, polls, is paced, of several devices and regions; idle; start.
const ROWS: [&str; 11] = [
    "null-d32",
    "null-d64-poll",
    "tmpfs-paced",
    "tmpfs-randwrite-d32",
    "tmpfs-randread-d1-poll",
    "tmpfs-seqread-d32",
    "tmpfs-64k-d16",
    "idle",
    "start",
    "scale-devices-64",
    "scale-regions-509",
];

/// The program, built if it is not: a crate's tests get the programs of that crate alone.
fn program() -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.args(["build", "-q", "-p", "blk-dataplane-cli"]);
    let target = Path::new(env!("CARGO_BIN_EXE_versus")).parent().unwrap();
    if target.ends_with("release") {
        build.arg("--release");
    }
    assert!(build.status().unwrap().success());
    target.join("blk-dataplane")
}

fn versus(directory: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_versus"))
        .args(["--quick", "--runtime=0.1", "--shm-size=16"])
        .arg("--program")
        .arg(program())
        .arg("--results")
        .arg(directory)
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn the_comparison_has_all_its_rows_and_no_errors() {
    let directory = tempfile::tempdir().unwrap();
    let rows = format!("--rows={}", ROWS.join(","));
    let output = versus(directory.path(), &[&rows]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(!said.contains("FAILED"), "{said}");

    let text = fs::read_to_string(directory.path().join("results.json")).unwrap();
    let results: serde_json::Value = serde_json::from_str(&text).unwrap();
    let records = results["records"].as_array().unwrap();
    let measured: HashSet<(&str, &str)> = records
        .iter()
        .map(|record| {
            assert!(record["result"]["Ok"].is_object(), "{record}");
            assert!(!record["commands"].as_array().unwrap().is_empty());
            let name = |field: &str| record[field].as_str().unwrap();
            (name("row"), name("contender"))
        })
        .collect();
    for row in ROWS {
        assert!(measured.contains(&(row, "blk-dataplane")), "{row}: {said}");
    }
    // Who is not measured is named, with the remedy.
    let is_measured = measured.iter().any(|(_, who)| who.starts_with("qemu"));
    let missing = results["missing"].to_string();
    assert!(
        is_measured != missing.contains("qemu-storage-daemon"),
        "{missing}"
    );

    let report = fs::read_to_string(directory.path().join("performance.md")).unwrap();
    for row in ROWS {
        assert!(
            report.contains(&format!("| `{row}` | blk-dataplane |")),
            "{row}"
        );
    }
    assert!(report.contains("rates.svg") == is_measured);
    assert!(!report.contains("What failed"), "{report}");
    // A bar for each of the rows that has one, judged one way or the other.
    let judged = report.matches("met** |").count() + report.matches("| met |").count();
    assert!(judged >= 12, "{report}");
}

#[test]
fn a_peer_that_does_not_run_is_reported_and_the_exit_code_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let output = versus(
        directory.path(),
        &[
            "--rows=null-d64-poll",
            "--contenders=blk-dataplane,broken",
            "--peer=broken=false {socket} {size}",
        ],
    );
    assert_eq!(output.status.code(), Some(1));
    let report = fs::read_to_string(directory.path().join("performance.md")).unwrap();
    assert!(
        report.contains("- `null-d64-poll`, broken, round 1: it has ended (exit status: 1)"),
        "{report}"
    );
    assert!(report.contains("| `null-d64-poll` | blk-dataplane |"));
}

#[test]
fn a_report_can_be_made_of_results_that_were_kept() {
    let directory = tempfile::tempdir().unwrap();
    let output = versus(directory.path(), &["--rows=null-d32", "--contenders=blk"]);
    assert!(output.status.success());
    let written = fs::read_to_string(directory.path().join("performance.md")).unwrap();
    let results = directory.path().join("results.json");
    let again = directory.path().join("again.md");
    let output = versus(
        directory.path(),
        &[
            "--from",
            results.to_str().unwrap(),
            "--output",
            again.to_str().unwrap(),
        ],
    );
    assert!(output.status.success());
    let said = |text: &str| {
        let table = text.find("#### Null device").unwrap();
        text[table..].to_owned()
    };
    assert_eq!(said(&fs::read_to_string(again).unwrap()), said(&written));
}
