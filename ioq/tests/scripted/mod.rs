//! A queue on a disk that injects faults, and what comes of its operations.

use ioq::testing::{FaultDisk, Imitates};
use ioq::{Config, IoError, IoQueue};

pub(crate) const CONFIG: Config = Config {
    depth: 8,
    max_segments: 4,
};

pub(crate) const BOTH: [Imitates; 2] = [Imitates::LinuxAio, Imitates::IoUring];

pub(crate) type Owner = (Vec<u8>, u32);

pub(crate) fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| u8::try_from((i * 7 + i / 512) % 251).unwrap())
        .collect()
}

pub(crate) fn disk() -> FaultDisk {
    FaultDisk::new(pattern(4096))
}

pub(crate) fn queue(disk: &FaultDisk) -> IoQueue<Owner> {
    disk.queue(&CONFIG).unwrap()
}

pub(crate) fn read(queue: &mut IoQueue<Owner>, offset: u64, id: u32) {
    queue.read(offset, (vec![0; 512], id)).unwrap();
}

/// One reap, sorted by id.
pub(crate) fn reap(queue: &mut IoQueue<Owner>) -> Vec<(u32, Result<u64, IoError>)> {
    let mut results = Vec::new();
    queue.reap(|(_, id), result| results.push((id, result)));
    results.sort_by_key(|(id, _)| *id);
    results
}

/// Reaps until idle; a queue that stops making progress fails the test.
pub(crate) fn finish(queue: &mut IoQueue<Owner>) -> Vec<(Owner, Result<u64, IoError>)> {
    let mut results = Vec::new();
    for _ in 0..1000 {
        queue.reap(|owner, result| results.push((owner, result)));
        if queue.is_idle() {
            return results;
        }
        if queue.needs_retry() {
            queue.submit();
        }
    }
    panic!("stuck: {queue:?}");
}
