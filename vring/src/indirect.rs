//! An indirect table: the part of its rules that both ring formats share (virtio 1.3 §2.7.5.3,
//! §2.8.7).

use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use crate::chain::MAX_INDIRECT_DESCRIPTORS;
use crate::fault::ChainFault;
use crate::ring_memory::{AlignedTable, DESCRIPTOR_BYTES, DESCRIPTOR_LEN};

/// An indirect table that is wholly in guest memory.
///
/// Two kinds that are read alike, for the caller to have a loop of each: asking for every entry
/// which it is would cost more than reading it.
pub(crate) enum IndirectTable<'a, M> {
    /// One look at the memory map finds all of it: what nearly every driver sends.
    Aligned(AlignedTable<'a>),
    /// At an odd address or over two regions: valid and rare.
    Scattered(ScatteredTable<'a, M>),
}

impl<'a, M: GuestMemory> IndirectTable<'a, M> {
    /// Finds the table that an indirect descriptor, which may be where it is, points to. WRITE on
    /// that descriptor means nothing (§2.7.5.3.2, §2.8.7; row D16).
    ///
    /// Always inlined: as a call it hands the table over through memory, at one instruction in ten
    /// of a whole pop and push.
    #[inline(always)]
    pub(crate) fn find(memory: &'a M, address: u64, len: u32) -> Result<Self, ChainFault> {
        let entries = table_entries(len)?;
        if let Some(table) = AlignedTable::translate(memory, address, entries) {
            return Ok(Self::Aligned(table));
        }
        // All of it must be there, not only the entries that happen to be reached (row D15).
        let table_len = usize::from(entries) * DESCRIPTOR_LEN;
        // No table wraps, and vm-memory's IOMMU adds the two without asking.
        let wraps = address.checked_add(u64::from(len)).is_none();
        if wraps || !memory.check_range(GuestAddress(address), table_len, Permissions::Read) {
            return Err(ChainFault::IndirectTableUnmapped { address, len });
        }
        Ok(Self::Scattered(ScatteredTable {
            memory,
            address,
            len,
            entries,
        }))
    }
}

/// A table that is read through the memory map, entry by entry.
pub(crate) struct ScatteredTable<'a, M> {
    memory: &'a M,
    address: u64,
    len: u32,
    entries: u16,
}

impl<M: GuestMemory> ScatteredTable<'_, M> {
    /// The number of entries.
    pub(crate) const fn entries(&self) -> u16 {
        self.entries
    }

    /// Reads the two halves of entry `index` once.
    pub(crate) fn read(&self, index: u16) -> Result<[u64; 2], ChainFault> {
        let &Self { address, len, .. } = self;
        let unmapped = ChainFault::IndirectTableUnmapped { address, len };
        let offset = u64::from(index) * DESCRIPTOR_LEN as u64;
        let entry = address.checked_add(offset).ok_or(unmapped)?;
        let mut words = [[0u8; 8]; 2];
        self.memory
            .read_slice(words.as_flattened_mut(), GuestAddress(entry))
            .map_err(|_| unmapped)?;
        Ok(words.map(u64::from_ne_bytes))
    }
}

/// The number of entries of a table of `len` bytes, which are 16 each (§2.7.5.3, §2.8.7).
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
