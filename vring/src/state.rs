//! Saving a queue and going on from there, for snapshots and migration.

#[cfg(feature = "serde")]
mod raw;

use std::sync::Arc;

use vm_memory::GuestMemory;

use crate::base::RingBase;
use crate::config::{QueueConfig, StartError};
use crate::fault::RingFault;
use crate::packed::PackedQueue;
use crate::queue::Queue;
use crate::split::SplitQueue;

/// An idle queue as plain data: with the guest's memory, all it takes to go on exactly where it
/// stopped.
///
/// Plain: whoever wrote the file or sent the message may have put anything here. Restoring checks
/// it like any other input, so nothing needs to be checked before.
///
/// With the feature `serde` it can be serialised: as numbers and flags under the names that the
/// fields have here, in any format that describes itself or not. Reading refuses a queue size that
/// is none, a position that contradicts the features, and fields it does not know.
///
/// # Example
///
/// ```
/// # use std::sync::Arc;
/// # use vm_memory::{GuestAddress, GuestMemoryMmap};
/// # use vring::driver::{SplitDriver, SplitLayout};
/// use vring::{Chain, Queue, QueueConfig, QueueSize, RingBase, RingFeatures};
/// # let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)])?);
/// # let (size, features) = (QueueSize::new(4)?, RingFeatures::default());
/// # let addresses = SplitLayout::new(GuestAddress(0x1000), size)?.addresses();
/// # let mut guest = SplitDriver::new(Arc::clone(&memory), addresses, size, features)?;
/// # let base = RingBase::fresh(features);
/// # let config = QueueConfig { size, addresses, features, base };
/// # let mut chain = Chain::for_queue(size);
/// # guest.add_chain(&[], &[])?;
/// # guest.publish();
/// let mut queue = Queue::start(Arc::clone(&memory), &config)?;
/// let head = queue.pop(&mut chain)?.expect("one chain is available");
/// assert!(queue.save().is_err(), "a chain is in flight");
/// queue.push(head, 0);
/// assert!(queue.save().is_err(), "the driver has not got it back");
/// queue.publish();
/// let state = queue.save()?;
///
/// // Elsewhere, later, with the guest's memory as it was:
/// let mut queue = Queue::restore(memory, &state)?;
/// assert_eq!(queue.pop(&mut chain)?, None);
/// // As after a start, the first decision is to interrupt: nobody knows what the driver was told.
/// assert!(queue.should_notify());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "raw::State", into = "raw::State"))]
pub struct QueueState {
    /// What the queue was started from, its base replaced by where it goes on.
    pub config: QueueConfig,
    /// Split ring: `used.idx` as published. The ring in the guest's memory has it too, so it tells
    /// whether memory and state belong together. Packed ring: none; the base has it all.
    pub used_idx: Option<u16>,
}

/// Why a queue cannot be saved as it is. The caller's doing, but for [`SaveError::Stopped`].
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// Chains are in flight: which, is not part of the state. Drain first: push them all, or
    /// un-pop.
    #[error("{count} chains are in flight: complete them first")]
    InFlight {
        /// How many.
        count: u16,
    },
    /// A broken ring has no position to go on from. It must be started anew by the guest. The fault
    /// says who broke it.
    #[error("the ring has stopped: {fault}")]
    Stopped {
        /// Why.
        fault: RingFault,
    },
    /// Chains have been pushed that the driver cannot see yet: publish them first.
    #[error("{count} chains are pushed and not published: publish them first")]
    Unpublished {
        /// How many.
        count: usize,
    },
}

/// Why a queue was not restored. Nothing was written to guest memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// Not even a start from the saved configuration is possible. The fault of whoever made the
    /// state or mapped the memory.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The split ring in memory is not the one that was saved: the memory is of another moment or
    /// another guest, or the guest wrote to a word that is the device's.
    #[error("used index is {found} in memory and {saved} in the saved state")]
    UsedIndex {
        /// The index in the state.
        saved: u16,
        /// The index in the ring.
        found: u16,
    },
}

impl<M: GuestMemory> SplitQueue<M> {
    /// The state of an idle queue; see [`QueueState`].
    ///
    /// # Errors
    ///
    /// [`SaveError`]: the queue is not idle, or broken.
    pub fn save(&self) -> Result<QueueState, SaveError> {
        check_idle(self.fault(), self.in_flight(), self.unpublished())?;
        Ok(QueueState {
            config: QueueConfig {
                size: self.size(),
                addresses: self.addresses(),
                features: self.features(),
                base: self.base(),
            },
            used_idx: Some(self.used_idx()),
        })
    }

    /// Starts a queue where a saved one stopped. As after [`start`](Self::start) kicks are enabled,
    /// and the first decision is to interrupt: look at the ring once, and finish the pass.
    ///
    /// # Errors
    ///
    /// [`RestoreError`]: the state is not one that a queue in this memory can have.
    pub fn restore(memory: Arc<M>, state: &QueueState) -> Result<Self, RestoreError> {
        let (rings, next_avail) = Self::translate(memory, &state.config)?;
        let saved = state.used_idx.ok_or(StartError::FormatMismatch)?;
        let size = state.config.size.get();
        // No more can be outstanding than there are entries.
        let outstanding = next_avail.wrapping_sub(saved);
        if outstanding > size {
            return Err(StartError::BaseTooFarAhead { outstanding, size }.into());
        }
        let found = rings.used_idx();
        if found != saved {
            return Err(RestoreError::UsedIndex { saved, found });
        }
        Ok(Self::begin(rings, state.config.features, next_avail, saved))
    }
}

impl<M: GuestMemory> PackedQueue<M> {
    /// The state of an idle queue; see [`QueueState`].
    ///
    /// # Errors
    ///
    /// [`SaveError`]: the queue is not idle, or broken.
    pub fn save(&self) -> Result<QueueState, SaveError> {
        check_idle(self.fault(), self.in_flight(), self.unpublished())?;
        Ok(QueueState {
            config: QueueConfig {
                size: self.size(),
                addresses: self.addresses(),
                features: self.features(),
                base: self.base(),
            },
            used_idx: None,
        })
    }

    /// Starts a queue where a saved one stopped. As after [`start`](Self::start) kicks are enabled,
    /// and the first decision is to interrupt: look at the ring once, and finish the pass.
    ///
    /// # Errors
    ///
    /// [`RestoreError`]: the state is not one that a queue in this memory can have.
    pub fn restore(memory: Arc<M>, state: &QueueState) -> Result<Self, RestoreError> {
        match state.used_idx {
            None => Ok(Self::start(memory, &state.config)?),
            Some(_) => Err(StartError::FormatMismatch.into()),
        }
    }
}

impl<M: GuestMemory> Queue<M> {
    /// The state of an idle queue; see [`QueueState`].
    ///
    /// # Errors
    ///
    /// [`SaveError`]: the queue is not idle, or broken.
    pub fn save(&self) -> Result<QueueState, SaveError> {
        match self {
            Self::Packed(queue) => queue.save(),
            Self::Split(queue) => queue.save(),
        }
    }

    /// Starts a queue where a saved one stopped, of the format that the state says. As after
    /// [`start`](Self::start) kicks are enabled, and the first decision is to interrupt: look at the
    /// ring once, and finish the pass.
    ///
    /// # Errors
    ///
    /// [`RestoreError`]: the state is not one that a queue in this memory can have.
    pub fn restore(memory: Arc<M>, state: &QueueState) -> Result<Self, RestoreError> {
        match state.config.base {
            RingBase::Packed { .. } => PackedQueue::restore(memory, state).map(Self::Packed),
            RingBase::Split { .. } => SplitQueue::restore(memory, state).map(Self::Split),
        }
    }
}

fn check_idle(
    fault: Option<RingFault>,
    in_flight: u16,
    unpublished: usize,
) -> Result<(), SaveError> {
    match (fault, in_flight, unpublished) {
        (Some(fault), ..) => Err(SaveError::Stopped { fault }),
        (None, 0, 0) => Ok(()),
        (None, 0, count) => Err(SaveError::Unpublished { count }),
        (None, count, _) => Err(SaveError::InFlight { count }),
    }
}
