//! What 64 devices cost while nothing is asked of them.

use std::fs;
use std::io::BufRead;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::libblkio::Client;
use crate::running::{Running, program};

const DEVICES: usize = 64;

/// A number in `/proc/PID/status`, in whatever unit it has there.
fn status(running: &Running, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", running.child.id())).unwrap();
    number(&status, field)
}

fn number(status: &str, field: &str) -> u64 {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let words = line.unwrap().split_whitespace();
    words.take(1).next().unwrap().parse().unwrap()
}

/// How often any thread of it has been given a processor and has let go of it again.
fn switches(running: &Running) -> u64 {
    let threads = fs::read_dir(format!("/proc/{}/task", running.child.id())).unwrap();
    threads
        // One that has ended since it was listed has nothing to say.
        .filter_map(|thread| fs::read_to_string(thread.unwrap().path().join("status")).ok())
        .map(|status| {
            number(&status, "voluntary_ctxt_switches")
                + number(&status, "nonvoluntary_ctxt_switches")
        })
        .sum()
}

/// A thread that runs has been switched to: where there was no switch, no processor time was used. Begun anew until
/// there is a quiet span, since what went on before takes a while to settle on a loaded machine.
#[track_caller]
fn assert_idle(running: &Running) {
    const TRIES: usize = 30;
    let mut seen = Vec::new();
    for _ in 0..TRIES {
        let before = switches(running);
        std::thread::sleep(Duration::from_secs(1));
        let after = switches(running);
        if after == before {
            return;
        }
        seen.push(after.abs_diff(before));
    }
    panic!("never quiet: {seen:?} switches a second");
}

/// Of physical memory, in KiB, shared pages and the program itself included.
const MEMORY_MAX: u64 = 64 << 10;

#[test]
fn idle_64_devices_use_no_processor_time_and_less_than_64_mib() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = program(&directory);
    for index in 0..DEVICES {
        let device = format!("blk-file={index}.img,create=1M,socket-path={index}");
        command.args(["--device", &device]);
    }
    // Read by nobody here, and more than fits into a pipe.
    command.stderr(std::process::Stdio::null());
    let (mut running, mut line) = Running::start(command);
    for _ in 1..DEVICES {
        assert!(line.starts_with("ready "), "{line}");
        line.clear();
        running.stdout.read_line(&mut line).unwrap();
    }
    assert_idle(&running);
    let (threads, memory) = (status(&running, "Threads"), status(&running, "VmRSS"));
    println!("nobody connected: {threads} threads, {memory} KiB");
    assert_eq!(threads, 2, "main and signals");
    assert!(memory < MEMORY_MAX, "{memory} KiB");

    // The same with a front-end on each, whose rings run and which has done something.
    let mut clients: Vec<_> = (0..DEVICES)
        .map(|index| Client::connect(&directory.path().join(index.to_string()), 1))
        .collect();
    for client in &mut clients {
        client.write(0, 0, &[7; 4096]);
        assert_eq!(client.read(0, 0, 4096), [7; 4096]);
    }
    assert_idle(&running);
    let (threads, memory) = (status(&running, "Threads"), status(&running, "VmRSS"));
    println!("everybody connected: {threads} threads, {memory} KiB");
    assert!(memory < MEMORY_MAX, "{memory} KiB");

    drop(clients);
    running.signal(Signal::SIGTERM);
    assert_eq!(running.wait().code(), Some(0));
}
