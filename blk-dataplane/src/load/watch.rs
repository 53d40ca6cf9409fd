//! Starts the jobs, and watches over them: a back-end that goes, or goes silent, must not keep them waiting.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::time::ClockId;
use nix::unistd::Pid;
use std::os::fd::AsFd;

use super::error::{During, LoadError};
use super::front_end::FrontEnd;
use super::job::{Job, JobParts, Outcome, Schedule, Shared, lines};
use super::measure::Clock;
use super::options::LoadOptions;
use super::report::Report;
use super::ring::{Client, Ring, RingFault, RingParts};
use super::workload::{Share, Workload};
use crate::SECTOR_SIZE;

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

/// Puts the load that `options` describe on the devices at `sockets`, and measures it. `progress` is called about
/// once a second.
///
/// # Errors
///
/// [`LoadError`]. Requests that fail are no such error: the report counts them.
pub fn run(
    sockets: &[PathBuf],
    options: &LoadOptions,
    progress: impl FnMut(&Progress),
) -> Result<Report, LoadError> {
    options.check()?;
    if sockets.is_empty() {
        return Err(LoadError::option(
            "--socket-path",
            "give at least one socket",
        ));
    }
    let backend_clock = options.backend_pid.map(clock_of).transpose()?;
    let devices = sockets
        .iter()
        .map(|socket| FrontEnd::connect(socket, options))
        .collect::<Result<Vec<_>, _>>()?;
    let queues = devices.iter().enumerate().flat_map(|(device, front_end)| {
        (0..front_end.notifiers.len()).map(move |queue| (device, queue))
    });
    let mut places = Vec::new();
    for (device, queue) in queues {
        places.push(Place::new(&devices[device], device, queue)?);
    }
    for device in &devices {
        device.start()?;
    }
    let outcomes = Load {
        options,
        devices: &devices,
        clock: Clock::start(),
        backend_clock,
        stop: AtomicBool::new(false),
        ended: AtomicUsize::new(0),
        ended_fd: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| LoadError::host("eventfd", errno))?,
    }
    .run(places, progress)?;
    let mut notes = Vec::new();
    for device in &devices {
        // All is measured: that it stops badly is worth a word, and no reason to lose the figures.
        if let Err(error) = device.stop() {
            notes.push(format!("stopping: {error}"));
        }
    }
    let backends = devices.into_iter().map(|device| device.backend).collect();
    Ok(Report::new(options, backends, &outcomes, notes))
}

/// Whose processor time is told.
fn clock_of(pid: u32) -> Result<ClockId, LoadError> {
    let clock = i32::try_from(pid)
        .map_err(io::Error::other)
        .and_then(|pid| Ok(ClockId::pid_cpu_clock_id(Pid::from_raw(pid))?));
    clock.map_err(|error| {
        let reason =
            format!("the processor time of {pid} cannot be read ({error}); is it running?");
        LoadError::option("--backend-pid", reason)
    })
}

/// A queue before its thread starts.
struct Place {
    device: usize,
    queue: usize,
    ring: Client,
}

impl Place {
    fn new(front_end: &FrontEnd, device: usize, queue: usize) -> Result<Self, LoadError> {
        let guest = &front_end.guest;
        let ring = Client::new(RingParts {
            memory: Arc::clone(&guest.memory),
            addresses: guest.rings[queue].addresses(),
            size: front_end.queue_size,
            features: front_end.ring_features,
            shape: front_end.shape,
            places: guest.places[queue].clone(),
        });
        Ok(Self {
            device,
            queue,
            ring: ring.map_err(|error| LoadError::host("the ring", io::Error::other(error)))?,
        })
    }
}

/// Why a queue's thread ended.
#[derive(Debug)]
enum JobError {
    Fault(RingFault),
    Host(LoadError),
}

struct Load<'a> {
    options: &'a LoadOptions,
    devices: &'a [FrontEnd],
    clock: Clock,
    backend_clock: Option<ClockId>,
    stop: AtomicBool,
    /// Threads that have ended, and what tells of each.
    ended: AtomicUsize,
    ended_fd: EventFd,
}

type Handle<'s> = ScopedJoinHandle<'s, Result<Option<Outcome>, JobError>>;

impl Load<'_> {
    fn run(
        &self,
        places: Vec<Place>,
        progress: impl FnMut(&Progress),
    ) -> Result<Vec<Outcome>, LoadError> {
        let shared: Vec<Shared> = places.iter().map(|_| Shared::default()).collect();
        let queues: Vec<_> = places
            .iter()
            .map(|place| (place.device, place.queue))
            .collect();
        let mut watch = Watch::new(self, &queues, &shared, progress);
        thread::scope(|scope| {
            let mut handles: Vec<Handle<'_>> = Vec::new();
            for ((number, place), shared) in (0u16..).zip(places).zip(&shared) {
                let name = format!("load-{number}");
                let spawned = thread::Builder::new()
                    .name(name)
                    .spawn_scoped(scope, move || {
                        let result = self.job(place, number, shared);
                        self.ended.fetch_add(1, Ordering::Release);
                        // It is never full.
                        let _ = self.ended_fd.write(1);
                        result
                    });
                match spawned {
                    Ok(handle) => handles.push(handle),
                    Err(error) => {
                        self.stop_all();
                        return Err(LoadError::host("cannot start a thread", error));
                    }
                }
            }
            let watched = watch.until_all_ended(handles.len());
            if watched.is_err() {
                self.stop_all();
            }
            let mut outcomes = Vec::new();
            let mut failed = None;
            for (handle, &(device, queue)) in handles.into_iter().zip(&queues) {
                match handle.join() {
                    Ok(Ok(outcome)) => outcomes.extend(outcome),
                    Ok(Err(JobError::Fault(fault))) => {
                        failed.get_or_insert_with(|| LoadError::Ring {
                            socket: self.devices[device].connection.socket().to_owned(),
                            queue,
                            fault,
                        });
                    }
                    Ok(Err(JobError::Host(error))) => {
                        failed.get_or_insert(error);
                    }
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            match failed {
                Some(error) => Err(error),
                None => watched.map(|()| outcomes),
            }
        })
    }

    /// A thread's work.
    fn job(&self, place: Place, number: u16, shared: &Shared) -> Result<Option<Outcome>, JobError> {
        let result = self.prepared_job(place, number, shared);
        if result.is_err() {
            // The others would go on to their end for nothing.
            self.stop_all();
        }
        result
    }

    fn prepared_job(
        &self,
        place: Place,
        number: u16,
        shared: &Shared,
    ) -> Result<Option<Outcome>, JobError> {
        let options = self.options;
        self.settle(number).map_err(JobError::Host)?;
        let front_end = &self.devices[place.device];
        let size = options
            .size
            .unwrap_or(front_end.backend.capacity_bytes - options.offset);
        let job = u16::try_from(place.queue).unwrap_or(u16::MAX);
        let share = Share::of(options, size / options.bs, job);
        let host = |what: &str| {
            JobError::Host(LoadError::host(
                what,
                io::Error::other("no place in memory"),
            ))
        };
        let lines = lines(
            &front_end.guest.memory,
            &front_end.guest.places[place.queue],
        )
        .map_err(|_| host("requests"))?;
        let notifiers = &front_end.notifiers[place.queue];
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / 4);
        let schedule = Schedule {
            ramp: nanoseconds(options.ramp_time),
            runtime: options.time_limit().map(nanoseconds),
            number_ios: options.number_ios,
            rate: options.rate_iops,
            poll: options.poll,
        };
        macro_rules! run {
            ($ring:expr) => {{
                let job = Job::new(JobParts {
                    ring: $ring,
                    lines: &lines,
                    workload: Workload::new(options, share.blocks, number.into()),
                    first_sector: (options.offset + share.first * options.bs) / SECTOR_SIZE,
                    sectors_per_block: options.bs / SECTOR_SIZE,
                    schedule,
                    clock: self.clock,
                    backend_clock: self.backend_clock,
                    kick: &notifiers.kick,
                    call: &notifiers.call,
                    shared,
                    stop: &self.stop,
                });
                run_job(job.ok_or_else(|| host("requests"))?)
            }};
        }
        match place.ring {
            Client::Packed(ring) => run!(ring),
            Client::Split(ring) => run!(ring),
        }
    }

    /// What the thread itself needs: its processor, and timers that are on time.
    fn settle(&self, number: u16) -> Result<(), LoadError> {
        let cpus = &self.options.cpus;
        if !cpus.is_empty() {
            let cpu = cpus[usize::from(number) % cpus.len()];
            let mut set = CpuSet::new();
            let bound = set
                .set(cpu.into())
                .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
            bound.map_err(|errno| {
                let reason = format!(
                    "no thread can be bound to CPU {cpu} ({errno}); give one that this machine has"
                );
                LoadError::option("--cpus", reason)
            })?;
        }
        if self.options.rate_iops.is_some() {
            // 50 us otherwise, a quarter of the distance between 5,000 requests a second.
            nix::sys::prctl::set_timerslack(1)
                .map_err(|errno| LoadError::host("prctl(PR_SET_TIMERSLACK)", errno))?;
        }
        Ok(())
    }

    /// Ends every thread, whatever it waits for.
    fn stop_all(&self) {
        self.stop.store(true, Ordering::Relaxed);
        for notifiers in self.devices.iter().flat_map(|device| &device.notifiers) {
            // A back-end could fill it up; then nobody sleeps on it.
            let fd = &notifiers.call;
            let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
            if poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0) {
                let _ = fd.write(1);
            }
        }
    }
}

fn run_job<R: Ring>(job: Job<'_, R>) -> Result<Option<Outcome>, JobError> {
    job.run().map_err(JobError::Fault)
}

/// What the thread that started the load does meanwhile.
struct Watch<'a, P> {
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
    fn new(
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
    fn until_all_ended(&mut self, threads: usize) -> Result<(), LoadError> {
        while self.load.ended.load(Ordering::Acquire) < threads {
            self.wait()?;
            if self.load.stop.load(Ordering::Relaxed) {
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
