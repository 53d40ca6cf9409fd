//! From the first descriptor of a chain to its buffers, in bounded steps, over any ring contents.

use vm_memory::GuestMemoryBackend;

use super::descriptor::Tail;
use super::rings::PackedRings;
use crate::chain::Chain;
use crate::fault::ChainFault;
use crate::indirect::IndirectTable;

/// A chain whose end was found.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct Walked {
    /// Descriptors of the ring that it takes.
    pub(super) descriptors: u16,
    /// The Buffer ID, which is that of its last descriptor (virtio 1.3 §2.8.6).
    pub(super) id: u16,
    /// What is wrong with it, if something is.
    pub(super) outcome: Result<(), ChainFault>,
}

/// Collects the chain that starts at `index` with `first`, which was read already, or `None` if it
/// does not end within `limit` descriptors.
///
/// A broken chain is followed to its end: the ring goes on behind it, and only there is its id.
#[inline]
pub(super) fn walk<M: GuestMemoryBackend>(
    rings: &PackedRings<M>,
    indirect_desc: bool,
    index: u16,
    first: Tail,
    limit: u16,
    chain: &mut Chain,
) -> Option<Walked> {
    chain.clear();
    if limit == 0 {
        return None;
    }
    let address = rings.address(index);
    if first.is_indirect() && !first.has_next() {
        let outcome = if indirect_desc {
            walk_table(&**rings.memory(), first, address, chain)
        } else {
            Err(ChainFault::IndirectNotNegotiated)
        };
        return Some(Walked {
            descriptors: 1,
            id: first.id,
            outcome,
        });
    }
    walk_ring(indirect_desc, first, address, limit, chain, |ahead| {
        let index = index.wrapping_add(ahead);
        (rings.later_tail(index), rings.address(index))
    })
}

/// Appends the buffers of the table at `address` that `tail` points to.
fn walk_table<M: GuestMemoryBackend>(
    memory: &M,
    tail: Tail,
    address: u64,
    chain: &mut Chain,
) -> Result<(), ChainFault> {
    let table = IndirectTable::find(memory, address, tail.len)?;
    // One after the other: NEXT and INDIRECT in the table, as all flags but WRITE, are reserved
    // and ignored (§2.8.7), and so is the id.
    for index in 0..table.entries() {
        let [address, tail] = table.read(index)?;
        let tail = Tail::from_word(tail);
        chain.append(u64::from_le(address), tail.len, tail.is_writable())?;
    }
    Ok(())
}

/// Appends the buffers of direct descriptors, up to the one without NEXT.
///
/// `read` loads the descriptor so many ahead of the first from guest memory; it is called once for
/// each that is visited, in order, and everything is decided on what it returned (row T1). Whether
/// those are marked available is not asked: the driver wrote them before it handed the first over
/// (§2.8.6), or it is wrong and the device reads what there is.
#[inline]
fn walk_ring(
    indirect_desc: bool,
    first: Tail,
    address: u64,
    limit: u16,
    chain: &mut Chain,
    mut read: impl FnMut(u16) -> (Tail, u64),
) -> Option<Walked> {
    let (mut tail, mut address) = (first, address);
    let mut descriptors = 1;
    let mut outcome = Ok(());
    loop {
        if outcome.is_ok() {
            outcome = if tail.is_indirect() {
                Err(misplaced(indirect_desc, tail))
            } else {
                chain.append(address, tail.len, tail.is_writable())
            };
        }
        if !tail.has_next() {
            return Some(Walked {
                descriptors,
                id: tail.id,
                outcome,
            });
        }
        if descriptors == limit {
            return None;
        }
        (tail, address) = read(descriptors);
        descriptors += 1;
    }
}

/// What is wrong with an indirect descriptor that is not alone: one list has descriptors of one
/// kind (§2.8.5, §2.8.19, driver MUST NOT).
#[cold]
const fn misplaced(indirect_desc: bool, tail: Tail) -> ChainFault {
    if !indirect_desc {
        ChainFault::IndirectNotNegotiated
    } else if tail.has_next() {
        ChainFault::IndirectAndNext
    } else {
        ChainFault::IndirectAmongDirect
    }
}
