//! From a request to descriptors and bytes in guest memory.

use vm_memory::{Bytes, GuestAddress};
use vring::driver::{F_INDIRECT, F_NEXT, F_WRITE, SplitDriver};

use super::input::{Cut, Field, Framing, Poke, Request};
use super::planes::Memory;

/// Where buffers and tables begin; the ring is below.
pub(super) const BUFFERS: u64 = 0x2000;
const END: u64 = 0x1_8000;

/// Hands out guest memory and descriptors to the requests of one batch.
#[derive(Debug)]
pub(super) struct Framer<'a> {
    memory: &'a Memory,
    descriptor_table: u64,
    size: u16,
    next_descriptor: u16,
    next_byte: u64,
    /// Where each descriptor of the batch is in guest memory.
    pub(super) descriptors: Vec<u64>,
    /// Makes each request's data another.
    seed: u8,
}

struct Buffer {
    addr: u64,
    len: u32,
    flags: u16,
}

impl<'a> Framer<'a> {
    pub(super) fn new(memory: &'a Memory, descriptor_table: u64, size: u16) -> Self {
        Self {
            memory,
            descriptor_table,
            size,
            next_descriptor: 0,
            next_byte: BUFFERS,
            descriptors: Vec::new(),
            seed: 0,
        }
    }

    fn take(&mut self, len: u64, alignment: u64, gap: u64) -> Option<u64> {
        let at = (self.next_byte + gap).next_multiple_of(alignment);
        (at + len <= END).then(|| {
            self.next_byte = at + len;
            at
        })
    }

    /// Writes a request, offers it and returns its head; `None` if there is no room left for it.
    pub(super) fn add(
        &mut self,
        guest: &mut SplitDriver<Memory>,
        request: &Request,
    ) -> Option<u16> {
        let before = (self.next_byte, self.next_descriptor, self.descriptors.len());
        let head = self.try_add(guest, request);
        if head.is_none() {
            (self.next_byte, self.next_descriptor) = (before.0, before.1);
            self.descriptors.truncate(before.2);
        }
        head
    }

    fn try_add(&mut self, guest: &mut SplitDriver<Memory>, request: &Request) -> Option<u16> {
        self.seed = self.seed.wrapping_add(0x35);
        let mut readable = [0; 16].to_vec();
        readable[..4].copy_from_slice(&request.kind.to_le_bytes());
        readable[4..8].copy_from_slice(&request.ioprio.to_le_bytes());
        readable[8..].copy_from_slice(&request.sector.to_le_bytes());
        readable.resize(usize::try_from(request.header_len).ok()?, 0x5a);
        let seed = self.seed;
        let pattern = (0..request.data_out).map(|at| (at ^ at >> 8).to_le_bytes()[0] ^ seed);
        let mut data: Vec<u8> = pattern.collect();
        for (place, (sector, sectors, flags)) in data.chunks_mut(16).zip(&request.segments) {
            let mut segment = [0; 16];
            segment[..8].copy_from_slice(&sector.to_le_bytes());
            segment[8..12].copy_from_slice(&sectors.to_le_bytes());
            segment[12..].copy_from_slice(&flags.to_le_bytes());
            place.copy_from_slice(&segment[..place.len()]);
        }
        readable.extend(data);

        let mut buffers = Vec::new();
        let mut content = readable.as_slice();
        for len in pieces(&request.cut, request.header_len, request.data_out) {
            let addr = self.take(u64::from(len), request.alignment, u64::from(request.gap))?;
            let (piece, rest) = content.split_at(usize::try_from(len).ok()?);
            self.memory.write_slice(piece, GuestAddress(addr)).ok()?;
            content = rest;
            buffers.push(Buffer {
                addr,
                len,
                flags: 0,
            });
        }
        for len in pieces(&request.cut, request.data_in, request.status_len) {
            let addr = self.take(u64::from(len), request.alignment, u64::from(request.gap))?;
            buffers.push(Buffer {
                addr,
                len,
                flags: F_WRITE,
            });
        }
        if buffers.is_empty() {
            buffers.push(Buffer {
                addr: BUFFERS,
                len: 0,
                flags: 0,
            });
        }

        let direct = match request.framing {
            Framing::Direct => buffers.len(),
            Framing::Indirect => 0,
            Framing::Mixed { direct } => usize::from(direct).min(buffers.len() - 1),
        };
        let rest = buffers.split_off(direct);
        if !rest.is_empty() {
            let table = self.take(16 * rest.len() as u64, 16, u64::from(request.gap % 3))?;
            for (index, buffer) in (0u16..).zip(&rest) {
                let at = table + 16 * u64::from(index);
                let more = if usize::from(index) + 1 < rest.len() {
                    F_NEXT
                } else {
                    0
                };
                let mut bytes = [0; 16];
                bytes[..8].copy_from_slice(&buffer.addr.to_le_bytes());
                bytes[8..12].copy_from_slice(&buffer.len.to_le_bytes());
                bytes[12..14].copy_from_slice(&(buffer.flags | more).to_le_bytes());
                bytes[14..].copy_from_slice(&(index + 1).to_le_bytes());
                self.memory.write_slice(&bytes, GuestAddress(at)).ok()?;
                self.descriptors.push(at);
            }
            let len = u32::try_from(16 * rest.len()).ok()?;
            buffers.push(Buffer {
                addr: table,
                len,
                flags: F_INDIRECT,
            });
        }
        self.chain(guest, &buffers, request.reversed)
    }

    fn chain(
        &mut self,
        guest: &mut SplitDriver<Memory>,
        buffers: &[Buffer],
        reversed: bool,
    ) -> Option<u16> {
        let count = u16::try_from(buffers.len()).ok()?;
        let first = self.next_descriptor;
        if first + count > self.size {
            return None;
        }
        self.next_descriptor = first + count;
        let index = |place: u16| {
            if reversed {
                first + count - 1 - place
            } else {
                first + place
            }
        };
        for (place, buffer) in (0..count).zip(buffers) {
            let (flags, next) = if place + 1 < count {
                (buffer.flags | F_NEXT, index(place + 1))
            } else {
                (buffer.flags, 0)
            };
            guest.write_desc(index(place), buffer.addr, buffer.len, flags, next);
            self.descriptors
                .push(self.descriptor_table + 16 * u64::from(index(place)));
        }
        guest.offer(index(0));
        Some(index(0))
    }

    pub(super) fn poke(&self, poke: Poke) {
        let Some(&at) = self
            .descriptors
            .get(usize::from(poke.which) % self.descriptors.len().max(1))
        else {
            return;
        };
        let write = |offset, bytes: &[u8]| {
            self.memory
                .write_slice(bytes, GuestAddress(at + offset))
                .expect("a descriptor is there");
        };
        match poke.field {
            Field::Addr(addr) => write(0, &addr.to_le_bytes()),
            Field::Len(len) => write(8, &len.to_le_bytes()),
            Field::Flags(flags) => write(12, &flags.to_le_bytes()),
            Field::Next(next) => write(14, &next.to_le_bytes()),
        }
    }
}

/// Lengths of the buffers of one direction, which is `first` and `second` bytes long.
fn pieces(cut: &Cut, first: u32, second: u32) -> Vec<u32> {
    let total = first + second;
    match cut {
        Cut::Usual => [first, second].into_iter().filter(|&len| len > 0).collect(),
        Cut::Joined => [total].into_iter().filter(|&len| len > 0).collect(),
        Cut::At(places) => {
            let mut places: Vec<u32> = places
                .iter()
                .map(|&place| u32::from(place) % (total + 1))
                .collect();
            places.sort_unstable();
            let mut last = 0;
            let mut lens = Vec::new();
            for place in places.into_iter().chain([total]) {
                lens.push(place - last);
                last = place;
            }
            lens
        }
        Cut::Every(step) => {
            let step = u32::from(*step);
            (0..total.div_ceil(step))
                .map(|piece| step.min(total - piece * step))
                .collect()
        }
    }
}
