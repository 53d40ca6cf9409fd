//! A running `DataPlane` and a guest beside it, on another processor: what a virtual machine does with
//! the device, less the machine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use blk_dataplane::{
    Backing, DataPlane, Device, DeviceOptions, Engine, Image, ImageOptions, QueueSetup,
};
use event_poll::{EventNotifier, EventPoll, Token};
use hostmem::{MemoryMap, RegionConfig};
use vm_memory::{Bytes, GuestAddress};
use vring::driver::{self, Driver};
use vring::{QueueSize, RingBase, RingFeatures, Segment};

use crate::fixture::{BLOCK, BlockFile, Random};
use crate::processors::{Bound, processors};
use crate::rings::Layout;
use crate::{Error, allocations};

/// Ring size: the usual one of virtio-blk.
const SIZE: u16 = 256;

/// Most requests in flight: three descriptors each fit the ring.
pub const DEPTH_MAX: u16 = 64;

const RING: GuestAddress = GuestAddress(0x1000);
/// 128 bytes a slot: the header at 0, the status byte at 32, the indirect table at 64.
const HEADERS: u64 = 0x1_0000;
const SLOT: u64 = 128;
const STATUS: u64 = 32;
const TABLE: u64 = 64;
/// A block a slot.
const DATA: u64 = 0x10_0000;
const MEMORY: u64 = 0x20_0000;

/// `VIRTIO_F_VERSION_1`, `VIRTIO_F_EVENT_IDX`, `VIRTIO_F_INDIRECT_DESC`, `VIRTIO_BLK_F_FLUSH`.
const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 28 | 1 << 9;

/// `VIRTIO_F_RING_PACKED`.
const PACKED: u64 = 1 << 34;

/// `VIRTIO_BLK_T_IN`.
const TYPE_IN: u32 = 0;
/// `VIRTIO_BLK_T_OUT`.
const TYPE_OUT: u32 = 1;

/// What callgrind is to collect: all that the data thread does, and nothing of its guest.
pub const DATA_THREAD: &str = "*DataThread<M>::run_in_one_map";

/// Status a completed request must not be left with.
const NO_STATUS: u8 = 0xee;

/// How long the guest waits for one completion before it calls the device hung.
const PATIENCE: Duration = Duration::from_secs(30);

/// Capacity of the null device, in blocks.
const NULL_BLOCKS: u64 = 1 << 18;

/// How the guest learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// By interrupts: it sleeps on the call eventfd whenever there is nothing to do, as a guest with
    /// an idle processor does.
    Sleeps,
    /// By looking: it asks for no interrupts and spins. Leaves the device's side alone.
    Polls,
}

/// The ring's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Split.
    Split,
    /// Packed.
    Packed,
}

/// What the guest asks for, a block at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads of random blocks: hardly any two are neighbours.
    RandomRead,
    /// Reads of one block after the other: all of a batch become one operation.
    SequentialRead,
    /// Writes to random blocks.
    RandomWrite,
}

/// A device with one queue, and its guest.
#[derive(Debug)]
pub struct Disk {
    plane: DataPlane<MemoryMap>,
    memory: Arc<MemoryMap>,
    driver: Driver<MemoryMap>,
    kick: EventNotifier,
    call: EventNotifier,
    poll: EventPoll,
    guest: Guest,
    access: Access,
    layout: Layout,
    /// Slot of the request at each head.
    slots: Box<[u16]>,
    free: Vec<u16>,
    random: Random,
    /// The block after the latest one asked for.
    next: u64,
    /// `None` for the null device, whose reads leave the zeroes that are there.
    blocks: Option<u64>,
    kicks: u64,
    sleeps: u64,
    guest_cpu: usize,
}

/// What one run cost, in all.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// Requests done.
    pub requests: u64,
    /// From the first request to the last completion.
    pub time: Duration,
    /// Kicks the guest sent.
    pub kicks: u64,
    /// Interrupts the device sent.
    pub interrupts: u64,
    /// Times the data thread went to sleep.
    pub device_sleeps: u64,
    /// Times the guest went to sleep.
    pub guest_sleeps: u64,
    /// Operations given to the kernel.
    pub operations: u64,
    /// Allocations of the whole process.
    pub allocations: u64,
}

impl Cost {
    /// `count` per request.
    pub fn per_request(&self, count: u64) -> f64 {
        count as f64 / self.requests.max(1) as f64
    }
}

impl Disk {
    /// Starts a device over `file`, or a null device, with its thread on one processor; the guest,
    /// who is the thread that calls [`run`](Self::run), is on another one then. Random reads, on a
    /// split ring.
    ///
    /// # Errors
    ///
    /// The host has run out of something.
    pub fn new(file: Option<&BlockFile>, guest: Guest) -> Result<Self, Error> {
        let options = DeviceOptions::default();
        let (format, layout) = (Format::Split, Layout::Direct);
        Self::start(file, guest, format, layout, Access::RandomRead, options)
    }

    /// The same, with a device that sleeps whenever it has nothing to do, for
    /// [`run_one_by_one`](Self::run_one_by_one).
    ///
    /// # Errors
    ///
    /// The host has run out of something.
    pub fn sleepy(
        file: Option<&BlockFile>,
        format: Format,
        layout: Layout,
        access: Access,
    ) -> Result<Self, Error> {
        let options = DeviceOptions {
            // Auto takes what suits the file system, and the counts would be of another engine elsewhere.
            engine: Engine::LinuxAio,
            poll_max: Duration::ZERO,
            ..DeviceOptions::default()
        };
        Self::start(file, Guest::Sleeps, format, layout, access, options)
    }

    fn start(
        file: Option<&BlockFile>,
        guest: Guest,
        format: Format,
        layout: Layout,
        access: Access,
        options: DeviceOptions,
    ) -> Result<Self, Error> {
        let backing = match file {
            Some(file) => {
                let options = ImageOptions {
                    read_only: access != Access::RandomWrite,
                    ..ImageOptions::default()
                };
                Backing::Image(Image::open(file.path(), &options)?)
            }
            None => Backing::null(NULL_BLOCKS * BLOCK as u64),
        };
        let options = DeviceOptions {
            num_queues: 1,
            ..options
        };
        let device = Device::new(backing, &options)?;

        let memory = Arc::new(guest_memory()?);
        let size = QueueSize::new(u32::from(SIZE))?;
        let accepted = match format {
            Format::Split => FEATURES,
            Format::Packed => FEATURES | PACKED,
        };
        let features = RingFeatures::from_virtio(accepted);
        let addresses = driver::Layout::new(RING, size, features)?.addresses();
        let driver = Driver::new(Arc::clone(&memory), addresses, size, features)?;

        let (device_cpu, guest_cpu) = processors()?;
        // The data thread inherits the processor of the thread that starts it.
        let bound = Bound::to(device_cpu)?;
        let plane = DataPlane::start(&device, Arc::clone(&memory));
        drop(bound);
        let mut plane = plane?;

        let (kick, call) = (EventNotifier::new()?, EventNotifier::new()?);
        plane.start_queue(
            0,
            QueueSetup {
                size: u32::from(SIZE),
                addresses,
                base: RingBase::fresh(features),
                features: accepted,
                kick: Some(kick.try_clone()?),
                call: Some(Box::new(call.try_clone()?)),
                err: None,
                enabled: true,
                inflight: None,
            },
        )?;
        let mut poll = EventPoll::new(1)?;
        poll.add(&call, Token(0))?;
        Ok(Self {
            plane,
            memory,
            driver,
            kick,
            call,
            poll,
            guest,
            access,
            layout,
            slots: vec![0; usize::from(SIZE)].into_boxed_slice(),
            free: (0..DEPTH_MAX).collect(),
            random: Random::new(42),
            next: 0,
            blocks: file.map(BlockFile::blocks),
            kicks: 0,
            sleeps: 0,
            guest_cpu,
        })
    }

    /// Asks for `count` blocks with `depth` requests in flight, and checks each one.
    ///
    /// # Errors
    ///
    /// A request failed, gave what is not in the file, or did not complete.
    ///
    /// # Panics
    ///
    /// If `depth` is 0 or above [`DEPTH_MAX`].
    pub fn run(&mut self, count: u64, depth: u16) -> Result<Cost, Error> {
        assert!((1..=DEPTH_MAX).contains(&depth));
        let _bound = Bound::to(self.guest_cpu)?;
        if self.guest == Guest::Polls {
            self.driver.disable_interrupts();
        }
        let counters = self.plane.counters();
        let (kicks, sleeps, allocated) = (self.kicks, self.sleeps, allocations::count());
        let (mut asked, mut got) = (0u64, 0u64);
        let (mut left, mut in_flight) = (count, 0u64);
        let start = Instant::now();
        loop {
            while left > 0 && in_flight < u64::from(depth) {
                asked = asked.wrapping_add(self.ask()?);
                left -= 1;
                in_flight += 1;
            }
            if self.driver.publish() > 0 && self.driver.needs_kick() {
                self.kicks += 1;
                self.kick.notify()?;
            }
            if in_flight == 0 {
                break;
            }
            in_flight -= self.take_some(&mut got)?;
        }
        let time = start.elapsed();
        let allocations = allocations::count() - allocated;
        if got != asked {
            return Err("the blocks read are not those asked for".into());
        }
        let after = self.plane.counters();
        Ok(Cost {
            requests: count,
            time,
            kicks: self.kicks - kicks,
            interrupts: after.notifications - counters.notifications,
            device_sleeps: after.sleeps - counters.sleeps,
            guest_sleeps: self.sleeps - sleeps,
            operations: after.operations - counters.operations,
            allocations,
        })
    }

    /// Asks for `batches` times `depth` blocks, a batch at a time: the guest publishes all of it at once, to a device
    /// that is asleep, and waits until that has served it and sleeps again. So the device does the same
    /// each time, however the two threads are scheduled, and what it does can be counted.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    ///
    /// # Panics
    ///
    /// As [`run`](Self::run).
    pub fn run_one_by_one(&mut self, batches: u64, depth: u16) -> Result<(), Error> {
        assert!((1..=DEPTH_MAX).contains(&depth));
        let (mut asked, mut got) = (0u64, 0u64);
        for _ in 0..batches {
            let sleeps = self.plane.counters().sleeps;
            for _ in 0..depth {
                asked = asked.wrapping_add(self.ask()?);
            }
            // Before the device can have served anything: it interrupts, whoever is the faster.
            self.driver.enable_interrupts();
            self.driver.publish();
            if self.driver.needs_kick() {
                self.kick.notify()?;
            }
            let mut in_flight = u64::from(depth);
            while in_flight > 0 {
                in_flight -= self.take_some(&mut got)?;
            }
            let start = Instant::now();
            while self.plane.counters().sleeps == sleeps {
                std::thread::yield_now();
                if start.elapsed() > PATIENCE {
                    return Err("the device does not go to sleep".into());
                }
            }
        }
        if got != asked {
            return Err("the blocks read are not those asked for".into());
        }
        Ok(())
    }

    /// Writes a request for the next block and stages it. Returns the word that a block read begins with.
    #[inline]
    fn ask(&mut self) -> Result<u64, Error> {
        let slot = self.free.pop().ok_or("no slot is free")?;
        let blocks = self.blocks.unwrap_or(NULL_BLOCKS);
        let number = match self.access {
            Access::SequentialRead => self.next,
            Access::RandomRead | Access::RandomWrite => self.random.below(blocks),
        };
        self.next = (number + 1) % blocks;
        let sector = number * (BLOCK as u64 / 512);
        let header = HEADERS + u64::from(slot) * SLOT;
        let is_write = self.access == Access::RandomWrite;
        let request_type = if is_write { TYPE_OUT } else { TYPE_IN };
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&request_type.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(header))?;
        let status = GuestAddress(header + STATUS);
        self.memory.write_obj(NO_STATUS, status)?;
        let segments = [(GuestAddress(header), 16), (data(slot), 4096), (status, 1)]
            .map(|(addr, len)| Segment { addr, len });
        let (readable, writable) = segments.split_at(if is_write { 2 } else { 1 });
        let head = match self.layout {
            Layout::Direct => self.driver.add_chain(readable, writable)?,
            Layout::Indirect => {
                let table = GuestAddress(header + TABLE);
                self.driver.add_indirect(table, readable, writable)?
            }
        };
        self.slots[usize::from(head)] = slot;
        Ok(match self.blocks {
            Some(_) if !is_write => number,
            _ => 0,
        })
    }

    /// Takes all completions, and adds the first word of each block to `sum`.
    #[inline]
    fn take(&mut self, sum: &mut u64) -> Result<u64, Error> {
        let is_write = self.access == Access::RandomWrite;
        // A read of the null device has written nothing.
        let written = match self.blocks {
            _ if is_write => 1,
            Some(_) => 4097,
            None => 0,
        };
        let mut completed = 0;
        while let Some(used) = self.driver.poll_used() {
            if !used.expected || used.len != written {
                return Err(format!("{used:?}").into());
            }
            let slot = self.slots[usize::try_from(used.id)?];
            let header = HEADERS + u64::from(slot) * SLOT;
            let status: u8 = self.memory.read_obj(GuestAddress(header + STATUS))?;
            if status != 0 {
                return Err(format!("status {status}").into());
            }
            if !is_write {
                *sum = sum.wrapping_add(self.memory.read_obj(data(slot))?);
            }
            self.free.push(slot);
            completed += 1;
        }
        Ok(completed)
    }

    /// As [`take`](Self::take), of one completion at least: waits for it.
    fn take_some(&mut self, sum: &mut u64) -> Result<u64, Error> {
        let mut completed = self.take(sum)?;
        if completed > 0 {
            return Ok(completed);
        }
        match self.guest {
            Guest::Polls => {
                let start = Instant::now();
                loop {
                    for _ in 0..64 {
                        std::hint::spin_loop();
                        completed = self.take(sum)?;
                        if completed > 0 {
                            return Ok(completed);
                        }
                    }
                    if start.elapsed() > PATIENCE {
                        return Err("the device does not answer".into());
                    }
                }
            }
            Guest::Sleeps => {
                while self.driver.enable_interrupts() {
                    self.sleeps += 1;
                    if self.poll.wait(Some(PATIENCE))?.is_empty() {
                        return Err("the device does not interrupt".into());
                    }
                    self.call.test_and_clear()?;
                }
                self.driver.disable_interrupts();
                self.take(sum)
            }
        }
    }
}

/// Memory as the program has it from a front-end: one region of a file.
fn guest_memory() -> Result<MemoryMap, Error> {
    let file = tempfile::tempfile_in("/dev/shm")?;
    file.set_len(MEMORY)?;
    let region = RegionConfig {
        guest_addr: GuestAddress(0),
        size: MEMORY,
        frontend_addr: 0,
        file,
        mmap_offset: 0,
    };
    Ok(MemoryMap::new(vec![region])?)
}

fn data(slot: u16) -> GuestAddress {
    GuestAddress(DATA + u64::from(slot) * BLOCK as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_guests_read_what_is_in_the_file_and_nothing_from_null() {
        let file = BlockFile::new(64).unwrap();
        for guest in [Guest::Sleeps, Guest::Polls] {
            for file in [Some(&file), None] {
                let mut disk = Disk::new(file, guest).unwrap();
                for depth in [1, 32, DEPTH_MAX] {
                    let cost = disk.run(500, depth).unwrap();
                    assert_eq!(cost.requests, 500);
                    // No kick is needed while the device still looks by itself.
                    assert!(cost.time > Duration::ZERO, "{cost:?}");
                }
            }
        }
    }

    #[test]
    fn each_batch_is_served_between_two_sleeps() {
        for format in [Format::Split, Format::Packed] {
            for access in [
                Access::RandomRead,
                Access::SequentialRead,
                Access::RandomWrite,
            ] {
                // Its own, for the writes leave no block as it was.
                let file = BlockFile::new(64).unwrap();
                for (file, layout) in [(Some(&file), Layout::Direct), (None, Layout::Indirect)] {
                    let mut disk = Disk::sleepy(file, format, layout, access).unwrap();
                    disk.run_one_by_one(10, 32).unwrap();
                    let before = disk.plane.counters();
                    disk.run_one_by_one(100, 32).unwrap();
                    let after = disk.plane.counters();
                    let context = format!("{format:?} {access:?} {file:?}");
                    assert_eq!(after.requests - before.requests, 3200, "{context}");
                    assert_eq!(after.sleeps - before.sleeps, 100, "{context}");
                    if access == Access::SequentialRead && file.is_some() {
                        // Of 32 each, or of a smaller fetch where they come back with the call.
                        let operations = after.operations - before.operations;
                        assert!((100..=400).contains(&operations), "{operations}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_polling_guest_gets_no_interrupts() {
        let mut disk = Disk::new(None, Guest::Polls).unwrap();
        // The first decision after a start is an interrupt, whatever the driver asked for.
        disk.run(10, 1).unwrap();
        assert_eq!(disk.run(1000, 4).unwrap().interrupts, 0);
    }
}
