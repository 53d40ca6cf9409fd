//! What a device finds in a ring of either format, in the oracle's terms.

use vring::{Chain, ChainFault, Finished, Head, PopError, Queue, RingFault, Segment};

use crate::naive_walk::Buffer;
use crate::ring_input::Memory;

/// The outcome of a pop.
#[derive(Debug)]
pub(crate) enum Found {
    Nothing,
    Chain { head: u16, buffers: Vec<Buffer> },
    BadChain { head: u16, fault: ChainFault },
    Broken(RingFault),
}

/// Splits what a pop returned, and left in `chain`, into what there is to compare and the head.
pub(crate) fn found(
    popped: Result<Option<Head>, PopError>,
    chain: &Chain,
) -> (Found, Option<Head>) {
    match popped {
        Ok(None) => (Found::Nothing, None),
        Ok(Some(head)) => {
            let found = Found::Chain {
                head: head.index(),
                buffers: buffers(chain),
            };
            (found, Some(head))
        }
        Err(PopError::Chain { head, fault }) => {
            let found = Found::BadChain {
                head: head.index(),
                fault,
            };
            (found, Some(head))
        }
        Err(PopError::Ring(fault)) => (Found::Broken(fault), None),
        Err(other) => panic!("no oracle knows {other:?}"),
    }
}

/// The buffers of a chain; its lengths are theirs.
fn buffers(chain: &Chain) -> Vec<Buffer> {
    let list = |segments: &[Segment], writable| -> Vec<Buffer> {
        let buffer = |segment: &Segment| Buffer {
            addr: segment.addr.0,
            len: segment.len,
            writable,
        };
        segments.iter().map(buffer).collect()
    };
    let readable = list(chain.readable(), false);
    let writable = list(chain.writable(), true);
    assert_eq!(chain.readable_len(), total_len(&readable));
    assert_eq!(chain.writable_len(), total_len(&writable));
    [readable, writable].concat()
}

fn total_len(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|buffer| u64::from(buffer.len)).sum()
}

/// Bytes there are to write.
pub(crate) fn room(buffers: &[Buffer]) -> u64 {
    let writable = buffers.iter().filter(|buffer| buffer.writable);
    writable.map(|buffer| u64::from(buffer.len)).sum()
}

/// The length that a device reports of a chain it has written in full.
pub(crate) fn full(room: Option<u64>) -> u32 {
    u32::try_from(room.unwrap_or(0)).unwrap_or(u32::MAX)
}

/// One pop of a pass.
pub(crate) struct Step {
    pub(crate) found: Found,
    /// If it is kept for later.
    pub(crate) head: Option<Head>,
    /// If it was given back at once, with how much.
    pub(crate) pushed: Option<u32>,
}

/// A whole pass of at most `limit` chains: of those it pops, it keeps the ones whose bit in `keep`
/// is set, and gives the others back, full if they are sound.
pub(crate) fn pass(
    queue: &mut Queue<Memory>,
    chain: &mut Chain,
    limit: u8,
    keep: u8,
) -> (Vec<Step>, Finished) {
    let mut batch = queue.batch(u16::from(limit));
    let mut steps = Vec::new();
    loop {
        let (found, head) = found(batch.pop(chain), chain);
        let Some(head) = head else {
            let (head, pushed) = (None, None);
            steps.push(Step {
                found,
                head,
                pushed,
            });
            break;
        };
        let step = if keep >> (steps.len() % 8) & 1 == 1 {
            Step {
                found,
                head: Some(head),
                pushed: None,
            }
        } else {
            let len = match &found {
                Found::Chain { buffers, .. } => full(Some(room(buffers))),
                _ => 0,
            };
            batch.push(head, len);
            Step {
                found,
                head: None,
                pushed: Some(len),
            }
        };
        steps.push(step);
    }
    (steps, batch.finish())
}
