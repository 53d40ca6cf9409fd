//! A disk with a write cache, which loses power.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::dice::Dice;
use super::disk::{Disk, Operation, Outcome, Refusal, Waker, queue_over};
use crate::error::SetupError;
use crate::op::Durability;
use crate::queue::{Config, IoQueue};

/// Bytes that a [`PowerLossDisk`] writes whole or not at all.
pub const SECTOR_LEN: usize = 512;

/// How often a [`PowerLossDisk`] does what, of a thousand times. Nothing of it, unless set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// An operation other than an fdatasync fails with `EIO` or `ENOSPC`, part of it done.
    pub fail: u16,
    /// It ends with `EAGAIN`, part of it done.
    pub again: u16,
    /// A read or write moves fewer sectors than asked for.
    pub short: u16,
    /// No room for an operation when it is submitted: [`Refusal::Again`].
    pub busy: u16,
    /// An operation is refused with an error when it is submitted.
    pub refuse: u16,
    /// An fdatasync fails with `EIO`.
    pub fail_sync: u16,
    /// What a failed fdatasync should have written out counts as written out, as in Linux's page cache: it
    /// reads as before, no later fdatasync writes it, and a power loss may take it. The next fdatasync of each
    /// other queue fails too, as each open file of Linux's is told once.
    pub failed_sync_forgets: bool,
}

/// What a [`PowerLossDisk`] may get wrong: to show that a test notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Lie {
    /// An fdatasync writes nothing out.
    SyncDoesNothing,
    /// An fdatasync writes out only what came through its own queue.
    SyncOfOneQueue,
    /// An fdatasync that has failed says that all is well.
    FailedSyncIsDone,
    /// A write says that it is done before it has begun.
    WriteDoneEarly,
    /// A write that has moved a part says that it moved all.
    PartIsAll,
    /// A write lands one sector further.
    NextSector,
    /// A read finds what is on stable storage and not what is in the cache.
    StaleRead,
    /// Zeroes are not written.
    NoZeroes,
}

/// What a [`PowerLossDisk`] has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deeds {
    /// Reads, writes, discards and zeroings that went well, continuations counted.
    pub transfers: u64,
    /// Those of them that moved fewer sectors than asked for.
    pub short: u64,
    /// Those that failed for good.
    pub failed: u64,
    /// Those that ended with `EAGAIN`.
    pub again: u64,
    /// Submissions for which there was no room.
    pub busy: u64,
    /// Submissions refused with an error.
    pub refused: u64,
    /// Fdatasyncs that went well.
    pub syncs: u64,
    /// Fdatasyncs that failed.
    pub failed_syncs: u64,
}

#[derive(Debug)]
struct Cached {
    content: Arc<[u8]>,
    /// The operation that wrote it, and through which queue.
    by: u64,
    port: usize,
    /// When its completion was fetched.
    completed: Option<u64>,
    /// A failed fdatasync has marked it clean.
    forgotten: bool,
}

#[derive(Debug)]
struct Sector {
    stable: Arc<[u8]>,
    /// Oldest first; the last is what reads find.
    cached: Vec<Cached>,
}

impl Sector {
    fn content(&self) -> &Arc<[u8]> {
        self.cached
            .last()
            .map_or(&self.stable, |cached| &cached.content)
    }
}

#[derive(Debug)]
enum Work {
    Discard,
    Fdatasync,
    Read(Vec<u8>),
    Write(Vec<Arc<[u8]>>, Durability),
    Zero(Durability),
}

#[derive(Debug)]
struct Running {
    /// Over all queues.
    serial: u64,
    port: usize,
    id: u64,
    submitted: u64,
    work: Work,
    first: usize,
    asked: usize,
    /// Sectors it is going to move.
    count: usize,
    /// Of them, those it has not, in any order.
    todo: Vec<usize>,
    errno: Option<i32>,
}

#[derive(Debug)]
struct Port {
    waker: Waker,
    ended: VecDeque<Ended>,
    /// What an fdatasync through another queue has failed to write, its next one has to tell.
    untold: bool,
}

#[derive(Debug)]
struct Ended {
    serial: u64,
    id: u64,
    first: usize,
    count: usize,
    outcome: Outcome,
}

#[derive(Debug)]
struct State {
    sectors: Vec<Sector>,
    zeroes: Arc<[u8]>,
    dice: Dice,
    faults: Faults,
    lie: Option<Lie>,
    /// Counts submissions and completions.
    clock: u64,
    serial: u64,
    ports: Vec<Port>,
    running: Vec<Running>,
    deeds: Deeds,
    off: bool,
}

/// A disk in memory that does what a disk with a volatile write cache may do, and loses its power when told
/// to. A handle, usable from any thread; clones are the same disk. Any number of queues may be on it.
///
/// It does nothing by itself: each [`step`](Self::step) does a bit of one of the operations in flight, chosen by
/// dice, a sector or more of it at a time. Operations end in any order. An fdatasync makes stable what was
/// written by operations whose completion was fetched before it was submitted, through whichever queue, and
/// not more than that: whatever else was written, or is being written, may be there after a power loss or
/// not, sector by sector. A discarded sector keeps its content or becomes zero.
///
/// ```
/// use ioq::testing::PowerLossDisk;
/// use ioq::{Config, Durability, IoQueue};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let disk = PowerLossDisk::new(vec![0; 4096], 1);
/// let mut queue: IoQueue<Vec<u8>> = disk.queue(&Config::default())?;
/// queue.write(0, vec![7; 512], Durability::WriteBack)?;
/// queue.submit();
/// while queue.reap(|_, result| assert_eq!(result, Ok(512))) == 0 {
///     disk.step();
/// }
/// // Written, and maybe lost.
/// let mut possible = Vec::new();
/// disk.after_power_loss(|sector, content| {
///     if sector == 0 {
///         possible.push(content[0]);
///     }
/// });
/// assert_eq!(possible, [0, 7]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct PowerLossDisk(Arc<Mutex<State>>);

impl PowerLossDisk {
    /// A disk that holds `image`, all of it on stable storage; a last part of less than a sector is not part
    /// of it. `seed` decides all that is left to chance.
    pub fn new(image: Vec<u8>, seed: u64) -> Self {
        let sectors = image.chunks_exact(SECTOR_LEN).map(|content| Sector {
            stable: content.into(),
            cached: Vec::new(),
        });
        Self(Arc::new(Mutex::new(State {
            sectors: sectors.collect(),
            zeroes: vec![0; SECTOR_LEN].into(),
            dice: Dice::new(seed),
            faults: Faults::default(),
            lie: None,
            clock: 0,
            serial: 0,
            ports: Vec::new(),
            running: Vec::new(),
            deeds: Deeds::default(),
            off: false,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A test that failed under the lock has reported its own failure.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A queue on the disk.
    ///
    /// # Errors
    /// As [`queue_over`].
    pub fn queue<O>(&self, config: &Config) -> Result<IoQueue<O>, SetupError> {
        queue_over(|waker| self.end(waker), config)
    }

    /// A queue's end of the disk, for whoever makes the queue by [`queue_over`].
    pub fn end(&self, waker: Waker) -> impl Disk + use<> {
        let mut state = self.state();
        state.ports.push(Port {
            waker,
            ended: VecDeque::new(),
            untold: false,
        });
        End {
            disk: self.clone(),
            port: state.ports.len() - 1,
        }
    }

    /// Bytes.
    pub fn capacity(&self) -> u64 {
        (self.state().sectors.len() * SECTOR_LEN) as u64
    }

    /// From now on operations have these faults.
    pub fn set_faults(&self, faults: Faults) {
        self.state().faults = faults;
    }

    /// From now on the disk lies, or does not.
    pub fn set_lie(&self, lie: Option<Lie>) {
        self.state().lie = lie;
    }

    /// Does a bit of an operation in flight. False if there is none.
    pub fn step(&self) -> bool {
        self.state().step()
    }

    /// Operations submitted that have not ended.
    pub fn in_flight(&self) -> usize {
        self.state().running.len()
    }

    /// What the disk has done so far.
    pub fn deeds(&self) -> Deeds {
        self.state().deeds
    }

    /// What reads find now.
    pub fn image(&self) -> Vec<u8> {
        let state = self.state();
        let contents = state.sectors.iter().flat_map(|sector| &**sector.content());
        contents.copied().collect()
    }

    /// Whether the power is lost.
    pub fn is_off(&self) -> bool {
        self.state().off
    }

    /// Tells `possible` of everything that each sector may hold if the power is lost now.
    pub fn after_power_loss(&self, mut possible: impl FnMut(u64, &[u8])) {
        self.state()
            .possible(|sector, content| possible(sector as u64, content));
    }

    /// The power is lost. Returns what is found afterwards: of all that each sector may hold, one, chosen by
    /// dice. The disk does nothing from then on; what is submitted fails with `EIO`.
    pub fn lose_power(&self) -> Vec<u8> {
        let mut state = self.state();
        let mut possible: Vec<Vec<Arc<[u8]>>> = vec![Vec::new(); state.sectors.len()];
        state.possible(|sector, content| possible[sector].push(Arc::clone(content)));
        let mut image = Vec::with_capacity(possible.len() * SECTOR_LEN);
        for contents in possible {
            let chosen = state.dice.index(contents.len());
            image.extend_from_slice(&contents[chosen]);
        }
        state.off = true;
        while let Some(running) = state.running.pop() {
            state.end(&running, Outcome::Error(libc::EIO));
        }
        image
    }
}

impl State {
    fn possible(&self, mut possible: impl FnMut(usize, &Arc<[u8]>)) {
        for (at, sector) in self.sectors.iter().enumerate() {
            possible(at, &sector.stable);
            for cached in &sector.cached {
                possible(at, &cached.content);
            }
        }
        for running in &self.running {
            for &at in &running.todo {
                let place = running.first + at;
                match &running.work {
                    Work::Write(data, _) => possible(place, &data[at]),
                    Work::Zero(_) | Work::Discard => possible(place, &self.zeroes),
                    Work::Read(_) | Work::Fdatasync => {}
                }
            }
        }
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn submit(&mut self, port: usize, id: u64, operation: Operation) -> Result<(), Refusal> {
        if self.dice.chance(self.faults.busy) {
            self.deeds.busy += 1;
            // Nothing else may ever wake whoever waits for room, but its own delay.
            return Err(Refusal::Again);
        }
        if self.dice.chance(self.faults.refuse) {
            self.deeds.refused += 1;
            return Err(Refusal::Errno(libc::EIO));
        }
        let (offset, len, work) = match operation {
            Operation::Discard { offset, len } => (offset, len, Work::Discard),
            Operation::Fdatasync => (0, 0, Work::Fdatasync),
            Operation::Read { offset, len } => (offset, len, Work::Read(vec![0; to_usize(len)])),
            Operation::Write {
                offset,
                data,
                durability,
            } => {
                let sectors = data.chunks_exact(SECTOR_LEN).map(Arc::from).collect();
                (offset, data.len() as u64, Work::Write(sectors, durability))
            }
            // As a file says.
            Operation::SecureErase { .. } => return Err(Refusal::Errno(libc::EOPNOTSUPP)),
            Operation::WriteZeroes {
                offset,
                len,
                durability,
                ..
            } => (offset, len, Work::Zero(durability)),
        };
        let (first, asked) = (to_usize(offset) / SECTOR_LEN, to_usize(len) / SECTOR_LEN);
        let whole =
            to_usize(offset).is_multiple_of(SECTOR_LEN) && to_usize(len).is_multiple_of(SECTOR_LEN);
        if !whole || first + asked > self.sectors.len() {
            // Nothing a test of this disk should do.
            return Err(Refusal::Errno(libc::EINVAL));
        }
        let (dice, faults) = (&mut self.dice, self.faults);
        let transfer = matches!(work, Work::Read(_) | Work::Write(..));
        let count = if transfer && asked > 1 && dice.chance(faults.short) {
            1 + dice.index(asked - 1)
        } else {
            asked
        };
        let errno = match work {
            Work::Fdatasync => dice.chance(faults.fail_sync).then_some(libc::EIO),
            _ if dice.chance(faults.again) => Some(libc::EAGAIN),
            _ if dice.chance(faults.fail) => Some([libc::EIO, libc::ENOSPC][dice.index(2)]),
            _ => None,
        };
        self.serial += 1;
        let running = Running {
            serial: self.serial,
            port,
            id,
            submitted: self.tick(),
            work,
            first,
            asked,
            count,
            todo: (0..count).collect(),
            errno,
        };
        if self.off {
            self.end(&running, Outcome::Error(libc::EIO));
            return Ok(());
        }
        if self.lie == Some(Lie::WriteDoneEarly) && matches!(running.work, Work::Write(..)) {
            self.end(&running, Outcome::Done);
        }
        self.running.push(running);
        Ok(())
    }

    fn step(&mut self) -> bool {
        if self.running.is_empty() {
            return false;
        }
        let chosen = self.dice.index(self.running.len());
        let mut running = self.running.swap_remove(chosen);
        // Mostly all of what is left, so that most operations are not torn.
        let parts = match self.dice.below(4) {
            0 => 1 + self.dice.index(running.todo.len()),
            _ => running.todo.len(),
        };
        for _ in 0..parts.min(running.todo.len()) {
            let next = self.dice.index(running.todo.len());
            let at = running.todo.swap_remove(next);
            // What fails has done a part.
            if running.errno.is_none() || self.dice.chance(500) {
                self.do_sector(&mut running, at);
            }
        }
        if running.todo.is_empty() {
            self.finish(running);
        } else {
            self.running.push(running);
        }
        true
    }

    fn do_sector(&mut self, running: &mut Running, at: usize) {
        let mut place = running.first + at;
        let content = match &mut running.work {
            Work::Read(data) => {
                let sector = &self.sectors[place];
                let content = match self.lie {
                    Some(Lie::StaleRead) => &sector.stable,
                    _ => sector.content(),
                };
                data[at * SECTOR_LEN..][..SECTOR_LEN].copy_from_slice(content);
                return;
            }
            Work::Write(data, _) => {
                if self.lie == Some(Lie::PartIsAll) && at > 0 && self.dice.chance(100) {
                    return;
                }
                if self.lie == Some(Lie::NextSector) && self.dice.chance(100) {
                    place = (place + 1) % self.sectors.len();
                }
                &data[at]
            }
            Work::Zero(_) if self.lie == Some(Lie::NoZeroes) => return,
            Work::Zero(_) => &self.zeroes,
            Work::Discard if self.dice.chance(500) => &self.zeroes,
            Work::Discard | Work::Fdatasync => return,
        };
        self.sectors[place].cached.push(Cached {
            content: Arc::clone(content),
            by: running.serial,
            port: running.port,
            completed: None,
            forgotten: false,
        });
    }

    fn finish(&mut self, mut running: Running) {
        if matches!(running.work, Work::Fdatasync)
            && std::mem::take(&mut self.ports[running.port].untold)
        {
            running.errno = Some(libc::EIO);
        }
        if let Some(errno) = running.errno {
            match running.work {
                Work::Fdatasync => {
                    self.deeds.failed_syncs += 1;
                    if self.faults.failed_sync_forgets {
                        self.forget(&running);
                        for (number, port) in self.ports.iter_mut().enumerate() {
                            port.untold |= number != running.port;
                        }
                    }
                    if self.lie == Some(Lie::FailedSyncIsDone) {
                        self.end(&running, Outcome::Done);
                        return;
                    }
                }
                _ if errno == libc::EAGAIN => self.deeds.again += 1,
                _ => self.deeds.failed += 1,
            }
            self.end(&running, Outcome::Error(errno));
            return;
        }
        let moved = (running.count * SECTOR_LEN) as u64;
        let outcome = match &mut running.work {
            Work::Fdatasync => {
                self.deeds.syncs += 1;
                self.sync(&running);
                self.end(&running, Outcome::Done);
                return;
            }
            Work::Read(data) => {
                data.truncate(to_usize(moved));
                Outcome::Data(std::mem::take(data))
            }
            Work::Write(_, durability) => {
                if *durability == Durability::WriteThrough {
                    self.make_stable(running.first, running.count, running.serial);
                }
                Outcome::Bytes(moved)
            }
            Work::Zero(durability) => {
                if *durability == Durability::WriteThrough {
                    self.make_stable(running.first, running.count, running.serial);
                }
                Outcome::Done
            }
            Work::Discard => Outcome::Done,
        };
        self.deeds.transfers += 1;
        self.deeds.short += u64::from(running.count < running.asked);
        self.end(&running, outcome);
    }

    /// Whether an fdatasync covers what is in the cache.
    fn covers(&self, sync: &Running, cached: &Cached) -> bool {
        cached.completed.is_some_and(|at| at < sync.submitted)
            && (self.lie != Some(Lie::SyncOfOneQueue) || cached.port == sync.port)
    }

    fn sync(&mut self, sync: &Running) {
        if self.lie == Some(Lie::SyncDoesNothing) {
            return;
        }
        for at in 0..self.sectors.len() {
            let covered = |cached: &Cached| self.covers(sync, cached) && !cached.forgotten;
            if let Some(last) = self.sectors[at].cached.iter().rposition(covered) {
                self.sectors[at].settle(last);
            }
        }
    }

    fn forget(&mut self, sync: &Running) {
        for at in 0..self.sectors.len() {
            for index in 0..self.sectors[at].cached.len() {
                if self.covers(sync, &self.sectors[at].cached[index]) {
                    self.sectors[at].cached[index].forgotten = true;
                }
            }
        }
    }

    fn make_stable(&mut self, first: usize, count: usize, serial: u64) {
        for sector in &mut self.sectors[first..first + count] {
            let own = sector.cached.iter().rposition(|cached| cached.by == serial);
            if let Some(own) = own {
                sector.settle(own);
            }
        }
    }

    fn end(&mut self, running: &Running, outcome: Outcome) {
        let port = &mut self.ports[running.port];
        port.ended.push_back(Ended {
            serial: running.serial,
            id: running.id,
            first: running.first,
            count: running.count,
            outcome,
        });
        port.waker.wake();
    }

    fn complete(&mut self, port: usize) -> Option<(u64, Outcome)> {
        let ended = self.ports[port].ended.pop_front()?;
        let now = self.tick();
        // What has failed counts as never completed: no fdatasync has to cover it.
        if !matches!(ended.outcome, Outcome::Error(_)) {
            let sectors = self.sectors[ended.first..].iter_mut().take(ended.count);
            for cached in sectors.flat_map(|sector| &mut sector.cached) {
                if cached.by == ended.serial {
                    cached.completed = Some(now);
                }
            }
        }
        Some((ended.id, ended.outcome))
    }
}

impl Sector {
    /// What is in the cache up to `last` is on stable storage.
    fn settle(&mut self, last: usize) {
        if let Some(cached) = self.cached.drain(..=last).next_back() {
            self.stable = cached.content;
        }
    }
}

/// A queue's end of the disk.
#[derive(Debug)]
struct End {
    disk: PowerLossDisk,
    port: usize,
}

impl Disk for End {
    fn submit(&mut self, id: u64, operation: Operation) -> Result<(), Refusal> {
        self.disk.state().submit(self.port, id, operation)
    }

    fn complete(&mut self) -> Option<(u64, Outcome)> {
        self.disk.state().complete(self.port)
    }

    fn completions_pending(&self) -> bool {
        !self.disk.state().ports[self.port].ended.is_empty()
    }

    /// What is in flight stays as far as it has come.
    fn stop(&mut self) {
        let mut state = self.disk.state();
        state.ports[self.port].ended.clear();
        state.running.retain(|running| running.port != self.port);
    }
}

fn to_usize(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}
