//! What a batch of requests that are in flight together may do, from what each does alone.

use vm_memory::{Bytes, GuestAddress};

use super::planes::{CAPACITY, Memory, Served};
use super::reference::{Effect, Prediction};
use crate::naive_memory::NaiveMemory;

/// How much can be said in advance.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Certainty {
    /// Each request does what it does alone, but for the order of overlapping transfers.
    Exact,
    /// Requests write over what decides about others, or over one another: each comes back once,
    /// and writes nothing outside its writable buffers.
    Aliased,
    /// Requests write over descriptors: the guest has made up new ones.
    RingHit,
}

/// Every range of guest memory that a request writes if it does what it does alone.
fn written(prediction: &Prediction) -> Vec<(u64, u64)> {
    let mut ranges = match &prediction.effect {
        Effect::Read { places, .. } => places.clone(),
        Effect::Id(id) => id.iter().map(|&(at, _)| (at, 1)).collect(),
        Effect::Nothing | Effect::Write { .. } | Effect::Zero(_) | Effect::Flush => Vec::new(),
    };
    ranges.extend(prediction.status.map(|(at, _)| (at, 1)));
    ranges
}

/// `ring` is where the ring is, `descriptors` are the addresses of the batch's, in tables and not.
pub(super) fn certainty(
    predictions: &[Prediction],
    ring: (u64, u64),
    descriptors: &[u64],
) -> Certainty {
    let written: Vec<_> = predictions.iter().flat_map(written).collect();
    let looked_at: Vec<_> = predictions
        .iter()
        .flat_map(|p| p.looked_at.clone())
        .collect();
    let writable: Vec<_> = predictions
        .iter()
        .flat_map(|p| p.writable.clone())
        .collect();
    let ring_and_tables: Vec<_> = descriptors
        .iter()
        .map(|&at| (at, 16))
        .chain([ring])
        .collect();
    let aliased = overlap_within(&written)
        || overlap(&written, &looked_at)
        // What the device writes into the used ring meanwhile is not foreseen.
        || overlap(&looked_at, &[ring]);
    // With aliasing it is not known which of the writable buffers will be written.
    if overlap(&written, &ring_and_tables) || aliased && overlap(&writable, &ring_and_tables) {
        Certainty::RingHit
    } else if aliased {
        Certainty::Aliased
    } else {
        Certainty::Exact
    }
}

/// Whether any two of the ranges, each an address and a length, overlap.
fn overlap_within(ranges: &[(u64, u64)]) -> bool {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable();
    sorted
        .windows(2)
        .any(|pair| pair[1].0 - pair[0].0 < pair[0].1)
}

/// Whether any range of one list overlaps one of the other.
fn overlap(a: &[(u64, u64)], b: &[(u64, u64)]) -> bool {
    let tag = |list: &[(u64, u64)], of: usize| -> Vec<(u64, u64, usize)> {
        list.iter().map(|&(at, len)| (at, len, of)).collect()
    };
    let mut sorted = [tag(a, 0), tag(b, 1)].concat();
    sorted.sort_unstable();
    // How far the ranges of each list have reached.
    let mut reached = [0; 2];
    sorted.into_iter().any(|(at, len, of)| {
        reached[of] = reached[of].max(at + len);
        at < reached[1 - of]
    })
}

/// Whether `at` is in one of the writable buffers.
pub(super) fn may_write(prediction: &Prediction, at: u64) -> bool {
    prediction
        .writable
        .iter()
        .any(|&(start, len)| start <= at && at - start < len)
}

/// What a byte of the disk may be while the batch is in flight: what it was, and what is written.
#[derive(Debug)]
pub(super) struct Versions {
    /// `(offset, data)` of the writes.
    writes: Vec<(usize, Vec<u8>)>,
}

impl Versions {
    fn of(predictions: &[Prediction], served: &Served) -> Self {
        let writes = |prediction: &Prediction| match &prediction.effect {
            _ if !served.stores() => Vec::new(),
            Effect::Write { offset, data } => vec![(*offset, data.clone())],
            Effect::Zero(ranges) => ranges
                .iter()
                .map(|&(offset, len)| (offset, vec![0; len]))
                .collect(),
            _ => Vec::new(),
        };
        Self {
            writes: predictions.iter().flat_map(writes).collect(),
        }
    }

    fn written_at(&self, at: usize) -> impl Iterator<Item = u8> {
        self.writes
            .iter()
            .filter_map(move |(offset, data)| data.get(at.checked_sub(*offset)?).copied())
    }
}

impl Versions {
    fn check_read(&self, disk: &[u8], offset: usize, found: &[u8]) {
        if disk[offset..offset + found.len()] == *found {
            return;
        }
        for (at, &found) in (offset..).zip(found) {
            let before = disk[at];
            assert!(
                self.written_at(at)
                    .chain([before])
                    .any(|byte| byte == found),
                "byte {at:#x} of the disk read as {found:#x}, not {before:#x}"
            );
        }
    }
}

/// Compares memory and disk after an exact batch, and takes over what could not be foreseen.
pub(super) fn settle(
    predictions: &[Prediction],
    served: &mut Served,
    naive: &mut NaiveMemory,
    real: &Memory,
) {
    let versions = Versions::of(predictions, served);
    for prediction in predictions {
        match &prediction.effect {
            Effect::Read { offset, places } => {
                let mut offset = *offset;
                for &(at, len) in places {
                    let mut found = vec![0; usize::try_from(len).expect("64 bits")];
                    real.read_slice(&mut found, GuestAddress(at))
                        .expect("mapped");
                    versions.check_read(&served.disk, offset, &found);
                    naive.write(at, &found);
                    offset += found.len();
                }
            }
            Effect::Id(id) => id.iter().for_each(|&(at, byte)| naive.write(at, &[byte])),
            Effect::Nothing | Effect::Write { .. } | Effect::Zero(_) | Effect::Flush => {}
        }
        if let Some((at, status)) = prediction.status {
            naive.write(at, &[status]);
        }
    }
    let content = served.content();
    // In the order of the guest, as a rule.
    let mut expected = served.disk.clone();
    for (offset, data) in &versions.writes {
        expected[*offset..offset + data.len()].copy_from_slice(data);
    }
    if content == expected {
        served.disk = content;
        return;
    }
    for (at, (&found, before)) in content.iter().zip(&mut served.disk).enumerate() {
        let mut after = versions.written_at(at).peekable();
        let right = match after.peek() {
            Some(_) => after.any(|byte| byte == found),
            None => found == *before,
        };
        let part = if at < CAPACITY {
            "disk"
        } else {
            "file, beyond the disk,"
        };
        assert!(
            right,
            "byte {at:#x} of the {part} is {found:#x}, was {before:#x}"
        );
        *before = found;
    }
}
