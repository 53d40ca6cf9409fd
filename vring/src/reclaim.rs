//! Taking over chains that a device which died had popped and not given back.

use vm_memory::GuestMemory;

use crate::chain::Chain;
use crate::fault::ChainFault;
use crate::head::Head;
use crate::queue::Queue;

/// A descriptor of a packed ring as it was read, for whoever keeps a record of the chains in flight
/// (vhost-user's in-flight tracking): a used descriptor may take the place of one of another chain
/// that is still in flight, so the ring alone does not tell what that chain was.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RingDescriptor {
    /// Guest-physical address of the buffer, or of the indirect table.
    pub address: u64,
    /// Length of either, in bytes.
    pub len: u32,
    /// The Buffer ID, which counts in the last descriptor of a chain (virtio 1.3 §2.8.6).
    pub id: u16,
    /// All flags, those that said whose the descriptor was included.
    pub flags: u16,
}

/// A chain that a predecessor has left: what identifies it in a ring of either format.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Leftover<'a> {
    /// The descriptors of a chain of a packed ring, in its order.
    Packed(&'a [RingDescriptor]),
    /// The head of a chain of a split ring.
    Split(u16),
}

/// Why a chain that a predecessor has left was not taken over. The fault of whoever kept the record
/// of it, or of the guest.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ReclaimError {
    /// The chain is the device's now, and broken: the guest has changed it, or the record is wrong.
    /// Push `head` back with length 0.
    #[error("descriptor chain {}: {fault}", head.index())]
    Chain {
        /// The chain's head, to be pushed with length 0.
        head: Head,
        /// What is wrong with the chain.
        fault: ChainFault,
    },
    /// No such chain can be in flight: its head is no index of the ring, or is in flight already; its
    /// descriptors have no end, or one too early; or it is one of the other format. Nothing has
    /// changed.
    #[error("no chain of that description can be in flight")]
    Impossible,
}

impl<M: GuestMemory> Queue<M> {
    /// Takes over a chain that a device before this one had popped and not given back, as if it had
    /// been popped here. The base that the queue was started with must have passed it.
    ///
    /// In the order in which they were popped, before anything else is.
    ///
    /// # Errors
    ///
    /// [`ReclaimError`].
    pub fn reclaim(
        &mut self,
        leftover: Leftover<'_>,
        chain: &mut Chain,
    ) -> Result<Head, ReclaimError> {
        match (self, leftover) {
            (Self::Packed(queue), Leftover::Packed(descriptors)) => {
                queue.reclaim(descriptors, chain)
            }
            (Self::Split(queue), Leftover::Split(head)) => queue.reclaim(head, chain),
            _ => Err(ReclaimError::Impossible),
        }
    }

    /// Undoes a [`reclaim`](Self::reclaim), for a device that finds it has no room. The chain is to be
    /// reclaimed again later.
    ///
    /// # Errors
    ///
    /// Returns the head if it is not in flight, or not the latest with `VIRTIO_F_IN_ORDER`.
    pub fn unreclaim(&mut self, head: Head) -> Result<(), Head> {
        match self {
            Self::Packed(queue) => queue.unreclaim(head),
            Self::Split(queue) => queue.unreclaim(head),
        }
    }
}
