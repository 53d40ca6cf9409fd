//! The token of a chain the device owns.

/// A chain taken from a queue and not yet given back.
///
/// It can be neither copied nor made by a caller, and [`push`](crate::SplitQueue::push) consumes
/// it: so a chain is completed at most once, and only by the holder of the token. Dropping it
/// leaks the chain until the queue is started anew; the guest waits for it for ever.
#[derive(Debug, Eq, PartialEq)]
#[must_use = "a chain that is never pushed back hangs the guest's request"]
pub struct Head {
    index: u16,
}

impl Head {
    pub(crate) const fn new(index: u16) -> Self {
        Self { index }
    }

    /// The descriptor index of the chain's head: below the queue size, and unique among the
    /// heads in flight on this queue, so it can index a table of requests.
    #[inline]
    pub const fn index(&self) -> u16 {
        self.index
    }
}
