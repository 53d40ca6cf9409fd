//! Writes without a pause, whose every block tells when it was written, and what may be found of them afterwards.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::libblkio::{BUFFER, Client, Request, pattern};

pub(crate) const BLOCK: usize = 4096;
/// Blocks written to, each by one request at a time.
pub(crate) const BLOCKS: u64 = 512;
const DEPTH: usize = 32;
const QUEUES: usize = 2;

/// What has been done to a block: the numbers of its last write acknowledged and of its last write submitted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Written {
    acknowledged: u64,
    submitted: u64,
}

/// Watched and ended by another thread.
#[derive(Debug, Default)]
pub(crate) struct Control {
    pub(crate) over: AtomicBool,
    pub(crate) acknowledged: AtomicU64,
}

impl Control {
    /// Waits until so many writes have been acknowledged, ever.
    pub(crate) fn wait_for(&self, number: u64) {
        let start = std::time::Instant::now();
        while self.acknowledged.load(Ordering::Relaxed) < number {
            assert!(start.elapsed() < Duration::from_secs(60), "no progress");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Its number and place, and what follows from them, to the last byte.
fn content(block: u64, number: u64) -> Vec<u8> {
    let mut bytes = pattern(block << 32 | number, BLOCK);
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes
}

/// Writes through the socket at `path` until `control` says that it is over, which the device may be before.
/// `written` is what was done earlier.
pub(crate) fn write_until_over(
    path: &Path,
    control: &Control,
    mut written: Vec<Written>,
) -> Vec<Written> {
    written.resize(usize::try_from(BLOCKS).unwrap(), Written::default());
    let mut client = Client::connect(path, QUEUES);
    let mut in_flight: HashMap<(usize, usize), usize> = HashMap::new();
    let mut next = 0;
    let slot = BUFFER / DEPTH;
    while !control.over.load(Ordering::Relaxed) {
        for queue in 0..QUEUES {
            for place in 0..DEPTH {
                if in_flight.contains_key(&(queue, place)) {
                    continue;
                }
                // Neighbours most of the time, for the merger.
                next = (next + 1) % written.len();
                while in_flight.values().any(|&block| block == next) {
                    next = (next + 1) % written.len();
                }
                in_flight.insert((queue, place), next);
                written[next].submitted += 1;
                let block = u64::try_from(next).unwrap();
                let bytes = content(block, written[next].submitted);
                client.fill(queue, place * slot, &bytes);
                let request = Request::Write {
                    at: block * BLOCK as u64,
                    buffer: place * slot,
                    len: BLOCK,
                };
                client.add(queue, request, place);
            }
        }
        for queue in 0..QUEUES {
            // Nothing answers any more once the device has gone.
            let answers = client.wait_for(queue, 1, Duration::from_millis(20));
            note(queue, answers, &mut in_flight, &mut written, control);
        }
    }
    // What was answered before it went.
    for queue in 0..QUEUES {
        let answers = client.wait_for(queue, 0, Duration::ZERO);
        note(queue, answers, &mut in_flight, &mut written, control);
    }
    written
}

fn note(
    queue: usize,
    answers: Option<Vec<(usize, i32)>>,
    in_flight: &mut HashMap<(usize, usize), usize>,
    written: &mut [Written],
    control: &Control,
) {
    for (place, answer) in answers.unwrap_or_default() {
        assert_eq!(answer, 0);
        let block = in_flight.remove(&(queue, place)).expect("answered once");
        written[block].acknowledged = written[block].submitted;
        control.acknowledged.fetch_add(1, Ordering::Relaxed);
    }
}

/// Checks that each block is, as a whole, one of the writes that may have been its last; such as it is, the book goes
/// on from there.
pub(crate) fn check(image: &[u8], written: &[Written]) -> Vec<Written> {
    let blocks = image.chunks_exact(BLOCK).zip(written).zip(0..);
    blocks
        .map(|((bytes, written), block)| {
            let number = number_of(block, bytes);
            assert!(
                (written.acknowledged..=written.submitted).contains(&number),
                "block {block} is of write {number}; {written:?}"
            );
            Written {
                acknowledged: number,
                ..*written
            }
        })
        .collect()
}

/// The number of the write that the block is of, as a whole.
pub(crate) fn number_of(block: u64, bytes: &[u8]) -> u64 {
    let number = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    if number == 0 {
        assert!(bytes.iter().all(|&byte| byte == 0), "block {block} is torn");
    } else {
        assert!(bytes == content(block, number), "block {block} is torn");
    }
    number
}
