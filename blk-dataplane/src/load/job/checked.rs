//! What a job does besides where blocks are verified.

use super::{Job, Phase};
use crate::load::ring::{Kind, Ring};
use crate::load::verify::{Verifier, Wrong};
use crate::load::workload::Step;

/// Blocks that were wrong that are told one by one.
const SAMPLES_MAX: usize = 4;

/// What was found out about blocks.
#[derive(Clone, Debug, Default)]
pub(in crate::load) struct Verified {
    /// Blocks that were read and checked.
    pub(in crate::load) blocks: u64,
    /// Those that were wrong.
    pub(in crate::load) wrong: u64,
    /// Reads and writes that failed after the measured span.
    pub(in crate::load) errors: u64,
    /// The first few that were wrong: offset and how.
    pub(in crate::load) samples: Vec<(u64, Wrong)>,
}

impl<R: Ring> Job<'_, R> {
    /// The next request; `None` while none can be made.
    pub(super) fn next_step(&mut self) -> Option<Step> {
        let Some(verifier) = &mut self.verifier else {
            return Some(self.workload.next());
        };
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
    pub(super) fn prepare(&mut self, request: u16, step: Step) {
        let Some(verifier) = &mut self.verifier else {
            return;
        };
        match step.kind {
            Kind::Flush => return,
            Kind::Write => self.requests.put(request, verifier.content(step.block)),
            Kind::Read => self.requests.wipe(request),
        }
        verifier.take(step.block);
    }

    /// A request has ended; `done` or not.
    pub(super) fn verify(&mut self, request: u16, done: bool) {
        let Some(verifier) = &mut self.verifier else {
            return;
        };
        let slot = &self.requests.slots[usize::from(request)];
        // Those before are in the report's errors.
        if !done && matches!(self.phase, Phase::Draining | Phase::Checking) {
            self.verified.errors += 1;
        }
        match slot.kind {
            Kind::Flush => {}
            Kind::Write => verifier.written(slot.block, done),
            Kind::Read if !done => verifier.not_read(slot.block),
            Kind::Read => {
                self.verified.blocks += 1;
                let copy = |to: &mut [u8]| self.requests.get(request, to);
                if let Err(wrong) = verifier.read(slot.block, copy) {
                    self.verified.wrong += 1;
                    if self.verified.samples.len() < SAMPLES_MAX {
                        self.verified.samples.push(wrong);
                    }
                }
            }
        }
    }

    /// Has what was written read back; false if nothing was.
    pub(super) fn begin_checking(&mut self) -> bool {
        let blocks = self.verifier.as_ref().map_or(0, Verifier::written_blocks);
        self.phase = Phase::Checking;
        self.to_issue = blocks;
        blocks != 0
    }
}
