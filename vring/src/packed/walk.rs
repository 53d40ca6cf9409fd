//! From the first descriptor of a chain to its buffers, in bounded steps, over any ring contents.

use vm_memory::GuestMemory;

use super::descriptor::Tail;
use super::rings::PackedRings;
use crate::chain::{Chain, Filling};
use crate::fault::ChainFault;
use crate::indirect::IndirectTable;
use crate::reclaim::RingDescriptor;

/// A chain whose end was found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Walked {
    /// Descriptors of the ring that it takes.
    pub(super) descriptors: u16,
    /// The Buffer ID, which is that of its last descriptor (virtio 1.3 §2.8.6).
    pub(super) id: u16,
}

/// Why there is no chain.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Broken {
    /// It breaks a rule.
    Chain { walked: Walked, fault: ChainFault },
    /// It does not end within the limit.
    Endless,
}

/// Collects the chain that starts at `index` with `first`, which was read already, and that takes
/// at most `limit` descriptors. One that breaks a rule is left empty.
#[inline]
pub(super) fn walk<M: GuestMemory>(
    rings: &PackedRings<M>,
    indirect_desc: bool,
    index: u16,
    first: Tail,
    limit: u16,
    chain: &mut Chain,
) -> Result<Walked, Broken> {
    if limit == 0 {
        chain.clear();
        return Err(Broken::Endless);
    }
    let mut filling = chain.refill();
    let address = rings.address(index);
    if first.is_indirect() && !first.has_next() {
        let walked = Walked {
            descriptors: 1,
            id: first.id,
        };
        let fault = if indirect_desc {
            match walk_table(&**rings.memory(), first, address, &mut filling) {
                Ok(()) => {
                    filling.end();
                    return Ok(walked);
                }
                Err(fault) => fault,
            }
        } else {
            ChainFault::IndirectNotNegotiated
        };
        chain.clear();
        return Err(Broken::Chain { walked, fault });
    }
    let table = rings.table();
    let read = |ahead| table.later(index.wrapping_add(ahead));
    match walk_ring(indirect_desc, first, address, limit, &mut filling, read) {
        Ok(walked) => {
            filling.end();
            Ok(walked)
        }
        Err(broken) => {
            chain.clear();
            Err(broken)
        }
    }
}

/// Collects the chain of `descriptors`, which somebody else has read. It must end with the last. One that breaks a rule
/// is left empty.
pub(super) fn walk_list<M: GuestMemory>(
    memory: &M,
    indirect_desc: bool,
    descriptors: &[RingDescriptor],
    chain: &mut Chain,
) -> Result<Walked, Broken> {
    let mut filling = chain.refill();
    let walked = walk_listed(memory, indirect_desc, descriptors, &mut filling);
    match walked {
        Ok(_) => filling.end(),
        Err(_) => chain.clear(),
    }
    walked
}

fn walk_listed<M: GuestMemory>(
    memory: &M,
    indirect_desc: bool,
    descriptors: &[RingDescriptor],
    chain: &mut Filling<'_>,
) -> Result<Walked, Broken> {
    let tail = |descriptor: &RingDescriptor| {
        let RingDescriptor {
            address,
            len,
            id,
            flags,
        } = *descriptor;
        (Tail { len, id, flags }, address)
    };
    let Some((first, address)) = descriptors.first().map(tail) else {
        return Err(Broken::Endless);
    };
    if first.is_indirect() && !first.has_next() && indirect_desc {
        let walked = Walked {
            descriptors: 1,
            id: first.id,
        };
        return match walk_table(memory, first, address, chain) {
            Ok(()) => Ok(walked),
            Err(fault) => Err(Broken::Chain { walked, fault }),
        };
    }
    let limit = u16::try_from(descriptors.len()).unwrap_or(u16::MAX);
    walk_ring(indirect_desc, first, address, limit, chain, |ahead| {
        // Below the limit, so there is one.
        descriptors
            .get(usize::from(ahead))
            .map_or((first, address), tail)
    })
}

/// Appends the buffers of the table at `address` that `tail` points to.
fn walk_table<M: GuestMemory>(
    memory: &M,
    tail: Tail,
    address: u64,
    chain: &mut Filling<'_>,
) -> Result<(), ChainFault> {
    match IndirectTable::find(memory, address, tail.len)? {
        IndirectTable::Aligned(table) => {
            for index in 0..table.entries() {
                // There is an entry below the end.
                if let Some(words) = table.read(index) {
                    append_entry(words, chain)?;
                }
            }
        }
        IndirectTable::Scattered(table) => {
            for index in 0..table.entries() {
                append_entry(table.read(index)?, chain)?;
            }
        }
    }
    Ok(())
}

/// Appends the buffer of an entry of an indirect table, which are all part of the chain, one after
/// the other: NEXT and INDIRECT, as all flags but WRITE, are reserved and ignored, and so is the id
/// (§2.8.7).
#[inline(always)]
fn append_entry([address, tail]: [u64; 2], chain: &mut Filling<'_>) -> Result<(), ChainFault> {
    let tail = Tail::from_word(tail);
    chain.append(u64::from_le(address), tail.len, tail.is_writable())
}

/// Appends the buffers of direct descriptors, up to the one without NEXT.
///
/// `read` loads the descriptor so many ahead of the first from guest memory; it is called once for
/// each that is visited, in order, and everything is decided on what it returned (row T1). Whether
/// those are marked available is not asked: the driver wrote them before it handed the first over
/// (§2.8.6), or it is wrong and the device reads what there is.
#[inline(always)]
fn walk_ring(
    indirect_desc: bool,
    first: Tail,
    address: u64,
    limit: u16,
    chain: &mut Filling<'_>,
    mut read: impl FnMut(u16) -> (Tail, u64),
) -> Result<Walked, Broken> {
    // As the word it was read in: one register from one descriptor to the next, and the id is taken out at the end.
    let (mut word, mut address) = (first.to_word(), address);
    let mut descriptors = 1;
    loop {
        let tail = Tail::from_word(word);
        let appended = if tail.is_indirect() {
            Err(misplaced(indirect_desc, tail))
        } else {
            chain.append(address, tail.len, tail.is_writable())
        };
        if let Err(fault) = appended {
            return skip(fault, tail, descriptors, limit, |ahead| read(ahead).0);
        }
        if !tail.has_next() {
            return Ok(Walked {
                descriptors,
                id: tail.id,
            });
        }
        if descriptors == limit {
            return Err(Broken::Endless);
        }
        let (next, at) = read(descriptors);
        (word, address) = (next.to_word(), at);
        descriptors = descriptors.wrapping_add(1);
    }
}

/// Goes on to the end of a chain that is broken: the ring goes on behind it, and only there is its
/// id.
#[cold]
fn skip(
    fault: ChainFault,
    tail: Tail,
    descriptors: u16,
    limit: u16,
    mut read: impl FnMut(u16) -> Tail,
) -> Result<Walked, Broken> {
    let (mut tail, mut descriptors) = (tail, descriptors);
    while tail.has_next() {
        if descriptors == limit {
            return Err(Broken::Endless);
        }
        tail = read(descriptors);
        descriptors = descriptors.wrapping_add(1);
    }
    let walked = Walked {
        descriptors,
        id: tail.id,
    };
    Err(Broken::Chain { walked, fault })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::QueueSize;
    use crate::packed::descriptor::{F_AVAIL, F_USED};
    use crate::split::descriptor::{F_INDIRECT, F_NEXT, F_WRITE};

    const LIMIT: u16 = 8;

    fn tail(len: u32, id: u16, flags: u16) -> Tail {
        Tail { len, id, flags }
    }

    /// Walks `ring` with a reader that records each descriptor asked for: how far ahead of the
    /// first, which the caller of the walk has read.
    fn reads(ring: &[Tail]) -> (Result<Walked, Broken>, Vec<u16>) {
        let mut chain = Chain::for_queue(QueueSize::try_from(LIMIT).unwrap());
        let mut asked = Vec::new();
        let outcome = walk_ring(true, ring[0], 0x1000, LIMIT, &mut chain.refill(), |ahead| {
            asked.push(ahead);
            (ring[usize::from(ahead)], 0x1000)
        });
        (outcome, asked)
    }

    #[test]
    fn t1_each_descriptor_of_a_chain_is_read_once_in_order() {
        let ring = [
            tail(16, 1, F_NEXT),
            tail(0, 2, F_NEXT),
            tail(512, 3, F_NEXT | F_WRITE),
            tail(1, 4, F_WRITE),
            tail(0, 5, 0),
        ];
        let walked = Walked {
            descriptors: 4,
            id: 4,
        };
        assert_eq!(reads(&ring), (Ok(walked), vec![1, 2, 3]));
        assert!(reads(&ring[4..]).1.is_empty());
    }

    #[test]
    fn t1_a_broken_chain_is_read_once_to_its_end() {
        for (flags, fault) in [
            (F_NEXT, ChainFault::ReadableAfterWritable),
            (F_NEXT | F_INDIRECT, ChainFault::IndirectAndNext),
        ] {
            let ring = [
                tail(16, 1, F_NEXT | F_WRITE),
                tail(16, 2, flags),
                tail(16, 3, F_NEXT),
                tail(16, 4, F_WRITE | F_INDIRECT),
            ];
            let walked = Walked {
                descriptors: 4,
                id: 4,
            };
            let broken = Broken::Chain { walked, fault };
            assert_eq!(reads(&ring), (Err(broken), vec![1, 2, 3]));
        }
    }

    #[test]
    fn d3_no_descriptor_beyond_the_limit_is_read() {
        for broken in [0, F_INDIRECT] {
            let ring = [tail(0, 0, F_NEXT | broken); LIMIT as usize];
            assert_eq!(reads(&ring), (Err(Broken::Endless), (1..LIMIT).collect()));
        }
    }

    #[test]
    fn later_descriptors_need_not_be_marked_available() {
        for bits in [0, F_AVAIL, F_USED, F_AVAIL | F_USED] {
            let ring = [tail(1, 0, F_NEXT | F_AVAIL), tail(1, 7, bits)];
            let walked = Walked {
                descriptors: 2,
                id: 7,
            };
            assert_eq!(reads(&ring), (Ok(walked), vec![1]));
        }
    }
}
