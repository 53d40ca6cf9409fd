//! The thread of one queue: takes what has completed, makes as many requests again, tells the device once.

mod checked;
mod phases;
mod requests;
mod waiting;

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use nix::sys::eventfd::EventFd;
use nix::time::ClockId;

use self::checked::Verified;
use self::phases::{Begin, Phase};
use self::requests::Requests;
pub(super) use self::requests::Slices;
use self::waiting::Due;
use super::measure::{Clock, Tallies};
use super::ring::{Ring, RingFault};
use super::verify::Verifier;
use super::workload::{Step, Workload};

/// How often a client that polls looks at the clock while nothing completes.
const LOOKS_PER_CLOCK: u32 = 512;

/// What the thread tells while it runs. On cache lines of its own: it writes once a harvest.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Shared {
    /// Requests made.
    pub(super) issued: AtomicU64,
    /// Requests completed.
    pub(super) completed: AtomicU64,
    /// The measured span has begun.
    pub(super) measuring: AtomicBool,
}

/// What threads are told while they run.
#[derive(Debug, Default)]
pub(super) struct Orders(AtomicU8);

impl Orders {
    const FINISH: u8 = 1;
    const ABORT: u8 = 2;

    /// End the measured span now, and do what comes after it.
    pub(super) fn finish(&self) {
        self.0.fetch_max(Self::FINISH, Ordering::Relaxed);
    }

    /// End at once, with nothing to tell.
    pub(super) fn abort(&self) {
        self.0.store(Self::ABORT, Ordering::Relaxed);
    }

    pub(super) fn is_finish(&self) -> bool {
        self.0.load(Ordering::Relaxed) == Self::FINISH
    }

    pub(super) fn is_abort(&self) -> bool {
        self.0.load(Ordering::Relaxed) == Self::ABORT
    }
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
    /// One look at the clock for all that is taken together.
    pub(super) reduced_clock: bool,
    /// Nanoseconds to be busy with each request before it is made available.
    pub(super) think: u64,
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

/// What a job is made of.
pub(super) struct JobParts<'a, R> {
    pub(super) ring: R,
    pub(super) slices: &'a Slices<'a>,
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
    pub(super) orders: &'a Orders,
}

pub(super) struct Job<'a, R> {
    ring: R,
    requests: Requests<'a>,
    /// Requests that are not in flight.
    free: Vec<u16>,
    workload: Workload,
    verifier: Option<Verifier>,
    /// What could not be made a request, since all blocks are busy; with `verifier`.
    waiting: Option<Step>,
    verified: Verified,
    schedule: Schedule,
    clock: Clock,
    backend_clock: Option<ClockId>,
    kick: &'a EventFd,
    call: &'a EventFd,
    shared: &'a Shared,
    orders: &'a Orders,

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
    /// With a rate.
    due: Due,
    outcome: Option<Outcome>,
}

impl<'a, R: Ring> Job<'a, R> {
    /// `None` if the requests have no place in memory.
    pub(super) fn new(parts: JobParts<'a, R>) -> Option<Self> {
        let requests = Requests::new(parts.slices, parts.first_sector, parts.sectors_per_block)?;
        let count = u16::try_from(requests.slots.len()).ok()?;
        Some(Self {
            ring: parts.ring,
            requests,
            free: (0..count).rev().collect(),
            workload: parts.workload,
            verifier: parts.verifier,
            waiting: None,
            verified: Verified::default(),
            schedule: parts.schedule,
            clock: parts.clock,
            backend_clock: parts.backend_clock,
            kick: parts.kick,
            call: parts.call,
            shared: parts.shared,
            orders: parts.orders,
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
            due: Due::new(parts.schedule.rate.unwrap_or(1)),
            outcome: None,
        })
    }

    /// Runs until the schedule is done and nothing is in flight; `None` if it was aborted before.
    ///
    /// # Errors
    ///
    /// [`RingFault`]: the back-end's fault.
    pub(super) fn run(self) -> Result<Option<Outcome>, RingFault> {
        // What every request asks is asked once, here: the loop is made twice.
        if self.verifier.is_some() || self.schedule.rate.is_some() {
            self.run_loop::<true>()
        } else {
            self.run_loop::<false>()
        }
    }

    /// `CHECKED`: there is a verifier or a rate.
    fn run_loop<const CHECKED: bool>(mut self) -> Result<Option<Outcome>, RingFault> {
        let now = self.clock.now();
        self.due.at = now;
        self.phase_end = now + self.schedule.ramp;
        self.advance(now);
        self.ring.disable_interrupts();
        self.issue_all::<CHECKED>(now);
        let mut looks = 0;
        loop {
            if self.ring.has_used() {
                let now = self.harvest::<CHECKED>()?;
                self.issue_all::<CHECKED>(now);
                looks = 0;
            } else if self.is_done() {
                if self.phase == Phase::Draining && self.begin_checking() {
                    let now = self.clock.now();
                    self.issue_all::<CHECKED>(now);
                    continue;
                }
                let verified = self.verified;
                return Ok(self.outcome.map(|outcome| Outcome {
                    verified,
                    ..outcome
                }));
            } else if self.orders.is_abort() {
                return Ok(None);
            } else if self.schedule.poll {
                std::hint::spin_loop();
                looks += 1;
                if looks == LOOKS_PER_CLOCK || (CHECKED && self.schedule.rate.is_some()) {
                    looks = 0;
                    self.look_at_the_clock::<CHECKED>();
                }
            } else {
                self.sleep();
                if self.orders.is_finish() || (CHECKED && self.schedule.rate.is_some()) {
                    self.look_at_the_clock::<CHECKED>();
                }
            }
        }
    }

    /// What time alone brings about.
    fn look_at_the_clock<const CHECKED: bool>(&mut self) {
        let now = self.clock.now();
        self.advance(now);
        self.issue_all::<CHECKED>(now);
    }

    /// Takes what has completed, at most as much as can be in flight.
    // A function of its own for whoever counts instructions.
    #[inline(never)]
    fn harvest<const CHECKED: bool>(&mut self) -> Result<u64, RingFault> {
        let mut now = self.clock.now();
        let batch = usize::from(self.schedule.batch);
        let one_by_one = !CHECKED && batch == 1;
        let anywhere = self.workload.only_anywhere();
        for _ in 0..self.requests.slots.len() {
            let Some(request) = self.ring.poll() else {
                break;
            };
            let request = request?;
            if !self.schedule.reduced_clock {
                self.tallies.settle(now);
                now = self.clock.now();
            }
            let slot = &self.requests.slots[usize::from(request)];
            if slot.started == now {
                // It was made meanwhile, and has not taken no time.
                self.tallies.settle(now);
                now = self.clock.now();
            }
            let done = slot.is_done();
            if done {
                self.tallies.success(slot.kind, slot.started, now);
            } else {
                self.tallies.error(slot.kind);
            }
            self.completed += 1;
            if one_by_one && self.to_issue != 0 {
                // The request that has just ended is made again: no others wait for a turn.
                let step = match anywhere {
                    Some(kind) => self.workload.step_anywhere(kind),
                    None => self.workload.next(),
                };
                self.requests.write(request, step, now);
                self.ring.offer(request, step.kind);
                self.to_issue -= 1;
                self.issued += 1;
                self.publish();
                continue;
            }
            self.free.push(request);
            if CHECKED && self.verifier.is_some() {
                self.verify(request, done);
            }
            if self.free.len() >= batch {
                // Made available at once, so that one time will do for the end of the one and the start of the other.
                self.issue_all::<CHECKED>(now);
            }
        }
        self.tallies.settle(now);
        self.tell();
        self.advance(now);
        Ok(now)
    }

    /// Makes as many requests as may be in flight, and are due, a batch after another.
    #[inline(never)]
    fn issue_all<const CHECKED: bool>(&mut self, now: u64) {
        let batch = usize::from(self.schedule.batch);
        loop {
            let count = if CHECKED {
                self.issue_checked(now, batch)
            } else if let Some(kind) = self.workload.only_anywhere() {
                self.issue_steps(now, batch, |workload| workload.step_anywhere(kind))
            } else {
                self.issue_steps(now, batch, Workload::next)
            };
            if count == 0 {
                break;
            }
            self.to_issue -= count as u64;
            self.issued += count as u64;
            if self.schedule.think != 0 {
                self.think(count as u64);
            }
            self.publish();
            if count < batch {
                break;
            }
        }
        self.tell();
    }

    /// Makes what is staged available, and kicks if the device wants to be told.
    #[inline]
    fn publish(&mut self) {
        self.ring.publish();
        if self.ring.needs_kick() {
            self.kicks += 1;
            // An eventfd that cannot be added to has been signalled.
            let _ = self.kick.write(1);
        }
    }

    /// Tells whoever watches.
    #[inline]
    fn tell(&self) {
        self.shared.issued.store(self.issued, Ordering::Relaxed);
        self.shared
            .completed
            .store(self.completed, Ordering::Relaxed);
    }

    /// Is busy for as long as `count` requests are to take.
    #[cold]
    fn think(&self, count: u64) {
        let until = self.clock.now() + self.schedule.think.saturating_mul(count);
        while self.clock.now() < until {
            std::hint::spin_loop();
        }
    }

    /// Makes all requests that there are, `most` at most, those that were used last first: they are in a cache.
    /// Returns how many.
    #[inline]
    fn issue_steps(
        &mut self,
        now: u64,
        most: usize,
        mut next: impl FnMut(&mut Workload) -> Step,
    ) -> usize {
        let room = usize::try_from(self.to_issue).unwrap_or(usize::MAX);
        let keep = self.free.len().saturating_sub(room.min(most));
        for &request in self.free[keep..].iter().rev() {
            let step = next(&mut self.workload);
            self.requests.write(request, step, now);
            self.ring.offer(request, step.kind);
        }
        let count = self.free.len() - keep;
        self.free.truncate(keep);
        count
    }

    /// The same where each request is verified, or due at its time.
    fn issue_checked(&mut self, now: u64, most: usize) -> usize {
        let room = usize::try_from(self.to_issue).unwrap_or(usize::MAX);
        let mut count = 0;
        while count < room.min(most) {
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
            self.prepare(request, step);
            self.requests.write(request, step, started);
            self.ring.offer(request, step.kind);
            count += 1;
        }
        count
    }
}
