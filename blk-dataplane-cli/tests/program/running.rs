//! The program as a process of its own.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// Longer than any start or stop takes on a loaded machine; only a hang gets here.
const DEADLINE: Duration = Duration::from_secs(30);

pub(crate) fn program(directory: &TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blk-dataplane"));
    command
        .current_dir(directory.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// How long a test may take with one program. Then the program is killed, so that whoever waits for its answer
/// finds that there is none.
const LIFETIME: Duration = Duration::from_secs(180);

/// A running program, killed with the test.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) stdout: BufReader<std::process::ChildStdout>,
    _alive: Sender<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    /// Starts it and returns the first line of its output.
    pub(crate) fn start(mut command: Command) -> (Self, String) {
        let mut running = Self::of(command.spawn().unwrap());
        let mut line = String::new();
        running.stdout.read_line(&mut line).unwrap();
        (running, line)
    }

    /// One that has just been started.
    pub(crate) fn of(mut child: Child) -> Self {
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (alive, gone) = channel();
        let pid = Pid::from_raw(child.id().cast_signed());
        std::thread::spawn(move || {
            if gone.recv_timeout(LIFETIME) == Err(RecvTimeoutError::Timeout) {
                let _ = kill(pid, Signal::SIGKILL);
            }
        });
        Self {
            child,
            stdout,
            _alive: alive,
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < DEADLINE, "the program does not exit");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn rest_of_stdout(&mut self) -> String {
        let mut text = String::new();
        self.stdout.read_to_string(&mut text).unwrap();
        text
    }

    pub(crate) fn stderr(&mut self) -> String {
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

pub(crate) fn output(directory: &TempDir, arguments: &[&str]) -> Output {
    program(directory).args(arguments).output().unwrap()
}

/// Runs it, expects it to fail with `code`, and returns what it said.
pub(crate) fn failure(directory: &TempDir, arguments: &[&str], code: i32) -> String {
    let output = output(directory, arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(output.stdout.is_empty(), "not ready, so nothing on stdout");
    stderr
}
