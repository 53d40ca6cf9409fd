//! The threads that run what an engine cannot do without blocking.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::backend::{BlockingFile, Completion};
use crate::notifier::Notifier;
use crate::op::Op;

/// Most threads of a queue's pool. A range may take seconds, and neither a sync nor another range
/// shall wait for it behind every other; more would only queue in the kernel, where they wait for the
/// same locks.
const WORKER_THREADS_MAX: usize = 4;

#[derive(Clone, Copy, Debug)]
struct Job {
    slot: u16,
    op: Op,
}

/// The pool, of as many threads as it has had jobs at a time. Dropping it waits for the step each
/// thread is at, and drops the rest.
#[derive(Debug)]
pub(crate) struct Workers {
    // `None` only while dropping.
    jobs: Option<Sender<Job>>,
    // Kept for further threads, and to take back, on drop, jobs no thread has begun.
    unbegun: Receiver<Job>,
    // Kept for further threads.
    done: Sender<Completion>,
    results: Receiver<Completion>,
    file: Arc<dyn BlockingFile>,
    notifier: Option<Arc<Notifier>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// A pool without threads. Both channels hold `depth`, the number of slots, so neither is ever
    /// full.
    pub(crate) fn new(
        depth: u16,
        file: Arc<dyn BlockingFile>,
        notifier: Option<Arc<Notifier>>,
    ) -> Self {
        let (jobs, unbegun) = bounded(usize::from(depth));
        let (done, results) = bounded(usize::from(depth));
        Self {
            jobs: Some(jobs),
            unbegun,
            done,
            results,
            file,
            notifier,
            stop: Arc::new(AtomicBool::new(false)),
            threads: Vec::with_capacity(WORKER_THREADS_MAX),
        }
    }

    /// Hands over a job beside `busy` others. The error is the host's, which gives no thread.
    pub(crate) fn submit(&mut self, slot: u16, op: Op, busy: usize) -> Result<(), i32> {
        if self.threads.len() <= busy && self.threads.len() < WORKER_THREADS_MAX {
            match self.spawn() {
                Ok(thread) => self.threads.push(thread),
                // Those there are will get round to it.
                Err(_) if !self.threads.is_empty() => {}
                Err(error) => return Err(error.raw_os_error().unwrap_or(libc::EAGAIN)),
            }
        }
        self.jobs
            .as_ref()
            .and_then(|jobs| jobs.try_send(Job { slot, op }).ok())
            .ok_or(libc::EIO)
    }

    fn spawn(&self) -> io::Result<JoinHandle<()>> {
        let (jobs, done) = (self.unbegun.clone(), self.done.clone());
        let (file, notifier) = (Arc::clone(&self.file), self.notifier.clone());
        let stop = Arc::clone(&self.stop);
        thread::Builder::new()
            .name("ioq-worker".into())
            .spawn(move || run(&jobs, &done, &*file, notifier.as_deref(), &stop))
    }

    pub(crate) fn completions_pending(&self) -> bool {
        !self.results.is_empty()
    }

    pub(crate) fn reap(&self) -> Option<Completion> {
        self.results.try_recv().ok()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        while self.unbegun.try_recv().is_ok() {}
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // An Err means the thread panicked; there is nothing left of it to wait for.
            drop(thread.join());
        }
    }
}

fn run(
    jobs: &Receiver<Job>,
    done: &Sender<Completion>,
    file: &dyn BlockingFile,
    notifier: Option<&Notifier>,
    stop: &AtomicBool,
) {
    for Job { slot, op } in jobs {
        let result = file.run(&op, stop);
        if done.send(Completion { slot, result }).is_err() {
            return;
        }
        // After the send: whoever wakes must find the result.
        if let Some(notifier) = notifier {
            notifier.signal();
        }
    }
}
