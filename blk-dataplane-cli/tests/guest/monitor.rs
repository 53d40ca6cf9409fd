//! QEMU's monitor, for humans: commands and their output as text.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// What the monitor says when it waits for a command.
const PROMPT: &str = "(qemu) ";

/// Far beyond what a command takes on a loaded machine.
const ANSWER: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(crate) struct Monitor(UnixStream);

impl Monitor {
    /// To a QEMU that listens there already, as it does before it says anything else.
    pub(crate) fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(ANSWER)).unwrap();
        let mut monitor = Self(stream);
        monitor.answer();
        monitor
    }

    /// What the monitor answers, after the command, which it repeats.
    pub(crate) fn command(&mut self, command: &str) -> String {
        self.0.write_all(format!("{command}\n").as_bytes()).unwrap();
        self.answer()
    }

    fn answer(&mut self) -> String {
        let mut text = Vec::new();
        while !text.ends_with(PROMPT.as_bytes()) {
            let mut byte = [0];
            self.0.read_exact(&mut byte).unwrap();
            text.extend(byte);
        }
        String::from_utf8_lossy(&text).into_owned()
    }
}
