//! Chains as a driver adds them and gets them back, in either format.

use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, Permissions};

use crate::chain::Segment;
use crate::ring_memory::DESCRIPTOR_LEN;
use crate::split::descriptor::{F_INDIRECT, F_WRITE};

/// There are not enough free descriptors; taking completions (`poll_used`) frees some.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{needed} descriptors needed, {free} free")]
pub struct Full {
    /// Descriptors the chain needs.
    pub needed: usize,
    /// Descriptors that are free.
    pub free: u16,
}

/// Why an indirect chain was not added.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AddError {
    /// No free descriptor.
    #[error(transparent)]
    Full(#[from] Full),
    /// The table is not inside one region of guest memory, or has more than 65535 entries.
    #[error("no room for a table of {entries} entries at {address:#x}")]
    Table {
        /// The table's guest-physical address.
        address: u64,
        /// Its length in entries.
        entries: usize,
    },
}

/// A completion, as the device reported it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Used {
    /// What `add_chain` returned for the chain, if the device is right: a split ring's head, a
    /// packed ring's buffer id.
    pub id: u32,
    /// Bytes written to the writable buffers, if the device is right.
    pub len: u32,
    /// Whether a chain with this id was outstanding. If not, the device is wrong, unless the test
    /// made the chain available behind the driver's back
    /// ([`SplitDriver::offer`](super::SplitDriver::offer), the `write_*` functions).
    pub expected: bool,
}

/// A descriptor as a test wants it, right or wrong, wherever the driver puts it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RawDescriptor {
    /// Guest-physical address of the buffer.
    pub address: u64,
    /// Its length in bytes.
    pub len: u32,
    /// [`F_NEXT`](super::F_NEXT), [`F_WRITE`](super::F_WRITE), [`F_INDIRECT`](super::F_INDIRECT)
    /// and any other bits. In a packed ring `F_AVAIL` and `F_USED` are replaced by what makes the
    /// descriptor available.
    pub flags: u16,
}

/// Bytes of a chain's writable buffers, as far as a used length can tell.
#[inline]
pub(super) fn total_len(segments: &[Segment]) -> u32 {
    let total = |sum: u32, segment: &Segment| sum.saturating_add(segment.len);
    segments.iter().fold(0, total)
}

/// The same for descriptors, as far as they say themselves what they are.
pub(super) fn raw_total_len(descriptors: &[RawDescriptor]) -> u32 {
    let writable = |descriptor: &&RawDescriptor| {
        descriptor.flags & F_WRITE != 0 && descriptor.flags & F_INDIRECT == 0
    };
    let total = |sum: u32, descriptor: &RawDescriptor| sum.saturating_add(descriptor.len);
    descriptors.iter().filter(writable).fold(0, total)
}

/// The segments of a chain in order, each with the flag of its direction. Empty in, one empty
/// segment out.
#[inline]
pub(super) fn directed<'a>(
    readable: &'a [Segment],
    writable: &'a [Segment],
) -> impl Iterator<Item = (Segment, u16)> + 'a {
    let nothing = Segment {
        addr: GuestAddress(0),
        len: 0,
    };
    let empty = readable.is_empty() && writable.is_empty();
    let readable = readable.iter().map(|&segment| (segment, 0));
    let writable = writable.iter().map(|&segment| (segment, F_WRITE));
    empty
        .then_some((nothing, 0))
        .into_iter()
        .chain(readable)
        .chain(writable)
}

/// Entries of the indirect table that [`write_table`] writes.
#[inline]
pub(super) fn table_entries(
    table: GuestAddress,
    readable: &[Segment],
    writable: &[Segment],
) -> Result<u16, AddError> {
    let entries = (readable.len() + writable.len()).max(1);
    u16::try_from(entries).map_err(|_| AddError::Table {
        address: table.0,
        entries,
    })
}

/// Writes a chain into an indirect table at `table`, whose entry `index` is `encode(index, segment,
/// flag of its direction)`.
#[inline]
pub(super) fn write_table<M: GuestMemory>(
    memory: &M,
    table: GuestAddress,
    readable: &[Segment],
    writable: &[Segment],
    encode: impl Fn(u16, Segment, u16) -> [u64; 2],
) -> Result<u16, AddError> {
    let count = table_entries(table, readable, writable)?;
    let entries = usize::from(count);
    let no_room = AddError::Table {
        address: table.0,
        entries,
    };
    let len = entries * DESCRIPTOR_LEN;
    // vm-memory's IOMMU adds the two without asking.
    table.checked_add(len as u64).ok_or(no_room)?;
    let mut slices = memory
        .get_slices(table, len, Permissions::Write)
        .map_err(|_| no_room)?;
    let slice = slices.next().and_then(Result::ok).ok_or(no_room)?;
    if slice.len() != len {
        return Err(no_room);
    }
    for ((segment, write), index) in directed(readable, writable).zip(0..count) {
        let words = encode(index, segment, write).map(u64::to_ne_bytes);
        slice
            .write_slice(words.as_flattened(), usize::from(index) * DESCRIPTOR_LEN)
            .map_err(|_| no_room)?;
    }
    Ok(count)
}
