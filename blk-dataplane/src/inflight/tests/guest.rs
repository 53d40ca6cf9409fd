//! A driver as the specification has it, that can be copied: what it knows at the moment of a kill.

use std::collections::BTreeMap;

use vm_memory::{Bytes, GuestAddress};

use super::{DESCRIPTORS, DEVICE, DRIVER, Memory};

const F_NEXT: u16 = 1;
const F_AVAIL: u16 = 1 << 7;
const F_USED: u16 = 1 << 15;

#[derive(Clone, Debug)]
pub(super) struct Guest {
    packed: bool,
    size: u16,
    /// Split: free descriptors. Packed: free buffer ids.
    free: Vec<u16>,
    /// Split: `avail.idx`. Packed: where the next chain goes.
    avail: u16,
    avail_wrap: bool,
    /// What of the used ring has been looked at.
    used: u16,
    used_wrap: bool,
    /// By id: what is waited for, its name and its descriptors.
    pub(super) waiting: BTreeMap<u16, (u64, Vec<u16>)>,
    /// Descriptors that could be made available.
    pub(super) room: u16,
    /// Of the next chain, in the address of each of its buffers.
    next_name: u64,
}

impl Guest {
    pub(super) fn new(packed: bool, size: u16) -> Self {
        Self {
            packed,
            size,
            free: (0..size).collect(),
            avail: 0,
            avail_wrap: true,
            used: 0,
            used_wrap: true,
            waiting: BTreeMap::new(),
            room: size,
            next_name: 1,
        }
    }

    /// Makes a chain of `len` descriptors available, if there is room.
    pub(super) fn offer(&mut self, memory: &Memory, len: u16) {
        if len > self.room {
            return;
        }
        self.room -= len;
        let name = self.next_name;
        self.next_name += 1;
        if self.packed {
            self.offer_packed(memory, name, len);
        } else {
            self.offer_split(memory, name, len);
        }
    }

    fn offer_split(&mut self, memory: &Memory, name: u64, len: u16) {
        let descriptors: Vec<u16> = (0..len).map(|_| self.free.pop().unwrap()).collect();
        for (i, &descriptor) in descriptors.iter().enumerate() {
            let at = GuestAddress(DESCRIPTORS + 16 * u64::from(descriptor));
            let next = descriptors.get(i + 1).copied();
            memory.write_obj(name << 12, at).unwrap();
            memory.write_obj(1u32, GuestAddress(at.0 + 8)).unwrap();
            let flags = if next.is_some() { F_NEXT } else { 0 };
            memory.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
            memory
                .write_obj(next.unwrap_or(0), GuestAddress(at.0 + 14))
                .unwrap();
        }
        let head = descriptors[0];
        let entry = DRIVER + 4 + 2 * u64::from(self.avail % self.size);
        memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        memory
            .write_obj(self.avail, GuestAddress(DRIVER + 2))
            .unwrap();
        self.waiting.insert(head, (name, descriptors));
    }

    fn offer_packed(&mut self, memory: &Memory, name: u64, len: u16) {
        let id = self.free.pop().unwrap();
        for i in 0..len {
            let at = GuestAddress(DESCRIPTORS + 16 * u64::from(self.avail));
            memory.write_obj(name << 12, at).unwrap();
            memory.write_obj(1u32, GuestAddress(at.0 + 8)).unwrap();
            memory.write_obj(id, GuestAddress(at.0 + 12)).unwrap();
            let available = if self.avail_wrap { F_AVAIL } else { F_USED };
            let next = if i + 1 < len { F_NEXT } else { 0 };
            memory
                .write_obj(available | next, GuestAddress(at.0 + 14))
                .unwrap();
            (self.avail, self.avail_wrap) = self.after((self.avail, self.avail_wrap), 1);
        }
        let descriptors = (0..len).collect();
        self.waiting.insert(id, (name, descriptors));
    }

    /// Takes what is given back. Panics if that was not waited for.
    pub(super) fn reap(&mut self, memory: &Memory) -> usize {
        let mut count = 0;
        while let Some(id) = self.next_used(memory) {
            let (_, descriptors) = self
                .waiting
                .remove(&id)
                .unwrap_or_else(|| panic!("{id} is completed, and was not waited for"));
            let len = u16::try_from(descriptors.len()).unwrap();
            self.room += len;
            if self.packed {
                self.free.push(id);
                (self.used, self.used_wrap) = self.after((self.used, self.used_wrap), len);
            } else {
                self.free.extend(descriptors);
                self.used = self.used.wrapping_add(1);
            }
            count += 1;
        }
        count
    }

    fn next_used(&self, memory: &Memory) -> Option<u16> {
        if self.packed {
            let at = DESCRIPTORS + 16 * u64::from(self.used);
            let flags: u16 = memory.read_obj(GuestAddress(at + 14)).unwrap();
            let used = if self.used_wrap { F_AVAIL | F_USED } else { 0 };
            // Before the first pass has come round all descriptors are zero, which is not its `used`.
            (flags & (F_AVAIL | F_USED) == used && !self.waiting.is_empty())
                .then(|| memory.read_obj(GuestAddress(at + 12)).unwrap())
        } else {
            let idx: u16 = memory.read_obj(GuestAddress(DEVICE + 2)).unwrap();
            let at = DEVICE + 4 + 8 * u64::from(self.used % self.size);
            (idx != self.used)
                .then(|| memory.read_obj::<u32>(GuestAddress(at)).unwrap())
                .map(|id| u16::try_from(id).unwrap())
        }
    }

    fn after(&self, (index, wrap): (u16, bool), count: u16) -> (u16, bool) {
        if index + count < self.size {
            (index + count, wrap)
        } else {
            (index + count - self.size, !wrap)
        }
    }
}
