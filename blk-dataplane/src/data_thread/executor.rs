//! Requests from pop to push: parsing, merging, submitting, completing. Knows no rings; the data
//! thread gives it chains and takes finished heads from it.

mod answered;
mod bounced;
mod ended;
mod merged;
mod ranged;
mod stable;

use std::collections::VecDeque;
use std::sync::Arc;

use event_poll::Stopper;
use hostmem::SigbusGuard;
use ioq::{Armed, IoError, IoErrorKind, IoQueue};
use iosched::{Limits, Merger, Op};
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileMemory};
use vring::{Chain, Head};

use super::bounce::{Bounce, is_lost};
use super::buffers::{
    Alignment, GuestBuffers, MAX_SEGMENTS_PER_REQUEST, NotInPlace, Owner, Transfer,
};
use super::failures::Failures;
use super::flush::Flushes;
use super::hot_region::HotRegion;
use super::peers::Seat;
use super::range_table::RangeTable;
use super::slots::{Request, Slots, Work};
use super::trace_points;
use super::{SlotId, StartError};
use crate::capacity::Capacity;
use crate::clock::Clock;
use crate::counters::{Counters, QueueCounters, RequestKind};
use crate::device::{Backing, Device};
use crate::lifetime::{LIFETIME_LEN, Lifetime};
use crate::request::{self, Accepted, Action, DataLen, Geometry, HEADER_LEN, ID_LEN, Status};
use crate::write_back::WriteBack;

/// Requests in flight per data thread. Disks gain nothing from more, each costs a kernel AIO slot
/// out of a host-wide 65536, and the rings hold the rest. Per thread and not split among them: a queue that
/// is busy alone gets as much as on a device with one thread.
const IN_FLIGHT_MAX: u16 = 256;

/// Bytes in flight per data thread at which no more is fetched; one request may go past it, so that
/// any size is served. Enough for a disk's whole queue, while stopping and draining, and a turn in
/// which the kernel copies through the page cache at once, stay bounded (a guest can point a request
/// of 4 GiB at a few pages).
const IN_FLIGHT_BYTES_MAX: u64 = 64 << 20;

/// Iovecs in one operation: merging stops here. Half of Linux's own limit (`UIO_MAXIOV`, 1024).
const OPERATION_SEGMENTS_MAX: u16 = 512;
const _: () = assert!(MAX_SEGMENTS_PER_REQUEST <= OPERATION_SEGMENTS_MAX as usize);

/// Bytes in one merged operation: beyond a megabyte a disk's throughput no longer grows, while the
/// requests in it wait for each other.
const OPERATION_BYTES_MAX: u64 = 1 << 20;

/// Used length of an answered request: the contiguous prefix of its writable area that was really
/// written (virtio 1.3 §2.7.8.2). The status byte counts only if all data before it was written.
fn used_len(written: u64, writable_data: u64) -> u32 {
    let len = if written == writable_data {
        written.saturating_add(1)
    } else {
        written
    };
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    Failed,
    /// The host cannot do this at all. Only discards and write-zeroes end so: for the others there is no
    /// other way.
    Unsupported,
}

impl Outcome {
    fn of<M>(owner: &Owner<M>, result: &Result<u64, IoError>) -> Self {
        match (result, owner) {
            (Ok(_), _) => Self::Done,
            (Err(error), Owner::Range { .. }) if error.kind() == IoErrorKind::Unsupported => {
                Self::Unsupported
            }
            (Err(_), _) => Self::Failed,
        }
    }
}

/// What became of a chain handed to [`Executor::start`].
#[derive(Debug)]
pub(super) enum Started {
    /// In flight; [`Executor::reap`] will tell.
    InFlight,
    /// Answered on the spot: push it with this used length.
    Finished { head: Head, used_len: u32 },
    /// Not started for want of room: un-pop it, room comes with a completion.
    NoRoom(Head),
}

/// A request that has come to its end.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) queue: u16,
    pub(super) head: Head,
    pub(super) used_len: u32,
    /// Bytes of data it has moved.
    pub(super) len: u64,
}

#[derive(Debug)]
pub(super) struct Executor<M> {
    ioq: IoQueue<Owner<M>>,
    slots: Slots,
    /// Data of all requests in flight.
    bytes_in_flight: u64,
    buffers: GuestBuffers<M>,
    merger: Merger,
    flushes: Flushes<SlotId>,
    ranges: RangeTable,
    bounce: Bounce,
    /// The first request of each transfer from or to guest memory that came back well and is yet to be acted
    /// on. Storage reused, as that of the next.
    transferred: Vec<SlotId>,
    /// All other operations that came back, and how they went. At most one per slot.
    done: VecDeque<(Owner<M>, Outcome)>,
    /// See [`set_write_through`](Self::set_write_through).
    write_through: bool,
    /// Writes that have completed and are not stable yet, linked; the first and the last.
    unsynced: Option<(SlotId, SlotId)>,
    /// `fdatasync` operations under way.
    syncs: usize,
    write_back: Arc<WriteBack>,
    /// Whether anybody looks at the dirty bitmap, if guest memory has one.
    marks_dirty: bool,
    /// Losses of memory in this process by the last pass. While it is the same, what was looked up
    /// since then is there.
    losses: usize,
    geometry: Geometry,
    /// Where the geometry's capacity comes from.
    capacity: Arc<Capacity>,
    /// Whether a read that went well has written anything.
    reads_write: bool,
    is_null: bool,
    serial: [u8; ID_LEN],
    lifetime: Option<Arc<Lifetime>>,
    counters: Arc<Counters>,
    queue_counters: Arc<[QueueCounters]>,
    failures: Failures,
    clock: Clock,
    /// When the first request of the batch was popped.
    batch_began: Option<u64>,
    /// When completions were last reaped.
    reaped: Option<u64>,
    /// What is being started.
    current: Current,
}

/// The request being started, for whoever counts it.
#[derive(Clone, Copy, Debug)]
struct Current {
    queue: u16,
    kind: RequestKind,
}

/// A request on its way into a slot; the rest of it is in [`Current`].
struct Starting {
    head: Head,
    status: GuestAddress,
    writable_data: u64,
    work: Work,
    /// Byte offset in the image, and bytes of data; 0 and 0 for one that moves none.
    offset: u64,
    len: u64,
}

/// Where requests come to their end: the guest's memory, looked up for all that end together, and whoever
/// wants to know.
struct Ending<'h, 'a, M: GuestMemoryBackend, F> {
    /// Of the map in force, which most requests were popped under.
    memory: &'h mut HotRegion<'a, M>,
    finished: F,
}

impl<M: GuestMemoryBackend> Executor<M> {
    pub(super) fn new(
        device: &Device,
        counters: Arc<Counters>,
        queue_counters: Arc<[QueueCounters]>,
    ) -> Result<Self, StartError> {
        let config = ioq::Config {
            depth: IN_FLIGHT_MAX,
            max_segments: OPERATION_SEGMENTS_MAX,
        };
        let (ioq, address, len) = match device.backing() {
            Backing::Image(image) => {
                let direct = image.memory_alignment() > 1;
                let ioq = IoQueue::open(image.file_of_thread(), device.engine(), &config)?;
                if let Some(fallback) = ioq.fallback() {
                    device.tell_fallback(fallback);
                }
                let len = if direct { image.block_size() } else { 1 };
                (ioq, image.memory_alignment(), len)
            }
            Backing::Null { read_zeroes, .. } => {
                let ioq = if *read_zeroes {
                    IoQueue::null_zeroes(&config)?
                } else {
                    IoQueue::null(&config)?
                };
                (ioq, 1, 1)
            }
            #[cfg(feature = "testing")]
            Backing::Testing(disk) => (disk.queue(&config)?, disk.alignment(), disk.alignment()),
        };
        let alignment = Alignment {
            address: to_usize(address),
            len: to_usize(len),
        };
        let capacity = usize::from(IN_FLIGHT_MAX);
        Ok(Self {
            ioq,
            slots: Slots::new(IN_FLIGHT_MAX),
            bytes_in_flight: 0,
            buffers: GuestBuffers::new(capacity, alignment),
            merger: Merger::new(
                capacity,
                Limits {
                    max_segments: u32::from(OPERATION_SEGMENTS_MAX),
                    // Two requests are never within no bytes.
                    max_bytes: if device.merges() {
                        OPERATION_BYTES_MAX
                    } else {
                        0
                    },
                },
            ),
            flushes: Flushes::with_capacity(capacity),
            ranges: RangeTable::new(capacity),
            bounce: Bounce::new(device.max_queue_size()).ok_or(StartError::NoMemory)?,
            transferred: Vec::with_capacity(capacity),
            done: VecDeque::with_capacity(capacity),
            write_through: true,
            unsynced: None,
            syncs: 0,
            write_back: Arc::clone(device.write_back()),
            marks_dirty: true,
            losses: SigbusGuard::losses(),
            geometry: device.geometry(),
            capacity: device.capacity_in_force(),
            is_null: matches!(device.backing(), Backing::Null { .. }),
            reads_write: !matches!(
                device.backing(),
                Backing::Null {
                    read_zeroes: false,
                    ..
                }
            ),
            serial: *device.serial(),
            lifetime: device.lifetime().cloned(),
            failures: Failures::new(device.backing(), Arc::clone(&counters)),
            counters,
            queue_counters,
            clock: Clock::new(device.latencies()),
            batch_began: None,
            reaped: None,
            current: Current {
                queue: 0,
                kind: RequestKind::Other,
            },
        })
    }

    pub(super) fn ioq(&self) -> &IoQueue<Owner<M>> {
        &self.ioq
    }

    /// The thread is awake and looks for completions by itself.
    pub(super) fn disarm(&mut self) {
        self.ioq.disarm_completion_fd();
    }

    /// The thread is about to sleep.
    pub(super) fn arm(&mut self) -> Armed {
        if self.done.is_empty() {
            self.ioq.arm_completion_fd()
        } else {
            Armed::Reap
        }
    }

    /// Whether what the kernel writes to guest memory is to be marked as dirty. Of requests that end from
    /// then on.
    pub(super) fn marks_dirty(&self) -> bool {
        self.marks_dirty
    }

    /// See [`marks_dirty`](Self::marks_dirty).
    pub(super) fn set_marks_dirty(&mut self, marks: bool) {
        self.marks_dirty = marks;
    }

    pub(super) fn set_losses(&mut self, losses: usize) {
        self.losses = losses;
    }

    /// Whether memory of `chain` has gone since it was looked up in this pass: what was read from it may
    /// be zeroes, and what was written is nowhere (hostile-inputs M10).
    #[inline]
    fn was_lost(&self, chain: &Chain, memory: &M) -> bool {
        SigbusGuard::losses() != self.losses && is_lost(chain, memory)
    }

    /// Whether operations cost nothing.
    pub(super) fn is_null(&self) -> bool {
        self.is_null
    }

    pub(super) fn has_room(&self) -> bool {
        self.slots.has_free() && self.bytes_in_flight < IN_FLIGHT_BYTES_MAX
    }

    pub(super) fn in_flight(&self) -> usize {
        self.slots.in_use()
    }

    /// Starts the request in `chain`. May keep the chain's content by swapping its storage.
    pub(super) fn start(
        &mut self,
        queue: u16,
        accepted: Accepted,
        head: Head,
        chain: &mut Chain,
        memory: &mut HotRegion<'_, M>,
    ) -> Started {
        trace_points::process_request(queue, &head, chain);
        self.current = Current {
            queue,
            kind: RequestKind::Other,
        };
        // Once per batch: its requests were popped within microseconds.
        if self.batch_began.is_none() {
            self.batch_began = self.clock.now();
        }
        // §5.2.6: the status is the last writable byte, wherever the driver cut its buffers.
        let Some(status) = status_byte(chain).filter(|&addr| memory.slice(addr, 1).is_ok()) else {
            return self.bad_chain(head);
        };
        let writable_data = chain.writable_len() - 1;
        let mut header = [0u8; HEADER_LEN];
        if chain.readable_len() < HEADER_LEN as u64 {
            return self.answer(head, memory, status, Status::IoErr, 0, writable_data);
        }
        if !copy_header(chain, memory, &mut header) {
            if is_lost(chain, memory.map()) {
                return self.answer(head, memory, status, Status::IoErr, 0, writable_data);
            }
            return self.bad_chain(head);
        }
        if self.was_lost(chain, memory.map()) {
            return self.answer(head, memory, status, Status::IoErr, 0, writable_data);
        }
        self.current.kind = RequestKind::of(request::kind_of(&header));
        let data = DataLen {
            readable: chain.readable_len() - HEADER_LEN as u64,
            writable: writable_data,
        };
        // After the pop: a driver that was told of a new size is served by it.
        self.geometry.capacity = self.capacity.get();
        let action = match request::parse(&header, data, &self.geometry, accepted) {
            Ok(action) => action,
            Err(refusal) => {
                return self.answer(head, memory, status, refusal, 0, writable_data);
            }
        };
        let (transfer, offset, len) = match action {
            Action::Read { offset, len } => (Transfer::Read, offset, len),
            Action::Write { offset, len } => (Transfer::Write, offset, len),
            Action::Flush => {
                let Some(slot) = self.slots.claim() else {
                    return Started::NoRoom(head);
                };
                self.buffers.hold(slot, memory.memory());
                self.fill_slot(
                    slot,
                    Starting {
                        head,
                        status,
                        writable_data,
                        work: Work::Flush,
                        offset: 0,
                        len: 0,
                    },
                );
                self.flushes.push(slot);
                return Started::InFlight;
            }
            Action::Ranges { kind, count } => {
                return self.start_ranges(head, chain, memory, status, (kind, count));
            }
            Action::GetId => {
                let serial = self.serial;
                return self.tell(head, chain, memory, status, &serial);
            }
            Action::GetLifetime => {
                // Offered only with it.
                let lifetime = self
                    .lifetime
                    .as_ref()
                    .map_or([0; LIFETIME_LEN], |of| of.bytes());
                return self.tell(head, chain, memory, status, &lifetime);
            }
        };
        let Some(slot) = self.slots.claim() else {
            return Started::NoRoom(head);
        };
        let (segments, bytes, op) = match transfer {
            Transfer::Read => (chain.writable(), 0..len, Op::Read),
            Transfer::Write => {
                let start = HEADER_LEN as u64;
                (chain.readable(), start..start + len, Op::Write)
            }
        };
        let in_place = match self.buffers.fill(slot, memory, segments, bytes) {
            Ok(count) => Some(count),
            Err(NotInPlace::Unmapped) => {
                self.slots.unclaim(slot);
                return self.bad_chain(head);
            }
            Err(NotInPlace::Lost) => {
                self.slots.unclaim(slot);
                return self.answer(head, memory, status, Status::IoErr, 0, writable_data);
            }
            Err(NotInPlace::Bounce) if self.bounce.free_lane().is_none() => {
                self.slots.unclaim(slot);
                return Started::NoRoom(head);
            }
            Err(NotInPlace::Bounce) => None,
        };
        self.bytes_in_flight += len;
        let work = self.work_of(transfer);
        if in_place.is_none() {
            self.buffers.hold(slot, memory.memory());
        }
        self.fill_slot(
            slot,
            Starting {
                head,
                status,
                writable_data,
                work,
                offset,
                len,
            },
        );
        if self.is_null && in_place.is_some() {
            // There is nothing to be gained by merging what costs nothing.
            if self
                .buffers
                .queue_one(&mut self.ioq, transfer, offset, slot)
            {
                self.counters.operations.add(1);
            } else if let Some(memory) = self.buffers.memory(slot).cloned() {
                let owner = Owner::Guest {
                    first: slot,
                    memory,
                };
                self.done.push_back((owner, Outcome::Failed));
            }
        } else if let Some(count) = in_place {
            let plugged = self.merger.plug(iosched::Request {
                op,
                offset,
                len,
                // At most MAX_SEGMENTS_PER_REQUEST.
                segments: u32::try_from(count).unwrap_or(u32::MAX),
                tag: slot.tag(),
            });
            if let Err(full) = plugged {
                debug_assert!(
                    false,
                    "the merger holds as many as there are slots: {full:?}"
                );
                self.submit_plugged();
                let _ = self.merger.plug(full.0);
            }
        } else if let Some(lane) = self.bounce.free_lane() {
            std::mem::swap(&mut lane.chain, chain);
            lane.slot = Some(slot);
            lane.transfer = transfer;
            (lane.offset, lane.len, lane.done) = (offset, len, 0);
            self.counters.bounced.add(1);
            self.bounce_round(slot);
        }
        Started::InFlight
    }

    /// Takes the request being started on.
    #[inline]
    fn fill_slot(&mut self, slot: SlotId, starting: Starting) {
        let Current { queue, kind } = self.current;
        self.of_queue(queue).requests.of(kind).add(1);
        let Starting {
            head,
            status,
            writable_data,
            work,
            offset,
            len,
        } = starting;
        self.slots.fill(
            slot,
            Request {
                head: Some(head),
                queue,
                kind,
                next: None,
                work,
                offset,
                len,
                status,
                writable_data,
                losses: self.losses,
                popped: self.batch_began,
            },
        );
    }

    fn of_queue(&self, queue: u16) -> &QueueCounters {
        &self.queue_counters[usize::from(queue)]
    }

    fn work_of(&mut self, transfer: Transfer) -> Work {
        match transfer {
            Transfer::Read => Work::Read,
            Transfer::Write => Work::Write(self.flushes.write_started()),
        }
    }

    /// Hands everything started since the last call to the kernel: merged, in one system call.
    /// `seat` is the thread's place among its peers.
    pub(super) fn submit(&mut self, seat: &mut Seat<Stopper>) {
        self.batch_began = None;
        self.submit_plugged();
        self.flushes.confer(seat);
        self.start_sync();
        if self.ioq.queued() > 0 {
            self.ioq.submit();
        }
    }

    /// Takes what the kernel has finished and gives each request's end to `finished`. Returns how
    /// many operations came back. May queue follow-up operations: call [`submit`](Self::submit).
    /// `memory` is the map in force.
    pub(super) fn reap(
        &mut self,
        memory: &mut HotRegion<'_, M>,
        finished: impl FnMut(Finished),
    ) -> usize {
        let Self {
            ioq,
            buffers,
            transferred,
            done,
            failures,
            write_back,
            ..
        } = self;
        let count = ioq.reap(
            #[inline(always)]
            |owner, result| match owner {
                Owner::Guest { first, memory } if result.is_ok() => {
                    buffers.give_back(first, memory);
                    transferred.push(first);
                }
                owner => note_done(owner, &result, write_back, failures, done),
            },
        );
        // Once for all that came back together.
        self.reaped = if self.done.is_empty() && self.transferred.is_empty() {
            None
        } else {
            self.clock.now()
        };
        let mut ending = Ending { memory, finished };
        let mut transferred = std::mem::take(&mut self.transferred);
        for first in transferred.drain(..) {
            let next = if self.write_through {
                Some(first)
            } else {
                self.finish(first, Outcome::Done, &mut ending)
            };
            if let Some(first) = next {
                self.transfer_done(first, Outcome::Done, &mut ending);
            }
        }
        self.transferred = transferred;
        while let Some((owner, outcome)) = self.done.pop_front() {
            self.operation_done(owner, outcome, &mut ending);
        }
        count
    }
}

/// Takes an operation that has come back and is not one of the many.
#[inline(never)]
fn note_done<M>(
    owner: Owner<M>,
    result: &Result<u64, IoError>,
    write_back: &WriteBack,
    failures: &mut Failures,
    done: &mut VecDeque<(Owner<M>, Outcome)>,
) {
    if let Err(error) = result
        && matches!(owner, Owner::Sync { .. })
        // Any other, EAGAIN too, may be what the page cache has met when it wrote.
        && error.errno() != Some(libc::EINTR)
    {
        // Before any of those that have come back with it is acted on.
        write_back.note_failure();
    }
    let outcome = Outcome::of(&owner, result);
    // What the host cannot do at all is the guest's to know, and answered so.
    if let Err(error) = result
        && outcome == Outcome::Failed
    {
        failures.note(error);
    }
    done.push_back((owner, outcome));
}

/// Address of the status byte, if the chain has any writable byte.
fn status_byte(chain: &Chain) -> Option<GuestAddress> {
    let last = chain.writable().last()?;
    last.addr
        .0
        .checked_add(u64::from(last.len) - 1)
        .map(GuestAddress)
}

/// Copies the header, once, however the driver has cut it. False if part of it is not there.
#[inline]
fn copy_header<M: GuestMemoryBackend>(
    chain: &Chain,
    memory: &mut HotRegion<'_, M>,
    header: &mut [u8; HEADER_LEN],
) -> bool {
    if let Some(first) = chain.readable().first()
        && first.len as usize >= HEADER_LEN
        && let Ok(slice) = memory.slice(first.addr, HEADER_LEN)
        && let Ok(words) = slice.get_ref::<[u64; 2]>(0)
    {
        let words = words.load().map(u64::to_ne_bytes);
        header.copy_from_slice(words.as_flattened());
        return true;
    }
    chain.copy_from_readable(memory.map(), 0, header).is_ok()
}

fn to_usize(n: u32) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests;
