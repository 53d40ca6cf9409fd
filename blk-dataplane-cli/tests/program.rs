//! The program as its users start it: what it prints, where, and how it exits.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// Longer than any start or stop takes on a loaded machine; only a hang gets here.
const DEADLINE: Duration = Duration::from_secs(30);

fn program(directory: &TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blk-dataplane"));
    command
        .current_dir(directory.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// A running program, killed with the test.
struct Running {
    child: Child,
    stdout: BufReader<std::process::ChildStdout>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    /// Starts it and returns the first line of its output.
    fn start(mut command: Command) -> (Self, String) {
        let mut child = command.spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut running = Self { child, stdout };
        let mut line = String::new();
        running.stdout.read_line(&mut line).unwrap();
        (running, line)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < DEADLINE, "the program does not exit");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn rest_of_stdout(&mut self) -> String {
        let mut text = String::new();
        self.stdout.read_to_string(&mut text).unwrap();
        text
    }

    fn stderr(&mut self) -> String {
        let mut text = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        text
    }
}

fn output(directory: &TempDir, arguments: &[&str]) -> Output {
    program(directory).args(arguments).output().unwrap()
}

/// Runs it, expects it to fail with `code`, and returns what it said.
fn failure(directory: &TempDir, arguments: &[&str], code: i32) -> String {
    let output = output(directory, arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(output.stdout.is_empty(), "not ready, so nothing on stdout");
    stderr
}

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
fn an_image_in_use_is_refused_by_name_of_its_user_unless_shared_by_force() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = program(&directory);
    command.args(["--blk-file", "disk.img", "--create", "1M"]);
    let (first, _) = Running::start(command);
    let second = ["--blk-file", "disk.img", "--socket-path", "second.sock"];
    for arguments in [&second[..], &[&second[..], &["--read-only"]].concat()] {
        let stderr = failure(&directory, arguments, 2);
        let holder = format!("in use by process {} (blk-dataplane)", first.child.id());
        for part in ["--blk-file", holder.as_str(), "--force-share"] {
            assert!(stderr.contains(part), "{part} is missing in:\n{stderr}");
        }
        assert!(!directory.path().join("second.sock").exists());
    }
    let mut command = program(&directory);
    command.args(second).arg("--force-share");
    let (_second, ready) = Running::start(command);
    assert!(ready.starts_with("ready "));
}

#[test]
fn readers_share_an_image_and_keep_writers_out() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("disk.img"), [0; 1 << 16]).unwrap();
    let mut readers = Vec::new();
    for socket in ["one.sock", "two.sock"] {
        let mut command = program(&directory);
        command.args([
            "--blk-file",
            "disk.img",
            "--read-only",
            "--socket-path",
            socket,
        ]);
        let (reader, ready) = Running::start(command);
        assert!(ready.starts_with("ready "));
        readers.push(reader);
    }
    failure(&directory, &["--blk-file", "disk.img"], 2);
    // SIGKILL leaves no lock behind.
    drop(readers);
    let mut command = program(&directory);
    command.args(["--blk-file", "disk.img"]);
    assert!(Running::start(command).1.starts_with("ready "));
}

#[test]
fn create_never_touches_an_image_that_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    let content: Vec<u8> = (0..4096u32)
        .map(|n| u8::try_from(n % 251).unwrap())
        .collect();
    std::fs::write(&image, &content).unwrap();
    let mut command = program(&directory);
    command.args(["--blk-file", "disk.img", "--create", "64M"]);
    let (mut running, ready) = Running::start(command);
    assert!(ready.starts_with("ready "));
    running.signal(Signal::SIGTERM);
    assert!(running.wait().success());
    assert_eq!(std::fs::read(&image).unwrap(), content);
}

#[test]
fn capabilities_are_json_whatever_else_is_asked() {
    let directory = tempfile::tempdir().unwrap();
    let output = output(
        &directory,
        &[
            "--print-capabilities",
            "--blk-file",
            "/nonexistent",
            "--fd",
            "99",
        ],
    );
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let dense: String = text.split_whitespace().collect();
    assert_eq!(
        dense,
        r#"{"type":"block","features":["read-only","blk-file"]}"#
    );
}

#[test]
fn failures_name_the_option_the_file_and_the_remedy() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("tiny"), b"x").unwrap();
    std::fs::write(directory.path().join("disk"), vec![0; 4096]).unwrap();
    let fifo = directory.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let long = "x".repeat(120);
    let cases: &[(&[&str], i32, [&str; 3])] = &[
        (
            &["--blk-file", "none"],
            2,
            ["--blk-file", "none", "--create"],
        ),
        (
            &["--blk-file", "."],
            2,
            ["--blk-file", ".", "raw disk image"],
        ),
        (
            &["--blk-file", "tiny"],
            2,
            ["--blk-file", "tiny", "truncate"],
        ),
        (
            &["--blk-file", "fifo"],
            2,
            ["--blk-file", "fifo", "raw disk image"],
        ),
        (
            &["--blk-file", "no/dir", "--create", "1M"],
            1,
            ["--create", "no/dir", "directory"],
        ),
        (
            &["--blk-file", "disk", "--serial", &long],
            2,
            ["--serial", "120 bytes", "at most 20"],
        ),
        (
            &["--blk-file", "disk", "--num-queues", "0"],
            2,
            ["--num-queues", "0", "1 to 256"],
        ),
        (
            &["--blk-file", "disk", "--queue-size", "100"],
            2,
            ["--queue-size", "100", "power of two"],
        ),
        (
            &["--blk-file", "disk", "--fd", "1"],
            2,
            ["--fd", "1", "socket"],
        ),
        (
            &["--blk-file", "disk", "--fd", "77"],
            2,
            ["--fd", "77", "socket"],
        ),
        (
            &["--null", "1M", "--socket-path", &long],
            2,
            ["--socket-path", "too long", "shorter"],
        ),
        (
            &["--null", "1M", "--socket-path", "no/s"],
            1,
            ["--socket-path", "no/s", "directory"],
        ),
        (
            &["--null", "1M", "--socket-path", "disk"],
            2,
            ["--socket-path", "disk", "another"],
        ),
    ];
    for (arguments, code, parts) in cases {
        let said = failure(&directory, arguments, *code);
        for part in parts {
            assert!(
                said.contains(part),
                "{arguments:?}: {part:?} is missing in: {said}"
            );
        }
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    assert_eq!(
        std::fs::read(directory.path().join("disk")).unwrap(),
        vec![0; 4096]
    );
}

#[test]
fn a_bad_option_leaves_no_new_image_behind() {
    let directory = tempfile::tempdir().unwrap();
    failure(
        &directory,
        &["--blk-file", "new", "--create", "1M", "--num-queues", "999"],
        2,
    );
    assert!(!directory.path().join("new").exists());
}

#[test]
fn s12_a_socket_path_that_is_no_socket_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("precious");
    std::fs::write(&path, "data").unwrap();
    failure(
        &directory,
        &["--null", "1M", "--socket-path", "precious"],
        2,
    );
    assert_eq!(std::fs::read(&path).unwrap(), b"data");
}

#[test]
fn a_socket_nobody_listens_on_is_replaced_and_a_live_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    assert!(
        path.symlink_metadata().unwrap().file_type().is_socket(),
        "stale"
    );
    let mut command = program(&directory);
    command.args(["--null", "1M", "--socket-path", "s"]);
    let (mut first, ready) = Running::start(command);
    assert!(ready.starts_with("ready "));
    let mode = path.symlink_metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o660, "{mode:o}");

    let said = failure(&directory, &["--null", "1M", "--socket-path", "s"], 2);
    assert!(said.contains("in use"), "{said}");
    UnixStream::connect(&path).unwrap();
    first.signal(Signal::SIGTERM);
    assert!(first.wait().success());
    assert!(!path.exists());
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

/// Lets the child inherit `fd` as descriptor 3.
fn with_fd_3(command: &mut Command, fd: &impl AsRawFd) {
    let fd = fd.as_raw_fd();
    #[expect(
        unsafe_code,
        reason = "pre_exec is the one way to pass a numbered descriptor"
    )]
    // SAFETY: the closure runs in the child alone; dup2 is async-signal-safe and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            // dup2 onto itself would keep CLOEXEC.
            assert_ne!(fd, 3);
            if nix::libc::dup2(fd, 3) < 0 {
                Err(std::io::Error::last_os_error())
            } else {
                Ok(())
            }
        });
    }
}

#[test]
fn fd_takes_a_listening_socket_and_leaves_its_file_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ours");
    let listener = UnixListener::bind(&path).unwrap();
    // A high number, so that it is not 3 already.
    let listener = nix::fcntl::fcntl(&listener, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(100))
        .map(OwnedNumber)
        .unwrap();
    let mut command = program(&directory);
    command.args(["--null", "1M", "--fd", "3"]);
    with_fd_3(&mut command, &listener);
    let (mut running, ready) = Running::start(command);
    assert_eq!(ready, "ready\n");
    drop(UnixStream::connect(&path).unwrap());
    drop(UnixStream::connect(&path).unwrap());
    running.signal(Signal::SIGTERM);
    assert!(running.wait().success());
    assert!(path.exists(), "somebody else's socket file");
}

#[test]
fn fd_takes_a_connected_socket_and_ends_with_it() {
    let directory = tempfile::tempdir().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let high = nix::fcntl::fcntl(&theirs, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(100)).unwrap();
    drop(theirs);
    let mut command = program(&directory);
    command.args(["--null", "1M", "--fd", "3"]);
    let high = OwnedNumber(high);
    with_fd_3(&mut command, &high);
    let (mut running, ready) = Running::start(command);
    drop(high);
    assert_eq!(ready, "ready\n");
    drop(ours);
    assert!(running.wait().success());
}

#[test]
fn fd_that_is_no_socket_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = std::fs::File::open(directory.path()).unwrap();
    let high = nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(100)).unwrap();
    let mut command = program(&directory);
    command.args(["--null", "1M", "--fd", "3"]);
    let high = OwnedNumber(high);
    with_fd_3(&mut command, &high);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("socket"));
}

/// A descriptor number that a fcntl made, closed when dropped.
struct OwnedNumber(i32);

impl AsRawFd for OwnedNumber {
    fn as_raw_fd(&self) -> i32 {
        self.0
    }
}

impl Drop for OwnedNumber {
    fn drop(&mut self) {
        let _ = nix::unistd::close(self.0);
    }
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
fn threads_and_blocks_that_cannot_be_are_refused_by_their_options() {
    let directory = tempfile::tempdir().unwrap();
    for (arguments, option) in [
        (["--num-threads", "0"], "--num-threads"),
        (["--num-threads", "17"], "--num-threads"),
        (["--queue-threads", "0,1000"], "--queue-threads"),
        (["--cpu-affinity", "5-1"], "--cpu-affinity"),
        (["--cpu-affinity", "1024"], "--cpu-affinity"),
        (["--block-size", "1024"], "--block-size"),
    ] {
        let arguments = [&["--null", "1M"][..], &arguments].concat();
        let stderr = failure(&directory, &arguments, 2);
        assert!(stderr.contains(option), "{stderr}");
    }
    // One that the host has not, and not the first.
    let arguments = [
        "--null",
        "1M",
        "--num-threads",
        "2",
        "--cpu-affinity",
        "0,1023",
    ];
    let stderr = failure(&directory, &arguments, 1);
    assert!(stderr.contains("CPU 1023"), "{stderr}");
}
