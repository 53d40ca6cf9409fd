//! One loop that accepts the front-ends of all devices, and sees each connection to its end.
//!
//! A connection has a thread of its own (`session.rs`), so that a front-end that stalls in the middle of a
//! message, or does not read its replies, holds up neither this loop nor any other device. The loop itself
//! never waits for anything but poll(2).

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use event_poll::EventNotifier;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use tracing::Span;

use super::handed::Handed;
use super::listener::Listener;
use super::server::{Endpoint, ServeError, Server};
use super::session::{self, ConnectionError};
use crate::device::Device;

/// Pause before another accept when the host has run out of something.
const EXHAUSTION_DELAY: Duration = Duration::from_millis(100);

/// How long a device may drain before its front-end is suspected of holding up the data thread (see
/// `handed.rs`). Longer than a disk takes that is merely busy; an interrupt is lost at worst.
const DRAIN_PATIENCE: Duration = Duration::from_secs(1);

/// How often it is released after that: each time lets one blocked write through.
const RELEASE_INTERVAL: Duration = Duration::from_millis(20);

/// Stack of a connection's thread: it handles one message at a time and calls nothing that recurses.
const CONNECTION_STACK: usize = 512 << 10;

/// A device and what becomes of it.
struct Station {
    device: Device,
    once: bool,
    /// Not there any more, or never, where no further front-end is to be served.
    listener: Option<Listener>,
    state: State,
    /// Names the device in what is logged.
    span: Span,
    /// The first failure to write the image out, or what has ended the device: told at the end, since it is not
    /// undone by whatever is served after it.
    failure: Option<ServeError>,
}

enum State {
    /// Nobody is connected.
    Free,
    /// Nobody is, and nobody is accepted before then: the host had not enough for the last one.
    Resting(Instant),
    /// Connected, and nothing said yet. Only a front-end that speaks is given a thread: others may be looking
    /// whether somebody listens.
    Silent(UnixStream),
    Served(Connection),
}

struct Connection {
    thread: JoinHandle<Result<(), ConnectionError>>,
    /// Readable when the thread is at its end.
    done: Arc<EventNotifier>,
    control: UnixStream,
    handed: Arc<Handed>,
    /// When to release the data thread next; `None` while the front-end is there.
    release_at: Option<Instant>,
}

/// What poll(2) is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Until,
    /// Whether station N has somebody to accept.
    Listener(usize),
    /// Told in place of the above: the listening socket has been shut down.
    ShutDown(usize),
    /// Whether the front-end of station N has something to say, or has gone.
    Silent(usize),
    /// Whether the thread of station N is at its end.
    Done(usize),
    /// Whether the front-end of station N has gone.
    HangUp(usize),
}

/// See [`Server::serve_all`].
pub(super) fn serve(servers: Vec<Server>, until: BorrowedFd<'_>) -> Result<(), ServeError> {
    let mut stations: Vec<_> = servers
        .into_iter()
        .map(Station::new)
        .collect::<io::Result<_>>()?;
    let stopped = serve_until(&mut stations, until);
    for station in &mut stations {
        station.close();
    }
    // Whatever happened, nobody's requests are left behind.
    let ended = stopped.and_then(|()| wait_for_all(&mut stations));
    for station in &mut stations {
        station.join();
    }
    ended?;
    match stations.into_iter().find_map(|station| station.failure) {
        Some(failure) => Err(failure),
        None => Ok(()),
    }
}

/// Serves until told to stop, or until nobody is left to serve.
fn serve_until(stations: &mut [Station], until: BorrowedFd<'_>) -> io::Result<()> {
    while !stations.iter().all(Station::is_over) {
        for asked in wait(stations, Some(until))? {
            match asked {
                Asked::Until => return Ok(()),
                Asked::Listener(index) => stations[index].accept(),
                Asked::ShutDown(index) => {
                    let error = io::Error::other("the listening socket has been shut down");
                    stations[index].cannot_accept(error);
                }
                Asked::Silent(index) => stations[index].listen_to(),
                Asked::Done(index) => stations[index].join(),
                Asked::HangUp(index) => stations[index].drain_since_now(),
            }
        }
    }
    Ok(())
}

/// Waits until no connection is left.
fn wait_for_all(stations: &mut [Station]) -> io::Result<()> {
    while stations
        .iter()
        .any(|station| matches!(station.state, State::Served(_)))
    {
        for asked in wait(stations, None)? {
            if let Asked::Done(index) = asked {
                stations[index].join();
            }
        }
    }
    Ok(())
}

/// Waits until something has happened, and does on the way what is due by time alone.
fn wait(stations: &mut [Station], until: Option<BorrowedFd<'_>>) -> io::Result<Vec<Asked>> {
    let now = Instant::now();
    let due = stations
        .iter_mut()
        .filter_map(|station| station.tick(now))
        .min();
    let mut asked = Vec::new();
    let mut fds = Vec::new();
    if let Some(until) = until {
        asked.push(Asked::Until);
        fds.push(PollFd::new(until, PollFlags::POLLIN));
    }
    for (index, station) in stations.iter().enumerate() {
        station.ask(index, &mut asked, &mut fds);
    }
    poll_until(&mut fds, due)?;
    let ready = asked.into_iter().zip(&fds);
    Ok(ready
        // Flags that nix does not know count, too.
        .filter(|(_, fd)| fd.any().unwrap_or(true))
        .map(|(asked, fd)| match asked {
            Asked::Listener(index) if is_hung_up(fd) => Asked::ShutDown(index),
            asked => asked,
        })
        .collect())
}

/// Hung up in one direction or both. nix has no name for POLLRDHUP, and no flags to show where there is one that
/// it has no name for.
fn is_hung_up(fd: &PollFd<'_>) -> bool {
    fd.revents()
        .is_none_or(|flags| flags.contains(PollFlags::POLLHUP))
}

/// Signals are taken from a descriptor; one that interrupts all the same begins the wait anew. Memory that the
/// kernel has not got now it may have later.
fn poll_until(fds: &mut [PollFd<'_>], due: Option<Instant>) -> io::Result<()> {
    loop {
        let timeout = match due {
            None => PollTimeout::NONE,
            Some(due) => {
                let left = due.saturating_duration_since(Instant::now());
                // Rounded up, since a wait that ends too early would be begun again.
                PollTimeout::try_from(left + Duration::from_micros(999))
                    .map_err(io::Error::other)?
            }
        };
        match poll(fds, timeout) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(Errno::ENOMEM | Errno::EAGAIN) => std::thread::sleep(EXHAUSTION_DELAY),
            Err(errno) => return Err(errno.into()),
        }
    }
}

impl Station {
    fn new(server: Server) -> io::Result<Self> {
        let Server {
            endpoint,
            device,
            name,
            once,
        } = server;
        let (listener, state) = match endpoint {
            Endpoint::Listening(listener) => {
                // Between the wake-up and the accept the front-end may have given up.
                listener.socket().set_nonblocking(true)?;
                (Some(listener), State::Free)
            }
            Endpoint::Connected(stream) => {
                stream.set_nonblocking(false)?;
                (None, State::Silent(stream))
            }
        };
        Ok(Self {
            device,
            once,
            listener,
            state,
            span: name.map_or_else(Span::none, |name| tracing::error_span!("device", %name)),
            failure: None,
        })
    }

    /// Whether nobody is served and nobody will be.
    fn is_over(&self) -> bool {
        self.listener.is_none() && matches!(self.state, State::Free | State::Resting(_))
    }

    /// Does what is due by `now`, and says what is due next.
    fn tick(&mut self, now: Instant) -> Option<Instant> {
        match &mut self.state {
            State::Resting(until) if *until <= now => self.state = State::Free,
            State::Resting(until) => return Some(*until),
            State::Served(connection) => {
                let due = connection.release_at.as_mut()?;
                if *due <= now {
                    // Slow disk or hostile front-end: reading its descriptors is no harm now.
                    connection.handed.release();
                    *due = now + RELEASE_INTERVAL;
                }
                return Some(*due);
            }
            State::Free | State::Silent(_) => {}
        }
        None
    }

    fn ask<'a>(&'a self, index: usize, asked: &mut Vec<Asked>, fds: &mut Vec<PollFd<'a>>) {
        let mut ask = |what, fd: BorrowedFd<'a>, flags| {
            asked.push(what);
            fds.push(PollFd::new(fd, flags));
        };
        match &self.state {
            State::Free => {
                if let Some(listener) = &self.listener {
                    let fd = listener.socket().as_fd();
                    // Whoever handed the socket down may shut it down: accept(2) says EAGAIN then, and poll(2)
                    // that there is somebody to accept.
                    let flags = PollFlags::from_bits_retain(libc::POLLIN | libc::POLLRDHUP);
                    ask(Asked::Listener(index), fd, flags);
                }
            }
            State::Resting(_) => {}
            State::Silent(stream) => ask(Asked::Silent(index), stream.as_fd(), PollFlags::POLLIN),
            State::Served(connection) => {
                let done = connection.done.as_fd();
                ask(Asked::Done(index), done, PollFlags::POLLIN);
                if connection.release_at.is_none() {
                    // No events asked for: a hang-up is always told.
                    let control = connection.control.as_fd();
                    ask(Asked::HangUp(index), control, PollFlags::empty());
                }
            }
        }
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else {
            return;
        };
        match listener.socket().accept() {
            Ok((stream, _)) => self.state = State::Silent(stream),
            // Somebody else who has the socket was faster, or the front-end has given up.
            Err(error) if is_transient(&error) => {}
            Err(error) if is_exhaustion(&error) => {
                self.span.in_scope(
                    || tracing::warn!(%error, "cannot accept a front-end now; trying again"),
                );
                self.rest();
            }
            Err(error) => self.cannot_accept(error),
        }
    }

    /// The socket is of no more use.
    fn cannot_accept(&mut self, error: io::Error) {
        self.span
            .in_scope(|| tracing::error!(%error, "cannot accept front-ends any more"));
        self.listener = None;
        self.failure.get_or_insert_with(|| error.into());
    }

    /// Sees whether a front-end that has been silent so far speaks, or has gone.
    fn listen_to(&mut self) {
        let State::Silent(stream) = std::mem::replace(&mut self.state, State::Free) else {
            return;
        };
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        // Without room for descriptors, so that none is made.
        match recv(stream.as_raw_fd(), &mut [0], flags) {
            Err(Errno::EINTR) => self.state = State::Silent(stream),
            Ok(1..) => self.serve(stream),
            // Gone. EAGAIN, although poll(2) says that there is something, is out-of-band data, which is nothing
            // that a front-end sends, and would keep the loop busy for as long as it is not taken.
            Ok(0) | Err(_) => {}
        }
    }

    fn serve(&mut self, stream: UnixStream) {
        let device = self.device.clone();
        match Connection::start(device, stream, self.span.clone()) {
            Ok(connection) => {
                self.state = State::Served(connection);
                if self.once {
                    self.listener = None;
                }
            }
            Err(error) => self.could_not_serve(error.into()),
        }
    }

    /// The host had not enough for this front-end. The next may be luckier, and to end here would cost them all.
    fn could_not_serve(&mut self, error: ServeError) {
        self.span
            .in_scope(|| tracing::error!(%error, "a front-end could not be served"));
        if self.listener.is_none() {
            self.failure.get_or_insert(error);
        }
        self.rest();
    }

    fn rest(&mut self) {
        self.state = State::Resting(Instant::now() + EXHAUSTION_DELAY);
    }

    /// The front-end has gone, or is to go.
    fn drain_since_now(&mut self) {
        if let State::Served(connection) = &mut self.state {
            connection
                .release_at
                .get_or_insert_with(|| Instant::now() + DRAIN_PATIENCE);
        }
    }

    /// Ends what there is, without waiting for it: nobody else can connect, and the front-end is told.
    fn close(&mut self) {
        // First: a front-end that comes back at once finds nobody there, and tries again later. One that were
        // accepted here would find the connection closed in the middle of its first messages.
        self.listener = None;
        match &self.state {
            State::Served(connection) => {
                // Ends a blocked read or write on the other thread; it then drains and returns. That
                // the front-end has gone already is no error.
                let _ = connection.control.shutdown(Shutdown::Both);
                self.drain_since_now();
            }
            State::Free | State::Resting(_) | State::Silent(_) => self.state = State::Free,
        }
    }

    /// Takes what the connection's thread, which is at its end, has to say.
    fn join(&mut self) {
        let State::Served(connection) = std::mem::replace(&mut self.state, State::Free) else {
            return;
        };
        let result = connection.thread.join().unwrap_or_else(|_| {
            let panicked = io::Error::other("the connection's thread panicked");
            Err(ConnectionError::Host(panicked))
        });
        match result.map_err(ServeError::from) {
            Ok(()) => {}
            Err(error @ ServeError::Stop(_)) => {
                self.span
                    .in_scope(|| tracing::error!(%error, "the device did not stop cleanly"));
                self.failure.get_or_insert(error);
            }
            Err(error) => self.could_not_serve(error),
        }
    }
}

impl Connection {
    /// Serves `stream` on a thread of its own.
    fn start(device: Device, stream: UnixStream, span: Span) -> io::Result<Self> {
        let done = Arc::new(EventNotifier::new().map_err(io::Error::other)?);
        let control = stream.try_clone()?;
        let handed = Arc::new(Handed::default());
        let at_end = Done(Arc::clone(&done));
        let shared = Arc::clone(&handed);
        let thread = std::thread::Builder::new()
            .name("vhost-user".into())
            .stack_size(CONNECTION_STACK)
            .spawn(move || {
                let _at_end = at_end;
                span.in_scope(|| session::serve(&device, stream, shared))
            })?;
        Ok(Self {
            thread,
            done,
            control,
            handed,
            release_at: None,
        })
    }
}

/// Tells that the connection's thread is at its end, even if it panics.
struct Done(Arc<EventNotifier>);

impl Drop for Done {
    fn drop(&mut self) {
        let told = self.0.notify();
        debug_assert!(told.is_ok(), "{told:?}");
    }
}

impl From<ConnectionError> for ServeError {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::Start(error) => Self::Start(error),
            ConnectionError::Host(error) => Self::Host(error),
            ConnectionError::Stop(error) => Self::Stop(error),
        }
    }
}

/// Errors of accept(2) that concern one connection and not the listener.
fn is_transient(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | Interrupted | ConnectionAborted)
}

/// Errors of accept(2) that pass when something else lets go of a descriptor or of memory. A front-end
/// that waits is served then; to end the program would cost every front-end to come.
fn is_exhaustion(error: &io::Error) -> bool {
    const PASSING: [i32; 4] = [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM];
    error
        .raw_os_error()
        .is_some_and(|errno| PASSING.contains(&errno))
}
