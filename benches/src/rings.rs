//! One split ring, served by vring and by virtio-queue in turn.
//!
//! The guest's side is laid out once: every entry of the available ring names a chain of three
//! descriptors, shaped as a read request (header; data, status), so that making a batch available is
//! one store, and what is measured is the device's side.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vring::driver::{SplitDriver, SplitLayout};
use vring::{
    Chain, QueueConfig, QueueSize, RingAddresses, RingBase, RingFeatures, Segment, SplitQueue,
};

use crate::Error;

/// Ring size: the usual one of virtio-blk.
const SIZE: u16 = 256;

/// Different chains. A divisor of the ring size, so that a position always names the same chain; three
/// descriptors for each fit the ring.
const CHAINS: u16 = 64;

/// Largest batch: chains in flight must differ.
pub const BATCH_MAX: u16 = CHAINS;

const RING: GuestAddress = GuestAddress(0x1000);
const TABLES: u64 = 0x1_0000;
const HEADERS: u64 = 0x2_0000;
const DATA: u64 = 0x10_0000;
const MEMORY: usize = 0x20_0000;

/// Used length of a 4 KiB read: data and status.
const USED_LEN: u32 = 4097;

/// How the chains are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Three descriptors of the ring's own table.
    Direct,
    /// One descriptor, pointing to a table of three.
    Indirect,
}

/// Which device serves the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// `vring::SplitQueue`.
    Vring,
    /// `virtio_queue::Queue`.
    VirtioQueue,
}

/// What a device does with a batch of chains: takes each, walks it into storage of its own, returns
/// it, and decides at the end whether to interrupt.
trait Device {
    /// Returns how many chains there were.
    fn serve(&mut self) -> usize;
}

struct Ours {
    queue: SplitQueue<GuestMemoryMmap>,
    chain: Chain,
}

impl Device for Ours {
    #[inline]
    fn serve(&mut self) -> usize {
        let mut served = 0;
        while let Ok(Some(head)) = self.queue.pop(&mut self.chain) {
            debug_assert_eq!(self.chain.readable().len(), 1);
            debug_assert_eq!(self.chain.writable().len(), 2);
            black_box(&self.chain);
            self.queue.push(head, USED_LEN);
            served += 1;
        }
        self.queue.publish();
        black_box(self.queue.should_notify());
        served
    }
}

struct Peer {
    memory: Arc<GuestMemoryMmap>,
    queue: Queue,
    /// As [`Chain`]: owned segments, reused.
    segments: Vec<(Segment, bool)>,
}

impl Device for Peer {
    #[inline]
    fn serve(&mut self) -> usize {
        let memory = &*self.memory;
        let mut served = 0;
        while let Some(chain) = self.queue.pop_descriptor_chain(memory) {
            let head = chain.head_index();
            self.segments.clear();
            for descriptor in chain {
                let segment = Segment {
                    addr: descriptor.addr(),
                    len: descriptor.len(),
                };
                self.segments.push((segment, descriptor.is_write_only()));
            }
            debug_assert_eq!(self.segments.len(), 3);
            black_box(&self.segments);
            if self.queue.add_used(memory, head, USED_LEN).is_err() {
                break;
            }
            served += 1;
        }
        black_box(self.queue.needs_notification(memory).ok());
        served
    }
}

/// A ring and the device that serves it.
pub struct Ring {
    driver: SplitDriver<GuestMemoryMmap>,
    device: Box<dyn Device>,
    avail_idx: u16,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("avail_idx", &self.avail_idx)
            .finish_non_exhaustive()
    }
}

impl Ring {
    /// Lays the ring out and starts the device on it.
    ///
    /// # Errors
    ///
    /// No memory.
    pub fn new(server: Server, layout: Layout) -> Result<Self, Error> {
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)])?);
        let size = QueueSize::new(u32::from(SIZE))?;
        let features = RingFeatures {
            indirect_desc: true,
            event_idx: true,
            ..RingFeatures::default()
        };
        let addresses = SplitLayout::new(RING, size)?.addresses();
        let mut driver = SplitDriver::new(Arc::clone(&memory), addresses, size, features)?;
        for chain in 0..u64::from(CHAINS) {
            let segment = |addr, len| Segment {
                addr: GuestAddress(addr),
                len,
            };
            let header = [segment(HEADERS + chain * 64, 16)];
            let answer = [
                segment(DATA + chain * 4096, 4096),
                segment(HEADERS + chain * 64 + 32, 1),
            ];
            let head = match layout {
                Layout::Direct => driver.add_chain(&header, &answer)?,
                Layout::Indirect => {
                    driver.add_indirect(GuestAddress(TABLES + chain * 64), &header, &answer)?
                }
            };
            let first = u16::try_from(chain)?;
            for position in (first..SIZE).step_by(usize::from(CHAINS)) {
                driver.write_avail_entry(position, head);
            }
        }
        let device: Box<dyn Device> = match server {
            Server::Vring => Box::new(ours(memory, size, addresses, features)?),
            Server::VirtioQueue => Box::new(peer(memory, addresses, features)?),
        };
        Ok(Self {
            driver,
            device,
            avail_idx: 0,
        })
    }

    /// Serves `batches` batches of `batch` chains.
    ///
    /// # Errors
    ///
    /// The device did not serve them all, or did not say so in the used ring.
    ///
    /// # Panics
    ///
    /// If `batch` is above [`BATCH_MAX`].
    pub fn run(&mut self, batches: u64, batch: u16) -> Result<Duration, Error> {
        assert!(batch <= BATCH_MAX);
        let start = Instant::now();
        for _ in 0..batches {
            self.avail_idx = self.avail_idx.wrapping_add(batch);
            self.driver.set_avail_idx(self.avail_idx);
            if self.device.serve() != usize::from(batch) {
                return Err("not all chains were served".into());
            }
        }
        let time = start.elapsed();
        if self.driver.used_idx() == self.avail_idx {
            Ok(time)
        } else {
            Err("not all chains were returned".into())
        }
    }
}

fn ours(
    memory: Arc<GuestMemoryMmap>,
    size: QueueSize,
    addresses: RingAddresses,
    features: RingFeatures,
) -> Result<Ours, Error> {
    let config = QueueConfig {
        size,
        addresses,
        features,
        base: RingBase::Split { next_avail: 0 },
    };
    Ok(Ours {
        queue: SplitQueue::start(memory, &config)?,
        chain: Chain::for_queue(size),
    })
}

fn peer(
    memory: Arc<GuestMemoryMmap>,
    addresses: RingAddresses,
    features: RingFeatures,
) -> Result<Peer, Error> {
    let mut queue = Queue::new(SIZE)?;
    queue.try_set_desc_table_address(addresses.descriptor_area)?;
    queue.try_set_avail_ring_address(addresses.driver_area)?;
    queue.try_set_used_ring_address(addresses.device_area)?;
    queue.set_event_idx(features.event_idx);
    queue.set_ready(true);
    if !queue.is_valid(&*memory) {
        return Err("virtio-queue refuses the ring".into());
    }
    Ok(Peer {
        memory,
        queue,
        segments: Vec::with_capacity(usize::from(SIZE)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_devices_serve_both_layouts_across_the_index_wrap() {
        for server in [Server::Vring, Server::VirtioQueue] {
            for layout in [Layout::Direct, Layout::Indirect] {
                let mut ring = Ring::new(server, layout).unwrap();
                // 70,400 chains: past 65,536.
                ring.run(2200, 32).unwrap();
                ring.run(100, 1).unwrap();
                let (id, len) = ring.driver.used_entry(ring.avail_idx.wrapping_sub(1));
                assert!(id < 192 && len == USED_LEN, "{server:?} {layout:?}");
            }
        }
    }
}
