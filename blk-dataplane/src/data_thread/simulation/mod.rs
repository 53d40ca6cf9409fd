//! Data threads, a guest and a disk that loses power, all run by one thread in an order that dice choose: the
//! same for the same seed. A step is one phase of a data thread's pass, a bit of the disk's work, some of the
//! guest's requests or answers, or a command of control's.
//!
//! At any moment the disk can say everything that a loss of power would leave, and the ledger which of that is
//! right: so each moment looked at stands for every way to lose power then.

mod control;
mod guest;

use std::sync::Arc;

use crossbeam_channel::{Sender, unbounded};
use event_poll::{EventNotifier, EventPoll};
use ioq::testing::{Deeds, Dice, Faults, Ledger, Lie, PowerLossDisk, SECTOR_LEN, Ticket};
use ioq::{Config, IoQueue};
use virtio_bindings::virtio_blk as blk;
use vm_memory::GuestAddress;
use vring::{QueueConfig, QueueSize, RingBase, RingFeatures};

use self::control::Control;
use self::guest::{Answered, GuestQueue, Memory, RING_SIZE, SECTORS, SPAN, Wants};
use super::*;
use crate::device::{Backing, DeviceOptions, bit};
use crate::request::Accepted;
use crate::testing::TestDisk;
use crate::threads::ThreadOptions;
use crate::write_back::WriteBack;

/// Steps in which everything outstanding must have been answered.
const PATIENCE: usize = 100_000;

/// When writes have to be stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cache {
    /// When the guest flushes.
    On,
    /// Before they complete: it cannot flush.
    NoFlush,
    /// The guest turns it off and on.
    Toggled,
}

/// What a simulation is like.
#[derive(Clone, Copy, Debug)]
struct Plan {
    seed: u64,
    threads: u16,
    queues: u16,
    cache: Cache,
    /// What direct I/O demands.
    alignment: u32,
    faults: Faults,
    mistake: Option<Mistake>,
}

/// What is wrong on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mistake {
    Disk(Lie),
    /// A flush does not wait for the writes popped by the other threads.
    FlushOfOneThread,
    /// Writes complete before they are stable, whatever the guest has asked for.
    NoWriteThrough,
    /// An fdatasync after one that has failed is believed, whatever the page cache has forgotten.
    TrustAfterFailure,
}

impl Plan {
    fn of(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let threads = 1 + u16::try_from(dice.below(3)).unwrap();
        let trouble = Faults {
            fail: 30,
            again: 30,
            short: 100,
            busy: 30,
            refuse: 10,
            fail_sync: 50,
            failed_sync_forgets: false,
        };
        let forgetful = Faults {
            fail_sync: 10,
            failed_sync_forgets: true,
            ..Faults::default()
        };
        Self {
            seed,
            threads,
            queues: threads + u16::try_from(dice.below(2)).unwrap(),
            cache: [Cache::On, Cache::On, Cache::NoFlush, Cache::Toggled][dice.index(4)],
            alignment: if dice.chance(500) { 1 } else { 512 },
            faults: [Faults::default(), trouble, forgetful][dice.index(3)],
            mistake: None,
        }
    }
}

/// What has been simulated.
#[derive(Clone, Copy, Debug, Default)]
struct Report {
    /// Moments of which every outcome was looked at.
    crash_points: u64,
    /// Outcomes looked at, sector by sector.
    outcomes: u64,
    lives: u64,
    requests: u64,
    failed: u64,
    merged: u64,
    bounced: u64,
    stops: u64,
    pauses: u64,
    toggles: u64,
    new_maps: u64,
    deeds: Deeds,
}

impl Report {
    fn plus(&self, other: &Self) -> Self {
        Self {
            crash_points: self.crash_points + other.crash_points,
            outcomes: self.outcomes + other.outcomes,
            lives: self.lives + other.lives,
            requests: self.requests + other.requests,
            failed: self.failed + other.failed,
            merged: self.merged + other.merged,
            bounced: self.bounced + other.bounced,
            stops: self.stops + other.stops,
            pauses: self.pauses + other.pauses,
            toggles: self.toggles + other.toggles,
            new_maps: self.new_maps + other.new_maps,
            deeds: plus(&self.deeds, &other.deeds),
        }
    }
}

fn plus(one: &Deeds, other: &Deeds) -> Deeds {
    Deeds {
        transfers: one.transfers + other.transfers,
        short: one.short + other.short,
        failed: one.failed + other.failed,
        again: one.again + other.again,
        busy: one.busy + other.busy,
        refused: one.refused + other.refused,
        syncs: one.syncs + other.syncs,
        failed_syncs: one.failed_syncs + other.failed_syncs,
    }
}

/// The phases of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Fetch,
    Submit,
    Reap,
    Publish,
    Settle,
}

struct SimThread {
    thread: DataThread<Memory>,
    commands: Sender<Command<Memory>>,
    next: Phase,
    counters: Arc<Counters>,
}

/// How far a data thread has come with a queue, in the queue's requests.
#[derive(Clone, Copy, Debug, Default)]
struct Popped {
    now: u64,
    /// And has let the other threads know.
    noted: u64,
}

struct Simulation {
    plan: Plan,
    dice: Dice,
    disk: PowerLossDisk,
    ledger: Ledger,
    memory: Arc<Memory>,
    threads: Vec<SimThread>,
    queues: Vec<GuestQueue>,
    popped: Vec<Popped>,
    control: Control,
    /// Control's own end of the disk.
    control_queue: IoQueue<()>,
    write_back: Arc<WriteBack>,
    /// Every answer seen from now on is to one that is stable.
    write_through: bool,
    report: Report,
}

impl Simulation {
    fn new(plan: Plan) -> Self {
        let sectors = usize::try_from(SECTORS).unwrap();
        let image = vec![0; sectors * SECTOR_LEN];
        let ledger = Ledger::new(&image);
        Self::on(plan, Dice::new(plan.seed), image, ledger, Report::default())
    }

    /// A new life on the disk as it was found.
    fn on(plan: Plan, mut dice: Dice, image: Vec<u8>, ledger: Ledger, report: Report) -> Self {
        let disk = PowerLossDisk::new(image, dice.number());
        disk.set_faults(plan.faults);
        if let Some(Mistake::Disk(lie)) = plan.mistake {
            disk.set_lie(Some(lie));
        }
        let mut backing = TestDisk::from(&disk).aligned(plan.alignment);
        if plan.faults.failed_sync_forgets && plan.mistake != Some(Mistake::TrustAfterFailure) {
            backing = backing.buffered();
        }
        let options = DeviceOptions {
            num_queues: plan.queues,
            threads: ThreadOptions {
                count: Some(plan.threads),
                ..ThreadOptions::default()
            },
            ..DeviceOptions::default()
        };
        let device = Device::new(Backing::Testing(backing), &options).unwrap();
        let len = usize::try_from(SPAN).unwrap() * usize::from(plan.queues);
        let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), len)]).unwrap());
        let desks = Arc::new(Desks::new(usize::from(plan.threads)));
        let threads = (0..usize::from(plan.threads)).map(|number| {
            let (commands, receiver) = unbounded();
            let counters = Arc::new(Counters::default());
            let desks = if plan.mistake == Some(Mistake::FlushOfOneThread) {
                Arc::new(Desks::new(usize::from(plan.threads)))
            } else {
                Arc::clone(&desks)
            };
            let parts = ThreadParts {
                device: device.clone(),
                memory: Arc::clone(&memory),
                poll: EventPoll::new(EVENTS_MAX).unwrap(),
                commands: receiver,
                counters: Arc::clone(&counters),
                queue_counters: (0..plan.queues).map(|_| QueueCounters::default()).collect(),
                number,
                desks,
                paused: false,
                marks_dirty: true,
                writeback: true,
            };
            SimThread {
                thread: DataThread::new(parts).unwrap(),
                commands,
                next: Phase::Fetch,
                counters,
            }
        });
        let mut simulation = Self {
            threads: threads.collect(),
            queues: (0..plan.queues)
                .map(|index| GuestQueue::new(&memory, index))
                .collect(),
            popped: vec![Popped::default(); usize::from(plan.queues)],
            plan,
            dice,
            ledger,
            memory,
            control: Control::Idle,
            control_queue: disk.queue(&Config::default()).unwrap(),
            write_back: Arc::clone(device.write_back()),
            disk,
            write_through: plan.cache == Cache::NoFlush,
            report,
        };
        for index in 0..plan.queues {
            simulation.start_queue(index, 0);
        }
        simulation
    }

    /// Which thread serves a queue.
    fn thread_of(&mut self, queue: u16) -> &mut SimThread {
        let thread = queue % self.plan.threads;
        &mut self.threads[usize::from(thread)]
    }

    fn start_queue(&mut self, index: u16, base: u16) {
        let addresses = self.queues[usize::from(index)].addresses;
        let mut features = 0;
        if self.plan.cache != Cache::NoFlush {
            features |= bit(blk::VIRTIO_BLK_F_FLUSH);
        }
        if self.plan.cache == Cache::Toggled {
            features |= bit(blk::VIRTIO_BLK_F_CONFIG_WCE);
        }
        let config = QueueConfig {
            size: QueueSize::new(RING_SIZE).unwrap(),
            addresses,
            features: RingFeatures::default(),
            base: RingBase::Split { next_avail: base },
        };
        let parts = QueueParts {
            ring: vring::Queue::start(Arc::clone(&self.memory), &config)
                .unwrap()
                .into(),
            addresses,
            kick: Some(EventNotifier::new().unwrap()),
            call: None,
            err: None,
            enabled: true,
            cache: CacheFeatures::of(features),
            accepted: Accepted {
                discard: true,
                write_zeroes: true,
                ..Accepted::default()
            },
        };
        let (reply, started) = crossbeam_channel::bounded(1);
        // Between two passes, as every command.
        let command = Command::StartQueue {
            index,
            parts: Box::new(parts),
            reply,
        };
        let thread = self.thread_of(index);
        thread.commands.send(command).unwrap();
        self.control = match std::mem::replace(&mut self.control, Control::Idle) {
            Control::Starting(mut all) => {
                all.push(started);
                Control::Starting(all)
            }
            _ => Control::Starting(vec![started]),
        };
    }

    /// One phase of a data thread's pass.
    fn run_thread(&mut self, number: usize) {
        let plan = self.plan;
        let thread = &mut self.threads[number];
        if plan.mistake == Some(Mistake::NoWriteThrough) {
            thread.thread.executor.set_write_through(false);
        }
        match thread.next {
            Phase::Fetch => {
                while let Ok(command) = thread.thread.commands.try_recv() {
                    thread.thread.command(command);
                }
                if plan.mistake == Some(Mistake::NoWriteThrough) {
                    thread.thread.executor.set_write_through(false);
                }
                let memory = thread.thread.memory.clone();
                thread.thread.fetch_all(&mut HotRegion::new(&memory));
                thread.next = Phase::Submit;
                self.note_popped(number);
            }
            Phase::Submit => {
                let DataThread { executor, seat, .. } = &mut thread.thread;
                executor.submit(seat);
                thread.next = Phase::Reap;
                for queue in (number..self.popped.len()).step_by(self.threads.len()) {
                    self.popped[queue].noted = self.popped[queue].now;
                }
            }
            Phase::Reap => {
                let memory = thread.thread.memory.clone();
                thread.thread.reap(&mut HotRegion::new(&memory));
                thread.next = Phase::Publish;
            }
            Phase::Publish => {
                thread.thread.publish_all();
                thread.next = Phase::Settle;
            }
            Phase::Settle => {
                assert!(!thread.thread.settle(), "nobody has told it to exit");
                thread.thread.arm();
                thread.next = Phase::Fetch;
            }
        }
    }

    /// After a thread has fetched: what the flushes that it has popped must cover.
    fn note_popped(&mut self, number: usize) {
        let threads = self.threads.len();
        // What any thread has let the others know of, and what this one had popped before.
        let mut before: Vec<Ticket> = Vec::new();
        for (index, queue) in self.queues.iter().enumerate() {
            let own = index % threads == number;
            let Popped { now, noted } = self.popped[index];
            before.extend(queue.changes_before(if own { now } else { noted }));
        }
        for index in (number..self.queues.len()).step_by(threads) {
            let Some(state) = &self.threads[number].thread.queues[index] else {
                continue;
            };
            let was = self.popped[index].now;
            let low = u16::try_from(was & 0xffff).unwrap();
            let now = was + u64::from(next_avail(state.ring.queue().base()).wrapping_sub(low));
            self.queues[index].flushes_cover(was, now, &before);
            self.queues[index].flushes_cover_own(was, now);
            self.popped[index].now = now;
        }
    }

    /// The guest looks for answers in all its rings.
    fn poll_answers(&mut self) -> Result<(), String> {
        for index in 0..self.queues.len() {
            while let Some(answered) = self.queues[index].poll()? {
                self.take(answered)?;
            }
        }
        Ok(())
    }

    fn take(&mut self, Answered { wants, ok, data }: Answered) -> Result<(), String> {
        self.report.requests += 1;
        self.report.failed += u64::from(!ok);
        if !ok && self.plan.faults == Faults::default() {
            return Err(format!("{wants:?} has failed on a sound disk"));
        }
        match wants {
            Wants::Change(tickets) => {
                for ticket in tickets {
                    self.ledger.answer(ticket, ok);
                    if self.write_through {
                        self.ledger.flushed(ticket);
                    }
                }
            }
            Wants::Flush(ticket, covers) if ok => {
                self.ledger.answer_flush(ticket);
                for covered in covers {
                    self.ledger.flushed(covered);
                }
            }
            Wants::Flush(..) => {}
            Wants::Read(ticket, sector) => self
                .ledger
                .answer_read(ticket, sector, ok.then_some(&*data))
                .map_err(|violation| format!("a read: {violation}"))?,
        }
        Ok(())
    }

    /// Looks at everything that a loss of power would leave now.
    fn check(&mut self) -> Result<(), String> {
        self.report.crash_points += 1;
        let mut all_well = Ok(());
        let Self { ledger, report, .. } = self;
        self.disk.after_power_loss(|sector, content| {
            report.outcomes += 1;
            if all_well.is_ok() {
                all_well = ledger.check_after_power_loss(sector, content);
            }
        });
        all_well.map_err(|violation| format!("after a loss of power: {violation}"))
    }

    fn step(&mut self) -> Result<(), String> {
        match self.dice.below(100) {
            0..14 => {
                let queue = self.dice.index(self.queues.len());
                for _ in 0..=self.dice.below(5) {
                    if self.queues[queue].has_room() {
                        self.queues[queue].ask(&mut self.dice, &mut self.ledger);
                    }
                }
                self.queues[queue].publish();
            }
            14..62 => {
                let number = self.dice.index(self.threads.len());
                self.run_thread(number);
            }
            62..90 => {
                self.disk.step();
            }
            90..99 => {
                self.poll_answers()?;
                self.check()?;
            }
            _ => self.begin_control(),
        }
        self.go_on_with_control()
    }

    /// Everything outstanding is answered; nothing is asked for any more.
    fn finish(&mut self) -> Result<(), String> {
        for _ in 0..PATIENCE {
            let answered = self.queues.iter().all(|queue| queue.outstanding.is_empty());
            if answered && matches!(self.control, Control::Idle) {
                return self.check();
            }
            let number = self.dice.index(self.threads.len());
            self.run_thread(number);
            self.disk.step();
            self.poll_answers()?;
            self.go_on_with_control()?;
        }
        Err("requests are never answered".into())
    }

    /// Some of the device's life, then the power is lost, and the next life begins with what is found.
    fn live(mut self, steps: usize) -> Result<Self, String> {
        for _ in 0..steps {
            self.step()?;
        }
        if self.dice.chance(500) {
            self.finish()?;
        }
        // Whether all that could be found is right has been asked before; this is one of it.
        self.poll_answers()?;
        let image = self.disk.lose_power();
        self.ledger
            .power_was_lost(&image)
            .map_err(|violation| format!("found after the power was lost: {violation}"))?;
        self.report.lives += 1;
        for thread in &self.threads {
            let counters = thread.counters.snapshot();
            self.report.merged += counters.merged;
            self.report.bounced += counters.bounced;
        }
        self.report.deeds = plus(&self.report.deeds, &self.disk.deeds());
        let Self {
            plan,
            dice,
            ledger,
            report,
            ..
        } = self;
        Ok(Self::on(plan, dice, image, ledger, report))
    }
}

/// Where a split ring stands.
fn next_avail(base: RingBase) -> u16 {
    match base {
        RingBase::Split { next_avail } => next_avail,
        other => panic!("a split ring stands at {other:?}"),
    }
}

/// Lives in a row, on one disk.
const LIVES: usize = 3;

/// Steps of a life.
const STEPS: usize = 1500;

fn simulate(plan: Plan) -> Result<Report, String> {
    let mut simulation = Simulation::new(plan);
    for _ in 0..LIVES {
        simulation = simulation.live(STEPS)?;
    }
    Ok(simulation.report)
}

mod tests;
