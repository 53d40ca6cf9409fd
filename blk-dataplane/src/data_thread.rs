//! A data thread: one loop that owns some of a device's rings and an I/O queue.
//!
//! Nothing here is shared, but for what `peers.rs` has. Control reaches the thread as [`Command`]s that it takes between two
//! batches, so stopping a queue, replacing the memory map or draining cannot race with popping.
//!
//! ```text
//!        commands ──┐
//! kick ─ eventfd ─> wait ─> fetch (pop, parse, plug) ─> submit (merge, flush, one io_submit)
//!                    ^                                     │
//!                    └── arm ── publish, call <── reap <───┘
//! ```
//!
//! A pass that found nothing is repeated for a while before the sleep, as long as that pays: see [`Pace`].

mod bounce;
mod buffers;
mod command;
mod executor;
mod failures;
mod flush;
mod hot_region;
mod pace;
pub(crate) mod peers;
mod queue;
mod range_table;
mod slots;
mod sync;
mod trace_points;

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use event_poll::{EventPoll, Stopper, Token};
use hostmem::SigbusGuard;
use ioq::{Armed, RETRY_DELAY};
use vm_memory::GuestMemoryBackend;
use vring::Chain;

use self::buffers::MemoryRef;
use self::executor::{Executor, Finished, Started};
use self::hot_region::HotRegion;
use self::pace::Pace;
use self::peers::{Desks, Peer, Seat, Wake};
use self::queue::{Fetched, QueueState};
use self::slots::SlotId;

pub(crate) use self::command::{CacheFeatures, Command, QueueParts};

use crate::counters::{Counters, QueueCounters};
use crate::device::Device;
use crate::notifier::{Notifier, SharedNotifier};

/// Chains fetched from one queue before the others, the completions and the control channel get
/// their turn (hostile-inputs A11, Z4). Half the requests in flight: the kernel works on one half
/// while the other is fetched.
const BATCH_MAX: usize = 128;

/// The same where an operation has come to its end when the call that submits it returns: the guest takes what has
/// been done and makes new requests while the thread does the next ones, and a guest that is as fast as the device
/// seldom finds nothing and sleeps. docs/performance.md has the measurements.
const INLINE_BATCH_MAX: usize = 8;

/// And where the guest looks for completions by itself: it does not fall asleep, and a pass costs less for each.
const INLINE_BATCH_POLLED: usize = 16;

/// Longest sleep of a thread that serves a queue which nobody kicks: what epoll_wait(2) can tell apart.
const POLLED_INTERVAL: Duration = Duration::from_millis(1);

/// Events taken per wait; the rest come with the next.
const EVENTS_MAX: usize = 64;

/// Longest sleep while an operation is under way that will not signal its end: one that was expected to be done
/// by the time it was submitted, as the many before it. The shortest that `epoll_wait` takes.
const SILENT_SLEEP_MAX: Duration = Duration::from_millis(1);

/// Token of the I/O queue's completion eventfd. Queues have their index.
const COMPLETIONS: Token = Token(1 << 32);

/// Why a data thread cannot start. The host's fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The kernel gives no I/O context.
    #[error(transparent)]
    IoQueue(#[from] ioq::SetupError),
    /// The kernel gives no epoll instance or eventfd.
    #[error(transparent)]
    EventPoll(#[from] event_poll::Error),
    /// The kernel gives no thread.
    #[error("cannot start the data thread: {0}")]
    Thread(std::io::Error),
    /// A thread may not run on the processor it was to be bound to: there is none of that number, or this
    /// process may not use it. The caller's fault.
    #[error("cannot bind a data thread to CPU {cpu}: {source}")]
    Affinity {
        /// The processor's number.
        cpu: u16,
        /// What the host said.
        source: std::io::Error,
    },
    /// The thread ended before it ran. A bug in this crate.
    #[error("the data thread ended at once")]
    Ended,
    /// No memory for the bounce buffers.
    #[error("no memory for the device's buffers")]
    NoMemory,
}

impl Wake for Stopper {
    fn wake(&self) {
        Self::wake(self);
    }
}

/// What a data thread is made of.
#[derive(Debug)]
pub(crate) struct ThreadParts<M: GuestMemoryBackend> {
    pub(crate) device: Device,
    pub(crate) memory: Arc<M>,
    pub(crate) poll: EventPoll,
    pub(crate) commands: Receiver<Command<M>>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) queue_counters: Arc<[QueueCounters]>,
    /// Which of the device's threads it is.
    pub(crate) number: Peer,
    pub(crate) desks: Arc<Desks<Stopper>>,
    pub(crate) paused: bool,
    pub(crate) marks_dirty: bool,
    pub(crate) writeback: bool,
}

/// Someone waiting until nothing is in flight.
#[derive(Debug)]
struct Drain {
    reply: Sender<()>,
    then: AfterDrain,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AfterDrain {
    StayPaused,
    Exit,
}

#[derive(Debug)]
pub(crate) struct DataThread<M: GuestMemoryBackend> {
    poll: EventPoll,
    commands: Receiver<Command<M>>,
    queues: Box<[Option<Box<QueueState<M>>>]>,
    /// Numbers of those there are: a device may have many, of which few run.
    running: Vec<usize>,
    /// A queue is to stop, or somebody waits for a drain: after each pass it is seen whether the time has come.
    winding_up: bool,
    executor: Executor<M>,
    seat: Seat<Stopper>,
    pace: Pace,
    memory: MemoryRef<M>,
    /// Where every chain is popped into.
    chain: Chain,
    /// Which of the running queues' turn it was to go first.
    first_queue: usize,
    /// Losses of memory in this process when the rings were looked up.
    losses: usize,
    /// How long a sleep may be, at most, if not until something comes.
    sleep_max: Option<Duration>,
    /// No fetching from any queue until told to resume.
    paused: bool,
    /// The configuration space's `writeback`.
    writeback: bool,
    drains: Vec<Drain>,
    counters: Arc<Counters>,
    queue_counters: Arc<[QueueCounters]>,
    number: Peer,
    /// Signalled when guest memory has been written to.
    logged: Option<SharedNotifier>,
}

impl<M: GuestMemoryBackend> DataThread<M> {
    /// Built on the thread itself: what it owns never moves to another.
    pub(crate) fn new(parts: ThreadParts<M>) -> Result<Self, StartError> {
        let ThreadParts {
            device,
            memory,
            mut poll,
            commands,
            counters,
            queue_counters,
            number,
            desks,
            paused,
            marks_dirty,
            writeback,
        } = parts;
        let mut executor =
            Executor::new(&device, Arc::clone(&counters), Arc::clone(&queue_counters))?;
        executor.set_marks_dirty(marks_dirty);
        if let Some(fd) = executor.ioq().completion_fd() {
            poll.add(fd, COMPLETIONS)?;
        }
        Ok(Self {
            // When nothing can fail any more: a thread that could not start takes no place.
            seat: Seat::new(desks, number, poll.stopper()),
            poll,
            commands,
            queues: (0..device.num_queues()).map(|_| None).collect(),
            running: Vec::with_capacity(usize::from(device.num_queues())),
            winding_up: false,
            executor,
            pace: Pace::new(device.poll_max()),
            memory: MemoryRef::new(memory),
            chain: Chain::for_queue(device.max_queue_size()),
            first_queue: 0,
            // Before any ring is: one that comes has been looked up later.
            losses: SigbusGuard::losses(),
            sleep_max: None,
            paused,
            writeback,
            drains: Vec::new(),
            counters,
            queue_counters,
            number,
            logged: None,
        })
    }

    pub(crate) fn poll_events_max() -> usize {
        EVENTS_MAX
    }

    /// Runs until told to exit, then has nothing in flight.
    pub(crate) fn run(mut self) {
        trace_points::start(self.number);
        tracing::debug!(thread = self.number, "data thread started");
        while self.run_in_one_map() {}
        tracing::debug!(thread = self.number, "data thread stopped");
        trace_points::stop(self.number);
    }

    /// Pass after pass, until the memory map is replaced. False if the thread is to exit.
    // A function of its own for whoever counts instructions.
    #[inline(never)]
    fn run_in_one_map(&mut self) -> bool {
        let memory = self.memory.clone();
        // Over all passes: what most of them look up is in one region.
        let mut hot = HotRegion::new(&memory);
        loop {
            // Cheaper than a try_recv that finds nothing, which fences.
            if !self.commands.is_empty() {
                while let Ok(command) = self.commands.try_recv() {
                    self.command(command);
                }
                if !memory.is(&self.memory) {
                    return true;
                }
            }
            let fetched = self.fetch_all(&mut hot);
            self.executor.disarm();
            self.executor.submit(&mut self.seat);
            let completed = self.reap(&mut hot);
            self.publish_all();
            if self.settle() {
                return false;
            }
            // While work keeps coming the thread neither sleeps nor lets the guest kick.
            let idle = if fetched || completed > 0 {
                self.pace.work(&self.counters);
                false
            } else {
                !self.keep_polling() && self.arm()
            };
            // After all that touches memory in a pass. A ring that was lost says so at the next pop.
            if !self.notice_lost_memory() && idle {
                self.sleep();
            }
        }
    }

    /// Fetches from every queue that may have something. True if any had. `hot` is of the map in force.
    fn fetch_all(&mut self, hot: &mut HotRegion<'_, M>) -> bool {
        if self.on_hold() {
            return false;
        }
        // Each turn begins one running queue further: when room is short, the queue that comes first
        // takes it, and that must not always be the same one (hostile-inputs Z4).
        let count = self.running.len();
        self.first_queue += 1;
        if self.first_queue >= count {
            self.first_queue = 0;
        }
        let mut fetched = false;
        for turn in (self.first_queue..count).chain(0..self.first_queue) {
            fetched |= self.fetch(self.running[turn], hot);
        }
        fetched
    }

    /// Whether nothing may be fetched from any queue.
    fn on_hold(&self) -> bool {
        self.paused || !self.drains.is_empty()
    }

    /// Fetches up to a batch from one queue. True if there was any.
    ///
    /// An armed queue is looked at too: nobody waits for its kick while another one keeps the thread
    /// from sleeping (hostile-inputs Z4).
    fn fetch(&mut self, index: usize, hot: &mut HotRegion<'_, M>) -> bool {
        let Self {
            queues,
            executor,
            chain,
            counters,
            queue_counters,
            ..
        } = self;
        let Some(queue) = queues[index]
            .as_deref_mut()
            .filter(|queue| queue.may_fetch())
        else {
            return false;
        };
        let of_queue = &queue_counters[index].requests;
        let batch_max = if !executor.ioq().completes_on_submit() {
            BATCH_MAX
        } else if queue.guest_polls() {
            INLINE_BATCH_POLLED
        } else {
            INLINE_BATCH_MAX
        };
        for fetched in 0..batch_max {
            if !executor.has_room() {
                queue.starved = true;
                return fetched > 0;
            }
            match queue.pop(chain, counters, of_queue) {
                Fetched::Chain(head) => {
                    // The next one's header, while this one is started.
                    if let Some(addr) = queue.ring.queue().next_buffer() {
                        hot.prefetch(addr);
                    }
                    match executor.start(queue.index, queue.accepted, head, chain, hot) {
                        Started::InFlight => {}
                        Started::Finished { head, used_len } => queue.push(head, used_len),
                        Started::NoRoom(head) => {
                            queue.unpop(head);
                            queue.starved = true;
                            return fetched > 0;
                        }
                    }
                }
                Fetched::BadChain(head) => {
                    queue.push(head, 0);
                    counters.bad_chains.add(1);
                    of_queue.bad_chains.add(1);
                }
                Fetched::Nothing => return fetched > 0,
            }
            counters.requests.add(1);
        }
        queue.more = executor.is_null() && queue.may_fetch();
        true
    }

    /// Whether memory was lost since the last pass, somewhere in this process (hostile-inputs M10). Then
    /// every ring is looked up again.
    fn notice_lost_memory(&mut self) -> bool {
        let losses = SigbusGuard::losses();
        if losses == self.losses {
            return false;
        }
        self.losses = losses;
        self.executor.set_losses(losses);
        for queue in self.queues.iter_mut().flatten() {
            queue.check_memory();
        }
        true
    }

    /// `hot` is of the map in force.
    fn reap(&mut self, hot: &mut HotRegion<'_, M>) -> usize {
        let Self {
            executor, queues, ..
        } = self;
        let mut room = false;
        let operations = executor.reap(
            hot,
            |Finished {
                 queue,
                 head,
                 used_len,
                 len,
             }| {
                room = true;
                if let Some(queue) = queues
                    .get_mut(usize::from(queue))
                    .and_then(|q| q.as_deref_mut())
                {
                    queue.push_moved(head, used_len, len);
                }
            },
        );
        if room {
            for queue in queues.iter_mut().flatten() {
                queue.starved = false;
            }
        }
        operations
    }

    /// One index store and at most one interrupt per queue that has something to tell.
    fn publish_all(&mut self) {
        let mut published = false;
        for &index in &self.running {
            if let Some(queue) = self.queues[index].as_deref_mut() {
                published |= queue.publish(&self.counters);
            }
        }
        // After the marks, which go before what the guest is told or with it.
        if published
            && let Some(logged) = &self.logged
            && let Err(error) = logged.0.notify()
        {
            tracing::debug!(%error, "the log's descriptor cannot be signalled");
        }
    }

    /// Ends what was waiting for requests to complete. True if the thread is to exit.
    fn settle(&mut self) -> bool {
        if !self.winding_up {
            return false;
        }
        self.wind_up()
    }

    #[cold]
    fn wind_up(&mut self) -> bool {
        for index in 0..self.queues.len() {
            let on_hold = self.on_hold();
            let drained = |queue: &mut Box<QueueState<M>>| {
                // What a predecessor has left is served before the end too, unless nothing may be.
                queue.stopping.is_some()
                    && queue.ring.queue().in_flight() == 0
                    && (on_hold || !queue.may_fetch())
            };
            if let Some(mut queue) = self.queues[index].take_if(drained) {
                self.unwatch(&mut queue);
                let base = queue.ring.queue().base();
                if let Some(reply) = queue.stopping.take() {
                    // Nobody waiting any more is no reason to fail.
                    let _ = reply.send(Some(base));
                }
                self.update_write_through();
            }
        }
        self.count_running();
        let mut queues = self.queues.iter().flatten();
        self.winding_up = !self.drains.is_empty() || queues.any(|queue| queue.stopping.is_some());
        if self.drains.is_empty() || self.executor.in_flight() > 0 {
            return false;
        }
        let mut exit = false;
        for Drain { reply, then } in self.drains.drain(..) {
            exit |= then == AfterDrain::Exit;
            self.paused |= then == AfterDrain::StayPaused;
            let _ = reply.send(());
        }
        exit
    }

    /// After a queue has come or gone.
    fn count_running(&mut self) {
        let queues = self.queues.iter().enumerate();
        self.running.clear();
        self.running
            .extend(queues.filter_map(|(index, queue)| queue.as_ref().map(|_| index)));
    }

    /// Whether to look for work again before letting the guest kick and sleeping.
    fn keep_polling(&mut self) -> bool {
        let in_flight = self.executor.in_flight() > 0;
        // With nothing to come from anywhere, only control is waited for, and that can wait.
        let expecting = in_flight
            || !self.on_hold() && self.queues.iter().flatten().any(|queue| queue.may_fetch());
        let again = expecting && self.pace.keep_polling(in_flight);
        if again {
            std::hint::spin_loop();
        }
        again
    }

    /// Lets the guest kick again before a sleep. False if something came in meanwhile: the kick for
    /// it was suppressed, so it must be fetched without one (hostile-inputs N7).
    fn arm(&mut self) -> bool {
        if !self.commands.is_empty() {
            return false;
        }
        self.sleep_max = match self.executor.arm() {
            Armed::Sleep => None,
            // These were expected to have completed in the system call that submitted them. That they are
            // late is found out without a signal.
            Armed::Silent(_) => Some(SILENT_SLEEP_MAX),
            _ => return false,
        };
        if self.on_hold() {
            return true;
        }
        let mut all_empty = true;
        for queue in self.queues.iter_mut().flatten() {
            // A starved queue is fetched from when a completion has made room, kick or no kick.
            if queue.may_fetch() && !queue.armed && !queue.starved && !queue.polled {
                queue.armed = queue.ring.notifications().enable_notification();
                all_empty &= queue.armed;
            }
        }
        all_empty
    }

    /// Sleeps until a kick, a completion or a command.
    fn sleep(&mut self) {
        if !self.seat.lie_down() {
            return;
        }
        self.counters.sleeps.add(1);
        let timeout = self.longest_sleep();
        let events = self.poll.wait(timeout);
        self.seat.get_up();
        let events = match events {
            Ok(events) => events,
            Err(error) => {
                // epoll_wait fails only on a bad descriptor or address, neither of which can be.
                // Slow down rather than spin: commands and rings are still looked at.
                tracing::error!(%error, "waiting for events failed");
                std::thread::sleep(RETRY_DELAY);
                return;
            }
        };
        let mut dead_kicks = [None; EVENTS_MAX];
        for (event, dead) in events.iter().zip(&mut dead_kicks) {
            if event.token == COMPLETIONS {
                // Before the completions are looked at: one that comes later sets it again.
                self.executor.ioq().clear_completion_fd();
                continue;
            }
            let index = usize::try_from(event.token.0).unwrap_or(usize::MAX);
            if let Some(queue) = self.queues.get_mut(index).and_then(|q| q.as_deref_mut()) {
                queue.armed = false;
                if !queue.clear_kick() {
                    *dead = Some(index);
                }
            }
        }
        for index in dead_kicks.into_iter().flatten() {
            self.drop_kick(index);
        }
    }

    /// `None`: until something happens.
    fn longest_sleep(&self) -> Option<Duration> {
        let polled = |queue: &QueueState<M>| queue.polled && queue.may_fetch() && !queue.starved;
        let is_polling = !self.on_hold() && self.queues.iter().flatten().any(|queue| polled(queue));
        let needs_retry = self.executor.ioq().needs_retry();
        let reasons = [
            is_polling.then_some(POLLED_INTERVAL),
            needs_retry.then_some(RETRY_DELAY),
            self.sleep_max,
        ];
        reasons.into_iter().flatten().min()
    }

    /// Stops watching a kick descriptor that cannot be read: level-triggered, it would wake the
    /// thread for ever (hostile-inputs N9).
    fn drop_kick(&mut self, index: usize) {
        tracing::warn!(
            queue = index,
            "the kick descriptor cannot be read; no longer watched"
        );
        if let Some(mut queue) = self.queues[index].take() {
            self.unwatch(&mut queue);
            self.queues[index] = Some(queue);
        }
    }

    fn unwatch(&mut self, queue: &mut QueueState<M>) {
        if let Some(kick) = queue.kick.take()
            && let Err(error) = self.poll.remove(&kick)
        {
            tracing::warn!(%error, "a kick descriptor was not watched");
        }
    }

    /// Writes are write-through as soon as one running queue's driver wants or needs it.
    fn update_write_through(&mut self) {
        let writeback = self.writeback;
        let mut queues = self.queues.iter().flatten();
        let through = queues.any(|queue| queue.cache.is_write_through(writeback));
        self.executor.set_write_through(through);
    }
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
