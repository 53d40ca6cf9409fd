//! What control does meanwhile: one thing at a time, as through `DataPlane`.

use std::sync::Arc;

use crossbeam_channel::{Receiver, bounded};
use ioq::testing::{Lie, Ticket};
use vring::RingBase;

use super::guest::Memory;
use super::{Cache, Mistake, Simulation, next_avail};
use crate::data_thread::Command;

/// What is under way.
pub(super) enum Control {
    Idle,
    Starting(Vec<Receiver<Result<(), event_poll::Error>>>),
    Pausing(Vec<Receiver<()>>),
    Paused {
        /// Steps left, and answers of each queue when it began.
        left: usize,
        asked: Vec<u64>,
    },
    Stopping(u16, Receiver<Option<RingBase>>),
    Stopped {
        queue: u16,
        base: u16,
        left: usize,
    },
    Moving(Vec<Receiver<()>>),
    TurningCache {
        on: bool,
        told: Vec<Receiver<()>>,
    },
    /// The cache is off; what it holds goes out.
    WritingOut(Ticket),
}

impl Simulation {
    /// Asks every thread.
    fn ask_all(
        &self,
        command: impl Fn(crossbeam_channel::Sender<()>) -> Command<Memory>,
    ) -> Vec<Receiver<()>> {
        let threads = self.threads.iter();
        threads
            .map(|thread| {
                let (reply, answer) = bounded(1);
                thread.commands.send(command(reply)).unwrap();
                answer
            })
            .collect()
    }

    pub(super) fn begin_control(&mut self) {
        if !matches!(self.control, Control::Idle) {
            return;
        }
        self.control = match self.dice.below(4) {
            0 => {
                self.report.pauses += 1;
                Control::Pausing(self.ask_all(|reply| Command::Pause { reply }))
            }
            1 => {
                self.report.stops += 1;
                let queue = u16::try_from(self.dice.below(u64::from(self.plan.queues))).unwrap();
                let (reply, stopped) = bounded(1);
                let index = queue;
                let command = Command::StopQueue { index, reply };
                self.thread_of(queue).commands.send(command).unwrap();
                Control::Stopping(queue, stopped)
            }
            2 => {
                self.report.new_maps += 1;
                // The same memory behind another map: requests in flight hold the old one.
                let memory = Arc::new((*self.memory).clone());
                self.memory = Arc::clone(&memory);
                let threads = self.threads.len();
                let mut told = Vec::new();
                for (number, thread) in self.threads.iter().enumerate() {
                    let own = (number..self.queues.len()).step_by(threads);
                    let rings = own.map(|index| {
                        let addresses = Some(self.queues[index].addresses);
                        (u16::try_from(index).unwrap(), addresses)
                    });
                    let (reply, answer) = bounded(1);
                    let command = Command::UpdateMemory {
                        memory: Arc::clone(&memory),
                        rings: rings.collect(),
                        reply,
                    };
                    thread.commands.send(command).unwrap();
                    told.push(answer);
                }
                Control::Moving(told)
            }
            _ if self.plan.cache == Cache::Toggled => {
                self.report.toggles += 1;
                let on = self.write_through;
                // What is answered from now on may stay in the cache.
                self.write_through = false;
                let told = self.ask_all(|reply| Command::SetWriteback {
                    writeback: on,
                    reply,
                });
                Control::TurningCache { on, told }
            }
            _ => Control::Idle,
        };
    }

    pub(super) fn go_on_with_control(&mut self) -> Result<(), String> {
        self.control = match std::mem::replace(&mut self.control, Control::Idle) {
            Control::Starting(mut started) => {
                started.retain(|answer| answer.try_recv().is_err());
                if started.is_empty() {
                    Control::Idle
                } else {
                    Control::Starting(started)
                }
            }
            Control::Pausing(mut told) => {
                told.retain(|answer| answer.try_recv().is_err());
                if told.is_empty() {
                    self.begin_pause()?
                } else {
                    Control::Pausing(told)
                }
            }
            Control::Paused { left: 0, .. } => {
                for thread in &self.threads {
                    thread.commands.send(Command::Resume).unwrap();
                }
                Control::Idle
            }
            Control::Paused { left, asked } => {
                self.poll_answers()?;
                let answered: Vec<u64> = self.queues.iter().map(|queue| queue.answered).collect();
                if answered != asked {
                    return Err("something was answered while the device was paused".into());
                }
                let left = left - 1;
                Control::Paused { left, asked }
            }
            Control::Stopping(queue, stopped) => match stopped.try_recv() {
                Ok(base) => self.begin_stop(queue, base)?,
                Err(_) => Control::Stopping(queue, stopped),
            },
            Control::Stopped {
                queue,
                base,
                left: 0,
            } => {
                self.start_queue(queue, base);
                std::mem::replace(&mut self.control, Control::Idle)
            }
            Control::Stopped { queue, base, left } => {
                self.poll_answers()?;
                let answered = self.queues[usize::from(queue)].answered;
                if base != u16::try_from(answered & 0xffff).unwrap() {
                    return Err("something was answered after the queue was stopped".into());
                }
                let left = left - 1;
                Control::Stopped { queue, base, left }
            }
            Control::Moving(mut told) => {
                told.retain(|answer| answer.try_recv().is_err());
                if told.is_empty() {
                    Control::Idle
                } else {
                    Control::Moving(told)
                }
            }
            Control::TurningCache { on, mut told } => {
                told.retain(|answer| answer.try_recv().is_err());
                if !told.is_empty() {
                    Control::TurningCache { on, told }
                } else if on {
                    Control::Idle
                } else {
                    // What was answered before, and not looked at, may be in the cache.
                    self.poll_answers()?;
                    self.write_through = true;
                    self.write_out()
                }
            }
            Control::WritingOut(flush) => {
                self.control_queue.submit();
                let mut done = None;
                self.control_queue.reap(|(), result| {
                    let result = result.map(drop).map_err(std::io::Error::other);
                    done = Some(self.write_back.judge(result).is_ok());
                });
                match done {
                    None => Control::WritingOut(flush),
                    Some(true) => {
                        self.ledger.answer_flush(flush);
                        Control::Idle
                    }
                    Some(false) => {
                        self.write_through = false;
                        let told = self.ask_all(|reply| Command::SetWriteback {
                            writeback: true,
                            reply,
                        });
                        Control::TurningCache { on: true, told }
                    }
                }
            }
            Control::Idle => Control::Idle,
        };
        Ok(())
    }

    /// Nothing is in flight: what is in the rings has been answered or was not popped.
    fn begin_pause(&mut self) -> Result<Control, String> {
        self.poll_answers()?;
        for (queue, popped) in self.queues.iter().zip(&self.popped) {
            if queue.answered != popped.now {
                return Err(format!(
                    "paused with {} popped and {} answered",
                    popped.now, queue.answered
                ));
            }
        }
        Ok(Control::Paused {
            left: self.dice.index(60),
            asked: self.queues.iter().map(|queue| queue.answered).collect(),
        })
    }

    fn begin_stop(&mut self, index: u16, base: Option<RingBase>) -> Result<Control, String> {
        self.poll_answers()?;
        let queue = &self.queues[usize::from(index)];
        let answered = u16::try_from(queue.answered & 0xffff).unwrap();
        match base.map(next_avail) {
            Some(base) if base == answered => Ok(Control::Stopped {
                queue: index,
                base,
                left: self.dice.index(60),
            }),
            base => Err(format!("stopped at {base:?} with {answered} answered")),
        }
    }

    /// As `DataPlane` does when the guest has turned the cache off.
    fn write_out(&mut self) -> Control {
        if let Some(Mistake::Disk(Lie::SyncOfOneQueue)) = self.plan.mistake {
            return Control::Idle;
        }
        self.control_queue.queue_fdatasync(()).unwrap();
        Control::WritingOut(self.ledger.ask_flush())
    }
}
