//! A back-end that runs.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::contenders::Commands;
use super::processes;

/// How long a back-end may take until it listens; SPDK takes seconds.
const START_MAX: Duration = Duration::from_secs(30);

/// How long it may take to end after SIGTERM.
const END_MAX: Duration = Duration::from_secs(10);

/// How often it is looked whether it listens, or has ended.
const LOOK: Duration = Duration::from_millis(1);

/// Characters of its complaints that are passed on.
const COMPLAINT_MAX: usize = 2000;

/// Ends with the value.
#[derive(Debug)]
pub(crate) struct Backend {
    child: Child,
    log: PathBuf,
}

impl Backend {
    /// Starts it on processor `cpu` and waits until it listens on all of `sockets`. What it says goes to `log`.
    pub(crate) fn start(
        commands: &Commands,
        cpu: usize,
        sockets: &[PathBuf],
        log: &Path,
    ) -> Result<Self, String> {
        let serve = pinned(cpu, &commands.serve);
        let backend = Self {
            child: spawn(&serve, log)?,
            log: log.to_owned(),
        };
        backend.set_up(commands, sockets)
    }

    fn set_up(mut self, commands: &Commands, sockets: &[PathBuf]) -> Result<Self, String> {
        if let Some(control) = &commands.control {
            self.wait_for(control)?;
        }
        for words in &commands.set_up {
            let output = Command::new(&words[0])
                .args(&words[1..])
                .output()
                .map_err(|e| format!("{}: {e}", words[0]))?;
            if !output.status.success() {
                let said = String::from_utf8_lossy(&output.stderr);
                return Err(format!("{}: {}: {said}", words.join(" "), output.status));
            }
        }
        for socket in sockets {
            self.wait_for(socket)?;
        }
        Ok(self)
    }

    fn wait_for(&mut self, socket: &Path) -> Result<(), String> {
        let deadline = Instant::now() + START_MAX;
        while !processes::is_listening(socket) {
            if let Some(status) = self.child.try_wait().map_err(|e| e.to_string())? {
                return Err(format!("it has ended ({status}): {}", self.complaint()));
            }
            if Instant::now() > deadline {
                let socket = socket.display();
                return Err(format!(
                    "nobody listens on {socket} after {} s: {}",
                    START_MAX.as_secs(),
                    self.complaint()
                ));
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The end of what it has said on stderr.
    pub(crate) fn complaint(&self) -> String {
        last_of(&self.log)
    }

    /// What is wrong if it has ended by itself.
    pub(crate) fn still_runs(&mut self) -> Result<(), String> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(format!(
                "the back-end has ended ({status}): {}",
                self.complaint()
            )),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// `words` on a processor.
pub(crate) fn pinned(cpu: usize, words: &[String]) -> Vec<String> {
    let mut all = vec!["taskset".to_owned(), "-c".to_owned(), cpu.to_string()];
    all.extend_from_slice(words);
    all
}

/// Starts it with its output in a file.
pub(crate) fn spawn(words: &[String], log: &Path) -> Result<Child, String> {
    let file = File::create(log).map_err(|e| format!("{}: {e}", log.display()))?;
    Command::new(&words[0])
        .args(&words[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(file)
        .spawn()
        .map_err(|e| format!("{}: {e}", words[0]))
}

/// Asks it to end, and makes it.
pub(crate) fn end(child: &mut Child) {
    // Nothing can be done about an error, and none is expected: the child is ours.
    let _ = processes::signal(child.id(), Signal::SIGTERM);
    let deadline = Instant::now() + END_MAX;
    while let Ok(None) = child.try_wait() {
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            return;
        }
        thread::sleep(LOOK);
    }
}

/// The end of a file of messages.
pub(crate) fn last_of(log: &Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim();
    let skipped = text.chars().count().saturating_sub(COMPLAINT_MAX);
    text.chars().skip(skipped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commands(script: &str) -> Commands {
        Commands {
            serve: ["sh", "-c", script].map(str::to_owned).to_vec(),
            ..Commands::default()
        }
    }

    #[test]
    fn a_back_end_that_does_not_start_is_told_with_what_it_said() {
        let directory = tempfile::tempdir().unwrap();
        let (socket, log) = (directory.path().join("s"), directory.path().join("log"));
        let failed = Backend::start(&commands("echo no >&2; exit 3"), 0, &[socket], &log);
        let message = failed.unwrap_err();
        assert!(message.contains("exit status: 3"), "{message}");
        assert!(message.ends_with("no"), "{message}");
    }

    #[test]
    fn a_back_end_ends_with_its_value() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let mut backend = Backend::start(&commands("exec sleep 1000"), 0, &[], &log).unwrap();
        assert_eq!(backend.still_runs(), Ok(()));
        let process = PathBuf::from(format!("/proc/{}", backend.pid()));
        assert!(process.exists());
        drop(backend);
        assert!(!process.exists());
    }
}
