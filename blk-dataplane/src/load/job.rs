//! The thread of one queue: takes what has completed, makes as many requests again, tells the device once.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll, ppoll};
use nix::sys::eventfd::EventFd;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};
use std::os::fd::AsFd;
use std::time::Duration;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory, VolatileSlice};

use super::guest::{LINE, Places, STATUS_OFFSET};
use super::measure::{Clock, Tallies};
use super::ring::{Kind, Ring, RingFault};
use super::verify::{Verifier, Wrong};
use super::workload::{Step, Workload};
use crate::SECTOR_SIZE;

/// Status before the device has written one: none that there is (virtio 1.3 §5.2.6).
const NO_STATUS: u8 = 0xff;
const STATUS_OK: u8 = 0;

/// How often a client that polls looks at the clock while nothing completes.
const LOOKS_PER_CLOCK: u32 = 512;

/// What the thread tells while it runs, and is told. On cache lines of its own: it writes once a harvest.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Shared {
    /// Requests made.
    pub(super) issued: AtomicU64,
    /// Requests completed.
    pub(super) completed: AtomicU64,
    /// The measured span has begun.
    pub(super) measuring: AtomicBool,
    /// Kicks and interrupts so far.
    pub(super) kicks: AtomicU64,
}

/// When the thread does what.
#[derive(Clone, Copy, Debug)]
pub(super) struct Schedule {
    /// Nanoseconds of load that are not measured.
    pub(super) ramp: u64,
    /// Nanoseconds that are.
    pub(super) runtime: Option<u64>,
    /// Requests that are.
    pub(super) number_ios: Option<u64>,
    /// Requests a second, by the clock.
    pub(super) rate: Option<u64>,
    pub(super) poll: bool,
    /// Requests made available at once, at most.
    pub(super) batch: u16,
}

/// What the queue did in the measured span.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) tallies: Tallies,
    pub(super) kicks: u64,
    pub(super) interrupts: u64,
    pub(super) sleeps: u64,
    /// Nanoseconds.
    pub(super) span: u64,
    /// Processor time of this thread, in nanoseconds.
    pub(super) client_cpu: u64,
    /// Processor time of the back-end at the beginning and end, in nanoseconds.
    pub(super) backend_cpu: Option<(u64, u64)>,
    /// Of the whole run, and the blocks read back after it.
    pub(super) verified: Verified,
}

/// What was found out about blocks.
#[derive(Clone, Debug, Default)]
pub(super) struct Verified {
    /// Blocks that were read and checked.
    pub(super) blocks: u64,
    /// Those that were wrong.
    pub(super) wrong: u64,
    /// Reads and writes that failed after the measured span.
    pub(super) errors: u64,
    /// The first few that were wrong: offset and how.
    pub(super) samples: Vec<(u64, Wrong)>,
}

/// Blocks that were wrong that are told one by one.
const SAMPLES_MAX: usize = 4;

/// A request's words in guest memory.
struct Slot<'m> {
    /// Type, and the reserved word (virtio 1.3 §5.2.6).
    kind: &'m AtomicU64,
    sector: &'m AtomicU64,
    status: &'m AtomicU8,
    started: u64,
    is: Kind,
    /// With a verifier.
    block: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Ramp,
    Measured,
    /// No more requests are made.
    Draining,
    /// Every block that was written is read once more.
    Checking,
}

/// Numbers at the beginning of the measured span.
#[derive(Clone, Copy, Debug, Default)]
struct Begin {
    at: u64,
    kicks: u64,
    interrupts: u64,
    sleeps: u64,
    client_cpu: u64,
    backend_cpu: Option<u64>,
}

/// What a job is made of.
pub(super) struct JobParts<'a, R> {
    pub(super) ring: R,
    pub(super) lines: &'a [VolatileSlice<'a>],
    pub(super) buffers: &'a [VolatileSlice<'a>],
    pub(super) workload: Workload,
    pub(super) verifier: Option<Verifier>,
    /// Of the first block.
    pub(super) first_sector: u64,
    pub(super) sectors_per_block: u64,
    pub(super) schedule: Schedule,
    pub(super) clock: Clock,
    pub(super) backend_clock: Option<ClockId>,
    pub(super) kick: &'a EventFd,
    pub(super) call: &'a EventFd,
    pub(super) shared: &'a Shared,
    pub(super) stop: &'a AtomicBool,
}

pub(super) struct Job<'a, R> {
    ring: R,
    slots: Vec<Slot<'a>>,
    buffers: &'a [VolatileSlice<'a>],
    /// Requests that are not in flight.
    free: Vec<u16>,
    workload: Workload,
    verifier: Option<Verifier>,
    /// What could not be made a request, since all blocks are busy; with `verifier`.
    waiting: Option<Step>,
    verified: Verified,
    first_sector: u64,
    sectors_per_block: u64,
    schedule: Schedule,
    clock: Clock,
    backend_clock: Option<ClockId>,
    kick: &'a EventFd,
    call: &'a EventFd,
    shared: &'a Shared,
    stop: &'a AtomicBool,

    phase: Phase,
    /// When the phase ends, if time ends it.
    phase_end: u64,
    /// Requests that may still be made.
    to_issue: u64,
    issued: u64,
    completed: u64,
    tallies: Tallies,
    kicks: u64,
    interrupts: u64,
    sleeps: u64,
    begin: Begin,
    /// When the next request is due, in nanoseconds and its fraction of a rate; with `rate`.
    due: Due,
    outcome: Option<Outcome>,
}

/// Even distances that are no whole nanoseconds, without adding up an error.
#[derive(Clone, Copy, Debug)]
struct Due {
    at: u64,
    rest: u64,
    rate: u64,
}

impl Due {
    const SECOND: u64 = 1_000_000_000;

    fn new(rate: u64, at: u64) -> Self {
        Self { at, rest: 0, rate }
    }

    fn advance(&mut self) {
        let step = Self::SECOND + self.rest;
        self.at += step / self.rate;
        self.rest = step % self.rate;
    }
}

/// The cache line of each request.
pub(super) fn lines<'m>(
    memory: &'m GuestMemoryMmap,
    places: &[Places],
) -> Result<Vec<VolatileSlice<'m>>, vm_memory::GuestMemoryError> {
    let len = usize::try_from(LINE).unwrap_or(64);
    let line = |place: &Places| memory.get_slice(place.line, len);
    places.iter().map(line).collect()
}

/// The data of each request.
pub(super) fn buffers<'m>(
    memory: &'m GuestMemoryMmap,
    places: &[Places],
    block: u64,
) -> Result<Vec<VolatileSlice<'m>>, vm_memory::GuestMemoryError> {
    let len = usize::try_from(block).unwrap_or(usize::MAX);
    let buffer = |place: &Places| memory.get_slice(place.data, len);
    places.iter().map(buffer).collect()
}

impl<'a, R: Ring> Job<'a, R> {
    pub(super) fn new(parts: JobParts<'a, R>) -> Option<Self> {
        let status = usize::try_from(STATUS_OFFSET).ok()?;
        let slot = |line: &'a VolatileSlice<'a>| {
            Some(Slot {
                kind: line.get_atomic_ref(0).ok()?,
                sector: line.get_atomic_ref(8).ok()?,
                status: line.get_atomic_ref(status).ok()?,
                started: 0,
                is: Kind::Read,
                block: 0,
            })
        };
        let slots: Vec<_> = parts.lines.iter().map(slot).collect::<Option<_>>()?;
        let count = u16::try_from(slots.len()).ok()?;
        Some(Self {
            ring: parts.ring,
            slots,
            buffers: parts.buffers,
            free: (0..count).rev().collect(),
            workload: parts.workload,
            verifier: parts.verifier,
            waiting: None,
            verified: Verified::default(),
            first_sector: parts.first_sector,
            sectors_per_block: parts.sectors_per_block,
            schedule: parts.schedule,
            clock: parts.clock,
            backend_clock: parts.backend_clock,
            kick: parts.kick,
            call: parts.call,
            shared: parts.shared,
            stop: parts.stop,
            phase: Phase::Ramp,
            phase_end: 0,
            to_issue: u64::MAX,
            issued: 0,
            completed: 0,
            tallies: Tallies::new(),
            kicks: 0,
            interrupts: 0,
            sleeps: 0,
            begin: Begin::default(),
            due: Due::new(parts.schedule.rate.unwrap_or(1), 0),
            outcome: None,
        })
    }

    /// Runs until the schedule is done and nothing is in flight; `None` if it was stopped before.
    ///
    /// # Errors
    ///
    /// [`RingFault`]: the back-end's fault.
    pub(super) fn run(mut self) -> Result<Option<Outcome>, RingFault> {
        let now = self.clock.now();
        self.due.at = now;
        self.phase_end = now + self.schedule.ramp;
        self.advance(now);
        self.ring.disable_interrupts();
        self.issue_all(now);
        let mut looks = 0;
        loop {
            if let Some(first) = self.ring.poll() {
                let now = self.harvest(first)?;
                self.issue_all(now);
                looks = 0;
            } else if self.is_done() {
                if self.phase == Phase::Draining && self.begin_checking() {
                    let now = self.clock.now();
                    self.issue_all(now);
                    continue;
                }
                let verified = self.verified;
                return Ok(self.outcome.map(|outcome| Outcome {
                    verified,
                    ..outcome
                }));
            } else if self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            } else if self.schedule.poll {
                std::hint::spin_loop();
                looks += 1;
                if looks == LOOKS_PER_CLOCK || self.schedule.rate.is_some() {
                    looks = 0;
                    let now = self.clock.now();
                    self.advance(now);
                    self.issue_all(now);
                }
            } else {
                self.sleep();
                if self.schedule.rate.is_some() {
                    let now = self.clock.now();
                    self.advance(now);
                    self.issue_all(now);
                }
            }
        }
    }

    /// Takes everything that has completed. One look at the clock is for all of it.
    // A function of its own for whoever counts instructions.
    #[inline(never)]
    fn harvest(&mut self, first: Result<u16, RingFault>) -> Result<u64, RingFault> {
        let now = self.clock.now();
        let mut next = Some(first);
        while let Some(request) = next {
            self.finish(request?, now);
            if self.free.len() >= usize::from(self.schedule.batch) {
                self.issue_all(now);
            }
            next = self.ring.poll();
        }
        self.tallies.settle(now);
        self.shared
            .completed
            .store(self.completed, Ordering::Relaxed);
        self.advance(now);
        Ok(now)
    }

    #[inline]
    fn finish(&mut self, request: u16, now: u64) {
        let slot = &self.slots[usize::from(request)];
        self.completed += 1;
        self.free.push(request);
        let (kind, block) = (slot.is, slot.block);
        let done = slot.status.load(Ordering::Relaxed) == STATUS_OK;
        if done {
            self.tallies.success(kind, slot.started, now);
        } else {
            self.tallies.error(kind);
        }
        if self.verifier.is_some() {
            self.verify(request, kind, block, done);
        }
    }

    fn verify(&mut self, request: u16, kind: Kind, block: u64, done: bool) {
        let Some(verifier) = &mut self.verifier else {
            return;
        };
        // Those before are in the report's errors.
        if !done && matches!(self.phase, Phase::Draining | Phase::Checking) {
            self.verified.errors += 1;
        }
        match kind {
            Kind::Flush => {}
            Kind::Write => verifier.written(block, done),
            Kind::Read if !done => verifier.not_read(block),
            Kind::Read => {
                let buffer = &self.buffers[usize::from(request)];
                self.verified.blocks += 1;
                let copy = |to: &mut [u8]| {
                    buffer.copy_to(to);
                };
                if let Err(wrong) = verifier.read(block, copy) {
                    self.verified.wrong += 1;
                    if self.verified.samples.len() < SAMPLES_MAX {
                        self.verified.samples.push(wrong);
                    }
                }
            }
        }
    }

    /// Nothing is in flight, and nothing is to come.
    fn is_done(&self) -> bool {
        let ended = match self.phase {
            Phase::Ramp | Phase::Measured => false,
            Phase::Draining => true,
            Phase::Checking => self.to_issue == 0,
        };
        ended && self.completed == self.issued
    }

    /// Has what was written read back; false if nothing was.
    fn begin_checking(&mut self) -> bool {
        let blocks = self.verifier.as_ref().map_or(0, Verifier::written_blocks);
        self.phase = Phase::Checking;
        self.to_issue = blocks;
        blocks != 0
    }

    /// The next request; `None` while none can be made.
    #[inline]
    fn next_step(&mut self) -> Option<Step> {
        if self.verifier.is_some() {
            self.next_verified()
        } else {
            Some(self.workload.next())
        }
    }

    fn next_verified(&mut self) -> Option<Step> {
        let verifier = self.verifier.as_mut()?;
        let step = if self.phase == Phase::Checking {
            Step {
                kind: Kind::Read,
                block: verifier.next_written()?,
            }
        } else {
            self.waiting.take().unwrap_or_else(|| self.workload.next())
        };
        if step.kind == Kind::Flush {
            return Some(step);
        }
        let settled = verifier.settle(step);
        if settled.is_none() {
            self.waiting = Some(step);
        }
        settled
    }

    /// Puts into the buffer what is to be written, or what no read may leave there.
    fn prepare(&mut self, request: u16, step: Step) {
        let Some(verifier) = &mut self.verifier else {
            return;
        };
        let buffer = &self.buffers[usize::from(request)];
        match step.kind {
            Kind::Flush => return,
            Kind::Write => buffer.copy_from(verifier.content(step.block)),
            Kind::Read => {
                let len = usize::try_from(SECTOR_SIZE).unwrap_or(512);
                for sector in (0..buffer.len()).step_by(len) {
                    // Within the buffer.
                    let wiped = buffer.write_slice(&[0; 8], sector);
                    debug_assert!(wiped.is_ok());
                }
            }
        }
        verifier.take(step.block);
    }

    /// Makes as many requests as may be in flight, and are due.
    #[inline(never)]
    fn issue_all(&mut self, now: u64) {
        let mut staged = 0;
        while self.to_issue != 0 {
            let started = if !self.is_paced() {
                now
            } else if self.due.at <= now {
                self.due.at
            } else {
                break;
            };
            let Some(&request) = self.free.last() else {
                break;
            };
            let Some(step) = self.next_step() else {
                break;
            };
            self.free.pop();
            if self.is_paced() {
                self.due.advance();
            }
            self.issue(request, step, started);
            staged += 1;
            if staged == self.schedule.batch {
                self.publish();
                staged = 0;
            }
        }
        if staged > 0 {
            self.publish();
        }
        self.shared.issued.store(self.issued, Ordering::Relaxed);
    }

    #[inline]
    fn publish(&mut self) {
        self.ring.publish();
        if self.ring.needs_kick() {
            self.kicks += 1;
            self.shared.kicks.store(self.kicks, Ordering::Relaxed);
            // An eventfd that cannot be added to has been signalled.
            let _ = self.kick.write(1);
        }
    }

    #[inline]
    fn issue(&mut self, request: u16, step: Step, started: u64) {
        if self.verifier.is_some() {
            self.prepare(request, step);
        }
        let slot = &mut self.slots[usize::from(request)];
        let kind = match step.kind {
            Kind::Read => VIRTIO_BLK_T_IN,
            Kind::Write => VIRTIO_BLK_T_OUT,
            Kind::Flush => VIRTIO_BLK_T_FLUSH,
        };
        let sector = match step.kind {
            // §5.2.6.1: a flush has 0.
            Kind::Flush => 0,
            _ => self.first_sector + step.block * self.sectors_per_block,
        };
        // Relaxed: published by the release store of the ring's index.
        slot.kind.store(u64::from(kind).to_le(), Ordering::Relaxed);
        slot.sector.store(sector.to_le(), Ordering::Relaxed);
        slot.status.store(NO_STATUS, Ordering::Relaxed);
        slot.started = started;
        slot.is = step.kind;
        slot.block = step.block;
        self.ring.offer(request, step.kind);
        self.to_issue -= 1;
        self.issued += 1;
    }

    /// Goes on to the next phase where its time has come.
    #[inline]
    fn advance(&mut self, now: u64) {
        let all_done = self.to_issue == 0 && self.completed == self.issued;
        if now >= self.phase_end || all_done {
            self.change_phase(now);
        }
    }

    #[cold]
    fn change_phase(&mut self, now: u64) {
        match self.phase {
            Phase::Ramp => self.begin(now),
            Phase::Measured => self.end(now),
            Phase::Draining | Phase::Checking => {}
        }
    }

    /// Reading back is not.
    #[inline]
    fn is_paced(&self) -> bool {
        self.schedule.rate.is_some() && self.phase != Phase::Checking
    }

    fn begin(&mut self, now: u64) {
        self.tallies.clear();
        self.take_interrupts();
        self.phase = Phase::Measured;
        self.phase_end = self
            .schedule
            .runtime
            .map_or(u64::MAX, |runtime| now + runtime);
        if let Some(number) = self.schedule.number_ios {
            // Those in flight count as well.
            self.to_issue = number.saturating_sub(self.issued - self.completed);
        }
        self.shared.measuring.store(true, Ordering::Relaxed);
        self.begin = Begin {
            at: now,
            kicks: self.kicks,
            interrupts: self.interrupts,
            sleeps: self.sleeps,
            backend_cpu: self.backend_cpu(),
            client_cpu: cpu_of(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap_or(0),
        };
    }

    fn end(&mut self, now: u64) {
        let client_cpu = cpu_of(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap_or(0);
        let backend_cpu = self.begin.backend_cpu.zip(self.backend_cpu());
        self.take_interrupts();
        self.phase = Phase::Draining;
        self.phase_end = u64::MAX;
        self.to_issue = 0;
        self.outcome = Some(Outcome {
            tallies: self.tallies.clone(),
            kicks: self.kicks - self.begin.kicks,
            interrupts: self.interrupts - self.begin.interrupts,
            sleeps: self.sleeps - self.begin.sleeps,
            span: now - self.begin.at,
            client_cpu: client_cpu.saturating_sub(self.begin.client_cpu),
            backend_cpu,
            verified: Verified::default(),
        });
    }

    fn backend_cpu(&self) -> Option<u64> {
        self.backend_clock.and_then(cpu_of)
    }

    /// Asks for an interrupt and waits for it, unless something has completed meanwhile.
    fn sleep(&mut self) {
        if self.ring.enable_interrupts() {
            self.sleeps += 1;
            if self.is_paced() && self.to_issue != 0 && !self.free.is_empty() {
                self.sleep_until_due();
            } else {
                self.read_call();
            }
        }
        self.ring.disable_interrupts();
    }

    fn read_call(&mut self) {
        match self.call.read() {
            Ok(signals) => self.interrupts += signals,
            // The back-end shares the descriptor's flags, and may have made it non-blocking.
            Err(Errno::EAGAIN) => self.wait_for_call(None),
            Err(_) => {}
        }
    }

    #[cold]
    fn wait_for_call(&self, timeout: Option<TimeSpec>) {
        let mut fds = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
        // Interrupted or not, the ring is looked at.
        let _ = ppoll(&mut fds, timeout, None);
    }

    fn sleep_until_due(&mut self) {
        let now = self.clock.now();
        let until = self.due.at.min(self.phase_end);
        let Some(left) = until.checked_sub(now).filter(|&left| left != 0) else {
            return;
        };
        let mut fds = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
        let timeout = TimeSpec::from_duration(Duration::from_nanos(left));
        if ppoll(&mut fds, Some(timeout), None).is_ok_and(|ready| ready > 0) {
            self.read_call();
        }
    }

    /// Counts the signals that nobody has read, as those of a client that polls.
    fn take_interrupts(&mut self) {
        let mut fds = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0) {
            self.read_call();
        }
    }
}

/// Processor time in nanoseconds.
fn cpu_of(clock: ClockId) -> Option<u64> {
    let time = Duration::from(clock_gettime(clock).ok()?);
    u64::try_from(time.as_nanos()).ok()
}
