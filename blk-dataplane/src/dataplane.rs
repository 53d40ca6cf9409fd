//! The handle by which a VMM or the vhost-user server runs a device.

use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use event_poll::{EventNotifier, EventPoll, Stopper};
use virtio_bindings::virtio_blk as blk;
use vm_memory::GuestMemoryBackend;
use vring::{QueueConfig, QueueSize, RingAddresses, RingBase, RingFeatures, SplitQueue};

use crate::counters::{CounterSnapshot, Counters};
use crate::data_thread::{Command, DataThread, QueueParts, StartError};
use crate::device::{Backing, Device, bit};
use crate::notifier::Notifier;

/// Everything a queue needs to run.
pub struct QueueSetup {
    /// Entries in the ring, as the driver set them: a power of two up to the device's maximum.
    pub size: u32,
    /// Where the ring lies, guest-physical.
    pub addresses: RingAddresses,
    /// Next available index to fetch: 0, or where an earlier run stopped.
    pub base: u16,
    /// Feature bits the driver accepted; the same for all queues of a device.
    pub features: u64,
    /// Signalled by the guest's kicks (an ioeventfd).
    pub kick: EventNotifier,
    /// Interrupts the guest (an irqfd, or a [`Notifier`] of the VMM's own). `None`: the guest polls.
    pub call: Option<Box<dyn Notifier>>,
    /// Signalled once if the guest breaks the ring.
    pub err: Option<Box<dyn Notifier>>,
    /// Whether to serve at once, or only after [`DataPlane::enable_queue`].
    pub enabled: bool,
}

impl std::fmt::Debug for QueueSetup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueueSetup")
            .field("size", &self.size)
            .field("addresses", &self.addresses)
            .field("base", &self.base)
            .field("enabled", &self.enabled)
            .finish_non_exhaustive()
    }
}

/// Why a queue did not start, or a running one could not be changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The index is not below the device's number of queues. The caller's or front-end's fault.
    #[error("queue {index} of a device with {num_queues}")]
    NoSuchQueue {
        /// The index asked for.
        index: u16,
        /// Queues the device has.
        num_queues: u16,
    },
    /// It runs already; a running ring cannot be set up anew. The caller's or front-end's fault.
    #[error("queue {0} is running")]
    Running(u16),
    /// It does not run. The caller's or front-end's fault.
    #[error("queue {0} is not running")]
    NotRunning(u16),
    /// No power of two, or above the device's maximum. The guest's or front-end's fault.
    #[error("a ring of {size} entries; a power of two up to {max} is possible")]
    Size {
        /// Entries asked for.
        size: u32,
        /// Most entries this device takes.
        max: u16,
    },
    /// The ring does not lie in guest memory as it must. The guest's or front-end's fault.
    #[error(transparent)]
    Ring(#[from] vring::StartError),
    /// The kick descriptor cannot be waited on. The front-end's or host's fault.
    #[error(transparent)]
    Kick(#[from] event_poll::Error),
    /// The data thread has ended. A bug in this crate: it ends only when told to.
    #[error(transparent)]
    Gone(#[from] Gone),
}

/// The data thread has ended though nobody told it to: a bug in this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the data thread has ended")]
pub struct Gone;

/// Why a device did not stop cleanly.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StopError {
    /// The data thread had ended before. A bug in this crate.
    #[error(transparent)]
    Gone(#[from] Gone),
    /// The last fdatasync failed: writes not covered by an earlier flush may be lost. Host's fault.
    #[error("cannot write the image out: {0}")]
    Sync(std::io::Error),
}

/// A running device: one data thread, up to [`Device::num_queues`] queues.
///
/// All calls take effect between two batches of the data thread, so none races with a request.
/// Dropping it does what [`stop`](Self::stop) does, errors logged.
///
/// ```
/// use std::sync::Arc;
/// use blk_dataplane::{Backing, DataPlane, Device, DeviceOptions, QueueSetup};
/// use event_poll::EventNotifier;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
/// use vring::{Segment, driver::{SplitDriver, SplitLayout}};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// // The VMM's own guest memory, and what the guest would do: a ring and a GET_ID request in it.
/// let memory: Arc<GuestMemoryMmap> =
///     Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)])?);
/// # let features = vring::RingFeatures::default();
/// let size = vring::QueueSize::new(16)?;
/// let addresses = SplitLayout::new(GuestAddress(0x1000), size)?.addresses();
/// let mut driver = SplitDriver::new(Arc::clone(&memory), addresses, size, features)?;
/// memory.write_slice(&[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], GuestAddress(0x8000))?;
/// let header = Segment { addr: GuestAddress(0x8000), len: 16 };
/// let id_and_status = Segment { addr: GuestAddress(0x9000), len: 21 };
///
/// let options = DeviceOptions { serial: "disk-7".into(), ..DeviceOptions::default() };
/// let device = Device::new(Backing::null(1 << 30), &options)?;
/// let mut plane = DataPlane::start(&device, Arc::clone(&memory))?;
/// let (kick, call) = (EventNotifier::new()?, EventNotifier::new()?);
/// plane.start_queue(0, QueueSetup {
///     size: 16,
///     addresses,
///     base: 0,
///     features: 1 << 32,
///     kick: kick.try_clone()?,
///     call: Some(Box::new(call.try_clone()?)),
///     err: None,
///     enabled: true,
/// })?;
///
/// driver.add_chain(&[header], &[id_and_status])?;
/// driver.publish();
/// kick.notify()?;
/// while driver.poll_used().is_none() {
///     std::thread::yield_now();
/// }
/// assert_eq!(plane.stop_queue(0)?, 1); // the next index to fetch is 1
/// let mut id = [0; 6];
/// memory.read_slice(&mut id, GuestAddress(0x9000))?;
/// assert_eq!(&id, b"disk-7");
/// plane.stop()?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct DataPlane<M: GuestMemoryBackend + Send + Sync + 'static> {
    device: Device,
    memory: Arc<M>,
    commands: Sender<Command<M>>,
    waker: Stopper,
    thread: Option<JoinHandle<()>>,
    running: Box<[bool]>,
    counters: Arc<Counters>,
}

impl<M: GuestMemoryBackend + Send + Sync + 'static> DataPlane<M> {
    /// Starts the data thread, with no queue yet.
    ///
    /// # Errors
    /// [`StartError`]: the host has run out of something.
    pub fn start(device: &Device, memory: Arc<M>) -> Result<Self, StartError> {
        let poll = EventPoll::new(DataThread::<M>::poll_events_max())?;
        let waker = poll.stopper();
        // Unbounded is bounded here: every caller waits for its reply or is serialised behind one.
        let (commands, receiver) = unbounded();
        let counters = Arc::new(Counters::default());
        let (started, outcome) = bounded(1);
        let thread = std::thread::Builder::new()
            .name("blk-data".into())
            .spawn({
                let (device, memory) = (device.clone(), Arc::clone(&memory));
                let counters = Arc::clone(&counters);
                move || match DataThread::new(&device, memory, poll, receiver, counters) {
                    Ok(thread) => {
                        let _ = started.send(Ok(()));
                        thread.run();
                    }
                    Err(error) => {
                        let _ = started.send(Err(error));
                    }
                }
            })
            .map_err(StartError::Thread)?;
        let plane = Self {
            device: device.clone(),
            memory,
            commands,
            waker,
            thread: Some(thread),
            running: vec![false; usize::from(device.num_queues())].into_boxed_slice(),
            counters,
        };
        match outcome.recv() {
            Ok(Ok(())) => Ok(plane),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(StartError::Ended),
        }
    }

    /// Finds out whether the device could start now, and leaves nothing running: for a program that
    /// wants to fail early and not when the first front-end connects.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn probe(device: &Device, memory: Arc<M>) -> Result<(), StartError> {
        let mut plane = Self::start(device, memory)?;
        plane.end_thread().map_err(|Gone| StartError::Ended)
    }

    /// The device that runs.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Starts queue `index` and looks at its ring without waiting for a kick.
    ///
    /// # Errors
    /// See [`QueueError`]; nothing has changed then.
    pub fn start_queue(&mut self, index: u16, setup: QueueSetup) -> Result<(), QueueError> {
        if self.is_running(index)? {
            return Err(QueueError::Running(index));
        }
        let max = self.device.max_queue_size().get();
        let size = QueueSize::new(setup.size)
            .ok()
            .filter(|size| size.get() <= max)
            .ok_or(QueueError::Size {
                size: setup.size,
                max,
            })?;
        let config = QueueConfig {
            size,
            addresses: setup.addresses,
            features: RingFeatures::from_virtio(setup.features),
            base: RingBase::Split {
                next_avail: setup.base,
            },
        };
        let parts = Box::new(QueueParts {
            ring: SplitQueue::start(Arc::clone(&self.memory), &config)?,
            addresses: setup.addresses,
            kick: setup.kick,
            call: setup.call,
            err: setup.err,
            enabled: setup.enabled,
            flush_negotiated: setup.features & bit(blk::VIRTIO_BLK_F_FLUSH) != 0,
        });
        self.ask(|reply| Command::StartQueue {
            index,
            parts,
            reply,
        })??;
        self.running[usize::from(index)] = true;
        Ok(())
    }

    /// Stops queue `index`: fetches no more, completes what is in flight, publishes it, and returns
    /// the next available index, from which a later run may go on. Afterwards nothing is written to
    /// the ring and nobody is notified. Takes as long as the slowest request in flight.
    ///
    /// # Errors
    /// [`QueueError::NoSuchQueue`], [`QueueError::NotRunning`], [`QueueError::Gone`].
    pub fn stop_queue(&mut self, index: u16) -> Result<u16, QueueError> {
        self.check_running(index)?;
        let base = self.ask(|reply| Command::StopQueue { index, reply })?;
        self.running[usize::from(index)] = false;
        base.ok_or(QueueError::NotRunning(index))
    }

    /// Whether queue `index` runs, enabled or not.
    ///
    /// # Errors
    /// [`QueueError::NoSuchQueue`].
    pub fn is_running(&self, index: u16) -> Result<bool, QueueError> {
        let num_queues = self.device.num_queues();
        self.running
            .get(usize::from(index))
            .copied()
            .ok_or(QueueError::NoSuchQueue { index, num_queues })
    }

    /// Enables or disables a running queue. Disabling completes what is in flight and fetches
    /// nothing new; enabling looks at the ring at once.
    ///
    /// # Errors
    /// [`QueueError::NoSuchQueue`], [`QueueError::NotRunning`], [`QueueError::Gone`].
    pub fn enable_queue(&mut self, index: u16, enabled: bool) -> Result<(), QueueError> {
        self.check_running(index)?;
        Ok(self.tell(Command::EnableQueue { index, enabled })?)
    }

    /// Replaces a running queue's kick notifier. No kick is lost: the ring is looked at.
    ///
    /// # Errors
    /// As [`start_queue`](Self::start_queue); the old one stays in force then.
    pub fn set_kick(&mut self, index: u16, kick: EventNotifier) -> Result<(), QueueError> {
        self.check_running(index)?;
        Ok(self.ask(|reply| Command::SetKick { index, kick, reply })??)
    }

    /// Replaces a running queue's call notifier, or takes it away for a polling guest. The new one is
    /// signalled at once, since a completion may have been announced where nobody listened any more.
    /// The old one is out of use when this returns.
    ///
    /// # Errors
    /// [`QueueError::NoSuchQueue`], [`QueueError::NotRunning`], [`QueueError::Gone`].
    pub fn set_call(
        &mut self,
        index: u16,
        call: Option<Box<dyn Notifier>>,
    ) -> Result<(), QueueError> {
        self.check_running(index)?;
        Ok(self.ask(|reply| Command::SetCall { index, call, reply })?)
    }

    /// Replaces a running queue's error notifier.
    ///
    /// # Errors
    /// [`QueueError::NoSuchQueue`], [`QueueError::NotRunning`], [`QueueError::Gone`].
    pub fn set_err(
        &mut self,
        index: u16,
        err: Option<Box<dyn Notifier>>,
    ) -> Result<(), QueueError> {
        self.check_running(index)?;
        Ok(self.ask(|reply| Command::SetErr { index, err, reply })?)
    }

    /// Replaces the memory map. `ring_addresses` says where each running ring lies in the new one;
    /// a ring that it has no place for is stopped as broken. Requests in flight go on in the old
    /// map, which stays mapped until the last of them has completed.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn update_memory(
        &mut self,
        memory: Arc<M>,
        mut ring_addresses: impl FnMut(u16) -> Option<RingAddresses>,
    ) -> Result<(), Gone> {
        let rings = (0..self.device.num_queues())
            .filter(|&index| self.running[usize::from(index)])
            .map(|index| (index, ring_addresses(index)))
            .collect();
        self.memory = Arc::clone(&memory);
        self.ask(|reply| Command::UpdateMemory {
            memory,
            rings,
            reply,
        })
    }

    /// Waits until nothing is in flight, fetching nothing meanwhile; then goes on, unless the device
    /// was paused before.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn drain(&mut self) -> Result<(), Gone> {
        self.ask(|reply| Command::Drain { reply })
    }

    /// As [`drain`](Self::drain), and fetches nothing until [`resume`](Self::resume).
    ///
    /// # Errors
    /// [`Gone`].
    pub fn pause(&mut self) -> Result<(), Gone> {
        self.ask(|reply| Command::Pause { reply })
    }

    /// Ends a [`pause`](Self::pause). What the guest put into the rings meanwhile is found without
    /// a kick.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn resume(&mut self) -> Result<(), Gone> {
        self.tell(Command::Resume)
    }

    /// A reading of the counters.
    #[must_use]
    pub fn counters(&self) -> CounterSnapshot {
        self.counters.snapshot()
    }

    /// Completes everything in flight, ends the data thread and writes the image out.
    ///
    /// # Errors
    /// See [`StopError`].
    pub fn stop(mut self) -> Result<(), StopError> {
        self.shut_down()
    }

    fn shut_down(&mut self) -> Result<(), StopError> {
        if self.thread.is_none() {
            return Ok(());
        }
        self.end_thread()?;
        match self.device.backing() {
            Backing::Image(image) if !image.is_read_only() => {
                image.file().sync_data().map_err(StopError::Sync)
            }
            Backing::Image(_) | Backing::Null { .. } => Ok(()),
        }
    }

    /// Whether the data thread runs. False only after a bug in this crate.
    #[cfg(feature = "vhost-user")]
    pub(crate) fn is_alive(&self) -> bool {
        self.thread
            .as_ref()
            .is_some_and(|thread| !thread.is_finished())
    }

    fn end_thread(&mut self) -> Result<(), Gone> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        let drained = self.ask(|reply| Command::Exit { reply });
        thread.join().map_err(|_| Gone)?;
        drained
    }

    fn check_running(&self, index: u16) -> Result<(), QueueError> {
        if self.is_running(index)? {
            Ok(())
        } else {
            Err(QueueError::NotRunning(index))
        }
    }

    fn tell(&self, command: Command<M>) -> Result<(), Gone> {
        self.commands.send(command).map_err(|_| Gone)?;
        self.waker.wake();
        Ok(())
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command<M>) -> Result<T, Gone> {
        let (reply, answer): (_, Receiver<T>) = bounded(1);
        self.tell(command(reply))?;
        answer.recv().map_err(|_| Gone)
    }
}

impl<M: GuestMemoryBackend + Send + Sync + 'static> Drop for DataPlane<M> {
    fn drop(&mut self) {
        if let Err(error) = self.shut_down() {
            tracing::error!(%error, "the device did not stop cleanly");
        }
    }
}
