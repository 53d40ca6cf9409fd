//! What the tests need of a guest and of a front-end: memory, rings, requests in any framing, and the
//! two ways to reach a device, as a VMM that embeds it and over the vhost-user socket.
//!
//! Everything that waits has a deadline, so that a device that hangs fails the test.

pub(crate) mod embedded;
#[cfg(feature = "vhost-user")]
pub(crate) mod front_end;
pub(crate) mod queue;
pub(crate) mod ram;
pub(crate) mod request;
pub(crate) mod ring;
pub(crate) mod scratch;
#[cfg(feature = "vhost-user")]
pub(crate) mod wire;

use std::io::Write;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// How long anything may take before it counts as hung. Far above what the slowest step needs on a
/// loaded machine; nothing passes or fails by being faster.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// Ends the whole run, with the test's name, if it is still there after three deadlines: for what
/// cannot be waited for with one, such as a call into a device that hangs.
pub(crate) struct Watchdog {
    _alive: Sender<()>,
}

impl Watchdog {
    pub(crate) fn start() -> Self {
        let (alive, gone) = channel();
        let test = std::thread::current().name().map(str::to_owned);
        std::thread::spawn(move || {
            if gone.recv_timeout(3 * DEADLINE) == Err(RecvTimeoutError::Timeout) {
                // Not `eprintln!`: that goes into the test's captured output, which is lost here.
                let _ = writeln!(std::io::stderr(), "{test:?} hangs");
                std::process::abort();
            }
        });
        Self { _alive: alive }
    }
}

/// Looks until `condition` holds; panics with `what` at the deadline.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "deadline: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// `bytes` that differ by `seed` and by position, so that a block in the wrong place shows.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        // xorshift64: cheap in debug builds.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
