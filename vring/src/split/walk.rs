//! From a head to a chain of buffers, in bounded steps, over any table contents.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::descriptor::Descriptor;
use super::rings::SplitRings;
use crate::chain::{Chain, MAX_INDIRECT_DESCRIPTORS};
use crate::fault::ChainFault;
use crate::ring_memory::{AlignedTable, DESCRIPTOR_BYTES, DESCRIPTOR_LEN};

/// Collects the chain that starts at `head`, which is below the queue size.
#[inline]
pub(super) fn walk<M: GuestMemoryBackend>(
    rings: &SplitRings<M>,
    indirect_desc: bool,
    head: u16,
    chain: &mut Chain,
) -> Result<(), ChainFault> {
    chain.clear();
    let size = rings.size().get();
    let mut index = head;
    // A chain without a loop visits each descriptor at most once. Counted in descriptors, so
    // that a loop of empty ones ends too (row D2).
    for _ in 0..size {
        let descriptor = rings.descriptor(index);
        if descriptor.is_indirect() {
            // After direct descriptors this is valid, as the chain's last (row D17). WRITE on
            // it means nothing (§2.7.5.3.2, row D16).
            return walk_indirect(&**rings.memory(), indirect_desc, descriptor, chain);
        }
        chain.append(descriptor.address, descriptor.len, descriptor.is_writable())?;
        if !descriptor.has_next() {
            return Ok(());
        }
        if descriptor.next >= size {
            return Err(ChainFault::NextOutOfRange {
                next: descriptor.next,
                limit: size,
            });
        }
        index = descriptor.next;
    }
    Err(ChainFault::TooManyDescriptors { limit: size })
}

/// Appends the buffers of the table that `descriptor` points to.
fn walk_indirect<M: GuestMemoryBackend>(
    memory: &M,
    indirect_desc: bool,
    descriptor: Descriptor,
    chain: &mut Chain,
) -> Result<(), ChainFault> {
    if !indirect_desc {
        return Err(ChainFault::IndirectNotNegotiated);
    }
    if descriptor.has_next() {
        return Err(ChainFault::IndirectAndNext);
    }
    let Descriptor { address, len, .. } = descriptor;
    let entries = table_entries(len)?;
    let unmapped = ChainFault::IndirectTableUnmapped { address, len };
    if let Some(table) = AlignedTable::translate(memory, address, entries) {
        // `walk_table` asks for no entry past the end, so the error is never taken.
        return walk_table(entries, chain, |index| {
            table
                .read(index)
                .map(Descriptor::from_words)
                .ok_or(unmapped)
        });
    }
    // A table at an odd address or over two regions: valid and rare. All of it must be there,
    // not only the entries that happen to be reached (row D15).
    let table_len = usize::from(entries) * DESCRIPTOR_LEN;
    let table = GuestAddress(address);
    if !GuestMemoryBackend::check_range(memory, table, table_len) {
        return Err(unmapped);
    }
    walk_table(entries, chain, |index| {
        let offset = u64::from(index) * DESCRIPTOR_LEN as u64;
        let entry = address.checked_add(offset).ok_or(unmapped)?;
        let mut words = [[0u8; 8]; 2];
        memory
            .read_slice(words.as_flattened_mut(), GuestAddress(entry))
            .map_err(|_| unmapped)?;
        Ok(Descriptor::from_words(words.map(u64::from_ne_bytes)))
    })
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

/// Appends the chain that starts at entry 0 of an indirect table; `read` loads an entry once.
#[inline]
fn walk_table(
    entries: u16,
    chain: &mut Chain,
    read: impl Fn(u16) -> Result<Descriptor, ChainFault>,
) -> Result<(), ChainFault> {
    let mut index = 0;
    for _ in 0..entries {
        let descriptor = read(index)?;
        if descriptor.is_indirect() {
            return Err(ChainFault::IndirectNested);
        }
        chain.append(descriptor.address, descriptor.len, descriptor.is_writable())?;
        if !descriptor.has_next() {
            return Ok(());
        }
        if descriptor.next >= entries {
            return Err(ChainFault::NextOutOfRange {
                next: descriptor.next,
                limit: entries,
            });
        }
        index = descriptor.next;
    }
    Err(ChainFault::TooManyDescriptors { limit: entries })
}
