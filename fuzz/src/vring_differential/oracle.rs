//! virtio-queue's side: the same ring in a memory of its own.

use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vring::RingAddresses;

use crate::naive_walk::Buffer;
use crate::ring_input::Memory;

/// A chain as virtio-queue hands it out.
pub(super) struct Chain {
    pub(super) head: u16,
    pub(super) buffers: Vec<Buffer>,
}

/// What fetching gives.
pub(super) enum Fetched {
    Nothing,
    Chain(Chain),
    /// The index is further ahead than the ring is long.
    Jump,
}

/// A ready queue, or `None` if it refuses to be at `addresses`.
pub(super) fn start(
    memory: &Memory,
    (size, event_idx): (u16, bool),
    addresses: RingAddresses,
    next_avail: u16,
) -> Option<Queue> {
    let mut queue = Queue::new(size).unwrap();
    queue
        .try_set_desc_table_address(addresses.descriptor_area)
        .ok()?;
    queue
        .try_set_avail_ring_address(addresses.driver_area)
        .ok()?;
    queue
        .try_set_used_ring_address(addresses.device_area)
        .ok()?;
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    if !queue.is_valid(memory) {
        return None;
    }
    queue.set_next_avail(next_avail);
    queue.set_next_used(word(memory, addresses.device_area.0 + 2));
    Some(queue)
}

/// Fetches the next chain. `index` stands in for the available index while that is read.
pub(super) fn fetch(queue: &mut Queue, memory: &Memory, index: Option<u16>) -> Fetched {
    let at = queue.avail_ring() + 2;
    let there = word(memory, at);
    if let Some(index) = index {
        set_word(memory, at, index);
    }
    let next = queue.iter(memory).map(|mut available| available.next());
    if index.is_some() {
        set_word(memory, at, there);
    }
    match next {
        Ok(None) => Fetched::Nothing,
        Ok(Some(chain)) => Fetched::Chain(Chain {
            head: chain.head_index(),
            buffers: chain
                .map(|found| Buffer {
                    addr: found.addr().0,
                    len: found.len(),
                    writable: found.is_write_only(),
                })
                .collect(),
        }),
        Err(Error::InvalidAvailRingIndex) => Fetched::Jump,
        Err(error) => panic!("{error}"),
    }
}

/// Writes a used element, and hides the index that says so from the guest: virtio-queue stores it
/// with each element ([`Difference::IndexStoredOnce`](super::Difference::IndexStoredOnce)).
pub(super) fn add_used(queue: &mut Queue, memory: &Memory, head: u16, len: u32) {
    let at = queue.used_ring() + 2;
    let before = word(memory, at);
    queue.add_used(memory, head, len).unwrap();
    assert_eq!(word(memory, at), queue.next_used());
    set_word(memory, at, before);
}

pub(super) fn word(memory: &Memory, at: u64) -> u16 {
    let mut bytes = [0; 2];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    u16::from_le_bytes(bytes)
}

pub(super) fn set_word(memory: &Memory, at: u64, word: u16) {
    memory
        .write_slice(&word.to_le_bytes(), GuestAddress(at))
        .unwrap();
}
