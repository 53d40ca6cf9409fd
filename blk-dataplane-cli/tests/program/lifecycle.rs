//! Ends under load, of the program and of its front-end, and what comes after.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::Ordering;

use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::libblkio::Client;
use crate::load::{BLOCK, BLOCKS, Control, Written, check, number_of, write_until_over};
use crate::running::{Running, program};

fn start(directory: &TempDir) -> Running {
    let mut command = program(directory);
    command.args([
        "--blk-file=disk.img",
        "--create=2M",
        "--socket-path=s",
        "--num-threads=2",
    ]);
    let (running, ready) = Running::start(command);
    assert!(ready.starts_with("ready "), "{ready}");
    running
}

fn image(directory: &TempDir) -> Vec<u8> {
    std::fs::read(directory.path().join("disk.img")).unwrap()
}

/// Ends the program with `signal` while its front-end writes; what the front-end knows then.
fn end_under_load(
    directory: &TempDir,
    signal: Signal,
    written: Vec<Written>,
) -> (Vec<Written>, ExitStatus) {
    let mut running = start(directory);
    let control = Control::default();
    let path = directory.path().join("s");
    std::thread::scope(|scope| {
        let front_end = scope.spawn(|| write_until_over(&path, &control, written));
        control.wait_for(500);
        running.signal(signal);
        let status = running.wait();
        control.over.store(true, Ordering::Relaxed);
        (front_end.join().unwrap(), status)
    })
}

#[test]
fn x3_sigterm_under_load_keeps_what_was_acknowledged_and_serves_again() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut written = Vec::new();
    for _ in 0..3 {
        let (after, status) = end_under_load(&directory, Signal::SIGTERM, written);
        assert_eq!(status.code(), Some(0));
        assert!(!directory.path().join("s").exists());
        written = check(&image(&directory), &after);
    }
}

#[test]
fn sigkill_under_load_keeps_what_was_acknowledged_and_the_next_program_serves() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut written = Vec::new();
    for _ in 0..3 {
        let (after, status) = end_under_load(&directory, Signal::SIGKILL, written);
        assert_eq!(status.code(), None, "killed");
        // Its socket is there, and nobody behind it: the next one takes its place.
        assert!(directory.path().join("s").exists());
        written = check(&image(&directory), &after);
    }
    // Read back through the next program, by a front-end that knows nothing of the earlier ones.
    let mut running = start(&directory);
    let mut client = Client::connect(&directory.path().join("s"), 1);
    let len = usize::try_from(BLOCKS).unwrap() * BLOCK;
    let read: Vec<u8> = (0..len / (1 << 20))
        .flat_map(|n| client.read(0, u64::try_from(n).unwrap() << 20, 1 << 20))
        .collect();
    assert_eq!(check(&read, &written), written);
    running.signal(Signal::SIGTERM);
    assert_eq!(running.wait().code(), Some(0));
}

/// The socket that [`front_end_to_be_killed`] is to write through.
const SOCKET: &str = "BLK_DATAPLANE_TEST_SOCKET";

/// A front-end in a process of its own, that says a line when it is at work.
#[test]
#[ignore = "the process that x2_sigkill_of_the_front_end... starts and kills; it needs the socket of that one"]
fn front_end_to_be_killed() {
    let Some(path) = std::env::var_os(SOCKET).map(PathBuf::from) else {
        panic!(
            "is started by x2_sigkill_of_the_front_end_under_load_drains_and_the_next_is_served"
        );
    };
    let control = Control::default();
    std::thread::scope(|scope| {
        scope.spawn(|| write_until_over(&path, &control, Vec::new()));
        control.wait_for(300);
        // Past the name of the test, which libtest has not ended the line of.
        println!("\nat work");
        control.wait_for(u64::MAX);
    });
}

fn front_end(path: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "lifecycle::front_end_to_be_killed"])
        .args(["--ignored", "--nocapture"])
        .env(SOCKET, path)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    command
}

#[test]
fn x2_sigkill_of_the_front_end_under_load_drains_and_the_next_is_served() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut running = start(&directory);
    let path = directory.path().join("s");
    for _ in 0..5 {
        let mut child = front_end(&path).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let at_work = lines.any(|line| line.unwrap() == "at work");
        assert!(at_work, "{:?}", child.wait());
        child.kill().unwrap();
        child.wait().unwrap();
        // In flight when it died, and drained before the next one is served: nothing is written any more, so that
        // what one read gives every later one gives too.
        let mut client = Client::connect(&path, 1);
        let mut read = || -> Vec<u64> {
            (0..BLOCKS)
                .map(|block| number_of(block, &client.read(0, block * BLOCK as u64, BLOCK)))
                .collect()
        };
        let numbers = read();
        assert!(numbers.iter().sum::<u64>() > 0);
        assert_eq!(read(), numbers);
        drop(client);
        // What the next round writes begins with number 1 again.
        let mut client = Client::connect(&path, 1);
        for at in 0..2 {
            client.write(0, at << 20, &[0; 1 << 20]);
        }
    }
    running.signal(Signal::SIGTERM);
    assert_eq!(running.wait().code(), Some(0));
}
