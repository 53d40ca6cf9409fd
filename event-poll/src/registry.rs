//! The set of descriptors waited for.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent};

use crate::error::Error;
use crate::event::{Interest, Token};

/// The token of the loop's own wake eventfd.
pub(crate) const WAKE: u64 = u64::MAX;

/// Adds descriptors to an [`EventPoll`](crate::EventPoll) and removes them, from inside its handler or
/// from any other thread, also while it waits. See [`EventPoll::registry`](crate::EventPoll::registry).
///
/// # Example
///
/// ```
/// use event_poll::{EventNotifier, EventPoll, Token};
/// use std::ops::ControlFlow;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let (first, second) = (EventNotifier::new()?, EventNotifier::new()?);
/// let mut poll = EventPoll::new(4)?;
/// poll.add(&first, Token(1))?;
/// let registry = poll.registry();
/// first.notify()?;
/// second.notify()?;
///
/// let mut seen = Vec::new();
/// poll.run(|event| {
///     seen.push(event.token);
///     if event.token == Token(2) {
///         return ControlFlow::Break(());
///     }
///     // While the loop runs: one out, another in.
///     registry.remove(&first).unwrap();
///     registry.add(&second, Token(2)).unwrap();
///     ControlFlow::Continue(())
/// })?;
/// assert_eq!(seen, [Token(1), Token(2)]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Registry(Arc<Set>);

#[derive(Debug)]
pub(crate) struct Set {
    epoll: Epoll,
    /// What is registered. Only for adding, removing, and events that come in a batch with a removal.
    entries: Mutex<Vec<Entry>>,
    /// How often something was removed; wraps.
    removals: AtomicUsize,
    /// Descriptors that no poller speaks for.
    unpolled: AtomicUsize,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    fd: RawFd,
    token: Token,
    polled: bool,
}

impl Registry {
    pub(crate) fn new() -> Result<Self, Error> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(|e| Error::system("epoll_create1", e))?;
        Ok(Self(Arc::new(Set {
            epoll,
            entries: Mutex::new(Vec::new()),
            removals: AtomicUsize::new(0),
            unpolled: AtomicUsize::new(0),
        })))
    }

    /// Waits for `fd` to become readable from now on, and reports it as `token`.
    ///
    /// # Errors
    ///
    /// * [`Error::AlreadyRegistered`], [`Error::ReservedToken`]: fault of the caller.
    /// * [`Error::NotPollable`]: a regular file or the like.
    /// * [`Error::System`]: the host's limit of watches is reached, or the epoll instance itself was
    ///   added.
    pub fn add(&self, fd: impl AsFd, token: Token) -> Result<(), Error> {
        self.add_entry(fd, token, Interest::READABLE, false)
    }

    /// As [`add`](Self::add), for what `interest` says.
    ///
    /// # Errors
    ///
    /// As [`add`](Self::add).
    pub fn add_for(&self, fd: impl AsFd, token: Token, interest: Interest) -> Result<(), Error> {
        self.add_entry(fd, token, interest, false)
    }

    /// As [`add`](Self::add), for the notifications of a [`Poller`](crate::Poller) of
    /// [`run_polling`](crate::EventPoll::run_polling): as long as the pollers find work nobody needs to
    /// look at this descriptor. Elsewhere there is no difference.
    ///
    /// # Errors
    ///
    /// As [`add`](Self::add).
    pub fn add_polled(&self, fd: impl AsFd, token: Token) -> Result<(), Error> {
        self.add_entry(fd, token, Interest::READABLE, true)
    }

    /// Changes what is waited for on `fd`, and its token. It has to be the descriptor that was added, not
    /// a clone of it.
    ///
    /// # Errors
    ///
    /// * [`Error::NotRegistered`], [`Error::ReservedToken`]: fault of the caller.
    /// * [`Error::System`]: the kernel refused for another reason.
    pub fn change(&self, fd: impl AsFd, token: Token, interest: Interest) -> Result<(), Error> {
        let mut event = self.event(token, interest)?;
        let mut entries = self.entries();
        match self.0.epoll.modify(&fd, &mut event) {
            Ok(()) => {}
            Err(Errno::ENOENT | Errno::EPERM) => return Err(Error::NotRegistered),
            Err(errno) => return Err(Error::system("epoll_ctl", errno)),
        }
        let fd = fd.as_fd().as_raw_fd();
        if let Some(entry) = entries.iter_mut().find(|entry| entry.fd == fd) {
            entry.token = token;
        }
        Ok(())
    }

    /// Stops waiting for `fd`. It has to be the descriptor that was added, not a clone of it. Called from
    /// the loop's handler, no later event of it reaches the handler, not even one that came with the
    /// event being handled, unless another descriptor has the same token.
    ///
    /// # Errors
    ///
    /// * [`Error::NotRegistered`]: fault of the caller.
    /// * [`Error::System`]: the kernel refused for another reason.
    pub fn remove(&self, fd: impl AsFd) -> Result<(), Error> {
        let mut entries = self.entries();
        match self.0.epoll.delete(&fd) {
            Ok(()) => {}
            // EPERM: of a kind that can not have been added.
            Err(Errno::ENOENT | Errno::EPERM) => return Err(Error::NotRegistered),
            Err(errno) => return Err(Error::system("epoll_ctl", errno)),
        }
        let fd = fd.as_fd().as_raw_fd();
        if let Some(place) = entries.iter().position(|entry| entry.fd == fd) {
            entries.swap_remove(place);
        }
        self.count_unpolled(&entries);
        // Relaxed: orders nothing for another thread, and the loop's own sees it in any case.
        self.0.removals.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn epoll(&self) -> &Epoll {
        &self.0.epoll
    }

    pub(crate) fn removals(&self) -> usize {
        self.0.removals.load(Ordering::Relaxed)
    }

    /// Whether any descriptor has `token`.
    pub(crate) fn has(&self, token: Token) -> bool {
        self.entries().iter().any(|entry| entry.token == token)
    }

    /// Whether a poller speaks for every descriptor. Relaxed: one added by another thread is looked at
    /// a little later at worst.
    pub(crate) fn all_polled(&self) -> bool {
        self.0.unpolled.load(Ordering::Relaxed) == 0
    }

    fn add_entry(
        &self,
        fd: impl AsFd,
        token: Token,
        interest: Interest,
        polled: bool,
    ) -> Result<(), Error> {
        let event = self.event(token, interest)?;
        let mut entries = self.entries();
        match self.0.epoll.add(&fd, event) {
            Ok(()) => {}
            Err(Errno::EEXIST) => return Err(Error::AlreadyRegistered),
            Err(Errno::EPERM) => return Err(Error::NotPollable),
            Err(errno) => return Err(Error::system("epoll_ctl", errno)),
        }
        let fd = fd.as_fd().as_raw_fd();
        let entry = Entry { fd, token, polled };
        // The same number again: the caller closed its file without removing it.
        match entries.iter_mut().find(|old| old.fd == fd) {
            Some(stale) => *stale = entry,
            None => entries.push(entry),
        }
        self.count_unpolled(&entries);
        Ok(())
    }

    fn event(&self, token: Token, interest: Interest) -> Result<EpollEvent, Error> {
        if token.0 == WAKE {
            return Err(Error::ReservedToken);
        }
        Ok(EpollEvent::new(interest.flags(), token.0))
    }

    fn count_unpolled(&self, entries: &[Entry]) {
        let unpolled = entries.iter().filter(|entry| !entry.polled).count();
        self.0.unpolled.store(unpolled, Ordering::Relaxed);
    }

    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        // Nothing panics while it is held, and each change is one step.
        self.0
            .entries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
