//! Standard error, which somebody may have connected to a pipe and forgotten: a thread that waits for room there
//! would serve nobody, and could not be stopped.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long somebody who reads may take to make room. Once that has passed, nothing is waited for until there is
/// some.
const PATIENCE: Duration = Duration::from_secs(1);

/// What a pipe or socket that poll(2) says has room takes without blocking (`PIPE_BUF`).
const CHUNK: usize = 4096;

/// What has become of earlier texts.
#[derive(Debug)]
struct State {
    /// Texts that there was no room for, since the last one that was written.
    lost: u64,
    patience: Duration,
}

static STATE: Mutex<State> = Mutex::new(State {
    lost: 0,
    patience: PATIENCE,
});

/// Writes `text`, or loses it where there is no room for it; how many were lost is said when there is some again.
/// `eprintln!` would wait, and panic where nobody can read any more.
pub(crate) fn say(text: &str) {
    let mut state = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    write(&io::stderr(), &mut state, text.as_bytes());
}

/// For whatever wants a `Write`; each call a text of its own.
#[derive(Debug)]
pub(crate) struct StandardError;

impl Write for StandardError {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let mut state = STATE.lock().unwrap_or_else(PoisonError::into_inner);
        write(&io::stderr(), &mut state, text);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write<F: AsFd>(to: &F, state: &mut State, text: &[u8])
where
    for<'a> &'a F: Write,
{
    let notice = match state.lost {
        0 => Vec::new(),
        lost => format!("blk-dataplane: {lost} messages were lost: nobody read them\n").into(),
    };
    for chunk in notice.chunks(CHUNK).chain(text.chunks(CHUNK)) {
        if !has_room(to, state.patience) {
            state.lost = state.lost.saturating_add(1);
            state.patience = Duration::ZERO;
            return;
        }
        let mut to = to;
        // There is nobody left to tell.
        let _ = to.write_all(chunk);
    }
    state.lost = 0;
    state.patience = PATIENCE;
}

/// Waits for room for a chunk. That nobody can read any more is found by writing.
fn has_room(to: &impl AsFd, patience: Duration) -> bool {
    let until = Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let mut fds = [PollFd::new(to.as_fd(), PollFlags::POLLOUT)];
        match poll(&mut fds, timeout) {
            Err(Errno::EINTR) => {}
            polled => return polled.is_ok_and(|ready| ready > 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn state() -> State {
        State {
            lost: 0,
            patience: Duration::from_millis(10),
        }
    }

    #[test]
    fn what_nobody_reads_is_lost_and_counted() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut state = state();
        let line = [b'x'; 1000];
        // A write that blocked would hang here.
        let mut written = 0;
        while state.lost == 0 {
            write(&ours, &mut state, &line);
            written += 1000;
        }
        write(&ours, &mut state, &line);
        assert_eq!((state.lost, state.patience), (2, Duration::ZERO));
        written -= 1000;
        theirs.read_exact(&mut vec![0; written]).unwrap();
        write(&ours, &mut state, b"new\n");
        assert_eq!((state.lost, state.patience), (0, PATIENCE));
        drop(ours);
        let mut rest = String::new();
        theirs.read_to_string(&mut rest).unwrap();
        assert_eq!(
            rest,
            "blk-dataplane: 2 messages were lost: nobody read them\nnew\n"
        );
    }

    #[test]
    fn long_texts_are_whole_and_a_closed_end_is_no_reason_to_wait() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let text = vec![b'x'; 3 * CHUNK + 7];
        write(&ours, &mut state(), &text);
        let mut read = vec![0; text.len()];
        theirs.read_exact(&mut read).unwrap();
        assert_eq!(read, text);
        drop(theirs);
        let mut state = state();
        for _ in 0..1000 {
            write(&ours, &mut state, &text);
        }
        assert_eq!(state.lost, 0);
    }
}
