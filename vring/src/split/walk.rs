//! From a head to a chain of buffers, in bounded steps, over any table contents.

use vm_memory::GuestMemory;

use super::descriptor::Descriptor;
use super::rings::SplitRings;
use crate::chain::{Chain, Filling};
use crate::fault::ChainFault;
use crate::indirect::IndirectTable;

/// Collects the chain that starts at `head`, which is below the queue size. A chain that breaks a rule is left empty.
#[inline(always)]
pub(super) fn walk<M: GuestMemory>(
    rings: &SplitRings<M>,
    indirect_desc: bool,
    head: u16,
    chain: &mut Chain,
) -> Result<(), ChainFault> {
    let size = rings.size().get();
    let table = rings.table();
    let mut filling = chain.refill();
    let direct = walk_table(
        size,
        head,
        &mut filling,
        |index| Ok(table.descriptor(index)),
    );
    let walked = match direct {
        Ok(None) => Ok(()),
        // After direct descriptors this is valid, as the chain's last (row D17). WRITE on it
        // means nothing (§2.7.5.3.2, row D16).
        Ok(Some(indirect)) => {
            walk_indirect(&**rings.memory(), indirect_desc, indirect, &mut filling)
        }
        Err(fault) => Err(fault),
    };
    match walked {
        Ok(()) => filling.end(),
        Err(_) => chain.clear(),
    }
    walked
}

/// Appends the buffers of the table that `descriptor` points to.
#[inline(always)]
fn walk_indirect<M: GuestMemory>(
    memory: &M,
    indirect_desc: bool,
    descriptor: Descriptor,
    chain: &mut Filling<'_>,
) -> Result<(), ChainFault> {
    if !indirect_desc {
        return Err(ChainFault::IndirectNotNegotiated);
    }
    if descriptor.has_next() {
        return Err(ChainFault::IndirectAndNext);
    }
    let Descriptor { address, len, .. } = descriptor;
    let unmapped = ChainFault::IndirectTableUnmapped { address, len };
    let nested = match IndirectTable::find(memory, address, len)? {
        // `walk_table` asks for no entry past the end, so the error is never taken.
        IndirectTable::Aligned(table) => walk_table(table.entries(), 0, chain, |index| {
            let words = table.read(index).ok_or(unmapped)?;
            Ok(Descriptor::from_words(words))
        })?,
        IndirectTable::Scattered(table) => walk_table(table.entries(), 0, chain, |index| {
            table.read(index).map(Descriptor::from_words)
        })?,
    };
    match nested {
        None => Ok(()),
        Some(_) => Err(ChainFault::IndirectNested),
    }
}

/// Appends the chain that starts at `first` in a table of `limit` descriptors, up to its end or
/// to an indirect descriptor, which is returned.
///
/// `read` loads a descriptor from guest memory; it is called once for each that is visited, with
/// an index below `limit`, and everything is decided on what it returned (rows T1, T3).
#[inline(always)]
fn walk_table(
    limit: u16,
    first: u16,
    chain: &mut Filling<'_>,
    mut read: impl FnMut(u16) -> Result<Descriptor, ChainFault>,
) -> Result<Option<Descriptor>, ChainFault> {
    let mut index = first;
    // A chain without a loop visits each descriptor at most once. Counted in descriptors, so
    // that a loop of empty ones ends too (row D2).
    for _ in 0..limit {
        let descriptor = read(index)?;
        if descriptor.is_indirect() {
            return Ok(Some(descriptor));
        }
        chain.append(descriptor.address, descriptor.len, descriptor.is_writable())?;
        if !descriptor.has_next() {
            return Ok(None);
        }
        if descriptor.next >= limit {
            return Err(ChainFault::NextOutOfRange {
                next: descriptor.next,
                limit,
            });
        }
        index = descriptor.next;
    }
    Err(ChainFault::TooManyDescriptors { limit })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::QueueSize;
    use crate::split::descriptor::{F_INDIRECT, F_NEXT, F_WRITE};

    const LIMIT: u16 = 8;

    fn descriptor(len: u32, flags: u16, next: u16) -> Descriptor {
        Descriptor {
            address: 0x1000,
            len,
            flags,
            next,
        }
    }

    /// Walks `table` with a reader that records each index asked for.
    fn reads(table: &[Descriptor]) -> (Result<Option<Descriptor>, ChainFault>, Vec<u16>) {
        let mut chain = Chain::for_queue(QueueSize::new(u32::from(LIMIT)).unwrap());
        let mut asked = Vec::new();
        let outcome = walk_table(LIMIT, 0, &mut chain.refill(), |index| {
            asked.push(index);
            Ok(table[usize::from(index)])
        });
        (outcome, asked)
    }

    #[test]
    fn t1_each_descriptor_of_a_chain_is_read_once() {
        let table = [
            descriptor(16, F_NEXT, 2),
            descriptor(1, F_WRITE, 0),
            descriptor(0, F_NEXT, 5),
            descriptor(0, 0, 0),
            descriptor(0, 0, 0),
            descriptor(512, F_NEXT, 1),
        ];
        assert_eq!(reads(&table), (Ok(None), vec![0, 2, 5, 1]));
    }

    #[test]
    fn t1_a_descriptor_found_wrong_is_not_read_again() {
        let beyond = Err(ChainFault::NextOutOfRange {
            next: LIMIT,
            limit: LIMIT,
        });
        let table = [descriptor(16, F_NEXT, LIMIT)];
        assert_eq!(reads(&table), (beyond, vec![0]));
        let table = [
            descriptor(16, F_NEXT | F_WRITE, 1),
            descriptor(16, F_NEXT, 0),
        ];
        let disordered = Err(ChainFault::ReadableAfterWritable);
        assert_eq!(reads(&table), (disordered, vec![0, 1]));
    }

    #[test]
    fn t3_an_indirect_descriptor_is_handed_over_as_it_was_read() {
        let indirect = descriptor(32, F_INDIRECT | F_WRITE, 0);
        let table = [descriptor(16, F_NEXT, 1), indirect];
        assert_eq!(reads(&table), (Ok(Some(indirect)), vec![0, 1]));
    }

    #[test]
    fn d2_a_loop_is_read_as_often_as_the_table_is_long() {
        let (outcome, asked) = reads(&[descriptor(0, F_NEXT, 0)]);
        assert_eq!(
            outcome,
            Err(ChainFault::TooManyDescriptors { limit: LIMIT })
        );
        assert_eq!(asked.len(), usize::from(LIMIT));
    }

    #[test]
    fn no_index_at_or_beyond_the_limit_is_ever_read() {
        for next in 0..=u16::MAX {
            let table = [descriptor(1, F_NEXT, next); LIMIT as usize];
            let (_, asked) = reads(&table);
            assert!(asked.iter().all(|&index| index < LIMIT));
        }
    }
}
