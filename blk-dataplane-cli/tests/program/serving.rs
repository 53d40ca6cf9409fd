//! What the program prints, leaves behind and survives.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::signal::Signal;

use crate::running::{Running, output, program};

#[test]
fn main_job_creates_serves_and_leaves_nothing_but_the_image() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let directory = tempfile::tempdir().unwrap();
        let mut command = program(&directory);
        command.args(["--blk-file", "disk.img", "--create", "64M"]);
        let (mut running, ready) = Running::start(command);
        let socket = directory.path().join("disk.img.sock");
        assert_eq!(ready, format!("ready {}\n", socket.display()));
        UnixStream::connect(&socket).unwrap();
        let image = directory.path().join("disk.img").metadata().unwrap();
        assert_eq!((image.len(), image.blocks()), (64 << 20, 0), "sparse");

        running.signal(signal);
        assert_eq!(running.wait().code(), Some(0));
        assert_eq!(running.rest_of_stdout(), "", "one line and no more");
        let stderr = running.stderr();
        for part in ["share=on", "memory-backend-memfd", "vhost-user-blk-pci"] {
            assert!(stderr.contains(part), "{part} is missing in:\n{stderr}");
        }
        assert!(stderr.contains(&format!("path={}", socket.display())));
        let left: Vec<_> = directory
            .path()
            .read_dir()
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left, ["disk.img"]);
    }
}

#[test]
fn capabilities_are_json_whatever_else_is_asked() {
    let directory = tempfile::tempdir().unwrap();
    let output = output(
        &directory,
        &[
            "--blk-file",
            "/nonexistent",
            "--fd",
            "99",
            "--num-queues",
            "many",
            "--no-such-option",
            "--print-capabilities",
        ],
    );
    assert!(output.status.success());
    assert!(output.stderr.is_empty());
    let text = String::from_utf8(output.stdout).unwrap();
    let dense: String = text.split_whitespace().collect();
    assert_eq!(
        dense,
        r#"{"type":"block","features":["read-only","blk-file"]}"#
    );
}

#[test]
fn a_killed_program_can_be_started_again_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let command = || {
        let mut command = program(&directory);
        command.args(["--blk-file", "disk.img", "--create", "1M"]);
        command
    };
    let (mut first, _) = Running::start(command());
    first.signal(Signal::SIGKILL);
    first.wait();
    let (mut second, ready) = Running::start(command());
    assert!(
        ready.starts_with("ready "),
        "the dead one's socket is in the way"
    );
    second.signal(Signal::SIGTERM);
    assert!(second.wait().success());
}

#[test]
fn s1_a_front_end_that_stalls_mid_message_does_not_keep_it_from_stopping() {
    use std::io::Write;
    let directory = tempfile::tempdir().unwrap();
    let mut command = program(&directory);
    command.args(["--null", "1M", "--socket-path", "s"]);
    let (mut running, _) = Running::start(command);
    let mut stalled = UnixStream::connect(directory.path().join("s")).unwrap();
    stalled.write_all(&[1, 0, 0]).unwrap();
    let _waiting = UnixStream::connect(directory.path().join("s")).unwrap();
    running.signal(Signal::SIGTERM);
    assert!(running.wait().success());
    assert!(!Path::new(&directory.path().join("s")).exists());
}

/// A message of code 99, which no front-end sends, and one that asks for the features.
const UNKNOWN: [u8; 12] = [99, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
const GET_FEATURES: [u8; 12] = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn standard_error_that_nobody_reads_any_more_is_no_reason_to_fail() {
    use std::io::Write;
    let directory = tempfile::tempdir().unwrap();
    let mut command = program(&directory);
    command.args(["--null", "1M", "--socket-path", "s"]);
    let (mut running, _) = Running::start(command);
    drop(running.child.stderr.take());
    let connect = || UnixStream::connect(directory.path().join("s")).unwrap();
    let mut bad = connect();
    bad.write_all(&UNKNOWN).unwrap();
    assert_eq!(
        bad.read(&mut [0; 16]).unwrap(),
        0,
        "closed, with a warning to nobody"
    );
    let mut good = connect();
    good.write_all(&GET_FEATURES).unwrap();
    good.read_exact(&mut [0; 20]).unwrap();
    running.signal(Signal::SIGTERM);
    assert_eq!(running.wait().code(), Some(0));
}

#[test]
fn sighup_reads_the_size_anew() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = program(&directory);
    command.args([
        "--blk-file",
        "disk.img",
        "--create",
        "1M",
        "--block-size",
        "4096",
    ]);
    let (mut running, _) = Running::start(command);
    let image = std::fs::File::options()
        .write(true)
        .open(directory.path().join("disk.img"))
        .unwrap();
    let mut stderr = BufReader::new(running.child.stderr.take().unwrap()).lines();
    let mut old = 1 << 20;
    // Grown, shrunk, and with a tail that is no whole block.
    for size in [4 << 20, 2 << 20, (3 << 20) + 512] {
        image.set_len(size).unwrap();
        running.signal(Signal::SIGHUP);
        let new = size / 4096 * 4096;
        let expected = format!("blk-dataplane: {new} bytes; it was {old}");
        assert!(stderr.any(|line| line.unwrap() == expected), "{expected}");
        old = new;
    }
    running.signal(Signal::SIGTERM);
    assert_eq!(running.wait().code(), Some(0));
}

#[test]
fn sigusr1_prints_the_counters() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = program(&directory);
    command.args(["--null", "1M", "--socket-path", "s"]);
    let (mut running, _) = Running::start(command);
    let mut stderr = BufReader::new(running.child.stderr.take().unwrap()).lines();
    for _ in 0..2 {
        running.signal(Signal::SIGUSR1);
        let counters = stderr
            .find_map(|line| {
                Some(
                    line.unwrap()
                        .strip_prefix("blk-dataplane: device: ")?
                        .to_owned(),
                )
            })
            .unwrap();
        for counter in [
            "requests=0",
            "io_errors=0",
            "bounced=0",
            "merged=0",
            "polls_paid=0",
        ] {
            assert!(
                counters.split(' ').any(|each| each == counter),
                "{counter}: {counters}"
            );
        }
    }
    running.signal(Signal::SIGTERM);
    assert_eq!(running.wait().code(), Some(0));
}
