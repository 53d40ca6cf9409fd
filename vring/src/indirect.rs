//! An indirect table: the part of its rules that both ring formats share (virtio 1.3 §2.7.5.3,
//! §2.8.7).

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::chain::MAX_INDIRECT_DESCRIPTORS;
use crate::fault::ChainFault;
use crate::ring_memory::{AlignedTable, DESCRIPTOR_BYTES, DESCRIPTOR_LEN};

/// An indirect table that is wholly in guest memory.
pub(crate) struct IndirectTable<'a, M> {
    memory: &'a M,
    address: u64,
    len: u32,
    entries: u16,
    /// The table, where one look at the memory map finds all of it: what nearly every driver
    /// sends. Otherwise it is at an odd address or over two regions: valid, rare, and read the
    /// slow way.
    aligned: Option<AlignedTable<'a>>,
}

impl<'a, M: GuestMemoryBackend> IndirectTable<'a, M> {
    /// Finds the table that an indirect descriptor, which may be where it is, points to. WRITE on
    /// that descriptor means nothing (§2.7.5.3.2, §2.8.7; row D16).
    #[inline]
    pub(crate) fn find(memory: &'a M, address: u64, len: u32) -> Result<Self, ChainFault> {
        let entries = table_entries(len)?;
        let aligned = AlignedTable::translate(memory, address, entries);
        if aligned.is_none() {
            // All of it must be there, not only the entries that happen to be reached (row D15).
            let table_len = usize::from(entries) * DESCRIPTOR_LEN;
            if !GuestMemoryBackend::check_range(memory, GuestAddress(address), table_len) {
                return Err(ChainFault::IndirectTableUnmapped { address, len });
            }
        }
        Ok(Self {
            memory,
            address,
            len,
            entries,
            aligned,
        })
    }

    #[inline]
    pub(crate) const fn entries(&self) -> u16 {
        self.entries
    }

    /// Reads the two halves of entry `index`, which is below [`entries`](Self::entries), once.
    #[inline]
    pub(crate) fn read(&self, index: u16) -> Result<[u64; 2], ChainFault> {
        match &self.aligned {
            // There is an entry below the end, so the error is never taken.
            Some(table) => table.read(index).ok_or_else(|| self.unmapped()),
            None => self.read_scattered(index),
        }
    }

    #[inline(never)]
    fn read_scattered(&self, index: u16) -> Result<[u64; 2], ChainFault> {
        let offset = u64::from(index) * DESCRIPTOR_LEN as u64;
        let entry = (self.address.checked_add(offset)).ok_or_else(|| self.unmapped())?;
        let mut words = [[0u8; 8]; 2];
        self.memory
            .read_slice(words.as_flattened_mut(), GuestAddress(entry))
            .map_err(|_| self.unmapped())?;
        Ok(words.map(u64::from_ne_bytes))
    }

    #[cold]
    const fn unmapped(&self) -> ChainFault {
        ChainFault::IndirectTableUnmapped {
            address: self.address,
            len: self.len,
        }
    }
}

/// The number of entries of a table of `len` bytes.
#[inline]
fn table_entries(len: u32) -> Result<u16, ChainFault> {
    if len == 0 || !len.is_multiple_of(DESCRIPTOR_BYTES) {
        return Err(ChainFault::IndirectTableLength { len });
    }
    let entries = len / DESCRIPTOR_BYTES;
    match u16::try_from(entries) {
        Ok(few) if few <= MAX_INDIRECT_DESCRIPTORS => Ok(few),
        _ => Err(ChainFault::IndirectTableTooLong { entries }),
    }
}
