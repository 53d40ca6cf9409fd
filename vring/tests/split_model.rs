//! `pop` of a split ring against a naive walker: what the specification says, written down plainly,
//! over a copy of the ring's bytes.

mod rig;

use proptest::prelude::*;
use rig::{END, Entry, Rig, TABLE};
use vm_memory::{Bytes, GuestAddress};
use vring::driver::{F_INDIRECT, RawDescriptor};
use vring::{ChainFault, PopError, RingFault, RingFeatures, Segment};

const SIZE: u16 = 16;

/// What the walker makes of one available entry.
#[derive(Debug, PartialEq)]
enum Outcome {
    Chain(u16, Vec<Segment>, Vec<Segment>),
    Fault(u16, ChainFault),
    Ring(RingFault),
    Empty,
}

/// The naive walker: a flat copy of memory, and vectors.
struct Walker {
    bytes: Vec<u8>,
    table: u64,
    available: u64,
    indirect: bool,
    next_avail: u16,
    owned: Vec<u16>,
    broken: bool,
}

impl Walker {
    fn u16(&self, at: u64) -> u16 {
        let at = usize::try_from(at).unwrap();
        u16::from_le_bytes(self.bytes[at..at + 2].try_into().unwrap())
    }

    fn entry(&self, at: u64) -> Entry {
        let start = usize::try_from(at).unwrap();
        let bytes = &self.bytes[start..start + 16];
        Entry {
            address: u64::from_le_bytes(bytes[..8].try_into().unwrap()),
            len: u32::from_le_bytes(bytes[8..12].try_into().unwrap()),
            flags: self.u16(at + 12),
            next: self.u16(at + 14),
        }
    }

    fn pop(&mut self) -> Outcome {
        if self.broken {
            return Outcome::Empty;
        }
        let avail_idx = self.u16(self.available + 2);
        let waiting = avail_idx.wrapping_sub(self.next_avail);
        if waiting == 0 {
            return Outcome::Empty;
        }
        let slot = u64::from(self.next_avail % SIZE);
        let head = self.u16(self.available + 4 + 2 * slot);
        let fault = if waiting > SIZE {
            RingFault::AvailIndexJump {
                avail_idx,
                next_avail: self.next_avail,
                size: SIZE,
            }
        } else if head >= SIZE {
            RingFault::HeadOutOfRange { head, size: SIZE }
        } else if self.owned.contains(&head) {
            RingFault::HeadInFlight { head }
        } else {
            self.next_avail = self.next_avail.wrapping_add(1);
            self.owned.push(head);
            return match self.collect(head) {
                Ok((readable, writable)) => Outcome::Chain(head, readable, writable),
                Err(fault) => Outcome::Fault(head, fault),
            };
        };
        self.broken = true;
        Outcome::Ring(fault)
    }

    fn collect(&self, head: u16) -> Result<(Vec<Segment>, Vec<Segment>), ChainFault> {
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let (mut base, mut limit, mut index, mut inside) = (self.table, SIZE, head, false);
        let mut steps = 0;
        loop {
            // A loop is found by counting: no table has more descriptors than it has.
            if steps == limit {
                return Err(ChainFault::TooManyDescriptors { limit });
            }
            steps += 1;
            let Entry {
                address,
                len,
                flags,
                next,
            } = self.entry(base + 16 * u64::from(index));
            let (has_next, write, is_indirect) = (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0);
            if is_indirect {
                if inside {
                    return Err(ChainFault::IndirectNested);
                }
                if !self.indirect {
                    return Err(ChainFault::IndirectNotNegotiated);
                }
                if has_next {
                    return Err(ChainFault::IndirectAndNext);
                }
                if len == 0 || len % 16 != 0 {
                    return Err(ChainFault::IndirectTableLength { len });
                }
                if len / 16 > 1024 {
                    return Err(ChainFault::IndirectTableTooLong { entries: len / 16 });
                }
                if u128::from(address) + u128::from(len) > u128::from(END) {
                    return Err(ChainFault::IndirectTableUnmapped { address, len });
                }
                limit = u16::try_from(len / 16).unwrap();
                (base, index, inside) = (address, 0, true);
                steps = 0;
                continue;
            }
            if len != 0 {
                if u128::from(address) + u128::from(len) >= 1 << 64 {
                    return Err(ChainFault::BufferOverflow { address, len });
                }
                let total: u64 = readable
                    .iter()
                    .chain(&writable)
                    .map(|s: &Segment| u64::from(s.len))
                    .sum();
                if total + u64::from(len) > 1 << 32 {
                    return Err(ChainFault::TooManyBytes);
                }
                let segment = rig::segment(address, len);
                if write {
                    writable.push(segment);
                } else if writable.is_empty() {
                    readable.push(segment);
                } else {
                    return Err(ChainFault::ReadableAfterWritable);
                }
            }
            if !has_next {
                return Ok((readable, writable));
            }
            if next >= limit {
                return Err(ChainFault::NextOutOfRange { next, limit });
            }
            index = next;
        }
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
    (
        proptest::collection::vec(len, 1..6),
        0usize..6,
        // A table at an aligned address mostly, sometimes at an odd one or over the region seam.
        prop_oneof![
            3 => Just(None),
            3 => (0u64..100).prop_map(|i| Some(TABLE + 0x100 * i)),
            1 => (0u64..100).prop_map(|i| Some(TABLE + 0x100 * i + 5)),
            1 => (1u64..90).prop_map(|i| Some(rig::SEAM - i)),
        ],
    )
        .prop_map(|(lens, readable, indirect)| Request {
            lens,
            readable,
            indirect,
        })
}

/// A change to some bytes of the descriptor table, available ring or a table: rare, and aimed at
/// the fields that matter.
#[derive(Clone, Copy, Debug)]
enum Corruption {
    Descriptor { index: u16, field: u64, value: u16 },
    AvailEntry { position: u16, head: u16 },
    AvailIdx { ahead: u16 },
    TableEntry { at: u64, field: u64, value: u16 },
}

fn corruption() -> impl Strategy<Value = Corruption> {
    // 16-bit pieces of a descriptor: the address's ends, the length's ends, flags and next.
    let field = prop_oneof![
        1 => Just(0u64), 1 => Just(6), 1 => Just(8), 1 => Just(10), 3 => Just(12), 3 => Just(14)
    ];
    let value = prop_oneof![4 => 0u16..20, 1 => any::<u16>(), 1 => Just(0xffff)];
    prop_oneof![
        8 => (0..SIZE, field.clone(), value.clone())
            .prop_map(|(index, field, value)| Corruption::Descriptor { index, field, value }),
        2 => (0..SIZE, 0..SIZE + 2)
            .prop_map(|(position, head)| Corruption::AvailEntry { position, head }),
        1 => prop_oneof![0..SIZE + 3, any::<u16>()]
            .prop_map(|ahead| Corruption::AvailIdx { ahead }),
        4 => (0u64..0x700, field, value)
            .prop_map(|(at, field, value)| Corruption::TableEntry { at, field, value }),
    ]
}

fn add(rig: &mut Rig, request: &Request) {
    let segments: Vec<_> = request
        .lens
        .iter()
        .zip(0u64..)
        .map(|(&len, i)| rig::segment(rig::BUFFERS + 0x1000 * i, len))
        .collect();
    let (readable, writable) = segments.split_at(request.readable.min(segments.len()));
    match request.indirect {
        None => {
            // A full ring is one request fewer.
            let _ = rig.guest.add_chain(readable, writable);
        }
        Some(table) if rig.guest.free() > 0 => {
            // By hand, because tables may lie over the seam, or over one another.
            for (i, segment) in segments.iter().enumerate() {
                let last = i + 1 == segments.len();
                let write = if i < readable.len() { 0 } else { 2 };
                let entry = Entry {
                    address: segment.addr.0,
                    len: segment.len,
                    flags: write | u16::from(!last),
                    next: if last {
                        0
                    } else {
                        u16::try_from(i).unwrap() + 1
                    },
                };
                let at = GuestAddress(table + 16 * u64::try_from(i).unwrap());
                rig.memory.write_slice(&entry.bytes(), at).unwrap();
            }
            let len = 16 * u32::try_from(segments.len()).unwrap();
            let descriptor = RawDescriptor {
                address: table,
                len,
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
        Corruption::AvailEntry { position, head } => rig.split().write_avail_entry(position, head),
        Corruption::AvailIdx { ahead } => {
            let idx = rig.next_avail().wrapping_add(ahead);
            rig.split().set_avail_idx(idx);
        }
        Corruption::TableEntry { at, field, value } => {
            let at = GuestAddress(TABLE + 16 * at + field);
            rig.memory.write_obj(value, at).unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn pop_agrees_with_a_naive_walker(
        start in prop_oneof![Just(0u16), any::<u16>(), 65520u16..],
        indirect in prop_oneof![9 => Just(true), 1 => Just(false)],
        requests in proptest::collection::vec(request(), 1..12),
        corruptions in prop_oneof![
            1 => Just(Vec::new()),
            3 => proptest::collection::vec(corruption(), 1..4),
        ],
        push_every in 1usize..4,
    ) {
        let features = RingFeatures { indirect_desc: indirect, ..RingFeatures::default() };
        let mut rig = Rig::starting_at(u32::from(SIZE), features, start);
        for request in &requests {
            add(&mut rig, request);
        }
        rig.guest.publish();
        for &corruption in &corruptions {
            corrupt(&mut rig, corruption);
        }

        let mut bytes = vec![0; usize::try_from(END).unwrap()];
        rig.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        let mut walker = Walker {
            bytes,
            table: rig.config.addresses.descriptor_area.0,
            available: rig.config.addresses.driver_area.0,
            indirect,
            next_avail: start,
            owned: Vec::new(),
            broken: false,
        };
        let mut held = Vec::new();
        // One more than a ring holds, to see it end.
        for step in 0..=usize::from(SIZE) + 1 {
            let expected = walker.pop();
            let mut token = None;
            let actual = match rig.pop() {
                Ok(Some(head)) => {
                    let index = head.index();
                    token = Some(head);
                    let chain = &rig.chain;
                    let total = |segments: &[Segment]| -> u64 {
                        segments.iter().map(|s| u64::from(s.len)).sum()
                    };
                    prop_assert_eq!(chain.readable_len(), total(chain.readable()));
                    prop_assert_eq!(chain.writable_len(), total(chain.writable()));
                    Outcome::Chain(index, chain.readable().to_vec(), chain.writable().to_vec())
                }
                Ok(None) => Outcome::Empty,
                Err(PopError::Chain { head, fault }) => {
                    let index = head.index();
                    token = Some(head);
                    Outcome::Fault(index, fault)
                }
                Err(PopError::Ring(fault)) => Outcome::Ring(fault),
                Err(other) => panic!("{other:?}"),
            };
            prop_assert_eq!(actual, expected);
            held.extend(token);
            if step % push_every == 0 && !held.is_empty() {
                let head = held.remove(0);
                walker.owned.retain(|&owned| owned != head.index());
                rig.queue.push(head, 0);
            }
            prop_assert_eq!(usize::from(rig.queue.in_flight()), walker.owned.len());
            prop_assert_eq!(rig.next_avail(), walker.next_avail);
        }
        for head in held {
            rig.queue.push(head, 0);
        }
    }
}
