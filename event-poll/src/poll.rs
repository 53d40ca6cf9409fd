//! The event loop.

use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags, EpollTimeout};

use crate::busy::BusyPoll;
use crate::cycle::{Host, Poller, cycle};
use crate::error::Error;
use crate::event::{Event, Interest, Token};
use crate::registry::{Registry, WAKE};
use crate::stopper::Stopper;

/// Most events one [`EventPoll::wait`] may hand out. A data thread waits for a few descriptors per
/// queue; beyond a thousand per wait nothing is saved, and the caller's array only grows.
pub const MAX_EVENTS_PER_WAIT: usize = 1024;

/// Counters since the loop was made; they wrap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Returns from the kernel's wait, for whatever reason.
    pub wakeups: u64,
    /// Events handed out.
    pub events: u64,
}

/// Waits for many descriptors at once (`epoll(7)`, level triggered).
///
/// Owned by the one thread that waits; a [`Stopper`] reaches it from others. All storage is
/// allocated by [`new`](Self::new).
///
/// # What the caller must see to
///
/// Remove a descriptor before closing it. The kernel watches the open file description, not the
/// descriptor: while a front-end holds the other end of the same eventfd, a descriptor closed without
/// [`remove`](Self::remove) goes on being reported under its token and can no longer be removed.
///
/// # Example
///
/// ```
/// use event_poll::{EventNotifier, EventPoll, Token};
/// use std::time::Duration;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let queues = [EventNotifier::new()?, EventNotifier::new()?];
/// let mut poll = EventPoll::new(queues.len())?;
/// for (index, queue) in queues.iter().enumerate() {
///     poll.add(queue, Token(index as u64))?;
/// }
/// queues[1].notify()?;
///
/// let ready = poll.wait(Some(Duration::from_secs(1)))?;
/// assert_eq!(ready.len(), 1);
/// assert_eq!(ready[0].token, Token(1));
/// assert!(ready[0].is_readable());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct EventPoll {
    registry: Registry,
    stopper: Stopper,
    /// What the kernel fills, `max_events` long. A wake may take an event's place: that one is then at the
    /// head of the kernel's list, and comes with the next wait.
    raw: Vec<EpollEvent>,
    /// Capacity `raw.len()`, never exceeded.
    ready: Vec<Event>,
    stats: Stats,
}

impl EventPoll {
    /// Makes an empty set that hands out up to `max_events` events per wait,
    /// 1..=[`MAX_EVENTS_PER_WAIT`]. More descriptors than that may be registered: the kernel takes
    /// ready ones in turn, so none starves.
    ///
    /// # Errors
    ///
    /// * [`Error::EventsPerWait`]: fault of the caller.
    /// * [`Error::System`]: the host is out of descriptors or memory.
    pub fn new(max_events: usize) -> Result<Self, Error> {
        if !(1..=MAX_EVENTS_PER_WAIT).contains(&max_events) {
            return Err(Error::EventsPerWait {
                requested: max_events,
            });
        }
        let registry = Registry::new()?;
        let stopper = Stopper::new()?;
        registry
            .epoll()
            .add(
                stopper.notifier(),
                EpollEvent::new(EpollFlags::EPOLLIN, WAKE),
            )
            .map_err(|e| Error::system("epoll_ctl", e))?;
        let raw = vec![EpollEvent::empty(); max_events];
        let ready = Vec::with_capacity(raw.len());
        Ok(Self {
            registry,
            stopper,
            raw,
            ready,
            stats: Stats::default(),
        })
    }

    /// Waits for `fd` to become readable from now on, and reports it as `token`.
    ///
    /// # Errors
    ///
    /// * [`Error::AlreadyRegistered`], [`Error::ReservedToken`]: fault of the caller.
    /// * [`Error::NotPollable`]: a regular file or the like.
    /// * [`Error::System`]: the host's limit of watches is reached, or the epoll instance itself was
    ///   added.
    pub fn add(&mut self, fd: impl AsFd, token: Token) -> Result<(), Error> {
        self.registry.add(fd, token)
    }

    /// As [`add`](Self::add), for what `interest` says.
    ///
    /// # Errors
    ///
    /// As [`add`](Self::add).
    pub fn add_for(
        &mut self,
        fd: impl AsFd,
        token: Token,
        interest: Interest,
    ) -> Result<(), Error> {
        self.registry.add_for(fd, token, interest)
    }

    /// As [`add`](Self::add), for the notifications of a [`Poller`]: while those given to
    /// [`run_polling`](Self::run_polling) find work nobody needs to look at this descriptor.
    ///
    /// # Errors
    ///
    /// As [`add`](Self::add).
    pub fn add_polled(&mut self, fd: impl AsFd, token: Token) -> Result<(), Error> {
        self.registry.add_polled(fd, token)
    }

    /// Stops waiting for `fd`. It has to be the descriptor that was added, not a clone of it.
    ///
    /// # Errors
    ///
    /// * [`Error::NotRegistered`]: fault of the caller.
    /// * [`Error::System`]: the kernel refused for another reason.
    pub fn remove(&mut self, fd: impl AsFd) -> Result<(), Error> {
        self.registry.remove(fd)
    }

    /// A handle that adds and removes descriptors while the loop runs: from its own handler, or from
    /// another thread.
    pub fn registry(&self) -> Registry {
        self.registry.clone()
    }

    /// Sleeps until a descriptor is ready, `timeout` has passed, or a [`Stopper`] wakes it, and
    /// returns what is ready: up to `max_events`, none after a timeout. A wake takes one event's place,
    /// so there may be none after it either; what is ready then comes with the next wait.
    ///
    /// `None` waits for ever, a zero timeout looks without sleeping. Other timeouts are rounded up to
    /// the kernel's millisecond, so a short one never becomes a busy loop, and are never cut short by
    /// a signal. One system call, and a second one after a wake.
    ///
    /// A stop ends one wait and does not keep later ones from sleeping: work in flight can still be
    /// waited for. Look at [`Stopper::is_stopped`] in the loop.
    ///
    /// # Errors
    ///
    /// [`Error::System`]: what `epoll_wait` returned; the set is of no further use.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<&[Event], Error> {
        self.ready.clear();
        // A deadline beyond the clock's range never comes.
        let deadline = match timeout {
            Some(timeout) if !timeout.is_zero() => Instant::now().checked_add(timeout),
            _ => None,
        };
        let mut next = match timeout {
            Some(timeout) => round_up(timeout),
            None => EpollTimeout::NONE,
        };
        loop {
            let count = match self.registry.epoll().wait(&mut self.raw, next) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(errno) => return Err(Error::system("epoll_wait", errno)),
            };
            self.stats.wakeups = self.stats.wakeups.wrapping_add(1);
            if count > 0 {
                self.take(count);
                return Ok(&self.ready);
            }
            if timeout == Some(Duration::ZERO) {
                return Ok(&self.ready);
            }
            // Nothing yet: a signal, or the end of a timeout too long for one call, or of all.
            if let Some(deadline) = deadline {
                match remaining(deadline, Instant::now()) {
                    Some(timeout) => next = timeout,
                    None => return Ok(&self.ready),
                }
            }
        }
    }

    /// Turns the first `count` raw events into `ready`.
    fn take(&mut self, count: usize) {
        let mut woken = false;
        for raw in self.raw.iter().take(count) {
            if raw.data() == WAKE {
                woken = true;
            } else {
                self.ready.push(Event::new(Token(raw.data()), raw.events()));
            }
        }
        if woken {
            // Our own eventfd, whose read can not fail; were it to, it would stay readable and the
            // next wait come back as well, which loses nothing.
            let cleared = self.stopper.notifier().test_and_clear();
            debug_assert!(cleared.is_ok(), "{cleared:?}");
        }
        // At most max_events ready, far below the range of u64.
        self.stats.events = self.stats.events.wrapping_add(self.ready.len() as u64);
    }

    /// Waits and calls `handler` for each event until a [`Stopper`] stops the loop or the handler
    /// breaks. Events not handled then are reported again by the next wait, as long as their cause
    /// stands.
    ///
    /// The handler has to remove the cause (read the eventfd), or the loop comes straight back to it.
    /// To add or remove descriptors it uses a [`Registry`].
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait).
    pub fn run(&mut self, mut handler: impl FnMut(Event) -> ControlFlow<()>) -> Result<(), Error> {
        while !self.stopper.is_stopped() {
            self.wait(None)?;
            if self.deliver(&mut handler).is_break() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// As [`run`](Self::run), and asks the `pollers` for work: in turn, until none has any, for as long
    /// as `busy` says that it pays, and once more after asking for notifications. Only then it
    /// waits. See [`Poller`] for the order, which loses no notification.
    ///
    /// While a poller finds work there is no system call, but for a look without sleeping at the
    /// descriptors that no poller speaks for (all but those of [`add_polled`](Self::add_polled)), if
    /// there are any: once in 64 turns. A [stop](Stopper::stop) is seen at every turn.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait).
    ///
    /// # Example
    ///
    /// ```
    /// use event_poll::{BusyPoll, EventNotifier, EventPoll, Poller, PollSettings, Stopper, Token};
    /// use std::ops::ControlFlow;
    /// use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
    ///
    /// /// What both sides share: a count of requests, and whether to kick after raising it.
    /// #[derive(Default)]
    /// struct Ring { requests: AtomicU32, kicks_wanted: AtomicBool }
    ///
    /// struct Queue<'a> { ring: &'a Ring, served: u32, stopper: Stopper }
    ///
    /// impl Poller for Queue<'_> {
    ///     fn poll(&mut self) -> bool {
    ///         let requests = self.ring.requests.load(Ordering::Acquire);
    ///         let work = requests != self.served;
    ///         self.served = requests;
    ///         if requests == 1000 {
    ///             self.stopper.stop();
    ///         }
    ///         work
    ///     }
    ///     fn arm(&mut self) -> bool {
    ///         self.ring.kicks_wanted.store(true, Ordering::Relaxed);
    ///         fence(Ordering::SeqCst); // pairs with the other side's
    ///         self.ring.requests.load(Ordering::Acquire) == self.served
    ///     }
    ///     fn disarm(&mut self) {
    ///         self.ring.kicks_wanted.store(false, Ordering::Relaxed);
    ///     }
    /// }
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let ring = Ring::default();
    /// let kick = EventNotifier::new()?;
    /// let mut poll = EventPoll::new(4)?;
    /// poll.add_polled(&kick, Token(0))?;
    /// let mut queue = Queue { ring: &ring, served: 0, stopper: poll.stopper() };
    /// let mut busy = BusyPoll::new(PollSettings::default());
    ///
    /// std::thread::scope(|scope| {
    ///     scope.spawn(|| {
    ///         for _ in 0..1000 {
    ///             ring.requests.fetch_add(1, Ordering::Release);
    ///             fence(Ordering::SeqCst); // pairs with the one in `arm`
    ///             if ring.kicks_wanted.load(Ordering::Relaxed) {
    ///                 kick.notify().unwrap();
    ///             }
    ///         }
    ///     });
    ///     poll.run_polling(&mut busy, &mut [&mut queue], |_event| {
    ///         let _ = kick.test_and_clear(); // the poller looks afterwards
    ///         ControlFlow::Continue(())
    ///     })
    /// })?;
    /// assert_eq!(queue.served, 1000);
    /// # Ok(())
    /// # }
    /// ```
    pub fn run_polling(
        &mut self,
        busy: &mut BusyPoll,
        pollers: &mut [&mut dyn Poller],
        handler: impl FnMut(Event) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        let mut host = Polled {
            poll: self,
            handler,
        };
        cycle(&mut host, busy, pollers)
    }

    /// Gives each ready event to `handler` until it breaks or the loop is stopped.
    fn deliver(&mut self, handler: &mut impl FnMut(Event) -> ControlFlow<()>) -> ControlFlow<()> {
        let removals = self.registry.removals();
        for event in &self.ready {
            if self.stopper.is_stopped() {
                return ControlFlow::Break(());
            }
            if self.registry.removals() != removals && !self.registry.has(event.token) {
                continue;
            }
            handler(*event)?;
        }
        ControlFlow::Continue(())
    }

    /// A handle that stops or wakes this loop from any thread.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Takes back a [stop](Stopper::stop), so that the next [`run`](Self::run) runs. The wake that
    /// came with the stop may still end one wait.
    pub fn reset(&mut self) {
        self.stopper.reset();
    }

    /// Counters since [`new`](Self::new).
    pub fn stats(&self) -> Stats {
        self.stats
    }
}

/// The loop as [`cycle`] sees it.
struct Polled<'a, F> {
    poll: &'a mut EventPoll,
    handler: F,
}

impl<F: FnMut(Event) -> ControlFlow<()>> Host for Polled<'_, F> {
    type Error = Error;

    fn is_stopped(&self) -> bool {
        self.poll.stopper.is_stopped()
    }

    fn all_polled(&self) -> bool {
        self.poll.registry.all_polled()
    }

    fn look(&mut self) -> Result<ControlFlow<()>, Error> {
        self.poll.wait(Some(Duration::ZERO))?;
        Ok(self.poll.deliver(&mut self.handler))
    }

    fn sleep(&mut self) -> Result<ControlFlow<()>, Error> {
        self.poll.wait(None)?;
        Ok(self.poll.deliver(&mut self.handler))
    }
}

/// To whole milliseconds, upwards; what is too long for one call is cut, and the caller waits again.
fn round_up(timeout: Duration) -> EpollTimeout {
    let millis = timeout.as_nanos().div_ceil(1_000_000);
    EpollTimeout::try_from(millis).unwrap_or(EpollTimeout::MAX)
}

/// What is left until `deadline`, `None` if nothing is.
fn remaining(deadline: Instant, now: Instant) -> Option<EpollTimeout> {
    let left = deadline.saturating_duration_since(now);
    (!left.is_zero()).then(|| round_up(left))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_round_up_and_never_down_to_a_busy_loop() {
        let millis = |timeout| round_up(timeout).as_millis();
        assert_eq!(millis(Duration::ZERO), Some(0));
        assert_eq!(millis(Duration::from_nanos(1)), Some(1));
        assert_eq!(millis(Duration::from_millis(1)), Some(1));
        assert_eq!(millis(Duration::from_nanos(1_000_001)), Some(2));
    }

    #[test]
    fn i9_after_a_signal_only_the_rest_of_a_timeout_is_waited_for() {
        let start = Instant::now();
        let deadline = start + Duration::from_millis(10);
        let after = |micros| {
            let left = remaining(deadline, start + Duration::from_micros(micros));
            left.map(|left| left.as_millis())
        };
        assert_eq!(after(4000), Some(Some(6)));
        assert_eq!(after(9999), Some(Some(1)), "rounded up, no busy loop");
        assert_eq!(after(10_000), None);
        assert_eq!(after(20_000), None);
    }

    #[test]
    fn timeouts_beyond_the_kernels_range_are_cut_not_negative() {
        assert_eq!(round_up(Duration::MAX), EpollTimeout::MAX);
        assert_eq!(EpollTimeout::MAX.as_millis(), Some(i32::MAX as u32));
    }
}
