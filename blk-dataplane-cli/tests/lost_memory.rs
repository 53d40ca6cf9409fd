//! M10: a front-end that truncates its guest's memory does not end the program. The messages are written
//! out here: the least that starts a ring.

use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::Pid;

/// vhost-user request numbers.
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_ERR: u32 = 14;

const VERSION_1: u64 = 1 << 32;

const MEMORY: u64 = 0x10_0000;
const FRONTEND: u64 = 0x7f00_0000_0000;

/// How long anything may take before it counts as hung.
const DEADLINE: u16 = 20_000;

/// Ended with the test.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn send(stream: &UnixStream, request: u32, payload: &[u64], fd: Option<&dyn AsRawFd>) {
    let body: Vec<u8> = payload.iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut message = Vec::new();
    let size = u32::try_from(body.len()).unwrap();
    // Flags: version 1.
    for word in [request, 1, size] {
        message.extend_from_slice(&word.to_le_bytes());
    }
    message.extend_from_slice(&body);
    let fds = fd.map(|fd| [fd.as_raw_fd()]);
    let control: Vec<_> = fds
        .iter()
        .map(|fds| ControlMessage::ScmRights(fds))
        .collect();
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&message)],
        &control,
        MsgFlags::empty(),
        None,
    );
    assert_eq!(sent.unwrap(), message.len());
}

/// Two 32-bit words in one.
fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// Waits for something to read.
fn wait_for(fd: impl AsFd, what: &str) {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::from(DEADLINE);
    assert_eq!(poll(&mut fds, timeout).unwrap(), 1, "deadline: {what}");
}

/// Starts a ring in memory of its own, takes the memory away, and waits to be told that the ring broke.
fn lose_a_ring(socket: &Path) {
    let stream = UnixStream::connect(socket).unwrap();
    let memory = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap());
    memory.set_len(MEMORY).unwrap();
    let notifier = || -> OwnedFd { EventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap().into() };
    let (kick, err) = (notifier(), notifier());

    send(&stream, SET_OWNER, &[], None);
    send(&stream, SET_FEATURES, &[VERSION_1], None);
    // One region: guest address, size, the front-end's address, offset.
    let table = [pair(1, 0), 0, MEMORY, FRONTEND, 0];
    send(&stream, SET_MEM_TABLE, &table, Some(&memory));
    send(&stream, SET_VRING_NUM, &[pair(0, 16)], None);
    // Index and flags; descriptors, used, available, log.
    let addresses = [0, FRONTEND, FRONTEND + 0x2000, FRONTEND + 0x1000, 0];
    send(&stream, SET_VRING_ADDR, &addresses, None);
    send(&stream, SET_VRING_BASE, &[pair(0, 0)], None);
    send(&stream, SET_VRING_ERR, &[0], Some(&err));
    send(&stream, SET_VRING_KICK, &[0], Some(&kick));
    // Answered when all of that is done.
    send(&stream, GET_FEATURES, &[], None);
    wait_for(&stream, "the reply");

    memory.set_len(0).unwrap();
    nix::unistd::write(&kick, &1_u64.to_ne_bytes()).unwrap();
    wait_for(&err, "the err descriptor");
}

#[test]
fn m10_truncated_guest_memory_breaks_the_ring_and_not_the_program() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let mut program = Command::new(env!("CARGO_BIN_EXE_blk-dataplane"))
        .args(["--null", "1M", "--socket-path"])
        .arg(&socket)
        .stdout(Stdio::piped())
        .spawn()
        .map(Program)
        .unwrap();
    let mut ready = String::new();
    BufReader::new(program.0.stdout.take().unwrap())
        .read_line(&mut ready)
        .unwrap();
    assert!(ready.starts_with("ready"), "{ready}");
    // One front-end after the other, each as bad as the last.
    for _ in 0..3 {
        lose_a_ring(&socket);
    }
    assert!(program.0.try_wait().unwrap().is_none(), "it has ended");
    let pid = Pid::from_raw(i32::try_from(program.0.id()).unwrap());
    kill(pid, Signal::SIGTERM).unwrap();
    assert!(program.0.wait().unwrap().success());
}
