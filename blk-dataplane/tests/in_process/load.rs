//! A guest that keeps several queues busy with requests of every kind, each from a thread of its own, and knows
//! of every answer whether it can be true. The disk loses its power when the test says so.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, Scope, ScopedJoinHandle};
use std::time::Duration;

use blk_dataplane::testing::TestDisk;
use blk_dataplane::{Backing, Device};
use ioq::testing::{Change, Dice, Ledger, PowerLossDisk, SECTOR_LEN, Ticket};

use crate::support::queue::{Completed, GuestQueue};
use crate::support::request::{DISCARD, Framing, IOERR, OK, Request, Table, WRITE_ZEROES};
use crate::support::scratch::on_threads;

/// Few, so that requests meet.
pub(crate) const SECTORS: u64 = 256;

/// Sectors in one transfer: some are larger than their neighbours may be merged to.
const TRANSFER_MAX: u64 = 40;

enum Wants {
    Change(Vec<Ticket>),
    Flush(Ticket),
    Read(Ticket, u64),
    Id,
}

/// Moves the disk on, from threads of its own, until dropped.
pub(crate) struct Motor {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Motor {
    pub(crate) fn start(disk: &PowerLossDisk) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..2).map(|number| {
            let (disk, stop) = (disk.clone(), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut dice = Dice::new(number);
                while !stop.load(Ordering::Relaxed) {
                    // Now and then nothing happens for a while.
                    if !disk.step() || dice.chance(5) {
                        std::thread::sleep(Duration::from_micros(dice.below(1000)));
                    }
                }
            })
        });
        Self {
            threads: threads.collect(),
            stop,
        }
    }
}

impl Drop for Motor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A disk in motion and the book of it.
pub(crate) struct Bench {
    pub(crate) disk: PowerLossDisk,
    ledger: Mutex<Ledger>,
    _motor: Motor,
}

/// What became of a load's requests.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) ok: usize,
    pub(crate) failed: usize,
}

impl Bench {
    pub(crate) fn new(seed: u64) -> Self {
        let image = vec![0; usize::try_from(SECTORS).unwrap() * SECTOR_LEN];
        let disk = PowerLossDisk::new(image.clone(), seed);
        Self {
            ledger: Mutex::new(Ledger::new(&image)),
            _motor: Motor::start(&disk),
            disk,
        }
    }

    /// 4 queues on so many threads; memory has to be aligned as for direct I/O.
    pub(crate) fn device(&self, threads: u16) -> Device {
        let disk = TestDisk::from(&self.disk).aligned(512);
        on_threads(Backing::Testing(disk), threads)
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts `count` requests through `queue`, up to 30 at a time.
    pub(crate) fn load(&self, queue: &mut GuestQueue, seed: u64, count: usize) -> Tally {
        let mut dice = Dice::new(seed);
        let mut wants = HashMap::new();
        let mut tally = Tally::default();
        queue.arena.reset();
        for _ in 0..count {
            let (request, framing, want) = self.choose(&mut dice);
            let room = |queue: &GuestQueue| {
                let needed = GuestQueue::descriptors(&request, &framing);
                queue.outstanding() < 30 && usize::from(queue.driver.free()) >= needed
            };
            if !room(queue) || dice.chance(300) {
                queue.publish();
            }
            while !room(queue) {
                let completed = queue.next();
                self.settle(&mut wants, &completed, &mut tally);
            }
            while let Some(completed) = queue.poll() {
                self.settle(&mut wants, &completed, &mut tally);
            }
            let head = queue.add(&request, &framing);
            wants.insert(head, want);
        }
        queue.publish();
        for completed in queue.finish() {
            self.settle(&mut wants, &completed, &mut tally);
        }
        // Each was answered once, and nothing else was: `GuestQueue` knows.
        assert!(wants.is_empty() && queue.poll().is_none());
        assert_eq!(tally.ok + tally.failed, count);
        tally
    }

    /// The same from a thread for each queue.
    pub(crate) fn load_all<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        queues: &'scope mut [GuestQueue],
        seed: u64,
        count: usize,
    ) -> Vec<ScopedJoinHandle<'scope, Tally>> {
        (seed..)
            .zip(queues)
            .map(|(seed, queue)| scope.spawn(move || self.load(queue, seed, count)))
            .collect()
    }

    fn choose(&self, dice: &mut Dice) -> (Request, Framing, Wants) {
        let mut ledger = self.ledger();
        let start = dice.below(SECTORS);
        let most = if dice.chance(200) { TRANSFER_MAX } else { 4 };
        let sectors = start..SECTORS.min(start + 1 + dice.below(most));
        let len = usize::try_from(sectors.end - sectors.start).unwrap() * SECTOR_LEN;
        let kind = dice.below(100);
        let mut ranges = |ledger: &mut Ledger, change| {
            let count = 1 + dice.below(3);
            let ranges = (0..count).map(|_| {
                let start = dice.below(SECTORS);
                start..SECTORS.min(start + 1 + dice.below(8))
            });
            let ranges: Vec<_> = ranges.collect();
            let segments: Vec<_> = ranges
                .iter()
                .map(|range| {
                    (
                        range.start,
                        u32::try_from(range.end - range.start).unwrap(),
                        0,
                    )
                })
                .collect();
            let tickets = ranges.into_iter().map(|range| ledger.ask(change, range));
            (segments, Wants::Change(tickets.collect()))
        };
        let (request, wants) = match kind {
            0..8 => (Request::flush(), Wants::Flush(ledger.ask_flush())),
            8..12 => {
                let (segments, wants) = ranges(&mut ledger, Change::Discard);
                (Request::ranges(DISCARD, &segments), wants)
            }
            12..18 => {
                let (segments, wants) = ranges(&mut ledger, Change::Zeroes);
                (Request::ranges(WRITE_ZEROES, &segments), wants)
            }
            18..20 => (Request::get_id(20), Wants::Id),
            20..50 => {
                let wants = Wants::Read(ledger.ask_read(), sectors.start);
                (Request::read(sectors.start, len), wants)
            }
            _ => {
                let ticket = ledger.ask(Change::Data, sectors.clone());
                let content = sectors.clone().flat_map(|at| ledger.content(ticket, at));
                let data: Vec<u8> = content.collect();
                let wants = Wants::Change(vec![ticket]);
                (Request::write(sectors.start, &data), wants)
            }
        };
        drop(ledger);
        let framing = match dice.below(4) {
            0 => Framing::joined(),
            1 => Framing::cut(&[16, 512, 1024], &[512, 2048]),
            _ => Framing::classic(&request),
        };
        let skew = if dice.chance(150) { dice.below(512) } else { 0 };
        let table = if dice.chance(500) {
            Table::Indirect
        } else {
            Table::Direct
        };
        (request, framing.skew(skew).table(table), wants)
    }

    fn settle(&self, wants: &mut HashMap<u32, Wants>, completed: &Completed, tally: &mut Tally) {
        let ok = match completed.status {
            Some(OK) => true,
            Some(IOERR) => false,
            other => panic!("status {other:?}"),
        };
        tally.ok += usize::from(ok);
        tally.failed += usize::from(!ok);
        let mut ledger = self.ledger();
        match wants.remove(&completed.head).unwrap() {
            Wants::Change(tickets) => {
                for ticket in tickets {
                    ledger.answer(ticket, ok);
                }
            }
            Wants::Flush(ticket) if ok => ledger.answer_flush(ticket),
            Wants::Flush(_) => {}
            Wants::Read(ticket, sector) => {
                let data = ok.then_some(&*completed.data);
                let read = ledger.answer_read(ticket, sector, data);
                assert_eq!(read, Ok(()));
            }
            Wants::Id => assert!(ok, "GET_ID asks no disk"),
        }
    }

    /// Looks at everything that a loss of power would leave now.
    pub(crate) fn check(&self) {
        // What the ledger knows to be acknowledged was so before the disk is asked.
        let ledger = self.ledger();
        self.disk.after_power_loss(|sector, content| {
            let checked = ledger.check_after_power_loss(sector, content);
            assert_eq!(checked, Ok(()));
        });
    }

    /// Reads every sector through `queue`, and flushes: with success.
    pub(crate) fn read_all(&self, queue: &mut GuestQueue) {
        queue.arena.reset();
        for sector in (0..SECTORS).step_by(16) {
            let ticket = self.ledger().ask_read();
            let done = queue.run(&Request::read(sector, 16 * SECTOR_LEN));
            assert_eq!(done.status, Some(OK));
            let read = self.ledger().answer_read(ticket, sector, Some(&done.data));
            assert_eq!(read, Ok(()));
        }
        let ticket = self.ledger().ask_flush();
        assert_eq!(queue.answer(&Request::flush()).0, Some(OK));
        self.ledger().answer_flush(ticket);
    }

    /// The power is lost, and what is found is right.
    pub(crate) fn lose_power(&self) {
        let image = self.disk.lose_power();
        assert_eq!(self.ledger().power_was_lost(&image), Ok(()));
    }
}
