//! The thread that runs what an engine cannot do without blocking.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::engine::{BlockingFile, Completion};
use crate::notifier::Notifier;
use crate::op::Opcode;

/// Threads of a queue's worker pool. One is enough: a queue has one file, the only operation here
/// is fdatasync, and two of those at once wait for the same write-back.
const WORKER_THREADS: usize = 1;

#[derive(Clone, Copy, Debug)]
struct Job {
    slot: u16,
    opcode: Opcode,
}

/// The worker pool; dropping it waits for the job each thread is at and drops the others.
#[derive(Debug)]
pub(crate) struct Worker {
    // `None` only while dropping.
    jobs: Option<Sender<Job>>,
    // Kept to take back, on drop, jobs no thread has begun.
    unbegun: Receiver<Job>,
    results: Receiver<Completion>,
    threads: Vec<JoinHandle<()>>,
}

impl Worker {
    /// Starts the pool. Both channels hold `depth`, the number of slots, so neither is ever full.
    pub(crate) fn start(
        depth: u16,
        file: &Arc<dyn BlockingFile>,
        notifier: Option<&Arc<Notifier>>,
    ) -> io::Result<Self> {
        let (jobs, unbegun) = bounded(usize::from(depth));
        let (done, results) = bounded(usize::from(depth));
        let mut worker = Self {
            jobs: Some(jobs),
            unbegun,
            results,
            threads: Vec::new(),
        };
        for _ in 0..WORKER_THREADS {
            let (jobs, done) = (worker.unbegun.clone(), done.clone());
            let (file, notifier) = (Arc::clone(file), notifier.cloned());
            let thread = thread::Builder::new()
                .name("ioq-worker".into())
                .spawn(move || run(&jobs, &done, &*file, notifier.as_deref()))?;
            worker.threads.push(thread);
        }
        Ok(worker)
    }

    /// Hands a job over; `false` if the threads are gone.
    pub(crate) fn submit(&self, slot: u16, opcode: Opcode) -> bool {
        self.jobs
            .as_ref()
            .is_some_and(|jobs| jobs.try_send(Job { slot, opcode }).is_ok())
    }

    pub(crate) fn completions_pending(&self) -> bool {
        !self.results.is_empty()
    }

    pub(crate) fn reap(&self) -> Option<Completion> {
        self.results.try_recv().ok()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
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
) {
    for job in jobs {
        let result = match job.opcode {
            Opcode::Fdatasync => file.fdatasync(),
            // No engine passes reads and writes on.
            Opcode::Read | Opcode::Write(_) => -i64::from(libc::EOPNOTSUPP),
        };
        if done
            .send(Completion {
                slot: job.slot,
                result,
            })
            .is_err()
        {
            return;
        }
        // After the send: whoever wakes must find the result.
        if let Some(notifier) = notifier {
            notifier.signal();
        }
    }
}
