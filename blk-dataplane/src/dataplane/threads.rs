//! The data threads of a device, as control sees them: started when needed, asked, ended.

use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use event_poll::{EventPoll, Stopper};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use vm_memory::GuestMemoryBackend;

use super::{DataPlane, Gone, QueueError};
use crate::counters::Counters;
use crate::data_thread::{Command, DataThread, StartError, ThreadParts};

/// A data thread, seen from control.
#[derive(Debug)]
pub(super) struct ThreadHandle<M: GuestMemoryBackend> {
    commands: Sender<Command<M>>,
    waker: Stopper,
    thread: JoinHandle<()>,
    pub(super) counters: Arc<Counters>,
}

impl<M: GuestMemoryBackend> ThreadHandle<M> {
    pub(super) fn tell(&self, command: Command<M>) -> Result<(), Gone> {
        self.commands.send(command).map_err(|_| Gone)?;
        self.waker.wake();
        Ok(())
    }

    /// Sends a command; its answer comes later.
    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command<M>) -> Result<Receiver<T>, Gone> {
        let (reply, answer) = bounded(1);
        self.tell(command(reply))?;
        Ok(answer)
    }
}

impl<M: GuestMemoryBackend + Send + Sync + 'static> DataPlane<M> {
    /// Starts data thread `number` unless it runs.
    pub(super) fn start_thread(&mut self, number: u16) -> Result<(), StartError> {
        let place = usize::from(number);
        if self.threads[place].is_some() {
            return Ok(());
        }
        let poll = EventPoll::new(DataThread::<M>::poll_events_max())?;
        let waker = poll.stopper();
        // Unbounded is bounded here: every caller waits for its reply or is serialised behind one.
        let (commands, receiver) = unbounded();
        let counters = Arc::new(Counters::default());
        let parts = ThreadParts {
            device: self.device.clone(),
            memory: Arc::clone(&self.memory),
            poll,
            commands: receiver,
            counters: Arc::clone(&counters),
            queue_counters: Arc::clone(&self.queue_counters),
            number: place,
            desks: Arc::clone(&self.desks),
            paused: self.paused,
            marks_dirty: self.marks_dirty,
            writeback: self.writeback,
        };
        let cpu = self.device.cpu_of(number);
        let (started, outcome) = bounded(1);
        // What the thread has to say is said of the same device as what its starter says.
        let span = tracing::Span::current();
        let thread = std::thread::Builder::new()
            .name(format!("blk-data-{number}"))
            .spawn(move || {
                let _named = span.enter();
                // Bound first: what the thread allocates is then near its processor.
                match cpu
                    .map_or(Ok(()), bind)
                    .and_then(|()| DataThread::new(parts))
                {
                    Ok(thread) => {
                        let _ = started.send(Ok(()));
                        thread.run();
                    }
                    Err(error) => {
                        let _ = started.send(Err(error));
                    }
                }
            })
            .map_err(StartError::Thread)?;
        // A thread that cannot start ends by itself.
        outcome.recv().map_err(|_| StartError::Ended)??;
        self.device.tally().add_thread(&counters);
        let handle = ThreadHandle {
            commands,
            waker,
            thread,
            counters,
        };
        if let Some(notifier) = &self.logged {
            let notifier = Some(notifier.clone());
            // It has just started: it is there.
            let told = handle.tell(Command::SetLogged { notifier });
            debug_assert!(told.is_ok(), "{told:?}");
        }
        self.threads[place] = Some(handle);
        Ok(())
    }

    /// Whether every data thread that was started runs. False only after a bug in this crate.
    #[cfg(feature = "vhost-user")]
    pub(crate) fn is_alive(&self) -> bool {
        self.threads
            .iter()
            .flatten()
            .all(|thread| !thread.thread.is_finished())
    }

    pub(super) fn end_threads(&mut self) -> Result<(), Gone> {
        // First all are drained: a flush may wait for another thread's writes.
        let mut ended = self.pause();
        let exits = self.post_all(|reply| Command::Exit { reply });
        for thread in self.threads.iter_mut().filter_map(Option::take) {
            let joined = thread.thread.join().map_err(|_| Gone);
            self.device.tally().end_thread(&thread.counters);
            ended = ended.and(joined);
        }
        drop(exits);
        ended
    }

    /// The thread that queue `index` runs on.
    pub(super) fn handle_of(&self, index: u16) -> Result<&ThreadHandle<M>, QueueError> {
        let thread = self.thread_of(index)?;
        self.threads[usize::from(thread)]
            .as_ref()
            .ok_or(QueueError::NotRunning(index))
    }

    /// Asks queue `index`'s thread and waits for the answer.
    pub(super) fn ask<T>(
        &self,
        index: u16,
        command: impl FnOnce(Sender<T>) -> Command<M>,
    ) -> Result<T, QueueError> {
        let answer = self.handle_of(index)?.ask(command)?;
        Ok(answer.recv().map_err(|_| Gone)?)
    }

    /// Sends a command to each thread that has started.
    fn post_all<T>(
        &self,
        mut command: impl FnMut(Sender<T>) -> Command<M>,
    ) -> Vec<Result<Receiver<T>, Gone>> {
        let mut answers = Vec::with_capacity(self.threads.len());
        for thread in &self.threads {
            // Made for each place, so that a command can count them.
            let (reply, answer) = bounded(1);
            let command = command(reply);
            if let Some(thread) = thread {
                answers.push(thread.tell(command).map(|()| answer));
            }
        }
        answers
    }

    /// Asks every thread, all at once, and waits for all answers.
    pub(super) fn ask_all(
        &self,
        command: impl FnMut(Sender<()>) -> Command<M>,
    ) -> Result<(), Gone> {
        let mut outcome = Ok(());
        for answer in self.post_all(command) {
            let answered = answer.and_then(|answer| answer.recv().map_err(|_| Gone));
            outcome = outcome.and(answered);
        }
        outcome
    }
}

/// Binds the calling thread to a processor.
fn bind(cpu: u16) -> Result<(), StartError> {
    let mut set = CpuSet::new();
    set.set(usize::from(cpu))
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
        .map_err(|errno| StartError::Affinity {
            cpu,
            source: errno.into(),
        })
}
