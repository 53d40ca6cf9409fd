//! The device side of a packed ring over plain bytes: every result and every byte it should write.
//! Positions are steps round the ring, never arithmetic.

use vring::{ChainFault, RingFault};

use super::walk::walk;
use crate::device::room;
use crate::naive_memory::NaiveMemory;
use crate::naive_order::NaiveOrder;
use crate::naive_walk::Buffer;

const WRITE: u16 = 1 << 1;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// A descriptor of the ring, in one of the two kinds of passes (virtio 1.3 §2.8.1).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Position {
    pub(super) index: u16,
    pub(super) wrap: bool,
}

impl Position {
    pub(super) fn next(self, size: u16) -> Self {
        if self.index + 1 < size {
            Self {
                index: self.index + 1,
                ..self
            }
        } else {
            Self {
                index: 0,
                wrap: !self.wrap,
            }
        }
    }

    pub(super) fn previous(self, size: u16) -> Self {
        if self.index > 0 {
            Self {
                index: self.index - 1,
                ..self
            }
        } else {
            Self {
                index: size - 1,
                wrap: !self.wrap,
            }
        }
    }

    fn on(self, count: u16, size: u16) -> Self {
        (0..count).fold(self, |position, _| position.next(size))
    }

    /// As it is in an event structure (§2.8.10).
    pub(super) fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    pub(super) fn from_bits(bits: u16) -> Self {
        Self {
            index: bits & 0x7fff,
            wrap: bits >> 15 == 1,
        }
    }
}

/// The descriptors from `used` to `avail`, if a ring of `size` can be in that state.
pub(super) fn outstanding(avail: Position, used: Position, size: u16) -> Option<u16> {
    if avail.index >= size || used.index >= size {
        return None;
    }
    (0..=size).find(|&count| used.on(count, size) == avail)
}

/// Addresses of the three areas.
#[derive(Clone, Copy, Debug)]
pub(super) struct Areas {
    pub(super) descriptors: u64,
    pub(super) driver_event: u64,
    pub(super) device_event: u64,
}

impl Areas {
    /// Whether a ring of `size` can be here (virtio 1.3 §2.8; one region each, see `vring`).
    pub(super) fn hold(&self, memory: &NaiveMemory, size: u16) -> bool {
        let areas = [
            (self.descriptors, 16 * u64::from(size), 16),
            (self.driver_event, 4, 4),
            (self.device_event, 4, 4),
        ];
        areas
            .iter()
            .all(|&(at, len, alignment)| at % alignment == 0 && memory.in_one_region(at, len))
    }
}

/// What the ring features change.
#[derive(Clone, Copy, Debug)]
pub(super) struct Features {
    pub(super) indirect_desc: bool,
    pub(super) event_idx: bool,
    pub(super) in_order: bool,
}

/// The model's own name of a chain: heads and buffer ids come round again.
pub(super) type Serial = u32;

/// What a pop should return.
#[derive(Debug)]
pub(super) enum Popped {
    Nothing,
    Chain {
        serial: Serial,
        id: u16,
        buffers: Vec<Buffer>,
    },
    BadChain {
        serial: Serial,
        id: u16,
        fault: ChainFault,
    },
    Broken(RingFault),
}

/// What is known of a chain that the device has.
#[derive(Clone, Debug)]
pub(super) struct Key {
    pub(super) serial: Serial,
    id: u16,
    descriptors: u16,
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.serial == other.serial
    }
}

#[derive(Debug)]
pub(super) struct Model {
    pub(super) areas: Areas,
    pub(super) size: u16,
    pub(super) features: Features,
    pub(super) avail: Position,
    pub(super) used: Position,
    /// Descriptors from `used` to `avail`.
    outstanding: u16,
    /// Where the next used descriptor goes.
    next_used: Position,
    /// Chains between `used` and `next_used`, their descriptors, and the used descriptor that is
    /// written last of all.
    pub(super) staged: Vec<(u16, u32)>,
    staged_descriptors: u16,
    first_staged: [u8; 8],
    /// Descriptors published since the latest notification decision; `None` before the first.
    undecided: Option<u32>,
    pub(super) owned: NaiveOrder<Key>,
    latest: Option<Serial>,
    next_serial: Serial,
    pub(super) fault: Option<RingFault>,
    reported: bool,
    pub(super) lost: bool,
    kicks_disabled: bool,
}

impl Model {
    /// What starting a queue does; `None` if it should be refused. The areas hold it.
    pub(super) fn start(
        memory: &mut NaiveMemory,
        areas: Areas,
        size: u16,
        features: Features,
        (avail, used): (Position, Position),
    ) -> Option<Self> {
        let outstanding = outstanding(avail, used, size)?;
        memory.write(areas.device_event, &[0; 4]);
        Some(Self {
            areas,
            size,
            features,
            avail,
            used,
            outstanding,
            next_used: used,
            staged: Vec::new(),
            staged_descriptors: 0,
            first_staged: [0; 8],
            undecided: None,
            owned: NaiveOrder::new(),
            latest: None,
            next_serial: 0,
            fault: None,
            reported: false,
            lost: false,
            kicks_disabled: false,
        })
    }

    fn slot(&self, position: Position) -> u64 {
        self.areas.descriptors + 16 * u64::from(position.index)
    }

    fn is_available(&self, memory: &NaiveMemory) -> bool {
        let flags = memory.word(self.slot(self.avail) + 14);
        let wanted = if self.avail.wrap { AVAIL } else { USED };
        flags & (AVAIL | USED) == wanted
    }

    pub(super) fn pop(&mut self, memory: &NaiveMemory) -> Popped {
        if let Some(fault) = self.fault {
            let first = !std::mem::replace(&mut self.reported, true);
            return if first {
                Popped::Broken(fault)
            } else {
                Popped::Nothing
            };
        }
        if !self.is_available(memory) {
            return Popped::Nothing;
        }
        let limit = self.size - self.outstanding;
        let ring = (self.areas.descriptors, self.size);
        let indirect_desc = self.features.indirect_desc;
        let Some(chain) = walk(memory, ring, self.avail, limit, indirect_desc) else {
            return self.broken(RingFault::ChainOverrun { limit });
        };
        let id = chain.id;
        if self.owned.iter().any(|other| other.key.id == id) {
            return self.broken(RingFault::BufferIdInFlight { id });
        }
        let serial = self.next_serial;
        self.next_serial += 1;
        self.latest = Some(serial);
        self.avail = self.avail.on(chain.descriptors, self.size);
        self.outstanding += chain.descriptors;
        let key = Key {
            serial,
            id,
            descriptors: chain.descriptors,
        };
        let room = chain.buffers.as_deref().ok().map(room);
        self.owned.arrive(key, room);
        match chain.buffers {
            Ok(buffers) => Popped::Chain {
                serial,
                id,
                buffers,
            },
            Err(fault) => Popped::BadChain { serial, id, fault },
        }
    }

    fn broken(&mut self, fault: RingFault) -> Popped {
        self.fault = Some(fault);
        self.reported = true;
        Popped::Broken(fault)
    }

    fn key(&self, serial: Serial) -> Key {
        let mut chains = self.owned.iter();
        let chain = chains.find(|chain| chain.key.serial == serial);
        chain.expect("it is in flight").key.clone()
    }

    /// Bytes there are to write, if the chain is sound.
    pub(super) fn room(&self, serial: Serial) -> Option<u64> {
        let mut chains = self.owned.iter();
        chains.find(|chain| chain.key.serial == serial)?.room
    }

    /// Whether the chain can be taken back; if so, it is.
    pub(super) fn unpop(&mut self, serial: Serial) -> bool {
        if self.latest != Some(serial) {
            return false;
        }
        self.latest = None;
        let chain = self.owned.remove(&self.key(serial)).key;
        self.outstanding -= chain.descriptors;
        self.avail = (0..chain.descriptors).fold(self.avail, |at, _| at.previous(self.size));
        true
    }

    pub(super) fn push(&mut self, memory: &mut NaiveMemory, serial: Serial, len: u32) {
        let key = self.key(serial);
        if self.latest == Some(serial) {
            self.latest = None;
        }
        if self.features.in_order {
            self.owned.complete(&key, len);
            return;
        }
        self.owned.remove(&key);
        if !self.lost {
            self.stage(memory, key.id, len, key.descriptors);
            self.staged.push((key.id, len));
        }
    }

    /// The used descriptor of chains that take so many descriptors (§2.8.4).
    fn stage(&mut self, memory: &mut NaiveMemory, id: u16, len: u32, descriptors: u16) {
        let mut flags = if self.next_used.wrap { AVAIL | USED } else { 0 };
        if len > 0 {
            flags |= WRITE;
        }
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&len.to_le_bytes());
        bytes[4..6].copy_from_slice(&id.to_le_bytes());
        bytes[6..].copy_from_slice(&flags.to_le_bytes());
        if self.staged_descriptors == 0 {
            self.first_staged = bytes;
        } else {
            memory.write(self.slot(self.next_used) + 8, &bytes);
        }
        self.next_used = self.next_used.on(descriptors, self.size);
        self.staged_descriptors += descriptors;
    }

    /// What is published: buffer ids and lengths.
    pub(super) fn publish(&mut self, memory: &mut NaiveMemory) -> Vec<(u16, u32)> {
        if self.features.in_order && !self.lost {
            for group in self.owned.turns() {
                let descriptors = group.iter().map(|(key, _)| key.descriptors).sum();
                if let Some((last, len)) = group.last() {
                    self.stage(memory, last.id, *len, descriptors);
                }
                self.staged
                    .extend(group.iter().map(|(key, len)| (key.id, *len)));
            }
        }
        if !self.staged.is_empty() {
            memory.write(self.slot(self.used) + 8, &self.first_staged);
        }
        let passed = std::mem::take(&mut self.staged_descriptors);
        self.used = self.next_used;
        self.outstanding -= passed;
        if let Some(undecided) = &mut self.undecided {
            *undecided += u32::from(passed);
        }
        std::mem::take(&mut self.staged)
    }

    pub(super) fn should_notify(&mut self, memory: &NaiveMemory) -> bool {
        let published = self.undecided.replace(0);
        if published == Some(0) || self.lost {
            return false;
        }
        let event = Position::from_bits(memory.word(self.areas.driver_event));
        match memory.word(self.areas.driver_event + 2) & 3 {
            1 => false,
            2 if self.features.event_idx => {
                // After two passes every position was among those passed.
                let all = 2 * u32::from(self.size);
                let count = published.unwrap_or(all).min(all);
                let mut at = self.used;
                (0..count).any(|_| {
                    at = at.previous(self.size);
                    at == event
                })
            }
            _ => true,
        }
    }

    pub(super) fn enable_notification(&mut self, memory: &mut NaiveMemory) -> bool {
        if self.fault.is_some() {
            return true;
        }
        let (desc, flags) = if self.features.event_idx {
            (self.avail.bits(), 2)
        } else {
            (0, 0)
        };
        self.write_event(memory, desc, flags);
        self.kicks_disabled = false;
        !self.is_available(memory)
    }

    /// The device writes the flag once, whatever the guest makes of it afterwards.
    pub(super) fn disable_notification(&mut self, memory: &mut NaiveMemory) {
        if !self.lost && !self.kicks_disabled {
            self.write_event(memory, 0, 1);
            self.kicks_disabled = true;
        }
    }

    fn write_event(&self, memory: &mut NaiveMemory, desc: u16, flags: u16) {
        memory.write(self.areas.device_event, &desc.to_le_bytes());
        memory.write(self.areas.device_event + 2, &flags.to_le_bytes());
    }

    pub(super) fn has_available(&self, memory: &NaiveMemory) -> bool {
        match self.fault {
            Some(_) => !self.reported,
            None => self.is_available(memory),
        }
    }

    /// Whether the ring moves to `areas`; if not, it has lost its memory.
    pub(super) fn set_memory(&mut self, memory: &NaiveMemory, areas: Areas) -> bool {
        if self.lost {
            return false;
        }
        if areas.hold(memory, self.size) {
            self.areas = areas;
            return true;
        }
        self.fault.get_or_insert(RingFault::MemoryLost);
        self.lost = true;
        self.staged.clear();
        self.staged_descriptors = 0;
        self.next_used = self.used;
        false
    }

    /// Whether a chain would be forgotten if another device took over now.
    pub(super) fn is_idle(&self) -> bool {
        self.owned.iter().next().is_none() && self.staged.is_empty()
    }
}
