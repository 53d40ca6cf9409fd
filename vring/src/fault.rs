//! What a driver can do wrong, as values.

use crate::Head;

/// A broken rule of virtio inside one descriptor chain: always the guest's fault, except
/// [`ChainFault::StorageTooSmall`].
///
/// The ring itself is sound. The caller returns the head with used length 0, counts the fault
/// and goes on.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ChainFault {
    /// A buffer's address plus its length passes the end of the 64-bit address space (virtio 1.3
    /// §2.7.5, §2.8.4: both describe memory, which has an end).
    ///
    /// A buffer ending exactly at 2^64 is refused too: no memory map has its last byte there,
    /// and every later `address + length` can then be plain arithmetic.
    #[error("buffer of {len} bytes at {address:#x} wraps the address space")]
    BufferOverflow {
        /// The buffer's guest-physical address.
        address: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// A chain of a packed ring has direct descriptors and ends with an indirect one (virtio 1.3
    /// §2.8.19, driver MUST NOT; in a split ring it is valid).
    #[error("indirect descriptor after direct ones in a packed ring")]
    IndirectAmongDirect,
    /// `INDIRECT` and `NEXT` in one descriptor (virtio 1.3 §2.7.5.3.1, §2.8.19, driver MUST NOT).
    #[error("descriptor has both INDIRECT and NEXT")]
    IndirectAndNext,
    /// A descriptor inside a split ring's indirect table is itself indirect (§2.7.5.3.1, driver
    /// MUST NOT). In a packed ring's, the flag is ignored (§2.8.7).
    #[error("indirect descriptor inside an indirect table")]
    IndirectNested,
    /// An indirect descriptor although `VIRTIO_F_INDIRECT_DESC` was not negotiated
    /// (§2.7.5.3.1, §2.8.19, driver MUST NOT).
    #[error("indirect descriptor without the feature")]
    IndirectNotNegotiated,
    /// An indirect table's length is zero or not a multiple of 16 (§2.7.5.3.2).
    #[error("indirect table of {len} bytes does not hold whole descriptors")]
    IndirectTableLength {
        /// The length given, in bytes.
        len: u32,
    },
    /// An indirect table has more entries than
    /// [`MAX_INDIRECT_DESCRIPTORS`](crate::MAX_INDIRECT_DESCRIPTORS) (§2.7.5.3.1, driver MUST NOT exceed
    /// the queue size, which real drivers do).
    #[error("indirect table of {entries} entries is beyond the limit")]
    IndirectTableTooLong {
        /// Its length in entries.
        entries: u32,
    },
    /// An indirect table is not wholly in guest memory.
    #[error("indirect table of {len} bytes at {address:#x} is not in guest memory")]
    IndirectTableUnmapped {
        /// The table's guest-physical address.
        address: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// Split ring: `next` points past the end of the table it is in (virtio 1.3 §2.7.5, §2.7.5.3: it is an
    /// index of that table).
    #[error("next descriptor {next} is not below {limit}")]
    NextOutOfRange {
        /// The index given.
        next: u16,
        /// The number of descriptors in the table.
        limit: u16,
    },
    /// A device-readable buffer after a device-writable one (§2.7.4.2, §2.8.17, driver MUST NOT).
    #[error("readable buffer after a writable one")]
    ReadableAfterWritable,
    /// The caller's [`Chain`](crate::Chain) was made for a smaller queue and cannot hold what a
    /// driver may send here. The caller's fault.
    #[error("the chain storage was made for a smaller queue")]
    StorageTooSmall,
    /// More than 2^32 bytes in one chain (§2.7.5.2, driver MUST NOT).
    #[error("chain of more than 2^32 bytes")]
    TooManyBytes,
    /// Split ring: more descriptors than the table has: the chain is too long, or loops
    /// (§2.7.5.2). In a packed ring that is [`RingFault::ChainOverrun`].
    #[error("chain loops or is longer than {limit} descriptors")]
    TooManyDescriptors {
        /// The number of descriptors in the table.
        limit: u16,
    },
}

/// The ring's integrity is lost: nothing fetched from it can be trusted any more.
///
/// The queue fetches nothing until it is started anew. Work in flight can still be pushed and
/// published (except after [`RingFault::MemoryLost`]). The caller signals its error event once.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RingFault {
    /// The available index is further ahead than the ring is long: it jumped, or went backwards
    /// (virtio 1.3 §2.7.6.1, driver MUST NOT decrement it).
    /// The guest's fault; the front-end's if the queue was started with a wrong base.
    #[error("available index {avail_idx} is more than {size} ahead of {next_avail}")]
    AvailIndexJump {
        /// The index the driver published.
        avail_idx: u16,
        /// The next entry the device would have fetched.
        next_avail: u16,
        /// The queue size, in entries.
        size: u16,
    },
    /// Packed ring: a chain has the Buffer ID of one the device still owns (virtio 1.3 §2.8.21.1: the
    /// driver takes a free one). The guest's fault.
    #[error("buffer id {id} is already in flight")]
    BufferIdInFlight {
        /// The id given twice.
        id: u16,
    },
    /// Packed ring: a chain goes on after the last descriptor that the driver may have made
    /// available, into those of chains it has not got back yet: it is too long, or has no end
    /// (virtio 1.3 §2.8.17). So there is no telling where the next one starts. The guest's fault;
    /// the front-end's if the queue was started with a wrong base.
    #[error("chain is longer than the {limit} descriptors the driver may have made available")]
    ChainOverrun {
        /// The queue size, less the descriptors of the chains the driver has not got back.
        limit: u16,
    },
    /// A head was made available while the device still owns it (virtio 1.3 §2.7.13.1: the driver
    /// takes a free one). The guest's fault.
    #[error("head {head} is already in flight")]
    HeadInFlight {
        /// The descriptor index offered twice.
        head: u16,
    },
    /// A head is not an index of the descriptor table (virtio 1.3 §2.7.6). The guest's fault.
    #[error("head {head} is not below the queue size {size}")]
    HeadOutOfRange {
        /// The index given.
        head: u16,
        /// The queue size, in entries.
        size: u16,
    },
    /// A new memory map no longer holds the ring. The front-end's fault.
    #[error("the memory map no longer holds the ring")]
    MemoryLost,
}

/// Why [`pop`](crate::SplitQueue::pop) has no chain to give. Both are the guest's doing unless
/// the fault inside says otherwise.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PopError {
    /// One chain is broken, and its storage left empty. Push `head` back with length 0; the ring goes on.
    #[error("descriptor chain {}: {fault}", head.index())]
    Chain {
        /// The chain's head, to be pushed with length 0.
        head: Head,
        /// What is wrong with the chain.
        fault: ChainFault,
    },
    /// The ring is broken. Reported exactly once; from then on the queue looks empty.
    #[error("ring: {0}")]
    Ring(RingFault),
}
