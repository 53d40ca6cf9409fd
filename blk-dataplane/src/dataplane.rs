//! The handle by which a VMM or the vhost-user server runs a device.

mod config;
mod error;
mod threads;

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use event_poll::{EventNotifier, Stopper};
use vm_memory::GuestMemoryBackend;
use vring::{QueueConfig, QueueSize, RingAddresses, RingBase, RingFeatures};

pub use self::error::{ConfigError, Gone, QueueError, StopError};
use self::threads::ThreadHandle;

use crate::counters::{CounterSnapshot, QueueCounters, QueueSnapshot};
use crate::data_thread::peers::Desks;
use crate::data_thread::{CacheFeatures, Command, QueueParts, StartError};
use crate::device::Device;
use crate::inflight::{InflightQueue, TrackedError, TrackedQueue};
use crate::lifetime::LifetimeWatch;
use crate::notifier::{Notifier, SharedNotifier};
use crate::request::Accepted;

/// The end of what [`DataPlane::probe`] has started last.
static ENDING: Mutex<Option<thread::JoinHandle<()>>> = Mutex::new(None);

/// Everything a queue needs to run.
pub struct QueueSetup {
    /// Entries in the ring, as the driver set them: a power of two up to the device's maximum.
    pub size: u32,
    /// Where the ring lies, guest-physical.
    pub addresses: RingAddresses,
    /// Where to go on: [`RingBase::fresh`] of the features, or where an earlier run stopped.
    pub base: RingBase,
    /// Feature bits the driver accepted; the same for all queues of a device.
    pub features: u64,
    /// Signalled by the guest's kicks (an ioeventfd). Queues may share one if the same data thread serves
    /// them: whichever thread looks first takes a kick from all others.
    ///
    /// `None`: the guest does not kick, and the data thread looks by itself, at least once in a millisecond. A
    /// thread that serves such a queue wakes that often though there is nothing to do.
    pub kick: Option<EventNotifier>,
    /// Interrupts the guest (an irqfd, or a [`Notifier`] of the VMM's own). `None`: the guest polls.
    pub call: Option<Box<dyn Notifier>>,
    /// Signalled once if the guest breaks the ring.
    pub err: Option<Box<dyn Notifier>>,
    /// Whether to serve at once, or only after [`DataPlane::enable_queue`].
    pub enabled: bool,
    /// Where to keep a record of the requests in flight, for a successor of this process. If a predecessor
    /// has left one there, the queue goes on where that says and not at `base`, and serves what was in
    /// flight first.
    pub inflight: Option<InflightQueue>,
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

/// A running device: up to [`Device::num_queues`] queues, on up to [`Device::num_threads`] data threads.
///
/// All calls take effect between two batches of a data thread, so none races with a request. A thread
/// starts with the first queue it serves (the first thread with the device) and ends with the device.
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
///     base: vring::RingBase::fresh(features),
///     features: 1 << 32,
///     kick: Some(kick.try_clone()?),
///     call: Some(Box::new(call.try_clone()?)),
///     err: None,
///     enabled: true,
///     inflight: None,
/// })?;
///
/// driver.add_chain(&[header], &[id_and_status])?;
/// driver.publish();
/// kick.notify()?;
/// while driver.poll_used().is_none() {
///     std::thread::yield_now();
/// }
/// // The next entry to fetch is 1.
/// assert_eq!(plane.stop_queue(0)?, vring::RingBase::Split { next_avail: 1 });
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
    /// Those that have started.
    threads: Box<[Option<ThreadHandle<M>>]>,
    desks: Arc<Desks<Stopper>>,
    running: Box<[bool]>,
    /// Of each queue.
    queue_counters: Arc<[QueueCounters]>,
    paused: bool,
    marks_dirty: bool,
    logged: Option<SharedNotifier>,
    /// The configuration space's `writeback`.
    writeback: bool,
    _lifetime: Option<LifetimeWatch>,
}

impl<M: GuestMemoryBackend + Send + Sync + 'static> DataPlane<M> {
    /// Starts the device with its first data thread, and no queue yet. Its size is
    /// [read anew](Self::resize): it may have changed since the device was made, or ran last.
    ///
    /// # Errors
    /// [`StartError`]: the host has run out of something.
    pub fn start(device: &Device, memory: Arc<M>) -> Result<Self, StartError> {
        if let Err(error) = device.resize() {
            // What it was then stays in force; beyond the end there is nothing but errors.
            tracing::warn!(%error, "the size of the image stays as it was");
        }
        let threads = usize::from(device.num_threads());
        let watch = device.lifetime().map(LifetimeWatch::start);
        let mut plane = Self {
            device: device.clone(),
            memory,
            threads: (0..threads).map(|_| None).collect(),
            desks: Arc::new(Desks::new(threads)),
            running: vec![false; usize::from(device.num_queues())].into_boxed_slice(),
            queue_counters: (0..device.num_queues())
                .map(|_| QueueCounters::default())
                .collect(),
            paused: false,
            marks_dirty: true,
            logged: None,
            writeback: true,
            _lifetime: watch.transpose().map_err(StartError::Thread)?,
        };
        device.tally().add_queues(&plane.queue_counters);
        plane.start_thread(0)?;
        Ok(plane)
    }

    /// Finds out whether the device could start now, for a program that wants to fail early and not when the first
    /// front-end connects. What it has started for that ends by itself, soon after it has returned.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn probe(device: &Device, memory: Arc<M>) -> Result<(), StartError> {
        // One at a time: as many threads at once as there are devices would leave the allocator with as many arenas.
        let mut ending = ENDING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(previous) = ending.take() {
            let _ = previous.join();
        }
        let mut plane = Self::start(device, memory)?;
        // The others need no more than the first, unless each is bound to a processor of its own.
        for thread in (1..device.num_threads()).filter(|&thread| device.cpu_of(thread).is_some()) {
            plane.start_thread(thread)?;
        }
        // An AIO context is taken down in a grace period of the kernel's (io_destroy), some 30 ms: as long as all the rest
        // of a program's start. Nobody needs the end of it.
        let end = move || {
            if let Err(Gone) = plane.end_threads() {
                tracing::error!(
                    "the device that was started to see whether it can did not stop cleanly"
                );
            }
        };
        // Where there is no thread to be had, the closure is dropped, and the plane with it.
        *ending = thread::Builder::new()
            .name("blk-probe".to_owned())
            .spawn(end)
            .ok();
        Ok(())
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
        let thread = self.thread_of(index)?;
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
            base: setup.base,
        };
        let memory = Arc::clone(&self.memory);
        let ring = TrackedQueue::start(memory, &config, setup.inflight.as_ref());
        let ring = ring.map_err(|error| match error {
            TrackedError::Inflight(error) => QueueError::Inflight(error),
            TrackedError::Start(error) => QueueError::Ring(error),
        })?;
        let parts = Box::new(QueueParts {
            ring,
            addresses: setup.addresses,
            kick: setup.kick,
            call: setup.call,
            err: setup.err,
            enabled: setup.enabled,
            cache: CacheFeatures::of(setup.features),
            accepted: Accepted::of(setup.features, self.device.features()),
        });
        self.accept_features(setup.features)?;
        // Last: a queue that cannot run starts no thread.
        self.start_thread(thread)?;
        self.ask(index, |reply| Command::StartQueue {
            index,
            parts,
            reply,
        })??;
        self.running[usize::from(index)] = true;
        Ok(())
    }

    /// Stops queue `index`: fetches no more, completes what is in flight, publishes it, and returns
    /// from where a later run goes on. Afterwards nothing is written to
    /// the ring and nobody is notified. Takes as long as the slowest request in flight.
    ///
    /// # Errors
    /// [`QueueError::NoSuchQueue`], [`QueueError::NotRunning`], [`QueueError::Gone`].
    pub fn stop_queue(&mut self, index: u16) -> Result<RingBase, QueueError> {
        self.check_running(index)?;
        let base = self.ask(index, |reply| Command::StopQueue { index, reply })?;
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
        Ok(self
            .handle_of(index)?
            .tell(Command::EnableQueue { index, enabled })?)
    }

    /// Replaces a running queue's kick notifier, or has its ring looked at without one. No kick is lost: the ring is
    /// looked at.
    ///
    /// # Errors
    /// As [`start_queue`](Self::start_queue); the old one stays in force then.
    pub fn set_kick(&mut self, index: u16, kick: Option<EventNotifier>) -> Result<(), QueueError> {
        self.check_running(index)?;
        Ok(self.ask(index, |reply| Command::SetKick { index, kick, reply })??)
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
        self.ask(index, |reply| Command::SetCall { index, call, reply })
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
        self.ask(index, |reply| Command::SetErr { index, err, reply })
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
        self.memory = Arc::clone(&memory);
        let mut rings: Vec<Vec<_>> = self.threads.iter().map(|_| Vec::new()).collect();
        for index in 0..self.device.num_queues() {
            if self.running[usize::from(index)]
                && let Some(thread) = self.device.thread_of(index)
            {
                rings[usize::from(thread)].push((index, ring_addresses(index)));
            }
        }
        let mut rings = rings.into_iter();
        self.ask_all(|reply| Command::UpdateMemory {
            memory: Arc::clone(&memory),
            rings: rings.next().unwrap_or_default(),
            reply,
        })
    }

    /// Whether what the kernel writes to guest memory is marked in its dirty bitmap, if it has one; it is from
    /// the start. Turned off, reads do without looking the bitmap up: for as long as nobody copies guest memory.
    /// Holds for every request that completes after this has returned. What is written other than by the kernel
    /// is always marked.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn mark_dirty_pages(&mut self, marks: bool) -> Result<(), Gone> {
        self.marks_dirty = marks;
        self.ask_all(|reply| Command::SetMarksDirty { marks, reply })
    }

    /// Has `notifier` signalled after each batch in which guest memory was written to, when all of it has been
    /// marked in the dirty bitmap: for whoever follows that. Vhost-user's `SET_LOG_FD`. As every
    /// [`Notifier`] it must not block.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn signal_dirty(&mut self, notifier: Option<Arc<dyn Notifier + Sync>>) -> Result<(), Gone> {
        self.logged = notifier.map(SharedNotifier);
        let mut told = Ok(());
        for thread in self.threads.iter().flatten() {
            let notifier = self.logged.clone();
            told = told.and(thread.tell(Command::SetLogged { notifier }));
        }
        told
    }

    /// Waits until nothing is in flight on any queue, fetching nothing meanwhile; then goes on, unless
    /// the device was paused before. Whoever needs the quiet for longer calls [`pause`](Self::pause),
    /// does what it must, and calls [`resume`](Self::resume).
    ///
    /// # Errors
    /// [`Gone`].
    pub fn drain(&mut self) -> Result<(), Gone> {
        let was_paused = self.paused;
        self.pause()?;
        if was_paused { Ok(()) } else { self.resume() }
    }

    /// Fetches nothing from any queue until [`resume`](Self::resume), and returns when nothing is in
    /// flight. Requests that arrive meanwhile wait in their rings; none is lost. Queues may be started, stopped
    /// and changed meanwhile.
    ///
    /// # Errors
    /// [`Gone`].
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use blk_dataplane::{Backing, DataPlane, Device, DeviceOptions, QueueSetup};
    /// # use event_poll::EventNotifier;
    /// # use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    /// # use vring::{Segment, driver::{SplitDriver, SplitLayout}};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let memory: Arc<GuestMemoryMmap> =
    /// #     Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)])?);
    /// # let features = vring::RingFeatures::default();
    /// # let size = vring::QueueSize::new(16)?;
    /// # let addresses = SplitLayout::new(GuestAddress(0x1000), size)?.addresses();
    /// # let mut driver = SplitDriver::new(Arc::clone(&memory), addresses, size, features)?;
    /// # memory.write_slice(&[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], GuestAddress(0x8000))?;
    /// # let header = Segment { addr: GuestAddress(0x8000), len: 16 };
    /// # let id_and_status = Segment { addr: GuestAddress(0x9000), len: 21 };
    /// # let device = Device::new(Backing::null(1 << 30), &DeviceOptions::default())?;
    /// # let mut plane = DataPlane::start(&device, Arc::clone(&memory))?;
    /// # let kick = EventNotifier::new()?;
    /// # plane.start_queue(0, QueueSetup {
    /// #     size: 16,
    /// #     addresses,
    /// #     base: vring::RingBase::Split { next_avail: 0 },
    /// #     features: 1 << 32,
    /// #     kick: Some(kick.try_clone()?),
    /// #     call: None,
    /// #     err: None,
    /// #     inflight: None,
    /// #     enabled: true,
    /// # })?;
    /// plane.pause()?;
    /// // Whatever needs the disk quiet: a snapshot, a truncation, a copy. The guest sends on.
    /// driver.add_chain(&[header], &[id_and_status])?;
    /// driver.publish();
    /// kick.notify()?;
    /// plane.drain()?; // already so
    /// assert!(driver.poll_used().is_none(), "it waits in its ring");
    ///
    /// plane.resume()?;
    /// while driver.poll_used().is_none() {
    ///     std::thread::yield_now();
    /// }
    /// plane.stop()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn pause(&mut self) -> Result<(), Gone> {
        self.paused = true;
        self.ask_all(|reply| Command::Pause { reply })
    }

    /// Ends a [`pause`](Self::pause). What the guest put into the rings meanwhile is found without
    /// a kick.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn resume(&mut self) -> Result<(), Gone> {
        self.paused = false;
        let mut told = Ok(());
        for thread in self.threads.iter().flatten() {
            told = told.and(thread.tell(Command::Resume));
        }
        told
    }

    /// A reading of the counters of all data threads.
    #[must_use]
    pub fn counters(&self) -> CounterSnapshot {
        let threads = self.threads.iter().flatten();
        threads.fold(CounterSnapshot::default(), |sum, thread| {
            sum.plus(&thread.counters.snapshot())
        })
    }

    /// A reading of the counters of queue `index`, over all its runs; `None` if there is no such queue.
    #[must_use]
    pub fn queue_counters(&self, index: u16) -> Option<QueueSnapshot> {
        let counters = self.queue_counters.get(usize::from(index))?;
        Some(counters.snapshot())
    }

    /// Completes everything in flight, ends the data threads and writes the image out.
    ///
    /// # Errors
    /// See [`StopError`].
    pub fn stop(mut self) -> Result<(), StopError> {
        self.shut_down()
    }

    fn shut_down(&mut self) -> Result<(), StopError> {
        if self.threads.iter().all(Option::is_none) {
            return Ok(());
        }
        self.end_threads()?;
        self.sync().map_err(StopError::Sync)
    }

    fn thread_of(&self, index: u16) -> Result<u16, QueueError> {
        let num_queues = self.device.num_queues();
        self.device
            .thread_of(index)
            .ok_or(QueueError::NoSuchQueue { index, num_queues })
    }

    fn check_running(&self, index: u16) -> Result<(), QueueError> {
        if self.is_running(index)? {
            Ok(())
        } else {
            Err(QueueError::NotRunning(index))
        }
    }
}

impl<M: GuestMemoryBackend + Send + Sync + 'static> Drop for DataPlane<M> {
    fn drop(&mut self) {
        if let Err(error) = self.shut_down() {
            tracing::error!(%error, "the device did not stop cleanly");
        }
        self.device.tally().end_queues(&self.queue_counters);
    }
}

#[cfg(test)]
mod tests;
