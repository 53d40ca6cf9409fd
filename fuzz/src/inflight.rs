//! A record of requests in flight as a hostile front-end hands it over, and a ring as a hostile guest leaves it: a device
//! that starts from both, serves what it finds, and stops.
//!
//! Oracle: for a split ring, which heads are served again and where the ring goes on, read off the record's bytes by the
//! specification; for both formats, that the device stops, that nothing is recorded as in flight afterwards, and that
//! not a byte beside the queue's own record has changed.

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use arbitrary::Arbitrary;
use blk_dataplane::{Backing, DataPlane, Device, DeviceOptions, InflightRegion, QueueSetup};
use event_poll::EventNotifier;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vring::{PackedPosition, RingAddresses, RingBase};

type Memory = GuestMemoryMmap<()>;

const DESCRIPTORS: u64 = 0x1000;
const DRIVER: u64 = 0x2000;
const DEVICE: u64 = 0x3000;
const MEMORY_LEN: usize = 0x1_0000;
/// Most entries of a record.
const ENTRIES_MAX: u16 = 16;
/// Bytes of a packed ring's record of that many, on a multiple of 64.
const STRIDE: usize = 32 + 32 * ENTRIES_MAX as usize + 32;

/// One entry of a record, for either format: fields that one has not are not used.
#[derive(Arbitrary, Clone, Copy, Debug, Default)]
pub struct Entry {
    inflight: u8,
    next: u8,
    last: u8,
    num: u8,
    counter: u8,
    id: u8,
    flags: u8,
    len: u16,
    address: u16,
}

/// One descriptor of the ring.
#[derive(Arbitrary, Clone, Copy, Debug, Default)]
pub struct Descriptor {
    address: u16,
    len: u16,
    id: u8,
    flags: u16,
}

/// Any 16 bits anywhere in the record, after all else.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Patch {
    at: u16,
    value: u16,
}

/// What a device is started from.
#[derive(Arbitrary, Debug)]
pub struct Input {
    packed: bool,
    ring_log: u8,
    more_entries: bool,
    /// 0 in three of four: nothing is to be read from the ring beside what is in flight.
    available: u8,
    used: u16,
    ahead: u8,
    heads: [u8; 2],
    positions: [u8; 2],
    wraps: u8,
    entries: Vec<Entry>,
    descriptors: Vec<Descriptor>,
    patches: Vec<Patch>,
}

struct Lab {
    plane: DataPlane<Memory>,
    memory: Arc<Memory>,
    kick: EventNotifier,
}

thread_local! {
    static LAB: RefCell<Option<Lab>> = const { RefCell::new(None) };
}

fn lab() -> Lab {
    let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY_LEN)]).unwrap();
    let memory = Arc::new(memory);
    let device = Device::new(Backing::null_zeroes(1 << 20), &DeviceOptions::default()).unwrap();
    Lab {
        plane: DataPlane::start(&device, Arc::clone(&memory)).unwrap(),
        memory,
        kick: EventNotifier::new().unwrap(),
    }
}

/// The record's bytes, mostly as a back-end might have left them.
fn record(input: &Input, entries: u16) -> Vec<u8> {
    let mut bytes = vec![0; STRIDE];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(8, &1u16.to_ne_bytes());
    put(10, &entries.to_ne_bytes());
    let small = |value: u8| u16::from(value % 18);
    let given = input.entries.iter().take(usize::from(entries));
    if input.packed {
        put(12, &small(input.heads[0]).to_ne_bytes());
        put(14, &small(input.heads[1]).to_ne_bytes());
        put(16, &small(input.positions[0]).to_ne_bytes());
        put(18, &small(input.positions[1]).to_ne_bytes());
        put(20, &[input.wraps & 1, input.wraps >> 1 & 1]);
        for (number, entry) in given.enumerate() {
            let at = 32 + 32 * number;
            put(
                at,
                &[if entry.inflight == 255 {
                    255
                } else {
                    entry.inflight & 1
                }],
            );
            put(at + 2, &small(entry.next).to_ne_bytes());
            put(at + 4, &small(entry.last).to_ne_bytes());
            put(at + 6, &u16::from(entry.num % 5).to_ne_bytes());
            put(at + 8, &u64::from(entry.counter).to_ne_bytes());
            put(at + 16, &u16::from(entry.id).to_ne_bytes());
            put(at + 18, &u16::from(entry.flags & 7).to_ne_bytes());
            put(at + 20, &u32::from(entry.len).to_ne_bytes());
            put(at + 24, &u64::from(entry.address).to_ne_bytes());
        }
    } else {
        put(12, &small(input.heads[0]).to_ne_bytes());
        let ahead = u16::from(input.ahead % 20);
        put(14, &input.used.wrapping_sub(ahead).to_ne_bytes());
        for (number, entry) in given.enumerate() {
            let at = 16 + 16 * number;
            put(
                at,
                &[if entry.inflight == 255 {
                    255
                } else {
                    entry.inflight & 1
                }],
            );
            put(at + 6, &small(entry.next).to_ne_bytes());
            put(at + 8, &u64::from(entry.counter).to_ne_bytes());
        }
    }
    for patch in input.patches.iter().take(8) {
        let at = usize::from(patch.at) % (STRIDE - 1);
        bytes[at..at + 2].copy_from_slice(&patch.value.to_ne_bytes());
    }
    bytes
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

/// By the specification: the heads that are in flight, in order, and where the ring goes on. `None`: refused.
fn expected_of_split(bytes: &[u8], entries: u16, size: u16, used: u16) -> Option<(Vec<u16>, u16)> {
    let entry = |head: u16| 16 + 16 * usize::from(head);
    match u16_at(bytes, 8) {
        0 => return Some((Vec::new(), used)),
        1 => {}
        _ => return None,
    }
    if u16_at(bytes, 10) != entries {
        return None;
    }
    let batch = used.wrapping_sub(u16_at(bytes, 14));
    if batch > size {
        return Some((Vec::new(), used));
    }
    let mut over = Vec::new();
    let mut head = u16_at(bytes, 12);
    for _ in 0..batch {
        if head >= size {
            break;
        }
        over.push(head);
        head = u16_at(bytes, entry(head) + 6);
    }
    let mut heads: Vec<(u64, u16)> = (0..size)
        .filter(|head| bytes[entry(*head)] == 1 && !over.contains(head))
        .map(|head| {
            let at = entry(head) + 8;
            let counter = bytes[at..at + 8].try_into().unwrap();
            (u64::from_ne_bytes(counter), head)
        })
        .collect();
    heads.sort_unstable();
    let count = u16::try_from(heads.len()).unwrap();
    let heads = heads.into_iter().map(|(_, head)| head).collect();
    Some((heads, used.wrapping_add(count)))
}

/// Starts a device from the input and stops it.
///
/// # Panics
///
/// If it differs from the oracle.
pub fn run(input: Input) {
    LAB.with_borrow_mut(|lab_| run_in(lab_.get_or_insert_with(lab), &input));
}

fn run_in(lab: &mut Lab, input: &Input) {
    let size = 1u16 << (input.ring_log % 5);
    let entries = if input.more_entries {
        ENTRIES_MAX
    } else {
        size
    };
    let bytes = record(input, entries);
    let expected = expected_of_split(&bytes, entries, size, input.used);

    lab.memory
        .write_slice(&vec![0; MEMORY_LEN], GuestAddress(0))
        .unwrap();
    for (number, descriptor) in (0u64..).zip(input.descriptors.iter().take(usize::from(size))) {
        let at = DESCRIPTORS + 16 * number;
        let put = |at: u64, value: &[u8]| lab.memory.write_slice(value, GuestAddress(at)).unwrap();
        put(at, &u64::from(descriptor.address).to_le_bytes());
        put(at + 8, &u32::from(descriptor.len).to_le_bytes());
        if input.packed {
            put(at + 12, &u16::from(descriptor.id).to_le_bytes());
            put(at + 14, &descriptor.flags.to_le_bytes());
        } else {
            put(at + 12, &(descriptor.flags & 7).to_le_bytes());
            put(at + 14, &u16::from(descriptor.id % 17).to_le_bytes());
        }
    }
    let quiet = input.available.is_multiple_of(4) || input.available < 192;
    if !input.packed {
        let base = expected.as_ref().map_or(0, |expected| expected.1);
        let more = if quiet {
            0
        } else {
            u16::from(input.available % 20)
        };
        let avail = base.wrapping_add(more);
        lab.memory
            .write_obj(avail.to_le(), GuestAddress(DRIVER + 2))
            .unwrap();
        lab.memory
            .write_obj(input.used.to_le(), GuestAddress(DEVICE + 2))
            .unwrap();
    }

    let (file, len) = InflightRegion::create(2, entries).unwrap();
    // Past the queue's own record: must stay as it is.
    let own = if input.packed {
        32 + 32 * usize::from(entries)
    } else {
        16 + 16 * usize::from(entries)
    };
    let mut whole = vec![0x5A; usize::try_from(len).unwrap()];
    whole[..own].copy_from_slice(&bytes[..own]);
    file.write_all_at(&whole, 0).unwrap();
    let region = InflightRegion::map(file.try_clone().unwrap(), 0, len, 2, entries).unwrap();

    let base = if input.packed {
        RingBase::Packed {
            avail: PackedPosition::FIRST,
            used: PackedPosition::FIRST,
        }
    } else {
        RingBase::Split {
            next_avail: input.used,
        }
    };
    // VERSION_1, INDIRECT_DESC, and RING_PACKED.
    let features = 1 << 32 | 1 << 28 | u64::from(input.packed) << 34;
    let started = lab.plane.start_queue(
        0,
        QueueSetup {
            size: u32::from(size),
            addresses: RingAddresses {
                descriptor_area: GuestAddress(DESCRIPTORS),
                driver_area: GuestAddress(DRIVER),
                device_area: GuestAddress(DEVICE),
            },
            base,
            features,
            kick: Some(lab.kick.try_clone().unwrap()),
            call: None,
            err: None,
            enabled: true,
            inflight: region.queue(0),
        },
    );
    if !input.packed {
        assert_eq!(started.is_ok(), expected.is_some(), "{started:?}");
    }
    let after = |file: &File| {
        let mut now = vec![0; whole.len()];
        file.read_exact_at(&mut now, 0).unwrap();
        now
    };
    if started.is_err() {
        assert!(
            after(&file) == whole,
            "a record that is refused is left alone"
        );
        return;
    }
    lab.plane.drain().unwrap();
    let stopped = lab.plane.stop_queue(0).unwrap();
    let now = after(&file);
    assert!(now[own..] == whole[own..], "written beside the record");
    let (first, stride) = if input.packed { (32, 32) } else { (16, 16) };
    for number in 0..usize::from(entries) {
        assert_eq!(
            now[first + stride * number],
            0,
            "entry {number} is left in flight"
        );
    }
    if input.packed {
        assert_eq!(
            u16_at(&now, 12),
            u16_at(&now, 14),
            "an update is left half done"
        );
        assert_eq!((u16_at(&now, 16), now[20]), (u16_at(&now, 18), now[21]));
        return;
    }
    let used: u16 = lab.memory.read_obj(GuestAddress(DEVICE + 2)).unwrap();
    assert_eq!(u16_at(&now, 14), used);
    if let (Some((heads, base)), true) = (expected, quiet) {
        assert_eq!(stopped, RingBase::Split { next_avail: base });
        let count = used.wrapping_sub(input.used);
        let mut given: Vec<u16> = (0..count)
            .map(|i| {
                let slot = u64::from(input.used.wrapping_add(i) % size);
                let id: u32 = lab
                    .memory
                    .read_obj(GuestAddress(DEVICE + 4 + 8 * slot))
                    .unwrap();
                u16::try_from(id).unwrap()
            })
            .collect();
        let mut heads = heads;
        heads.sort_unstable();
        given.sort_unstable();
        assert_eq!(
            given, heads,
            "each head that was in flight is given back once"
        );
    }
}
