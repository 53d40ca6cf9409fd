//! A wake round trip between two threads: through event-poll, sleeping at once and polling first, and with
//! eventfds alone.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::thread;
use std::time::{Duration, Instant};

use benches::Error;
use benches::rounds::{Contender, Mode, compare};
use criterion::Criterion;
use event_poll::{BusyPoll, EventNotifier, EventPoll, PollSettings, Poller, Stopper, Token};
use nix::sys::eventfd::EventFd;

/// One side: what it waits for, and what it wakes the other with.
struct Side {
    poll: EventPoll,
    mine: EventNotifier,
    theirs: EventNotifier,
}

impl Side {
    fn new(mine: &EventNotifier, theirs: &EventNotifier) -> Result<Self, Error> {
        let mine = mine.try_clone()?;
        let mut poll = EventPoll::new(4)?;
        poll.add(&mine, Token(0))?;
        Ok(Self {
            poll,
            mine,
            theirs: theirs.try_clone()?,
        })
    }

    fn wait(&mut self) -> Result<(), Error> {
        // A deadline, so that a lost wake fails the bench instead of hanging it.
        if self.poll.wait(Some(Duration::from_secs(30)))?.is_empty() {
            return Err("a wake was lost".into());
        }
        self.mine.test_and_clear()?;
        Ok(())
    }
}

/// Wait with epoll, clear, notify: three system calls on each side.
fn event_poll(trips: u64) -> Result<Duration, Error> {
    let (here, there) = (EventNotifier::new()?, EventNotifier::new()?);
    let mut local = Side::new(&here, &there)?;
    let mut remote = Side::new(&there, &here)?;
    thread::scope(|scope| {
        let echo = scope.spawn(move || -> Result<(), Error> {
            for _ in 0..=trips {
                remote.wait()?;
                remote.theirs.notify()?;
            }
            Ok(())
        });
        let mut trip = || -> Result<(), Error> {
            local.theirs.notify()?;
            local.wait()
        };
        // The first one waits for the thread to start.
        trip()?;
        let start = Instant::now();
        for _ in 0..trips {
            trip()?;
        }
        let time = start.elapsed();
        echo.join().map_err(|_| "the other side panicked")??;
        Ok(time)
    })
}

/// One direction of the round trip: a count in memory, as a ring has it, and a kick for when the other side asks
/// for one.
struct Line {
    sent: AtomicU64,
    kicks_wanted: AtomicBool,
    kick: EventNotifier,
}

impl Line {
    fn new() -> Result<Self, Error> {
        Ok(Self {
            sent: AtomicU64::new(0),
            kicks_wanted: AtomicBool::new(true),
            kick: EventNotifier::new()?,
        })
    }

    fn send(&self) {
        self.sent.fetch_add(1, Ordering::Release);
        // Pairs with the one in `Answer::arm`.
        fence(Ordering::SeqCst);
        if self.kicks_wanted.load(Ordering::Relaxed) {
            // Our own eventfd: it cannot fail.
            let _ = self.kick.notify();
        }
    }
}

/// Answers all that comes on one line by as much on the other, so many times.
struct Answer<'a> {
    incoming: &'a Line,
    outgoing: &'a Line,
    answered: u64,
    last: u64,
    stopper: Stopper,
}

impl Poller for Answer<'_> {
    fn poll(&mut self) -> bool {
        let sent = self.incoming.sent.load(Ordering::Acquire);
        let work = sent != self.answered;
        while self.answered != sent {
            self.answered += 1;
            if self.answered == self.last {
                self.stopper.stop();
            }
            self.outgoing.send();
        }
        work
    }

    fn arm(&mut self) -> bool {
        self.incoming.kicks_wanted.store(true, Ordering::Relaxed);
        // Pairs with the one in `Line::send`.
        fence(Ordering::SeqCst);
        self.incoming.sent.load(Ordering::Acquire) == self.answered
    }

    fn disarm(&mut self) {
        self.incoming.kicks_wanted.store(false, Ordering::Relaxed);
    }
}

fn answer(incoming: &Line, outgoing: &Line, last: u64, poll_max: Duration) -> Result<(), Error> {
    let mut poll = EventPoll::new(4)?;
    poll.add_polled(&incoming.kick, Token(0))?;
    let mut answer = Answer {
        incoming,
        outgoing,
        answered: 0,
        last,
        stopper: poll.stopper(),
    };
    let mut busy = BusyPoll::new(PollSettings::up_to(poll_max));
    poll.run_polling(&mut busy, &mut [&mut answer], |_| {
        let _ = incoming.kick.test_and_clear();
        ControlFlow::Continue(())
    })?;
    Ok(())
}

/// The same trips through memory, for which a kick is needed only if the other side sleeps.
fn polling(trips: u64, poll_max: Duration) -> Result<Duration, Error> {
    let (here, there) = (Line::new()?, Line::new()?);
    thread::scope(|scope| {
        let echo = scope.spawn(|| answer(&there, &here, trips, poll_max));
        let start = Instant::now();
        there.send();
        answer(&here, &there, trips, poll_max)?;
        let time = start.elapsed();
        echo.join().map_err(|_| "the other side panicked")??;
        Ok(time)
    })
}

/// Blocking reads and writes, two system calls on each side: the floor, for a thread that waits for one thing only.
fn eventfds(trips: u64) -> Result<Duration, Error> {
    let (here, there) = (EventFd::new()?, EventFd::new()?);
    thread::scope(|scope| {
        let echo = scope.spawn(|| -> Result<(), Error> {
            for _ in 0..=trips {
                there.read()?;
                here.write(1)?;
            }
            Ok(())
        });
        let trip = || -> Result<(), Error> {
            there.write(1)?;
            here.read()?;
            Ok(())
        };
        trip()?;
        let start = Instant::now();
        for _ in 0..trips {
            trip()?;
        }
        let time = start.elapsed();
        echo.join().map_err(|_| "the other side panicked")??;
        Ok(time)
    })
}

fn main() -> Result<(), Error> {
    let mode = Mode::from_args();
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    let mut group = criterion.benchmark_group("event-poll/round-trip");
    group.bench_function("event-poll", |b| {
        b.iter_custom(|trips| event_poll(trips).expect("eventfds"));
    });
    group.bench_function("eventfd", |b| {
        b.iter_custom(|trips| eventfds(trips).expect("eventfds"));
    });
    group.finish();
    let mut contenders = [
        Contender::new("event-poll", event_poll),
        Contender::new("event-poll, a ring, polling off", |trips| {
            polling(trips, Duration::ZERO)
        }),
        Contender::new("event-poll, a ring, polling", |trips| {
            polling(trips, PollSettings::default().max)
        }),
        Contender::new("blocking eventfd, no epoll", eventfds),
    ];
    let trips = mode.pick(5000, 50);
    compare(mode, "event-poll/round-trip, trips", trips, &mut contenders)?;
    criterion.final_summary();
    Ok(())
}
