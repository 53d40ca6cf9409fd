//! A running `DataPlane` and a guest beside it, on another processor: what a virtual machine does with
//! the device, less the machine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use blk_dataplane::{Backing, DataPlane, Device, DeviceOptions, Image, ImageOptions, QueueSetup};
use event_poll::{EventNotifier, EventPoll, Token};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vring::driver::{SplitDriver, SplitLayout};
use vring::{QueueSize, RingBase, RingFeatures, Segment};

use crate::fixture::{BLOCK, BlockFile, Random};
use crate::{Error, allocations};

/// Ring size: the usual one of virtio-blk.
const SIZE: u16 = 256;

/// Most requests in flight: three descriptors each fit the ring.
pub const DEPTH_MAX: u16 = 64;

const RING: GuestAddress = GuestAddress(0x1000);
/// 64 bytes a slot: the header at 0, the status byte at 32.
const HEADERS: u64 = 0x1_0000;
const STATUS: u64 = 32;
/// A block a slot.
const DATA: u64 = 0x10_0000;
const MEMORY: usize = 0x20_0000;

/// `VIRTIO_F_VERSION_1`, `VIRTIO_F_EVENT_IDX`, `VIRTIO_F_INDIRECT_DESC`, `VIRTIO_BLK_F_FLUSH`.
const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 28 | 1 << 9;

/// `VIRTIO_BLK_T_IN`.
const TYPE_IN: u32 = 0;

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

/// A device with one queue, and its guest.
#[derive(Debug)]
pub struct Disk {
    plane: DataPlane<GuestMemoryMmap>,
    memory: Arc<GuestMemoryMmap>,
    driver: SplitDriver<GuestMemoryMmap>,
    kick: EventNotifier,
    call: EventNotifier,
    poll: EventPoll,
    guest: Guest,
    /// Slot of the request at each head.
    slots: Box<[u16]>,
    free: Vec<u16>,
    random: Random,
    /// `None` for the null device, whose reads give zeroes.
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
    /// who is the thread that calls [`run`](Self::run), is on another one then.
    ///
    /// # Errors
    ///
    /// The host has run out of something.
    pub fn new(file: Option<&BlockFile>, guest: Guest) -> Result<Self, Error> {
        let backing = match file {
            Some(file) => {
                let options = ImageOptions {
                    read_only: true,
                    ..ImageOptions::default()
                };
                Backing::Image(Image::open(file.path(), &options)?)
            }
            None => Backing::null(NULL_BLOCKS * BLOCK as u64),
        };
        let options = DeviceOptions {
            num_queues: 1,
            ..DeviceOptions::default()
        };
        let device = Device::new(backing, &options)?;

        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)])?);
        let size = QueueSize::new(u32::from(SIZE))?;
        let addresses = SplitLayout::new(RING, size)?.addresses();
        let features = RingFeatures::from_virtio(FEATURES);
        let driver = SplitDriver::new(Arc::clone(&memory), addresses, size, features)?;

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
                features: FEATURES,
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
            slots: vec![0; usize::from(SIZE)].into_boxed_slice(),
            free: (0..DEPTH_MAX).collect(),
            random: Random::new(42),
            blocks: file.map(BlockFile::blocks),
            kicks: 0,
            sleeps: 0,
            guest_cpu,
        })
    }

    /// Reads `count` random blocks with `depth` requests in flight, and checks each one.
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
            let mut completed = self.take(&mut got)?;
            if completed == 0 {
                self.wait()?;
                completed = self.take(&mut got)?;
            }
            in_flight -= completed;
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

    /// Writes a read request of a random block and stages it. Returns the word the block begins with.
    #[inline]
    fn ask(&mut self) -> Result<u64, Error> {
        let slot = self.free.pop().ok_or("no slot is free")?;
        let number = self.random.below(self.blocks.unwrap_or(NULL_BLOCKS));
        let sector = number * (BLOCK as u64 / 512);
        let header = HEADERS + u64::from(slot) * 64;
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&TYPE_IN.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(header))?;
        let status = GuestAddress(header + STATUS);
        self.memory.write_obj(NO_STATUS, status)?;
        let head = self.driver.add_chain(
            &[Segment {
                addr: GuestAddress(header),
                len: 16,
            }],
            &[
                Segment {
                    addr: data(slot),
                    len: 4096,
                },
                Segment {
                    addr: status,
                    len: 1,
                },
            ],
        )?;
        self.slots[usize::from(head)] = slot;
        Ok(self.blocks.map_or(0, |_| number))
    }

    /// Takes all completions, and adds the first word of each block to `sum`.
    #[inline]
    fn take(&mut self, sum: &mut u64) -> Result<u64, Error> {
        let mut completed = 0;
        while let Some(used) = self.driver.poll_used() {
            if !used.expected || used.len != 4097 {
                return Err(format!("{used:?}").into());
            }
            let slot = self.slots[usize::try_from(used.id)?];
            let header = HEADERS + u64::from(slot) * 64;
            let status: u8 = self.memory.read_obj(GuestAddress(header + STATUS))?;
            if status != 0 {
                return Err(format!("status {status}").into());
            }
            *sum = sum.wrapping_add(self.memory.read_obj(data(slot))?);
            self.free.push(slot);
            completed += 1;
        }
        Ok(completed)
    }

    /// Returns when something has completed.
    fn wait(&mut self) -> Result<(), Error> {
        if self.guest == Guest::Polls {
            let start = Instant::now();
            while self.driver.used_idx() == self.driver.next_used() {
                for _ in 0..64 {
                    std::hint::spin_loop();
                    if self.driver.used_idx() != self.driver.next_used() {
                        return Ok(());
                    }
                }
                if start.elapsed() > PATIENCE {
                    return Err("the device does not answer".into());
                }
            }
            return Ok(());
        }
        while self.driver.enable_interrupts() {
            self.sleeps += 1;
            if self.poll.wait(Some(PATIENCE))?.is_empty() {
                return Err("the device does not interrupt".into());
            }
            self.call.test_and_clear()?;
        }
        self.driver.disable_interrupts();
        Ok(())
    }
}

fn data(slot: u16) -> GuestAddress {
    GuestAddress(DATA + u64::from(slot) * BLOCK as u64)
}

/// The processors of device and guest: the first two that this thread may use, or one for both.
fn processors() -> Result<(usize, usize), Error> {
    let usable = sched_getaffinity(Pid::from_raw(0))?;
    let mut usable = (0..CpuSet::count()).filter(|&cpu| usable.is_set(cpu).unwrap_or(false));
    let first = usable.next().ok_or("no processor")?;
    let second = usable.next().unwrap_or_else(|| {
        eprintln!("one processor: device and guest share it, the rates mean little");
        first
    });
    Ok((first, second))
}

/// The calling thread, bound to one processor until this is dropped.
struct Bound(CpuSet);

impl Bound {
    fn to(processor: usize) -> Result<Self, Error> {
        let before = sched_getaffinity(Pid::from_raw(0))?;
        let mut set = CpuSet::new();
        set.set(processor)?;
        sched_setaffinity(Pid::from_raw(0), &set)?;
        Ok(Self(before))
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        // Worst, what this thread does next stays on one processor.
        let _ = sched_setaffinity(Pid::from_raw(0), &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_guests_read_what_is_in_the_file_and_zeroes_from_null() {
        let file = BlockFile::new(64).unwrap();
        for guest in [Guest::Sleeps, Guest::Polls] {
            for file in [Some(&file), None] {
                let mut disk = Disk::new(file, guest).unwrap();
                for depth in [1, 32, DEPTH_MAX] {
                    let cost = disk.run(500, depth).unwrap();
                    assert_eq!(cost.requests, 500);
                    assert!(cost.kicks >= 1, "{cost:?}");
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
