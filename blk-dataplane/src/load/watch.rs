//! Watches over the threads: a back-end that goes, or goes silent, must not keep them waiting.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::error::{During, LoadError};
use super::job::Shared;
use super::run::Load;

/// How often the watch looks whether requests complete.
const LOOK: Duration = Duration::from_millis(100);

/// How a load is going, once a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// Since the load began.
    pub elapsed: Duration,
    /// How long it is to take, if time ends it.
    pub total: Option<Duration>,
    /// Requests completed so far, those before the measured span included.
    pub completed: u64,
    /// Requests completed a second, since the last time.
    pub iops: f64,
    /// Bytes a second, if each of them was of a block.
    pub bw_bytes: f64,
    /// Requests in flight.
    pub in_flight: u64,
    /// The measured span has begun.
    pub measuring: bool,
}

/// What the thread that started the load does meanwhile.
pub(super) struct Watch<'a, P> {
    load: &'a Load<'a>,
    queues: &'a [(usize, usize)],
    shared: &'a [Shared],
    /// Of each queue: completions when it was last seen to go on, and when that was.
    seen: Vec<(u64, Instant)>,
    began: Instant,
    told: Instant,
    told_completed: u64,
    progress: P,
}

impl<'a, P: FnMut(&Progress)> Watch<'a, P> {
    pub(super) fn new(
        load: &'a Load<'a>,
        queues: &'a [(usize, usize)],
        shared: &'a [Shared],
        progress: P,
    ) -> Self {
        let now = Instant::now();
        Self {
            load,
            queues,
            shared,
            seen: vec![(0, now); queues.len()],
            began: now,
            told: now,
            told_completed: 0,
            progress,
        }
    }

    /// Waits until all threads have ended of themselves.
    pub(super) fn until_all_ended(&mut self, threads: usize) -> Result<(), LoadError> {
        while self.load.ended.load(Ordering::Acquire) < threads {
            self.wait()?;
            if self.load.orders.is_abort() {
                // A job has failed, and says why itself.
                return Ok(());
            }
            self.look_for_stalls()?;
            self.tell();
        }
        Ok(())
    }

    fn wait(&self) -> Result<(), LoadError> {
        let devices = self.load.devices;
        let watched = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = vec![watched(self.load.ended_fd.as_fd())];
        fds.extend(
            devices
                .iter()
                .map(|device| watched(device.connection.as_fd())),
        );
        fds.extend(
            self.queues
                .iter()
                .map(|&(device, queue)| watched(devices[device].notifiers[queue].err.as_fd())),
        );
        fds.extend(self.load.until.map(watched));
        let timeout = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::MAX);
        if poll(&mut fds, timeout).is_err() {
            return Ok(());
        }
        let ready: Vec<_> = fds.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        if ready[0] {
            // Read, so that the others' ends are waited for.
            let _ = self.load.ended_fd.read();
        }
        for (device, _) in devices.iter().zip(&ready[1..]).filter(|(_, ready)| **ready) {
            if device.connection.gone() {
                return Err(LoadError::Closed {
                    socket: device.connection.socket().to_owned(),
                    during: During::Load,
                });
            }
        }
        if let Some(until) = self.load.until
            && ready.last() == Some(&true)
        {
            // As large as what a signalfd gives; an eventfd gives less.
            let _ = nix::unistd::read(until, &mut [0; 128]);
            if self.load.orders.is_finish() {
                return Err(LoadError::Interrupted);
            }
            self.load.finish();
        }
        let mut errs = self.queues.iter().zip(&ready[1 + devices.len()..]);
        match errs.find(|(_, ready)| **ready) {
            Some((&(device, queue), _)) => Err(LoadError::RingGivenUp {
                socket: devices[device].connection.socket().to_owned(),
                queue,
            }),
            None => Ok(()),
        }
    }

    fn look_for_stalls(&mut self) -> Result<(), LoadError> {
        let now = Instant::now();
        for ((shared, seen), &(device, queue)) in
            self.shared.iter().zip(&mut self.seen).zip(self.queues)
        {
            // In this order, so that it is never more than is in flight.
            let completed = shared.completed.load(Ordering::Relaxed);
            let in_flight = shared
                .issued
                .load(Ordering::Relaxed)
                .saturating_sub(completed);
            if completed != seen.0 || in_flight == 0 {
                *seen = (completed, now);
            } else if now.duration_since(seen.1) >= self.load.options.io_timeout {
                return Err(LoadError::Stalled {
                    socket: self.load.devices[device].connection.socket().to_owned(),
                    queue,
                    in_flight,
                    patience: self.load.options.io_timeout,
                });
            }
        }
        Ok(())
    }

    /// Once a second.
    fn tell(&mut self) {
        let now = Instant::now();
        let since = now.duration_since(self.told);
        if since < Duration::from_secs(1) {
            return;
        }
        let sum = |of: fn(&Shared) -> u64| self.shared.iter().map(of).sum::<u64>();
        let completed = sum(|shared| shared.completed.load(Ordering::Relaxed));
        let issued = sum(|shared| shared.issued.load(Ordering::Relaxed));
        #[expect(clippy::cast_precision_loss, reason = "for people to read")]
        let iops = completed.saturating_sub(self.told_completed) as f64 / since.as_secs_f64();
        let options = self.load.options;
        let limit = options.time_limit();
        #[expect(clippy::cast_precision_loss, reason = "for people to read")]
        let bw_bytes = iops * options.bs as f64;
        (self.progress)(&Progress {
            elapsed: now.duration_since(self.began),
            total: limit.map(|limit| limit + options.ramp_time),
            completed,
            iops,
            bw_bytes,
            in_flight: issued.saturating_sub(completed),
            measuring: self
                .shared
                .iter()
                .all(|shared| shared.measuring.load(Ordering::Relaxed)),
        });
        self.told = now;
        self.told_completed = completed;
    }
}
