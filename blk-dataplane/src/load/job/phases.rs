//! What happens at the beginning and end of the measured span.

use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use super::checked::Verified;
use super::{Job, Outcome};
use crate::load::ring::Ring;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Ramp,
    Measured,
    /// No more requests are made.
    Draining,
    /// Every block that was written is read once more.
    Checking,
}

/// Numbers at the beginning of the measured span.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Begin {
    at: u64,
    kicks: u64,
    interrupts: u64,
    sleeps: u64,
    client_cpu: u64,
    backend_cpu: Option<u64>,
}

impl<R: Ring> Job<'_, R> {
    /// Goes on to the next phase where its time has come.
    #[inline]
    pub(super) fn advance(&mut self, now: u64) {
        let all_done = self.to_issue == 0 && self.completed == self.issued;
        if now >= self.phase_end || all_done || self.orders.is_finish() {
            self.change_phase(now);
        }
    }

    #[cold]
    fn change_phase(&mut self, now: u64) {
        match self.phase {
            Phase::Ramp => {
                self.begin(now);
                if self.orders.is_finish() {
                    self.end(now);
                }
            }
            Phase::Measured => self.end(now),
            Phase::Draining | Phase::Checking => {}
        }
    }

    fn begin(&mut self, now: u64) {
        self.tallies.clear();
        self.take_interrupts();
        self.phase = Phase::Measured;
        let runtime = self.schedule.runtime;
        self.phase_end = runtime.map_or(u64::MAX, |runtime| now + runtime);
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
            backend_cpu: self.backend_clock.and_then(cpu_of),
            client_cpu: cpu_of(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap_or(0),
        };
    }

    fn end(&mut self, now: u64) {
        let client_cpu = cpu_of(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap_or(0);
        let backend_cpu = self.backend_clock.and_then(cpu_of);
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
            backend_cpu: self.begin.backend_cpu.zip(backend_cpu),
            verified: Verified::default(),
        });
    }

    /// Nothing is in flight, and nothing is to come.
    pub(super) fn is_done(&self) -> bool {
        let ended = match self.phase {
            Phase::Ramp | Phase::Measured => false,
            Phase::Draining => true,
            Phase::Checking => self.to_issue == 0,
        };
        ended && self.completed == self.issued
    }
}

/// Processor time in nanoseconds.
fn cpu_of(clock: ClockId) -> Option<u64> {
    let time = Duration::from(clock_gettime(clock).ok()?);
    u64::try_from(time.as_nanos()).ok()
}
