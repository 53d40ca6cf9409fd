//! The naive model, and where things are in memory.

use vm_memory::GuestAddress;
use vring::{ChainFault, PackedPosition, RingFault, RingFeatures, Segment};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;
pub(crate) const AVAIL: u16 = 1 << 7;
pub(crate) const USED: u16 = 1 << 15;

pub(crate) const DRIVER_EVENT: usize = 0x100;
pub(crate) const DEVICE_EVENT: usize = 0x200;
pub(crate) const RING: usize = 0x300;
pub(crate) const TABLES: u64 = 0x400;
/// Where the second region of memory starts, right after the first.
pub(crate) const SEAM: u64 = 0x1000;
pub(crate) const END: usize = 0x1400;
/// Nothing looks at the buffers, so they need not be in memory.
pub(crate) const BUFFERS: u64 = 0x2000;

/// The bytes of memory, and one position and one list of everything.
#[derive(Clone)]
pub(crate) struct Model {
    pub(crate) bytes: Vec<u8>,
    pub(crate) size: u16,
    pub(crate) features: RingFeatures,
    pub(crate) avail: PackedPosition,
    pub(crate) used: PackedPosition,
    pub(crate) next_used: PackedPosition,
    /// Descriptors from `used` to `avail`.
    pub(crate) outstanding: u16,
    /// Chains the driver has not got back, in the order they were popped.
    pub(crate) chains: Vec<Owned>,
    /// Chains staged, and the used descriptor that is not written yet.
    pub(crate) staged: usize,
    pub(crate) first_staged: Option<(u16, u32, u16)>,
    /// Every descriptor passed since the last decision, and whether there was one.
    pub(crate) passed: Vec<PackedPosition>,
    pub(crate) decided: bool,
    pub(crate) latest: Option<u32>,
    pub(crate) next_number: u32,
    pub(crate) fault: Option<RingFault>,
}

/// A chain popped.
#[derive(Clone, Debug)]
pub(crate) struct Owned {
    pub(crate) number: u32,
    pub(crate) id: u16,
    pub(crate) descriptors: u16,
    /// Bytes it has room for, unless it is broken.
    pub(crate) writable: Option<u64>,
    /// With IN_ORDER: pushed with that length, and waiting.
    pub(crate) written: Option<u32>,
}

/// What a pop gives; the number is the model's own name of the chain.
#[derive(Debug, PartialEq)]
pub(crate) enum Popped {
    Empty,
    Chain(u32, Vec<Segment>, Vec<Segment>),
    Broken(u32, ChainFault),
    Ring(RingFault),
}

/// One descriptor, as it is in memory.
#[derive(Clone, Copy)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) id: u16,
    pub(crate) flags: u16,
}

pub(crate) fn step(position: &mut PackedPosition, size: u16) {
    position.index += 1;
    if position.index == size {
        position.index = 0;
        position.wrap = !position.wrap;
    }
}

pub(crate) fn used_bits(wrap: bool) -> u16 {
    if wrap { AVAIL | USED } else { 0 }
}

impl Model {
    pub(crate) fn new(size: u16, features: RingFeatures, at: PackedPosition) -> Self {
        let mut model = Self {
            bytes: vec![0; END],
            size,
            features,
            avail: at,
            used: at,
            next_used: at,
            outstanding: 0,
            chains: Vec::new(),
            staged: 0,
            first_staged: None,
            passed: Vec::new(),
            decided: false,
            latest: None,
            next_number: 0,
            fault: None,
        };
        // What is left of the passes before: used descriptors.
        for index in 0..size {
            let wrap = if index < at.index { at.wrap } else { !at.wrap };
            model.write_tail(index, 0, 0, used_bits(wrap));
        }
        model
    }

    pub(crate) fn read<const N: usize>(&self, at: usize) -> [u8; N] {
        self.bytes[at..at + N].try_into().unwrap()
    }

    pub(crate) fn descriptor(&self, at: usize) -> Descriptor {
        Descriptor {
            address: u64::from_le_bytes(self.read(at)),
            len: u32::from_le_bytes(self.read(at + 8)),
            id: u16::from_le_bytes(self.read(at + 12)),
            flags: u16::from_le_bytes(self.read(at + 14)),
        }
    }

    pub(crate) fn write_tail(&mut self, index: u16, len: u32, id: u16, flags: u16) {
        let at = RING + 16 * usize::from(index) + 8;
        self.bytes[at..at + 4].copy_from_slice(&len.to_le_bytes());
        self.bytes[at + 4..at + 6].copy_from_slice(&id.to_le_bytes());
        self.bytes[at + 6..at + 8].copy_from_slice(&flags.to_le_bytes());
    }

    pub(crate) fn write_device_event(&mut self, desc: u16, flags: u16) {
        self.bytes[DEVICE_EVENT..DEVICE_EVENT + 2].copy_from_slice(&desc.to_le_bytes());
        self.bytes[DEVICE_EVENT + 2..DEVICE_EVENT + 4].copy_from_slice(&flags.to_le_bytes());
    }

    pub(crate) fn is_available(&self) -> bool {
        let flags = self
            .descriptor(RING + 16 * usize::from(self.avail.index))
            .flags;
        (flags & AVAIL != 0) == self.avail.wrap && (flags & USED != 0) != self.avail.wrap
    }

    pub(crate) fn pop(&mut self) -> Popped {
        if self.fault.is_some() || !self.is_available() {
            return Popped::Empty;
        }
        let limit = self.size - self.outstanding;
        let mut descriptors = Vec::new();
        let mut position = self.avail;
        loop {
            if descriptors.len() == usize::from(limit) {
                let fault = RingFault::ChainOverrun { limit };
                self.fault = Some(fault);
                return Popped::Ring(fault);
            }
            let descriptor = self.descriptor(RING + 16 * usize::from(position.index));
            descriptors.push(descriptor);
            step(&mut position, self.size);
            if descriptor.flags & NEXT == 0 {
                break;
            }
        }
        let id = descriptors.last().unwrap().id;
        if self.chains.iter().any(|chain| chain.id == id) {
            let fault = RingFault::BufferIdInFlight { id };
            self.fault = Some(fault);
            return Popped::Ring(fault);
        }
        let count = u16::try_from(descriptors.len()).unwrap();
        let number = self.next_number;
        self.next_number += 1;
        self.avail = position;
        self.outstanding += count;
        self.latest = Some(number);
        let collected = self.collect(&descriptors);
        self.chains.push(Owned {
            number,
            id,
            descriptors: count,
            writable: collected
                .as_ref()
                .ok()
                .map(|(_, writable)| writable.iter().map(|s| u64::from(s.len)).sum()),
            written: None,
        });
        match collected {
            Ok((readable, writable)) => Popped::Chain(number, readable, writable),
            Err(fault) => Popped::Broken(number, fault),
        }
    }

    /// The buffers of a chain, or the first rule it breaks.
    pub(crate) fn collect(
        &self,
        descriptors: &[Descriptor],
    ) -> Result<(Vec<Segment>, Vec<Segment>), ChainFault> {
        let mut buffers = Buffers::default();
        for (i, descriptor) in descriptors.iter().enumerate() {
            let &Descriptor {
                address,
                len,
                flags,
                ..
            } = descriptor;
            if flags & INDIRECT == 0 {
                buffers.add(address, len, flags)?;
                continue;
            }
            if !self.features.indirect_desc {
                return Err(ChainFault::IndirectNotNegotiated);
            }
            if flags & NEXT != 0 {
                return Err(ChainFault::IndirectAndNext);
            }
            if i != 0 {
                return Err(ChainFault::IndirectAmongDirect);
            }
            if len == 0 || len % 16 != 0 {
                return Err(ChainFault::IndirectTableLength { len });
            }
            if len / 16 > 1024 {
                return Err(ChainFault::IndirectTableTooLong { entries: len / 16 });
            }
            if u128::from(address) + u128::from(len) > u128::try_from(END).unwrap() {
                return Err(ChainFault::IndirectTableUnmapped { address, len });
            }
            let table = usize::try_from(address).unwrap();
            for entry in 0..usize::try_from(len / 16).unwrap() {
                let Descriptor {
                    address,
                    len,
                    flags,
                    ..
                } = self.descriptor(table + 16 * entry);
                buffers.add(address, len, flags & WRITE)?;
            }
        }
        Ok((buffers.readable, buffers.writable))
    }

    pub(crate) fn unpop(&mut self, number: u32) -> bool {
        let Some(chain) = self.chains.last() else {
            return false;
        };
        if self.latest != Some(number) || chain.number != number || chain.written.is_some() {
            return false;
        }
        // As many steps forward as lead back.
        let two_passes = 2 * u32::from(self.size);
        for _ in 0..two_passes - u32::from(chain.descriptors) {
            step(&mut self.avail, self.size);
        }
        self.outstanding -= chain.descriptors;
        self.chains.pop();
        self.latest = None;
        true
    }

    pub(crate) fn push(&mut self, number: u32, len: u32) {
        let at = self
            .chains
            .iter()
            .position(|chain| chain.number == number)
            .unwrap();
        if self.features.in_order {
            self.chains[at].written = Some(len);
        } else {
            let chain = self.chains.remove(at);
            self.stage(chain.id, len, chain.descriptors);
            self.staged += 1;
        }
    }

    /// A used descriptor: at once, but for the first of a batch.
    pub(crate) fn stage(&mut self, id: u16, len: u32, descriptors: u16) {
        let write = if len == 0 { 0 } else { WRITE };
        let flags = used_bits(self.next_used.wrap) | write;
        if self.next_used == self.used {
            self.first_staged = Some((id, len, flags));
        } else {
            self.write_tail(self.next_used.index, len, id, flags);
        }
        for _ in 0..descriptors {
            step(&mut self.next_used, self.size);
        }
    }

    pub(crate) fn publish(&mut self) -> usize {
        while self.features.in_order {
            // A run: chains pushed, all but the last with all they have room for.
            let mut run = 0;
            for chain in &self.chains {
                let Some(written) = chain.written else { break };
                run += 1;
                if chain.writable != Some(u64::from(written)) {
                    break;
                }
            }
            let run: Vec<_> = self.chains.drain(..run).collect();
            let Some(last) = run.last() else { break };
            let descriptors = run.iter().map(|chain| chain.descriptors).sum();
            self.stage(last.id, last.written.unwrap(), descriptors);
            self.staged += run.len();
        }
        if let Some((id, len, flags)) = self.first_staged.take() {
            self.write_tail(self.used.index, len, id, flags);
        }
        // A full batch ends where it began, one pass on.
        while self.used != self.next_used {
            self.passed.push(self.used);
            step(&mut self.used, self.size);
            self.outstanding -= 1;
        }
        std::mem::take(&mut self.staged)
    }

    pub(crate) fn should_notify(&mut self) -> bool {
        let passed = std::mem::take(&mut self.passed);
        let first = !std::mem::replace(&mut self.decided, true);
        if passed.is_empty() && !first {
            return false;
        }
        let desc = u16::from_le_bytes(self.read(DRIVER_EVENT));
        let asked = PackedPosition::from_bits(desc);
        let flags = u16::from_le_bytes(self.read(DRIVER_EVENT + 2));
        match (flags & 3, self.features.event_idx) {
            (1, _) => false,
            (2, true) => asked.index < self.size && (first || passed.contains(&asked)),
            _ => true,
        }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.chains
            .iter()
            .filter(|chain| chain.written.is_none())
            .count()
    }
}

/// The buffers of a chain so far.
#[derive(Default)]
pub(crate) struct Buffers {
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

impl Buffers {
    pub(crate) fn add(&mut self, address: u64, len: u32, flags: u16) -> Result<(), ChainFault> {
        if len == 0 {
            return Ok(());
        }
        if u128::from(address) + u128::from(len) >= 1 << 64 {
            return Err(ChainFault::BufferOverflow { address, len });
        }
        let all = self.readable.iter().chain(&self.writable);
        let total: u64 = all.map(|segment| u64::from(segment.len)).sum();
        if total + u64::from(len) > 1 << 32 {
            return Err(ChainFault::TooManyBytes);
        }
        if flags & WRITE != 0 {
            self.writable.push(segment(address, len));
        } else if self.writable.is_empty() {
            self.readable.push(segment(address, len));
        } else {
            return Err(ChainFault::ReadableAfterWritable);
        }
        Ok(())
    }
}

pub(crate) fn segment(address: u64, len: u32) -> Segment {
    Segment {
        addr: GuestAddress(address),
        len,
    }
}
