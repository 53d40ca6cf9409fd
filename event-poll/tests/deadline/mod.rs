//! Runs what may hang on its own thread, so that a hang fails the test instead of the suite.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Far longer than any of the tests takes on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(30);

/// The result of `work`.
///
/// # Panics
///
/// If `work` does, or does not end in time.
pub(crate) fn within_deadline<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    let worker = thread::spawn(move || {
        let _ = sender.send(work());
    });
    match receiver.recv_timeout(DEADLINE) {
        Ok(result) => result,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("still running after {DEADLINE:?}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => match worker.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => unreachable!("the worker sends before it ends"),
        },
    }
}
