//! A descriptor chain by the letter of virtio 1.3 §2.7.5, over plain bytes.

use vring::ChainFault;

use crate::naive_memory::NaiveMemory;

/// Entries an indirect table may have (hostile-inputs D20).
const TABLE_ENTRIES_MAX: u32 = 1024;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Buffer {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) writable: bool,
}

struct Descriptor {
    addr: u64,
    len: u32,
    next: Option<u16>,
    writable: bool,
    indirect: bool,
}

fn descriptor(memory: &NaiveMemory, table: u64, index: u16) -> Descriptor {
    let at = table + 16 * u64::from(index);
    let missing = "the table is mapped";
    let flags = memory.word(at + 12);
    Descriptor {
        addr: u64::from_le_bytes(memory.read(at).expect(missing)),
        len: u32::from_le_bytes(memory.read(at + 8).expect(missing)),
        next: (flags & 1 != 0).then(|| memory.word(at + 14)),
        writable: flags & 2 != 0,
        indirect: flags & 4 != 0,
    }
}

/// The buffers of a chain, empty ones too, and what holds for all of them together.
#[derive(Debug, Default)]
pub(crate) struct Gathered {
    buffers: Vec<Buffer>,
    total: u64,
    /// There is something to write.
    writable: bool,
}

impl Gathered {
    pub(crate) fn append(&mut self, buffer: Buffer) -> Result<(), ChainFault> {
        let Buffer { addr, len, .. } = buffer;
        if len > 0 {
            if u128::from(addr) + u128::from(len) >= 1 << 64 {
                return Err(ChainFault::BufferOverflow { address: addr, len });
            }
            self.total += u64::from(len);
            if self.total > 1 << 32 {
                return Err(ChainFault::TooManyBytes);
            }
            if !buffer.writable && self.writable {
                return Err(ChainFault::ReadableAfterWritable);
            }
            self.writable |= buffer.writable;
        }
        self.buffers.push(buffer);
        Ok(())
    }

    pub(crate) fn all(self) -> Vec<Buffer> {
        self.buffers
    }

    pub(crate) fn not_empty(mut self) -> Vec<Buffer> {
        self.buffers.retain(|buffer| buffer.len > 0);
        self.buffers
    }
}

/// The buffers of the chain at `head`, empty ones left out, or the first fault in its order.
pub(crate) fn walk(
    memory: &NaiveMemory,
    (table, size): (u64, u16),
    indirect_desc: bool,
    head: u16,
) -> Result<Vec<Buffer>, ChainFault> {
    let (buffers, fault) = trace(memory, (table, size), indirect_desc, head);
    fault.map_or_else(|| Ok(buffers.not_empty()), Err)
}

/// The buffers met up to the end of the chain, or to its first fault.
pub(crate) fn trace(
    memory: &NaiveMemory,
    (table, size): (u64, u16),
    indirect_desc: bool,
    head: u16,
) -> (Gathered, Option<ChainFault>) {
    let mut met = Gathered::default();
    let fault = follow(memory, (table, size), indirect_desc, head, &mut met).err();
    (met, fault)
}

fn follow(
    memory: &NaiveMemory,
    (mut table, mut limit): (u64, u16),
    indirect_desc: bool,
    head: u16,
    met: &mut Gathered,
) -> Result<(), ChainFault> {
    let mut visited = 0;
    let mut nested = false;
    let mut index = head;
    loop {
        if visited == limit {
            return Err(ChainFault::TooManyDescriptors { limit });
        }
        visited += 1;
        let found = descriptor(memory, table, index);
        if found.indirect {
            if nested {
                return Err(ChainFault::IndirectNested);
            }
            if !indirect_desc {
                return Err(ChainFault::IndirectNotNegotiated);
            }
            if found.next.is_some() {
                return Err(ChainFault::IndirectAndNext);
            }
            (table, limit) = indirect_table(memory, found.addr, found.len)?;
            (nested, visited, index) = (true, 0, 0);
            continue;
        }
        met.append(Buffer {
            addr: found.addr,
            len: found.len,
            writable: found.writable,
        })?;
        match found.next {
            None => return Ok(()),
            Some(next) if next >= limit => return Err(ChainFault::NextOutOfRange { next, limit }),
            Some(next) => index = next,
        }
    }
}

/// Address and entries of the table that an indirect descriptor points to.
pub(crate) fn indirect_table(
    memory: &NaiveMemory,
    address: u64,
    len: u32,
) -> Result<(u64, u16), ChainFault> {
    if len == 0 || !len.is_multiple_of(16) {
        return Err(ChainFault::IndirectTableLength { len });
    }
    let entries = len / 16;
    if entries > TABLE_ENTRIES_MAX {
        return Err(ChainFault::IndirectTableTooLong { entries });
    }
    if !memory.is_mapped(address, u64::from(len)) {
        return Err(ChainFault::IndirectTableUnmapped { address, len });
    }
    Ok((address, u16::try_from(entries).expect("checked above")))
}
