//! In what `vring` and virtio-queue 0.18 differ on the same split ring, and why.
//!
//! The list is complete: the target panics at a difference that is none of these, or that is not as
//! its reason says. And none is idle: `tests/corpora.rs` asks that the corpus meets every one.

use vring::ChainFault;

/// One of the differences there are.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Difference {
    /// At a start.
    AreaOverRegions,
    /// At a start.
    AvailableRingAtZero,
    /// At a start.
    FlagsClearedAtStart,
    /// Fetching.
    IndexReadOnce,
    /// Fetching.
    StoppedRing,
    /// Fetching.
    HeadOutOfRange,
    /// Fetching.
    HeadInFlight,
    /// In a chain.
    EmptyBuffers,
    /// In a chain.
    FourGiB,
    /// In a chain.
    BufferOverflow,
    /// In a chain.
    IndirectAndNext,
    /// In a chain.
    IndirectNested,
    /// In a chain.
    IndirectNotNegotiated,
    /// In a chain.
    IndirectTableLength,
    /// In a chain.
    IndirectTableTooLong,
    /// In a chain.
    IndirectTableUnmapped,
    /// In a chain.
    NextOutOfRange,
    /// In a chain.
    ReadableAfterWritable,
    /// In a chain.
    TooManyBytes,
    /// In a chain.
    TooManyDescriptors,
    /// Giving back.
    IndexStoredOnce,
    /// Deciding on an interrupt.
    FirstDecision,
    /// Deciding on an interrupt.
    NothingPublished,
    /// Deciding on an interrupt.
    NoInterruptFlag,
    /// Asking for no kicks.
    FlagsStoredOnce,
}

impl Difference {
    /// All of them.
    pub const ALL: [Self; 25] = [
        Self::AreaOverRegions,
        Self::AvailableRingAtZero,
        Self::FlagsClearedAtStart,
        Self::IndexReadOnce,
        Self::StoppedRing,
        Self::HeadOutOfRange,
        Self::HeadInFlight,
        Self::EmptyBuffers,
        Self::FourGiB,
        Self::BufferOverflow,
        Self::IndirectAndNext,
        Self::IndirectNested,
        Self::IndirectNotNegotiated,
        Self::IndirectTableLength,
        Self::IndirectTableTooLong,
        Self::IndirectTableUnmapped,
        Self::NextOutOfRange,
        Self::ReadableAfterWritable,
        Self::TooManyBytes,
        Self::TooManyDescriptors,
        Self::IndexStoredOnce,
        Self::FirstDecision,
        Self::NothingPublished,
        Self::NoInterruptFlag,
        Self::FlagsStoredOnce,
    ];

    /// What each of the two does, and why `vring` does what it does. README.md has the same words.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::AreaOverRegions => {
                "vring refuses an area that is not inside one region of memory, since it translates \
                 an area once; virtio-queue looks each word up"
            }
            Self::AvailableRingAtZero => {
                "virtio-queue takes an available ring at address 0 for a queue that was not set up; \
                 the specification has no such address"
            }
            Self::FlagsClearedAtStart => {
                "vring clears used.flags when it starts: they must be 0 with EVENT_IDX (§2.7.10.1), \
                 and a predecessor may have left NO_NOTIFY behind; virtio-queue leaves what is there"
            }
            Self::IndexReadOnce => {
                "vring fetches what it has once seen to be available without looking again, so an \
                 index taken back (§2.7.6.1) stops it later; virtio-queue reads the index for each"
            }
            Self::StoppedRing => {
                "an index that jumped, or any other fault of the ring, stops vring for good, since \
                 nothing fetched from it can be trusted; virtio-queue says so at each call and goes \
                 on when the index is in range again"
            }
            Self::HeadOutOfRange => {
                "a head that is no index of the table stops vring; virtio-queue hands it out as an \
                 empty chain, which it then refuses to take back"
            }
            Self::HeadInFlight => {
                "a head that the device has already stops vring, or one request would be answered \
                 twice; virtio-queue does not keep track and hands it out again"
            }
            Self::EmptyBuffers => {
                "vring leaves buffers of no bytes out; virtio-queue hands them out"
            }
            Self::FourGiB => {
                "a chain of exactly 2^32 bytes is within the limit (§2.7.5.2), and served by vring; \
                 virtio-queue counts in 32 bits and ends it one buffer early"
            }
            Self::BufferOverflow => {
                "vring returns a chain with a buffer that passes the end of the address space; \
                 virtio-queue leaves it to whoever translates the buffer"
            }
            Self::IndirectAndNext => {
                "vring returns a chain with INDIRECT and NEXT in one descriptor (§2.7.5.3.1); \
                 virtio-queue follows the table and forgets NEXT"
            }
            Self::IndirectNested => {
                "vring returns a chain with a table in a table (§2.7.5.3.1); virtio-queue ends it \
                 there without a word"
            }
            Self::IndirectNotNegotiated => {
                "vring returns a chain with a table if the feature was not negotiated (§2.7.5.3.1); \
                 virtio-queue does not know, and follows it"
            }
            Self::IndirectTableLength => {
                "vring returns a chain whose table is no whole number of descriptors, or none \
                 (§2.7.5.3.2); virtio-queue ends it there without a word"
            }
            Self::IndirectTableTooLong => {
                "vring returns a chain whose table is longer than 1024, which bounds the work of a \
                 pop; virtio-queue follows it up to 65535"
            }
            Self::IndirectTableUnmapped => {
                "vring returns a chain whose table is not all in memory; virtio-queue hands out the \
                 entries before the hole, and ends it there without a word"
            }
            Self::NextOutOfRange => {
                "vring returns a chain whose next is not in the table; virtio-queue ends it there \
                 without a word"
            }
            Self::ReadableAfterWritable => {
                "vring returns a chain with a readable buffer after a writable one (§2.7.4.2); \
                 virtio-queue hands both out"
            }
            Self::TooManyBytes => {
                "vring returns a chain of more than 2^32 bytes (§2.7.5.2); virtio-queue ends it \
                 before, without a word"
            }
            Self::TooManyDescriptors => {
                "vring returns a chain that loops, or is longer than its table; virtio-queue ends it \
                 after as many descriptors as there are, without a word"
            }
            Self::IndexStoredOnce => {
                "vring stores used.idx once for all that was pushed, when it is published; \
                 virtio-queue with each element"
            }
            Self::FirstDecision => {
                "vring's first decision with EVENT_IDX is to interrupt, since nobody knows what the \
                 driver was told before; virtio-queue takes it that nothing happened"
            }
            Self::NothingPublished => {
                "without EVENT_IDX vring does not interrupt if nothing was published since the last \
                 decision; virtio-queue always does"
            }
            Self::NoInterruptFlag => {
                "without EVENT_IDX vring obeys NO_INTERRUPT in avail.flags (§2.7.7); virtio-queue \
                 does not look"
            }
            Self::FlagsStoredOnce => {
                "vring sets NO_NOTIFY once until it clears it, whatever the guest makes of the word; \
                 virtio-queue at each call"
            }
        }
    }

    /// The difference that a fault of a chain makes, and whether virtio-queue ends the chain where
    /// the fault is, or goes on.
    pub(super) fn of_fault(fault: ChainFault) -> (Self, Then) {
        match fault {
            ChainFault::BufferOverflow { .. } => (Self::BufferOverflow, Then::GoesOn),
            ChainFault::IndirectAndNext => (Self::IndirectAndNext, Then::GoesOn),
            ChainFault::IndirectNested => (Self::IndirectNested, Then::Ends),
            ChainFault::IndirectNotNegotiated => (Self::IndirectNotNegotiated, Then::GoesOn),
            ChainFault::IndirectTableLength { .. } => (Self::IndirectTableLength, Then::Ends),
            ChainFault::IndirectTableTooLong { .. } => (Self::IndirectTableTooLong, Then::GoesOn),
            ChainFault::IndirectTableUnmapped { .. } => (Self::IndirectTableUnmapped, Then::GoesOn),
            ChainFault::NextOutOfRange { .. } => (Self::NextOutOfRange, Then::Ends),
            ChainFault::ReadableAfterWritable => (Self::ReadableAfterWritable, Then::GoesOn),
            ChainFault::TooManyBytes => (Self::TooManyBytes, Then::Ends),
            ChainFault::TooManyDescriptors { .. } => (Self::TooManyDescriptors, Then::Ends),
            other => panic!("{other} is no fault of a split ring's chain"),
        }
    }
}

/// What virtio-queue does at a fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Then {
    Ends,
    GoesOn,
}
