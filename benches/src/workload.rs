//! The workloads that counts are taken of, by the names that `load` takes.

use event_poll::{EventNotifier, EventPoll, Token};
use iosched::{Limits, Merger, Op, Request};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::disk::{Access, DATA_THREAD, Disk, Format, Guest};
use crate::fixture::{BLOCK, BlockFile, Random};
use crate::lookups::{ADDRESSES, Order, Regions, look_at, look_up};
use crate::reads::{DEPTH, Reader, Reads};
use crate::rings::{self, Layout, Ring, Server};
use crate::{Error, allocations};

/// Chains in a batch of the ring workloads.
const RING_BATCH: u16 = 32;

/// Blocks of the files read: 4 MiB, quickly written, for counts do not depend on it.
const BLOCKS: u64 = 1024;

const SPLIT: (Format, Layout) = (Format::Split, Layout::Direct);
const PACKED: (Format, Layout) = (Format::Packed, Layout::Direct);

/// A name, and what it does to how many units.
type Workload = (&'static str, fn(u64) -> Result<u64, Error>);

/// All of them. Each takes the number of units (chains, requests, reads) and returns the
/// allocations of the second half of them, when everything has warmed up.
pub const WORKLOADS: &[Workload] = &[
    ("vring-split-direct", |n| {
        ring(Server::VringSplit, Layout::Direct, n)
    }),
    ("vring-split-indirect", |n| {
        ring(Server::VringSplit, Layout::Indirect, n)
    }),
    ("vring-packed-direct", |n| {
        ring(Server::VringPacked, Layout::Direct, n)
    }),
    ("vring-packed-indirect", |n| {
        ring(Server::VringPacked, Layout::Indirect, n)
    }),
    ("virtio-queue-direct", |n| {
        ring(Server::VirtioQueue, Layout::Direct, n)
    }),
    ("virtio-queue-indirect", |n| {
        ring(Server::VirtioQueue, Layout::Indirect, n)
    }),
    ("virtio-queue-iter-direct", |n| {
        ring(Server::VirtioQueueIter, Layout::Direct, n)
    }),
    ("virtio-queue-iter-indirect", |n| {
        ring(Server::VirtioQueueIter, Layout::Indirect, n)
    }),
    ("lookup-none", |n| in_turn(&Regions::even(1), n, look_at)),
    ("lookup-1", |n| {
        lookups(&Regions::even(1).hostmem()?, &Regions::even(1), n)
    }),
    ("lookup-8", |n| {
        lookups(&Regions::even(8).hostmem()?, &Regions::even(8), n)
    }),
    ("lookup-509", |n| {
        lookups(&Regions::even(509).hostmem()?, &Regions::even(509), n)
    }),
    ("lookup-pc-509", |n| {
        lookups(&Regions::pc().hostmem()?, &Regions::pc(), n)
    }),
    ("lookup-vm-memory-1", |n| {
        lookups(&Regions::even(1).vm_memory()?, &Regions::even(1), n)
    }),
    ("lookup-vm-memory-509", |n| {
        lookups(&Regions::even(509).vm_memory()?, &Regions::even(509), n)
    }),
    ("iosched-random", merger),
    ("ioq-null-batch-32", |n| reads(Reader::IoqNull, 32, n)),
    ("ioq-batch-1", |n| reads(Reader::Ioq, 1, n)),
    ("ioq-batch-32", |n| reads(Reader::Ioq, 32, n)),
    ("ioq-disarmed-batch-1", |n| reads(Reader::IoqDisarmed, 1, n)),
    ("ioq-disarmed-batch-32", |n| {
        reads(Reader::IoqDisarmed, 32, n)
    }),
    ("ioq-uring-batch-1", |n| reads(Reader::IoqUring, 1, n)),
    ("ioq-uring-batch-32", |n| reads(Reader::IoqUring, 32, n)),
    ("bare-batch-1", |n| reads(Reader::Bare, 1, n)),
    ("bare-batch-32", |n| reads(Reader::Bare, 32, n)),
    ("bare-uring-batch-1", |n| reads(Reader::BareUring, 1, n)),
    ("bare-uring-batch-32", |n| reads(Reader::BareUring, 32, n)),
    ("disk-null-depth-1", |n| disk(false, 1, n)),
    ("disk-null-depth-32", |n| disk(false, 32, n)),
    ("disk-image-depth-1", |n| disk(true, 1, n)),
    ("disk-image-depth-32", |n| disk(true, 32, n)),
    ("event-poll-wake", wakes),
    ("data-thread-null-split-read", |n| {
        data_thread(false, SPLIT, Access::RandomRead, 32, n)
    }),
    ("data-thread-null-packed-read", |n| {
        data_thread(false, PACKED, Access::RandomRead, 32, n)
    }),
    ("data-thread-null-split-indirect", |n| {
        let indirect = (Format::Split, Layout::Indirect);
        data_thread(false, indirect, Access::RandomRead, 32, n)
    }),
    ("data-thread-null-split-write", |n| {
        data_thread(false, SPLIT, Access::RandomWrite, 32, n)
    }),
    ("data-thread-null-packed-write", |n| {
        data_thread(false, PACKED, Access::RandomWrite, 32, n)
    }),
    ("data-thread-null-split-write-depth-1", |n| {
        data_thread(false, SPLIT, Access::RandomWrite, 1, n)
    }),
    ("data-thread-image-split-read", |n| {
        data_thread(true, SPLIT, Access::RandomRead, 32, n)
    }),
    ("data-thread-image-packed-read", |n| {
        data_thread(true, PACKED, Access::RandomRead, 32, n)
    }),
    ("data-thread-image-split-write", |n| {
        data_thread(true, SPLIT, Access::RandomWrite, 32, n)
    }),
    ("data-thread-image-packed-write", |n| {
        data_thread(true, PACKED, Access::RandomWrite, 32, n)
    }),
    ("data-thread-image-split-sequential", |n| {
        data_thread(true, SPLIT, Access::SequentialRead, 32, n)
    }),
    ("data-thread-image-split-read-depth-1", |n| {
        data_thread(true, SPLIT, Access::RandomRead, 1, n)
    }),
];

/// Runs the workload called `name` on `units` units; returns its allocations, as [`WORKLOADS`] says.
///
/// # Errors
///
/// No such workload, or it failed.
pub fn run(name: &str, units: u64) -> Result<u64, Error> {
    let (_, run) = WORKLOADS
        .iter()
        .find(|(workload, _)| *workload == name)
        .ok_or_else(|| {
            let names: Vec<_> = WORKLOADS.iter().map(|(name, _)| *name).collect();
            format!("no workload {name}; there are {}", names.join(", "))
        })?;
    run(units)
}

/// The function that the instructions of this workload are counted within, if it is not all of it: the
/// device's side of a ring or the data thread, without the guest.
pub fn counted_within(name: &str) -> Option<&'static str> {
    if name.starts_with("vring-") || name.starts_with("virtio-queue-") {
        Some(rings::SERVE)
    } else if name.starts_with("data-thread-") {
        Some(DATA_THREAD)
    } else {
        None
    }
}

/// The workloads whose instructions are held to the committed figures: those of this project's code that are the same in
/// each run.
pub fn held() -> impl Iterator<Item = &'static str> {
    const LEFT_OUT: [&str; 6] = [
        "virtio-queue-",
        "lookup-none",
        "lookup-vm-memory-",
        "bare-",
        // The kernel may complete a read before or after it is looked for.
        "ioq-uring-",
        // Two threads that take turns as they like.
        "disk-",
    ];
    let names = WORKLOADS.iter().map(|&(name, _)| name);
    names.filter(|name| !LEFT_OUT.iter().any(|prefix| name.starts_with(prefix)))
}

/// Does the work in halves and counts the allocations of the second.
fn second_half(units: u64, mut work: impl FnMut(u64) -> Result<(), Error>) -> Result<u64, Error> {
    work(units / 2)?;
    let before = allocations::count();
    work(units - units / 2)?;
    Ok(allocations::count() - before)
}

fn ring(server: Server, layout: Layout, chains: u64) -> Result<u64, Error> {
    let mut ring = Ring::new(server, layout)?;
    second_half(chains, |chains| {
        ring.run(chains.div_ceil(u64::from(RING_BATCH)), RING_BATCH)?;
        Ok(())
    })
}

fn reads(reader: Reader, batch: u16, count: u64) -> Result<u64, Error> {
    let file = BlockFile::new(BLOCKS)?;
    let mut reads = Reads::new(&file, reader, batch, DEPTH)?;
    second_half(count, |count| {
        reads.run(count)?;
        Ok(())
    })
}

fn disk(image: bool, depth: u16, requests: u64) -> Result<u64, Error> {
    let file = image.then(|| BlockFile::new(BLOCKS)).transpose()?;
    let mut disk = Disk::new(file.as_ref(), Guest::Sleeps)?;
    second_half(requests, |requests| {
        disk.run(requests, depth)?;
        Ok(())
    })
}

fn data_thread(
    image: bool,
    (format, layout): (Format, Layout),
    access: Access,
    depth: u16,
    requests: u64,
) -> Result<u64, Error> {
    let file = image.then(|| BlockFile::new(BLOCKS)).transpose()?;
    let mut disk = Disk::sleepy(file.as_ref(), format, layout, access)?;
    second_half(requests, |requests| {
        disk.run_one_by_one(requests.div_ceil(u64::from(depth)), depth)
    })
}

/// A kick: notified, waited for, cleared.
fn wakes(count: u64) -> Result<u64, Error> {
    let notifier = EventNotifier::new()?;
    let mut poll = EventPoll::new(64)?;
    poll.add(&notifier, Token(0))?;
    second_half(count, |count| {
        for _ in 0..count {
            notifier.notify()?;
            let events = poll.wait(None)?;
            if events.iter().len() != 1 || !notifier.test_and_clear()? {
                return Err("a kick was lost".into());
            }
        }
        Ok(())
    })
}

fn lookups<M: GuestMemoryBackend>(map: &M, regions: &Regions, count: u64) -> Result<u64, Error> {
    in_turn(regions, count, |addresses| look_up(map, addresses))
}

/// Random addresses: nothing is the same as the last time.
fn in_turn(
    regions: &Regions,
    count: u64,
    look_up: impl Fn(&[GuestAddress]) -> u64,
) -> Result<u64, Error> {
    let addresses = Order::Random.addresses(regions)?;
    let expected = look_up(&addresses);
    second_half(count, |mut count| {
        while count > 0 {
            let round = usize::try_from(count.min(ADDRESSES))?;
            let sum = look_up(&addresses[..round]);
            if round == addresses.len() && sum != expected {
                return Err("two lookups differ".into());
            }
            count -= round as u64;
        }
        Ok(())
    })
}

fn merger(requests: u64) -> Result<u64, Error> {
    let limits = Limits {
        max_segments: 512,
        max_bytes: 1 << 20,
    };
    let mut merger = Merger::new(256, limits);
    let mut random = Random::new(42);
    second_half(requests, |requests| {
        for _ in 0..requests.div_ceil(32) {
            for tag in 0..32 {
                let request = Request {
                    op: Op::Read,
                    offset: random.below(1 << 20) * BLOCK as u64,
                    len: BLOCK as u64,
                    segments: 1,
                    tag,
                };
                merger.plug(request).map_err(|full| full.to_string())?;
            }
            let mut parts = 0;
            merger.unplug(|merged| parts += merged.parts.len());
            if parts != 32 {
                return Err("not every request came out".into());
            }
        }
        Ok(())
    })
}
