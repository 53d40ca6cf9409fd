//! Waiting for processes without ever waiting for good.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ExitStatus};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// A point in time after which something hangs, not merely takes long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(Instant);

impl Deadline {
    pub(crate) fn after(duration: Duration) -> Self {
        Self(Instant::now() + duration)
    }

    fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// The child's exit status, or `None` if it still runs at the deadline.
    pub(crate) fn wait(self, child: &mut Child) -> Option<ExitStatus> {
        // Exits are rare in a test, so asking again and again costs nothing that matters.
        const ASK_EVERY: Duration = Duration::from_millis(5);
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return Some(status);
            }
            if self.remaining().is_zero() {
                return None;
            }
            thread::sleep(ASK_EVERY);
        }
    }
}

/// What a stream yielded next.
#[derive(Debug)]
pub(crate) enum Next {
    Line(String),
    End,
    DeadlinePassed,
}

/// Lines of a stream, read by a thread of their own so that no writer blocks and no reader hangs.
#[derive(Debug)]
pub(crate) struct Lines(Receiver<String>);

impl Lines {
    pub(crate) fn of(stream: impl Read + Send + 'static) -> Self {
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n') {
                let Ok(line) = line else { break };
                let line = String::from_utf8_lossy(&line)
                    .trim_end_matches('\r')
                    .to_owned();
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self(receiver)
    }

    pub(crate) fn next(&self, deadline: Deadline) -> Next {
        match self.0.recv_timeout(deadline.remaining()) {
            Ok(line) => Next::Line(line),
            Err(RecvTimeoutError::Disconnected) => Next::End,
            Err(RecvTimeoutError::Timeout) => Next::DeadlinePassed,
        }
    }
}
