//! Connects, starts a thread for each queue, and gathers what they measured.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::time::ClockId;
use nix::unistd::Pid;

use super::error::LoadError;
use super::front_end::FrontEnd;
use super::job::{Job, JobParts, Orders, Outcome, Schedule, Shared, Slices};
use super::measure::Clock;
use super::options::LoadOptions;
use super::report::Report;
use super::ring::{Client, Ring, RingFault, RingParts};
use super::verify::{BLOCKS_MAX, Verifier};
use super::watch::{Progress, Watch};
use super::workload::{Share, Workload};
use crate::SECTOR_SIZE;

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
    run_with(sockets, options, None, progress)
}

/// Like [`run`], until `until` becomes readable: then the measured span ends, and the report is of what was
/// measured so far. It is read (an eventfd, a signalfd); if it becomes readable again, all ends at once.
///
/// # Errors
///
/// Those of [`run`], and [`LoadError::Interrupted`].
pub fn run_until(
    sockets: &[PathBuf],
    options: &LoadOptions,
    until: impl AsFd,
    progress: impl FnMut(&Progress),
) -> Result<Report, LoadError> {
    run_with(sockets, options, Some(until.as_fd()), progress)
}

fn run_with(
    sockets: &[PathBuf],
    options: &LoadOptions,
    until: Option<BorrowedFd<'_>>,
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
    let names: Vec<_> = places
        .iter()
        .map(|place| (devices[place.device].backend.socket.clone(), place.queue))
        .collect();
    let outcomes = Load {
        options,
        devices: &devices,
        clock: Clock::start(),
        backend_clock,
        until,
        orders: Orders::default(),
        ended: AtomicUsize::new(0),
        ended_fd: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| LoadError::host("eventfd", errno))?,
    }
    .run(places, progress)?;
    let mut notes = Vec::new();
    for (outcome, (socket, queue)) in outcomes.iter().zip(&names) {
        for (offset, wrong) in &outcome.verified.samples {
            notes.push(format!(
                "{socket}: queue {queue}: the sector at {offset} {wrong}"
            ));
        }
    }
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

/// A load that runs.
pub(super) struct Load<'a> {
    pub(super) options: &'a LoadOptions,
    pub(super) devices: &'a [FrontEnd],
    clock: Clock,
    backend_clock: Option<ClockId>,
    /// Readable when the load is to end before its time.
    pub(super) until: Option<BorrowedFd<'a>>,
    pub(super) orders: Orders,
    /// Threads that have ended, and what tells of each.
    pub(super) ended: AtomicUsize,
    pub(super) ended_fd: EventFd,
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
                        self.abort();
                        return Err(LoadError::host("cannot start a thread", error));
                    }
                }
            }
            let watched = watch.until_all_ended(handles.len());
            if watched.is_err() {
                self.abort();
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
            self.abort();
        }
        result
    }

    fn prepared_job(
        &self,
        place: Place,
        number: u16,
        shared: &Shared,
    ) -> Result<Option<Outcome>, JobError> {
        self.settle(number).map_err(JobError::Host)?;
        let Place {
            device,
            queue,
            ring,
        } = place;
        match ring {
            Client::Packed(ring) => self.run_ring(ring, device, queue, number, shared),
            Client::Split(ring) => self.run_ring(ring, device, queue, number, shared),
        }
    }

    fn run_ring<R: Ring>(
        &self,
        ring: R,
        device: usize,
        queue: usize,
        number: u16,
        shared: &Shared,
    ) -> Result<Option<Outcome>, JobError> {
        let options = self.options;
        let front_end = &self.devices[device];
        let capacity = front_end.backend.capacity_bytes;
        let size = options.size.unwrap_or(capacity - options.offset);
        let job = u16::try_from(queue).unwrap_or(u16::MAX);
        let share = Share::of(options, size / options.bs, job);
        let first = options.offset + share.first * options.bs;
        let no_memory = || {
            let source = io::Error::other("the layout has no place for them");
            JobError::Host(LoadError::host("requests", source))
        };
        let (memory, places) = (&front_end.guest.memory, &front_end.guest.places[queue]);
        let slices = Slices::new(memory, places, options.bs).map_err(|_| no_memory())?;
        let verifier = options
            .verify
            .then(|| verifier(options, first, share.blocks));
        let verifier = verifier.transpose().map_err(JobError::Host)?;
        let notifiers = &front_end.notifiers[queue];
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / 4);
        let job = Job::new(JobParts {
            ring,
            slices: &slices,
            workload: Workload::new(options, share.blocks, number.into()),
            verifier,
            first_sector: first / SECTOR_SIZE,
            sectors_per_block: options.bs / SECTOR_SIZE,
            schedule: Schedule {
                ramp: nanoseconds(options.ramp_time),
                runtime: options.time_limit().map(nanoseconds),
                number_ios: options.number_ios,
                rate: options.rate_iops,
                poll: options.poll,
                batch: options.iodepth_batch,
                reduced_clock: options.gtod_reduce,
                think: nanoseconds(options.thinktime),
            },
            clock: self.clock,
            backend_clock: self.backend_clock,
            kick: &notifiers.kick,
            call: &notifiers.call,
            shared,
            orders: &self.orders,
        });
        job.ok_or_else(no_memory)?.run().map_err(JobError::Fault)
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
    fn abort(&self) {
        self.orders.abort();
        self.wake_all();
    }

    /// Ends the measured span.
    pub(super) fn finish(&self) {
        self.orders.finish();
        self.wake_all();
    }

    fn wake_all(&self) {
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

fn verifier(options: &LoadOptions, first: u64, blocks: u64) -> Result<Verifier, LoadError> {
    if blocks > BLOCKS_MAX {
        let reason = format!(
            "each queue can keep {BLOCKS_MAX} blocks of {} bytes in mind, and has {blocks}; give less --size",
            options.bs
        );
        return Err(LoadError::option("--verify", reason));
    }
    let block = usize::try_from(options.bs).unwrap_or(usize::MAX);
    // Who only reads must find what somebody has written before.
    let strict = !options.rw.writes();
    Ok(Verifier::new(
        first,
        block,
        blocks,
        options.randseed,
        strict,
    ))
}
