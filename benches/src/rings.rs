//! One ring, served by vring in both its formats and by virtio-queue.
//!
//! The guest makes a number of chains available, each of three descriptors and shaped as a read request
//! (header; data, status). Then the device serves them in batches. Only that is timed, and only that is
//! counted: [`SERVE`] names the function for callgrind.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vring::driver::{Driver, Layout as Areas};
use vring::{
    Chain, PackedQueue, QueueConfig, QueueSize, RingAddresses, RingBase, RingFeatures, Segment,
    SplitQueue,
};

use crate::Error;

/// Ring size: the usual one of virtio-blk.
const SIZE: u16 = 256;

/// Chains the guest makes available at once, and so the largest batch. Three descriptors for each fit
/// the ring.
pub const BATCH_MAX: u16 = 64;

/// What callgrind is to collect: the device's side of a ring, whichever device it is.
pub const SERVE: &str = "*benches::rings::Device>::serve";

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
    /// Three descriptors of the ring's own.
    Direct,
    /// One descriptor, pointing to a table of three.
    Indirect,
}

/// Which device serves the ring, and so which format it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// `vring::SplitQueue`.
    VringSplit,
    /// `vring::PackedQueue`.
    VringPacked,
    /// `virtio_queue::Queue`, a split ring, by `pop_descriptor_chain`: each chain published by itself,
    /// as its users do.
    VirtioQueue,
    /// The same by `iter`, which looks at the available index once for the batch.
    VirtioQueueIter,
}

/// What a device does with a batch of chains: takes each, walks it into storage of its own, returns
/// it, and decides at the end whether to interrupt.
trait Device {
    /// Serves at most `limit` chains; returns how many there were.
    fn serve(&mut self, limit: u16) -> u16;
}

/// Both formats have the same methods, and no trait that could be named.
macro_rules! vring_device {
    ($device:ident, $queue:ident) => {
        struct $device {
            queue: $queue<GuestMemoryMmap>,
            chain: Chain,
        }

        impl Device for $device {
            fn serve(&mut self, limit: u16) -> u16 {
                let mut served = 0;
                let mut batch = self.queue.batch(limit);
                while let Ok(Some(head)) = batch.pop(&mut self.chain) {
                    debug_assert_eq!(self.chain.readable().len(), 1);
                    debug_assert_eq!(self.chain.writable().len(), 2);
                    black_box(&self.chain);
                    batch.push(head, USED_LEN);
                    served += 1;
                }
                let _ = black_box(batch.finish());
                served
            }
        }
    };
}

vring_device!(Split, SplitQueue);
vring_device!(Packed, PackedQueue);

struct Peer {
    memory: Arc<GuestMemoryMmap>,
    queue: virtio_queue::Queue,
    /// As [`Chain`]: owned segments, reused.
    segments: Vec<(Segment, bool)>,
}

/// A chain of virtio-queue, of whatever it was popped by.
type PeerChain<'a> = virtio_queue::DescriptorChain<&'a GuestMemoryMmap>;

/// Walks a chain into `segments`.
#[inline]
fn collect(chain: PeerChain<'_>, segments: &mut Vec<(Segment, bool)>) {
    segments.clear();
    for descriptor in chain {
        let segment = Segment {
            addr: descriptor.addr(),
            len: descriptor.len(),
        };
        segments.push((segment, descriptor.is_write_only()));
    }
    debug_assert_eq!(segments.len(), 3);
    black_box(segments);
}

impl Device for Peer {
    fn serve(&mut self, limit: u16) -> u16 {
        let memory = &*self.memory;
        let mut served = 0;
        while served < limit
            && let Some(chain) = self.queue.pop_descriptor_chain(memory)
        {
            let head = chain.head_index();
            collect(chain, &mut self.segments);
            if self.queue.add_used(memory, head, USED_LEN).is_err() {
                break;
            }
            served += 1;
        }
        black_box(self.queue.needs_notification(memory).ok());
        served
    }
}

struct PeerIter(Peer);

impl Device for PeerIter {
    fn serve(&mut self, limit: u16) -> u16 {
        let memory = &*self.0.memory;
        // The iterator borrows the queue, so what it gives is returned after it.
        let mut heads = [0; BATCH_MAX as usize];
        let mut served = 0;
        if let Ok(chains) = self.0.queue.iter(memory) {
            for (chain, head) in chains.take(usize::from(limit)).zip(&mut heads) {
                *head = chain.head_index();
                collect(chain, &mut self.0.segments);
                served += 1;
            }
        }
        for &head in &heads[..usize::from(served)] {
            if self.0.queue.add_used(memory, head, USED_LEN).is_err() {
                break;
            }
        }
        black_box(self.0.queue.needs_notification(memory).ok());
        served
    }
}

/// A ring, the guest that fills it, and the device that serves it.
pub struct Ring {
    guest: Driver<GuestMemoryMmap>,
    device: Box<dyn Device>,
    layout: Layout,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("guest", &self.guest)
            .field("layout", &self.layout)
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
            packed: server == Server::VringPacked,
            ..RingFeatures::default()
        };
        let addresses = Areas::new(RING, size, features)?.addresses();
        let guest = Driver::new(Arc::clone(&memory), addresses, size, features)?;
        let config = QueueConfig {
            size,
            addresses,
            features,
            base: RingBase::fresh(features),
        };
        let chain = Chain::for_queue(size);
        let device: Box<dyn Device> = match server {
            Server::VringSplit => Box::new(Split {
                queue: SplitQueue::start(memory, &config)?,
                chain,
            }),
            Server::VringPacked => Box::new(Packed {
                queue: PackedQueue::start(memory, &config)?,
                chain,
            }),
            Server::VirtioQueue => Box::new(peer(memory, addresses, features)?),
            Server::VirtioQueueIter => Box::new(PeerIter(peer(memory, addresses, features)?)),
        };
        Ok(Self {
            guest,
            device,
            layout,
        })
    }

    /// Serves `batches` batches of `batch` chains; returns how long the device took.
    ///
    /// # Errors
    ///
    /// The device did not serve them all, or did not give them back.
    ///
    /// # Panics
    ///
    /// If `batch` is zero or above [`BATCH_MAX`].
    pub fn run(&mut self, batches: u64, batch: u16) -> Result<Duration, Error> {
        assert!((1..=BATCH_MAX).contains(&batch));
        // As many batches between two looks at the clock as the guest makes available at once: the look
        // costs more than a chain.
        let most = BATCH_MAX / batch;
        let mut time = Duration::ZERO;
        let mut left = batches;
        while left > 0 {
            let now = u16::try_from(left).map_or(most, |left| left.min(most));
            left -= u64::from(now);
            self.make_available(now * batch)?;
            let start = Instant::now();
            for _ in 0..now {
                if self.device.serve(batch) != batch {
                    return Err("not all chains were served".into());
                }
            }
            time += start.elapsed();
            for _ in 0..now * batch {
                let used = self.guest.poll_used();
                if used.is_none_or(|used| !used.expected || used.len != USED_LEN) {
                    return Err("not all chains were given back".into());
                }
            }
        }
        Ok(time)
    }

    fn make_available(&mut self, chains: u16) -> Result<(), Error> {
        let segment = |addr, len| Segment {
            addr: GuestAddress(addr),
            len,
        };
        for chain in 0..u64::from(chains) {
            let header = [segment(HEADERS + chain * 64, 16)];
            let answer = [
                segment(DATA + chain * 4096, 4096),
                segment(HEADERS + chain * 64 + 32, 1),
            ];
            match self.layout {
                Layout::Direct => self.guest.add_chain(&header, &answer)?,
                Layout::Indirect => {
                    let table = GuestAddress(TABLES + chain * 64);
                    self.guest.add_indirect(table, &header, &answer)?
                }
            };
        }
        self.guest.publish();
        Ok(())
    }
}

fn peer(
    memory: Arc<GuestMemoryMmap>,
    addresses: RingAddresses,
    features: RingFeatures,
) -> Result<Peer, Error> {
    let mut queue = virtio_queue::Queue::new(SIZE)?;
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
    fn every_device_serves_both_layouts_across_the_wrap_of_indices() {
        for server in [
            Server::VringSplit,
            Server::VringPacked,
            Server::VirtioQueue,
            Server::VirtioQueueIter,
        ] {
            for layout in [Layout::Direct, Layout::Indirect] {
                let mut ring = Ring::new(server, layout).unwrap();
                // 70,400 chains: past 65,536.
                ring.run(2200, 32).unwrap();
                ring.run(100, 1).unwrap();
                assert_eq!(ring.guest.free(), SIZE, "{server:?} {layout:?}");
            }
        }
    }
}
