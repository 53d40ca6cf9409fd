//! A chain of a packed ring by the letter of virtio 1.3 §2.8.5 - §2.8.7, over plain bytes.

use vring::ChainFault;

use super::model::Position;
use crate::naive_memory::NaiveMemory;
use crate::naive_walk::{Buffer, Gathered, indirect_table};

#[derive(Clone, Copy)]
struct Descriptor {
    addr: u64,
    len: u32,
    id: u16,
    next: bool,
    writable: bool,
    indirect: bool,
}

fn descriptor(memory: &NaiveMemory, table: u64, index: u16) -> Descriptor {
    let at = table + 16 * u64::from(index);
    let missing = "the table is mapped";
    let flags = memory.word(at + 14);
    Descriptor {
        addr: u64::from_le_bytes(memory.read(at).expect(missing)),
        len: u32::from_le_bytes(memory.read(at + 8).expect(missing)),
        id: memory.word(at + 12),
        next: flags & 1 != 0,
        writable: flags & 2 != 0,
        indirect: flags & 4 != 0,
    }
}

/// A chain whose end is in the ring.
pub(super) struct Walked {
    pub(super) id: u16,
    pub(super) descriptors: u16,
    /// Empty ones left out; or the first fault in the chain's order.
    pub(super) buffers: Result<Vec<Buffer>, ChainFault>,
}

/// The chain at `start`, or `None` if it does not end within `limit` descriptors.
pub(super) fn walk(
    memory: &NaiveMemory,
    (ring, size): (u64, u16),
    start: Position,
    limit: u16,
    indirect_desc: bool,
) -> Option<Walked> {
    let mut list = Vec::new();
    let mut at = start;
    for descriptors in 1..=limit {
        let found = descriptor(memory, ring, at.index);
        at = at.next(size);
        list.push(found);
        if !found.next {
            return Some(Walked {
                id: found.id,
                descriptors,
                buffers: collect(memory, &list, indirect_desc),
            });
        }
    }
    None
}

fn collect(
    memory: &NaiveMemory,
    list: &[Descriptor],
    indirect_desc: bool,
) -> Result<Vec<Buffer>, ChainFault> {
    let mut met = Gathered::default();
    let mut take = |found: Descriptor| {
        met.append(Buffer {
            addr: found.addr,
            len: found.len,
            writable: found.writable,
        })
    };
    for found in list {
        if !found.indirect {
            take(*found)?;
            continue;
        }
        if !indirect_desc {
            return Err(ChainFault::IndirectNotNegotiated);
        }
        if found.next {
            return Err(ChainFault::IndirectAndNext);
        }
        if list.len() > 1 {
            return Err(ChainFault::IndirectAmongDirect);
        }
        // All entries are part of the chain; no flag of theirs but WRITE means anything.
        let (table, entries) = indirect_table(memory, found.addr, found.len)?;
        for index in 0..entries {
            take(descriptor(memory, table, index))?;
        }
    }
    Ok(met.not_empty())
}
