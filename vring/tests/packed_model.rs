//! A packed ring against a naive device: what the specification says, written down plainly over the
//! ring's bytes, pop by pop and push by push.

mod rig;

use proptest::prelude::*;
use rig::{BUFFERS, END, Memory, Rig, SEAM, TABLE};
use vm_memory::{Bytes, GuestAddress};
use vring::driver::{F_INDIRECT, RawDescriptor};
use vring::{ChainFault, Head, PopError, RingFault, RingFeatures, Segment};

const SIZE: u16 = 16;

/// What the naive device makes of the next descriptor.
#[derive(Debug, PartialEq)]
enum Outcome {
    Chain(Vec<Segment>, Vec<Segment>),
    Fault(ChainFault),
    Ring(RingFault),
    Empty,
}

#[derive(Clone, Copy)]
struct Entry {
    address: u64,
    len: u32,
    id: u16,
    flags: u16,
}

fn entry(memory: &Memory, at: u64) -> Entry {
    let mut bytes = [0u8; 16];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    Entry {
        address: u64::from_le_bytes(bytes[..8].try_into().unwrap()),
        len: u32::from_le_bytes(bytes[8..12].try_into().unwrap()),
        id: u16::from_le_bytes(bytes[12..14].try_into().unwrap()),
        flags: u16::from_le_bytes(bytes[14..].try_into().unwrap()),
    }
}

/// A position and its wrap counter, one descriptor at a time.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Place {
    fn after(self, count: usize) -> Self {
        (0..count).fold(self, |Self { index, wrap }, _| {
            if index + 1 == SIZE {
                Self {
                    index: 0,
                    wrap: !wrap,
                }
            } else {
                Self {
                    index: index + 1,
                    wrap,
                }
            }
        })
    }
}

struct Naive {
    ring: u64,
    indirect: bool,
    avail: Place,
    used: Place,
    /// Id and descriptors of the chains in flight, and of those pushed and not published.
    in_flight: Vec<(u16, usize)>,
    pushed: Vec<(u16, usize, u32)>,
    broken: bool,
}

impl Naive {
    fn pop(&mut self, memory: &Memory) -> Outcome {
        if self.broken {
            return Outcome::Empty;
        }
        let at = |place: Place| self.ring + 16 * u64::from(place.index);
        let first = entry(memory, at(self.avail));
        let (avail, used) = (first.flags >> 7 & 1 == 1, first.flags >> 15 == 1);
        if avail != self.avail.wrap || used == self.avail.wrap {
            return Outcome::Empty;
        }
        let held: usize = self.in_flight.iter().map(|chain| chain.1).sum();
        let waiting: usize = self.pushed.iter().map(|chain| chain.1).sum();
        let limit = usize::from(SIZE) - held - waiting;
        let mut list = Vec::new();
        loop {
            if list.len() == limit {
                self.broken = true;
                let limit = u16::try_from(limit).unwrap();
                return Outcome::Ring(RingFault::ChainOverrun { limit });
            }
            let next = entry(memory, at(self.avail.after(list.len())));
            list.push(next);
            if next.flags & 1 == 0 {
                break;
            }
        }
        let id = list.last().unwrap().id;
        if self.in_flight.iter().any(|chain| chain.0 == id) {
            self.broken = true;
            return Outcome::Ring(RingFault::BufferIdInFlight { id });
        }
        self.avail = self.avail.after(list.len());
        self.in_flight.push((id, list.len()));
        match self.buffers(memory, &list) {
            Ok((readable, writable)) => Outcome::Chain(readable, writable),
            Err(fault) => Outcome::Fault(fault),
        }
    }

    fn buffers(
        &self,
        memory: &Memory,
        list: &[Entry],
    ) -> Result<(Vec<Segment>, Vec<Segment>), ChainFault> {
        if let [only] = list
            && only.flags & 4 != 0
        {
            if !self.indirect {
                return Err(ChainFault::IndirectNotNegotiated);
            }
            let Entry { address, len, .. } = *only;
            if len == 0 || len % 16 != 0 {
                return Err(ChainFault::IndirectTableLength { len });
            }
            if len / 16 > 1024 {
                return Err(ChainFault::IndirectTableTooLong { entries: len / 16 });
            }
            if u128::from(address) + u128::from(len) > u128::from(END) {
                return Err(ChainFault::IndirectTableUnmapped { address, len });
            }
            let entries = (0..u64::from(len / 16)).map(|i| Entry {
                // All flags but WRITE are reserved there.
                flags: entry(memory, address + 16 * i).flags & 2,
                ..entry(memory, address + 16 * i)
            });
            return self.collect(entries);
        }
        self.collect(list.iter().copied())
    }

    fn collect(
        &self,
        entries: impl Iterator<Item = Entry>,
    ) -> Result<(Vec<Segment>, Vec<Segment>), ChainFault> {
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let mut total = 0u64;
        for Entry {
            address,
            len,
            flags,
            ..
        } in entries
        {
            if flags & 4 != 0 {
                return Err(if !self.indirect {
                    ChainFault::IndirectNotNegotiated
                } else if flags & 1 != 0 {
                    ChainFault::IndirectAndNext
                } else {
                    ChainFault::IndirectAmongDirect
                });
            }
            if len == 0 {
                continue;
            }
            if u128::from(address) + u128::from(len) >= 1 << 64 {
                return Err(ChainFault::BufferOverflow { address, len });
            }
            total += u64::from(len);
            if total > 1 << 32 {
                return Err(ChainFault::TooManyBytes);
            }
            let segment = rig::segment(address, len);
            if flags & 2 != 0 {
                writable.push(segment);
            } else if writable.is_empty() {
                readable.push(segment);
            } else {
                return Err(ChainFault::ReadableAfterWritable);
            }
        }
        Ok((readable, writable))
    }

    /// The chain popped `which` before others comes back.
    fn push(&mut self, which: usize, len: u32) {
        let (id, descriptors) = self.in_flight.remove(which);
        self.pushed.push((id, descriptors, len));
    }

    /// Looks whether the ring holds a used descriptor for each chain pushed.
    fn publish(&mut self, memory: &Memory) -> Result<(), TestCaseError> {
        for (id, descriptors, len) in self.pushed.drain(..) {
            let used = entry(memory, self.ring + 16 * u64::from(self.used.index));
            let state = if self.used.wrap { 1 << 15 | 1 << 7 } else { 0 };
            let write = if len == 0 { 0 } else { 2 };
            prop_assert_eq!((used.id, used.len, used.flags), (id, len, state | write));
            self.used = self.used.after(descriptors);
        }
        Ok(())
    }
}

/// One request of a mostly well-behaved driver.
#[derive(Clone, Debug)]
struct Request {
    lens: Vec<u32>,
    readable: usize,
    indirect: Option<u64>,
}

fn request() -> impl Strategy<Value = Request> {
    let len = prop_oneof![
        8 => 1u32..5000,
        1 => Just(0u32),
        1 => prop_oneof![Just(u32::MAX), Just(1 << 31)],
    ];
    // A table at an aligned address mostly, sometimes at an odd one or over the region seam.
    let indirect = prop_oneof![
        3 => Just(None),
        3 => (0u64..100).prop_map(|i| Some(TABLE + 0x100 * i)),
        1 => (0u64..100).prop_map(|i| Some(TABLE + 0x100 * i + 5)),
        1 => (1u64..90).prop_map(|i| Some(SEAM - i)),
    ];
    (proptest::collection::vec(len, 1..6), 0usize..6, indirect).prop_map(
        |(lens, readable, indirect)| Request {
            lens,
            readable,
            indirect,
        },
    )
}

/// A change to 16 bits of a descriptor or of a table, rare, and aimed at the fields that matter.
#[derive(Clone, Copy, Debug)]
enum Corruption {
    Descriptor {
        index: u16,
        field: u64,
        value: u16,
    },
    /// One bit of the flags changes.
    Flag {
        index: u16,
        bit: u32,
    },
    TableEntry {
        at: u64,
        field: u64,
        value: u16,
    },
}

fn corruption() -> impl Strategy<Value = Corruption> {
    // 16-bit pieces of a descriptor: the address's ends, the length's ends, id and flags.
    let field = prop_oneof![
        1 => Just(0u64), 1 => Just(6), 1 => Just(8), 1 => Just(10), 3 => Just(12), 1 => Just(14)
    ];
    let value = prop_oneof![4 => 0u16..20, 1 => any::<u16>(), 1 => Just(0xffff)];
    let bit = prop_oneof![4 => 0u32..3, 1 => Just(7u32), 1 => Just(15)];
    prop_oneof![
        4 => (0..SIZE, field.clone(), value.clone())
            .prop_map(|(index, field, value)| Corruption::Descriptor { index, field, value }),
        6 => (0..SIZE, bit).prop_map(|(index, bit)| Corruption::Flag { index, bit }),
        4 => (0u64..0x700, field, value)
            .prop_map(|(at, field, value)| Corruption::TableEntry { at, field, value }),
    ]
}

fn add(rig: &mut Rig, request: &Request) {
    let segments: Vec<_> = request
        .lens
        .iter()
        .zip(0u64..)
        .map(|(&len, i)| (BUFFERS + 0x1000 * i, len))
        .collect();
    let write = |i: usize| if i < request.readable { 0 } else { 2 };
    match request.indirect {
        None => {
            let segments: Vec<_> = segments.iter().map(|s| rig::segment(s.0, s.1)).collect();
            let (readable, writable) = segments.split_at(request.readable.min(segments.len()));
            // A full ring is one request fewer.
            let _ = rig.guest.add_chain(readable, writable);
        }
        Some(table) if rig.guest.free() > 0 => {
            let entries: Vec<_> = segments
                .iter()
                .enumerate()
                .map(|(i, &(address, len))| (address, len, write(i)))
                .collect();
            rig.write_table(table, &entries);
            let descriptor = RawDescriptor {
                address: table,
                len: 16 * u32::try_from(segments.len()).unwrap(),
                flags: F_INDIRECT,
            };
            rig.guest.add_raw(&[descriptor]).unwrap();
        }
        Some(_) => {}
    }
}

fn corrupt(rig: &mut Rig, corruption: Corruption) {
    match corruption {
        Corruption::Descriptor {
            index,
            field,
            value,
        } => {
            let at = rig.config.addresses.descriptor_area.0 + 16 * u64::from(index) + field;
            rig.memory.write_obj(value, GuestAddress(at)).unwrap();
        }
        Corruption::Flag { index, bit } => {
            let (address, len, id, flags) = rig.packed().desc(index);
            rig.packed()
                .write_desc(index, address, len, id, flags ^ 1 << bit);
        }
        Corruption::TableEntry { at, field, value } => {
            let at = GuestAddress(TABLE + 16 * at + field);
            rig.memory.write_obj(value, at).unwrap();
        }
    }
}

#[derive(Clone, Debug)]
struct Round {
    requests: Vec<Request>,
    corruptions: Vec<Corruption>,
    /// Pops between two pushes, and which of the chains in flight is pushed.
    push_every: usize,
    which: usize,
    publish: bool,
}

fn round() -> impl Strategy<Value = Round> {
    let corruptions = prop_oneof![
        3 => Just(Vec::new()),
        2 => proptest::collection::vec(corruption(), 1..4),
    ];
    (
        proptest::collection::vec(request(), 0..8),
        corruptions,
        1usize..4,
        0usize..5,
        any::<bool>(),
    )
        .prop_map(
            |(requests, corruptions, push_every, which, publish)| Round {
                requests,
                corruptions,
                push_every,
                which,
                publish,
            },
        )
}

fn outcome(rig: &mut Rig) -> (Outcome, Option<Head>) {
    match rig.pop() {
        Ok(Some(head)) => {
            let (readable, writable) = (rig.chain.readable(), rig.chain.writable());
            (
                Outcome::Chain(readable.to_vec(), writable.to_vec()),
                Some(head),
            )
        }
        Ok(None) => (Outcome::Empty, None),
        Err(PopError::Chain { head, fault }) => (Outcome::Fault(fault), Some(head)),
        Err(PopError::Ring(fault)) => (Outcome::Ring(fault), None),
        Err(other) => panic!("{other:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn pops_and_pushes_agree_with_a_naive_device(
        index in 0..SIZE,
        wrap: bool,
        indirect in prop_oneof![9 => Just(true), 1 => Just(false)],
        rounds in proptest::collection::vec(round(), 1..5),
    ) {
        let features = RingFeatures {
            indirect_desc: indirect,
            packed: true,
            ..RingFeatures::default()
        };
        let start = if wrap { index } else { index + SIZE };
        let mut rig = Rig::starting_at(u32::from(SIZE), features, start);
        let place = Place { index, wrap };
        let mut naive = Naive {
            ring: rig.config.addresses.descriptor_area.0,
            indirect,
            avail: place,
            used: place,
            in_flight: Vec::new(),
            pushed: Vec::new(),
            broken: false,
        };
        let mut held: Vec<Head> = Vec::new();
        for round in rounds {
            for request in &round.requests {
                add(&mut rig, request);
            }
            rig.guest.publish();
            for &corruption in &round.corruptions {
                corrupt(&mut rig, corruption);
            }
            for step in 0..=usize::from(SIZE) + 1 {
                let expected = naive.pop(&rig.memory);
                let (actual, head) = outcome(&mut rig);
                prop_assert_eq!(actual, expected);
                if let Some(head) = head {
                    prop_assert!(head.index() < SIZE);
                    prop_assert!(held.iter().all(|other| other.index() != head.index()));
                    held.push(head);
                }
                prop_assert_eq!(usize::from(rig.queue.in_flight()), held.len());
                if step % round.push_every == 0 && !held.is_empty() {
                    let which = round.which % held.len();
                    let len = u32::try_from(step).unwrap();
                    rig.queue.push(held.remove(which), len);
                    naive.push(which, len);
                }
                if round.publish {
                    prop_assert_eq!(rig.queue.publish(), naive.pushed.len());
                    naive.publish(&rig.memory)?;
                }
            }
            prop_assert_eq!(rig.queue.publish(), naive.pushed.len());
            naive.publish(&rig.memory)?;
            while rig.guest.poll_used().is_some() {}
        }
        for head in held {
            rig.queue.push(head, 0);
        }
    }
}
