//! The disk that loses power and the book that knows what it may hold: an honest queue on an honest disk is
//! never wrong, and a lie is always found out.

use ioq::testing::{
    Change, Dice, Faults, Ledger, Lie, PowerLossDisk, SECTOR_LEN, Ticket, Violation,
};
use ioq::{Config, Durability, IoQueue, Unmap};

const SECTORS: u64 = 32;

#[derive(Clone, Copy, Debug)]
enum Asked {
    Change(Ticket, Durability),
    Flush(Ticket),
    Read(Ticket, u64),
}

/// Buffer, and what it is for.
type Owner = (Vec<u8>, Asked);

struct Rig {
    disk: PowerLossDisk,
    ledger: Ledger,
    queues: [IoQueue<Owner>; 2],
    dice: Dice,
}

impl Rig {
    fn new(seed: u64) -> Self {
        let image = vec![0; usize::try_from(SECTORS).unwrap() * SECTOR_LEN];
        let disk = PowerLossDisk::new(image.clone(), seed);
        let config = Config {
            depth: 16,
            max_segments: 4,
        };
        Self {
            queues: [disk.queue(&config).unwrap(), disk.queue(&config).unwrap()],
            ledger: Ledger::new(&image),
            dice: Dice::new(seed),
            disk,
        }
    }

    fn ask(&mut self) {
        let Self { ledger, dice, .. } = self;
        let queue = &mut self.queues[dice.index(2)];
        if queue.free_slots() == 0 {
            return;
        }
        let first = dice.below(SECTORS);
        let sectors = first..SECTORS.min(first + 1 + dice.below(6));
        let (offset, len) = (first * 512, (sectors.end - first) * 512);
        let durability = if dice.chance(200) {
            Durability::WriteThrough
        } else {
            Durability::WriteBack
        };
        let queued = match dice.below(8) {
            0 => {
                let flush = ledger.ask_flush();
                queue.queue_fdatasync((Vec::new(), Asked::Flush(flush)))
            }
            1 => {
                let ticket = ledger.ask(Change::Discard, sectors);
                let owner = (Vec::new(), Asked::Change(ticket, Durability::WriteBack));
                queue.queue_discard(offset, len, owner)
            }
            2 => {
                let ticket = ledger.ask(Change::Zeroes, sectors);
                let owner = (Vec::new(), Asked::Change(ticket, durability));
                queue.queue_write_zeroes(offset, len, Unmap::Allowed, durability, owner)
            }
            3 | 4 => {
                let buffer = vec![0; usize::try_from(len).unwrap()];
                queue.read(offset, (buffer, Asked::Read(ledger.ask_read(), first)))
            }
            _ => {
                let ticket = ledger.ask(Change::Data, sectors.clone());
                let content = sectors.flat_map(|sector| ledger.content(ticket, sector));
                let owner = (content.collect(), Asked::Change(ticket, durability));
                queue.write(offset, owner, durability)
            }
        };
        assert!(queued.is_ok());
    }

    fn answers(&mut self) -> Result<(), Violation> {
        let Self { ledger, dice, .. } = self;
        let mut all_well = Ok(());
        self.queues[dice.index(2)].reap(|(buffer, asked), result| match asked {
            Asked::Change(ticket, durability) => {
                ledger.answer(ticket, result.is_ok());
                if durability == Durability::WriteThrough {
                    ledger.flushed(ticket);
                }
            }
            Asked::Flush(ticket) if result.is_ok() => ledger.answer_flush(ticket),
            Asked::Flush(_) => {}
            Asked::Read(ticket, sector) => {
                let data = result.is_ok().then_some(&*buffer);
                let read = ledger.answer_read(ticket, sector, data);
                all_well = std::mem::replace(&mut all_well, Ok(())).and(read);
            }
        });
        all_well
    }

    fn run(&mut self, steps: usize) -> Result<(), Violation> {
        for _ in 0..steps {
            match self.dice.below(8) {
                0..2 => self.ask(),
                2 => {
                    for queue in &mut self.queues {
                        queue.submit();
                    }
                }
                3..6 => {
                    self.disk.step();
                }
                _ => self.answers()?,
            }
            if !self.dice.chance(300) {
                continue;
            }
            let mut all_well = Ok(());
            self.disk.after_power_loss(|sector, content| {
                let checked = self.ledger.check_after_power_loss(sector, content);
                all_well = std::mem::replace(&mut all_well, Ok(())).and(checked);
            });
            all_well?;
        }
        Ok(())
    }
}

const TROUBLE: Faults = Faults {
    fail: 50,
    again: 50,
    short: 200,
    busy: 50,
    refuse: 20,
    fail_sync: 100,
    failed_sync_forgets: false,
};

#[test]
fn an_honest_disk_is_never_caught() {
    for seed in 0..20 {
        let mut rig = Rig::new(seed);
        if seed % 2 == 1 {
            rig.disk.set_faults(TROUBLE);
        }
        for life in 0..4 {
            let went = rig.run(200);
            assert_eq!(went, Ok(()), "seed {seed}, life {life}");
            let image = rig.disk.lose_power();
            assert_eq!(rig.ledger.power_was_lost(&image), Ok(()), "seed {seed}");
            let next = Rig::new(seed + 1000 * (life + 1));
            let disk = PowerLossDisk::new(image, seed + life);
            let config = Config::default();
            rig = Rig {
                queues: [disk.queue(&config).unwrap(), disk.queue(&config).unwrap()],
                ledger: rig.ledger,
                dice: next.dice,
                disk,
            };
        }
    }
}

#[test]
fn trouble_that_is_asked_for_happens() {
    let mut rig = Rig::new(1);
    rig.disk.set_faults(TROUBLE);
    rig.run(4000).unwrap();
    let deeds = rig.disk.deeds();
    let counts = [
        deeds.transfers,
        deeds.short,
        deeds.failed,
        deeds.again,
        deeds.busy,
        deeds.refused,
        deeds.syncs,
        deeds.failed_syncs,
    ];
    assert!(counts.iter().all(|&count| count > 0), "{deeds:?}");
}

#[test]
fn every_lie_is_caught() {
    for lie in [
        Lie::SyncDoesNothing,
        Lie::SyncOfOneQueue,
        Lie::FailedSyncIsDone,
        Lie::WriteDoneEarly,
        Lie::PartIsAll,
        Lie::NextSector,
        Lie::StaleRead,
        Lie::NoZeroes,
    ] {
        let caught = (0..20).any(|seed| {
            let mut rig = Rig::new(seed);
            rig.disk.set_lie(Some(lie));
            if lie == Lie::FailedSyncIsDone {
                rig.disk.set_faults(Faults {
                    fail_sync: 500,
                    failed_sync_forgets: true,
                    ..Faults::default()
                });
            }
            rig.run(1000).is_err()
        });
        assert!(caught, "{lie:?}");
    }
}

#[test]
fn a_failed_sync_that_forgets_is_not_made_good_by_the_next() {
    let disk = PowerLossDisk::new(vec![0; 512], 1);
    let mut queue: IoQueue<Vec<u8>> = disk.queue(&Config::default()).unwrap();
    let mut end = |what: fn(&mut IoQueue<Vec<u8>>)| {
        what(&mut queue);
        queue.submit();
        let mut ok = None;
        while ok.is_none() {
            disk.step();
            queue.reap(|_, result| ok = Some(result.is_ok()));
        }
        ok.unwrap()
    };
    assert!(end(|queue| queue
        .write(0, vec![1; 512], Durability::WriteBack)
        .unwrap()));
    disk.set_faults(Faults {
        fail_sync: 1000,
        failed_sync_forgets: true,
        ..Faults::default()
    });
    assert!(!end(|queue| queue.queue_fdatasync(Vec::new()).unwrap()));
    disk.set_faults(Faults::default());
    assert!(end(|queue| queue.queue_fdatasync(Vec::new()).unwrap()));
    assert_eq!(disk.image(), [1; 512]);
    let mut possible = Vec::new();
    disk.after_power_loss(|_, content| possible.push(content[0]));
    assert_eq!(possible, [0, 1]);
}
