//! A wake round trip between two threads: through event-poll, and with eventfds alone.

use std::thread;
use std::time::{Duration, Instant};

use benches::Error;
use benches::rounds::{Contender, Mode, compare};
use criterion::Criterion;
use event_poll::{EventNotifier, EventPoll, Token};
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
        Contender::new("blocking eventfd, no epoll", eventfds),
    ];
    let trips = mode.pick(5000, 50);
    compare(mode, "event-poll/round-trip, trips", trips, &mut contenders)?;
    criterion.final_summary();
    Ok(())
}
