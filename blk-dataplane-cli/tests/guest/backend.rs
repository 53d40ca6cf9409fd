//! The program under test, as an operator runs it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

use crate::deadline::{Deadline, Lines, Next};
use crate::lab::Lab;

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_blk-dataplane");

/// Far beyond what starting or stopping takes on a loaded machine.
const START_OR_STOP: Duration = Duration::from_secs(30);

/// A running `blk-dataplane`; killed if the test ends without stopping it.
#[derive(Debug)]
pub(crate) struct Backend {
    child: Child,
    stdout: Lines,
    stderr: PathBuf,
    socket: PathBuf,
}

impl Backend {
    /// Starts the program and waits for its `ready` line. `name` tells the backends of one test apart.
    pub(crate) fn start<A: AsRef<OsStr>>(
        lab: &Lab,
        name: &str,
        arguments: impl IntoIterator<Item = A>,
    ) -> Self {
        let mut command = Command::new(PROGRAM);
        command.args(arguments);
        Self::spawn(lab, name, command)
    }

    /// As `start`, with every system call named in `calls` recorded in the file `trace`.
    pub(crate) fn start_traced<A: AsRef<OsStr>>(
        lab: &Lab,
        name: &str,
        calls: &str,
        trace: &Path,
        arguments: impl IntoIterator<Item = A>,
    ) -> Self {
        let mut command = Command::new("strace");
        // -D: the program stays our child, strace is the one that runs apart.
        command
            .args(["-D", "-f", "-e"])
            .arg(format!("trace={calls}"))
            .arg("-o")
            .arg(trace)
            .arg("--")
            .arg(PROGRAM)
            .args(arguments);
        Self::spawn(lab, name, command)
    }

    fn spawn(lab: &Lab, name: &str, mut command: Command) -> Self {
        let socket = lab.path(&format!("{name}.sock"));
        let stderr = lab.path(&format!("{name}.stderr"));
        command
            .arg("--socket-path")
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&stderr).unwrap());
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let stdout = Lines::of(child.stdout.take().unwrap());
        let backend = Self {
            child,
            stdout,
            stderr,
            socket,
        };
        match backend.stdout.next(Deadline::after(START_OR_STOP)) {
            Next::Line(line) if line.starts_with("ready") => {}
            other => panic!("{command:?}: wanted a line starting with `ready`, got {other:?}"),
        }
        backend
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        signal::kill(pid, signal).unwrap();
    }

    /// Waits until the program has said `text` on stderr.
    #[track_caller]
    pub(crate) fn wait_to_say(&self, text: &str) {
        let deadline = Instant::now() + START_OR_STOP;
        while !self.stderr().contains(text) {
            assert!(
                Instant::now() < deadline,
                "the program does not say {text:?}"
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// What the program has written on stderr so far.
    pub(crate) fn stderr(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap()
    }

    /// Kills the program with no chance to do anything about it.
    pub(crate) fn kill(mut self) {
        self.signal(Signal::SIGKILL);
        self.child.wait().unwrap();
    }

    /// Stops the program the way an operator does, and checks that it leaves as promised: exit code 0,
    /// no socket file, nothing on stdout after the `ready` line.
    pub(crate) fn stop(mut self, by: Signal) {
        assert!(
            self.child.try_wait().unwrap().is_none(),
            "the program ended before it was told to"
        );
        self.signal(by);
        let deadline = Deadline::after(START_OR_STOP);
        let status = deadline
            .wait(&mut self.child)
            .unwrap_or_else(|| panic!("the program still runs long after {by}"));
        assert_eq!(status.code(), Some(0), "exit after {by}: {status}");
        assert!(!self.socket.exists(), "socket file left behind after {by}");
        match self.stdout.next(deadline) {
            Next::End => {}
            other => panic!("wanted one line on stdout, got {other:?} after it"),
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // Both fail only when the program has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            let stderr = fs::read_to_string(&self.stderr).unwrap_or_default();
            eprintln!("--- stderr of the program\n{stderr}---");
        }
    }
}
