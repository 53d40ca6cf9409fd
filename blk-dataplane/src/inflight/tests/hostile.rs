//! A front-end that hands over what no back-end has written (hostile-inputs K1-K3), and where each field is.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vring::{Chain, PopError, QueueSize, RingBase};

use super::guest::Guest;
use super::{DEVICE, Memory, config, features, memory};
use crate::inflight::{InflightError, InflightRegion, TrackedError, TrackedQueue};

const SIZE: u16 = 8;

fn u16_at(file: &File, offset: u64) -> u16 {
    let mut bytes = [0; 2];
    file.read_exact_at(&mut bytes, offset).unwrap();
    u16::from_ne_bytes(bytes)
}

fn u64_at(file: &File, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, offset).unwrap();
    u64::from_ne_bytes(bytes)
}

fn u8_at(file: &File, offset: u64) -> u8 {
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    byte[0]
}

/// A record in a file, and a ring.
struct Lab {
    memory: Arc<Memory>,
    file: File,
    len: u64,
    packed: bool,
    guest: Guest,
}

impl Lab {
    fn new(packed: bool) -> Self {
        let (file, len) = InflightRegion::create(1, SIZE).unwrap();
        Self {
            memory: Arc::new(memory()),
            file,
            len,
            packed,
            guest: Guest::new(packed, SIZE),
        }
    }

    fn start(&self) -> Result<TrackedQueue<Memory>, TrackedError> {
        let file = self.file.try_clone().unwrap();
        let region = InflightRegion::map(file, 0, self.len, 1, SIZE).unwrap();
        let base = RingBase::fresh(features(self.packed));
        let config = config(self.packed, SIZE, base);
        TrackedQueue::start(Arc::clone(&self.memory), &config, region.queue(0).as_ref())
    }
}

fn chain() -> Chain {
    Chain::for_queue(QueueSize::try_from(SIZE).unwrap())
}

#[test]
fn split_record_lies_where_the_specification_says() {
    let mut lab = Lab::new(false);
    let mut queue = lab.start().unwrap();
    assert_eq!(u64_at(&lab.file, 0), 0, "features");
    assert_eq!((u16_at(&lab.file, 8), u16_at(&lab.file, 10)), (1, SIZE));
    let mut chain = chain();
    lab.guest.offer(&lab.memory, 1);
    lab.guest.offer(&lab.memory, 2);
    let first = queue.pop(&mut chain).unwrap().unwrap();
    let second = queue.pop(&mut chain).unwrap().unwrap();
    let entry = |head: u16| 16 + 16 * u64::from(head);
    for (head, counter) in [(first.index(), 0), (second.index(), 1)] {
        assert_eq!(u8_at(&lab.file, entry(head)), 1);
        assert_eq!(u64_at(&lab.file, entry(head) + 8), counter);
    }
    let heads = (first.index(), second.index());
    queue.push(second, 0);
    queue.push(first, 0);
    queue.publish();
    assert_eq!(u16_at(&lab.file, 12), heads.0, "last_batch_head");
    assert_eq!(u16_at(&lab.file, entry(heads.0) + 6), heads.1, "next");
    assert_eq!(u16_at(&lab.file, 14), 2, "used_idx");
    for head in [heads.0, heads.1] {
        assert_eq!(u8_at(&lab.file, entry(head)), 0);
    }
}

#[test]
fn packed_record_lies_where_the_specification_says() {
    let mut lab = Lab::new(true);
    let mut queue = lab.start().unwrap();
    let header = |lab: &Lab| [10, 12, 14, 16, 18].map(|at| u16_at(&lab.file, at));
    assert_eq!((u64_at(&lab.file, 0), u16_at(&lab.file, 8)), (0, 1));
    assert_eq!(header(&lab), [SIZE, 0, 0, 0, 0]);
    assert_eq!((u8_at(&lab.file, 20), u8_at(&lab.file, 21)), (1, 1));
    let mut chain = chain();
    lab.guest.offer(&lab.memory, 2);
    lab.guest.offer(&lab.memory, 1);
    let first = queue.pop(&mut chain).unwrap().unwrap();
    let second = queue.pop(&mut chain).unwrap().unwrap();
    assert_eq!(header(&lab), [SIZE, 3, 3, 0, 0]);
    // inflight, next, last, num, counter of the first chain's head.
    let head = 32;
    assert_eq!(u8_at(&lab.file, head), 1);
    assert_eq!([2, 4, 6].map(|at| u16_at(&lab.file, head + at)), [1, 1, 2]);
    assert_eq!(u64_at(&lab.file, head + 8), 0);
    // id, flags, len, addr of its second descriptor; the guest's ids come from the last down.
    let second_entry = 64;
    assert_eq!(u16_at(&lab.file, second_entry + 16), SIZE - 1);
    assert_eq!(u16_at(&lab.file, second_entry + 18), 1 << 7);
    assert_eq!(u64_at(&lab.file, second_entry + 16) >> 32, 1);
    assert_eq!(u64_at(&lab.file, second_entry + 24), 1 << 12);
    assert_eq!(u64_at(&lab.file, 96 + 8), 1, "counter of the second chain");
    queue.push(second, 0);
    queue.publish();
    // Entry 2 is free again, before 3; one descriptor is used.
    assert_eq!(header(&lab), [SIZE, 2, 2, 1, 1]);
    assert_eq!((u8_at(&lab.file, 96), u16_at(&lab.file, 96 + 2)), (0, 3));
    queue.push(first, 0);
    queue.publish();
    assert_eq!(header(&lab), [SIZE, 0, 0, 3, 3]);
    assert_eq!(
        u16_at(&lab.file, 64 + 2),
        2,
        "the last entry leads to the rest"
    );
}

#[test]
fn k1_descriptions_that_cannot_be_are_refused() {
    let (file, size) = InflightRegion::create(4, 128).unwrap();
    let map = |offset, size, queues, entries| {
        InflightRegion::map(file.try_clone().unwrap(), offset, size, queues, entries).map(|_| ())
    };
    assert!(map(0, size, 4, 128).is_ok());
    assert!(matches!(
        map(0, 0, 4, 128),
        Err(InflightError::TooSmall { .. })
    ));
    assert!(matches!(
        map(0, 64, 4, 128),
        Err(InflightError::TooSmall { .. })
    ));
    assert!(matches!(
        map(0, size, 0, 128),
        Err(InflightError::NumQueues { .. })
    ));
    assert!(matches!(
        map(0, size, 257, 128),
        Err(InflightError::NumQueues { .. })
    ));
    assert!(matches!(
        map(0, size, u16::MAX, 128),
        Err(InflightError::NumQueues { .. })
    ));
    for entries in [0, 3, 129, u16::MAX] {
        let refused = map(0, size, 4, entries);
        assert!(
            matches!(refused, Err(InflightError::QueueSize { .. })),
            "{entries}"
        );
    }
    // More than the file has, however that is said.
    assert!(matches!(
        map(0, size, 5, 128).err(),
        None | Some(InflightError::Map(_))
    ));
    assert!(matches!(
        map(0, u64::MAX, 256, 128),
        Err(InflightError::Map(_))
    ));
    assert!(matches!(
        map(size, size, 4, 128),
        Err(InflightError::Map(_))
    ));
    assert!(matches!(
        map(u64::MAX - 7, size, 4, 128),
        Err(InflightError::Map(_))
    ));
    assert!(matches!(
        map(4, size - 8, 1, 128),
        Err(InflightError::Misaligned { offset: 4 })
    ));
    // A size of which most is not used is none of our business, if the rest is there.
    assert!(map(0, u64::MAX, 4, 128).is_ok());
    assert!(map(8, size - 8, 1, 128).is_ok());
}

#[test]
fn k1_files_that_cannot_be_mapped_are_refused() {
    let file = File::open("/dev/null").unwrap();
    let refused = InflightRegion::map(file, 0, 1 << 20, 1, 8);
    assert!(matches!(refused, Err(InflightError::Map(_))));
}

#[test]
fn k1_a_ring_larger_than_the_record_is_not_started() {
    let lab = Lab::new(false);
    let region = InflightRegion::map(lab.file.try_clone().unwrap(), 0, lab.len, 1, 4).unwrap();
    let config = config(false, SIZE, RingBase::Split { next_avail: 0 });
    let refused = TrackedQueue::start(Arc::clone(&lab.memory), &config, region.queue(0).as_ref());
    assert!(matches!(
        refused,
        Err(TrackedError::Inflight(InflightError::RingTooLarge {
            ring: 8,
            buffer: 4
        }))
    ));
}

#[test]
fn k1_the_record_cannot_be_taken_away_from_those_who_have_it() {
    let lab = Lab::new(false);
    assert!(lab.file.set_len(0).is_err());
    assert!(lab.file.set_len(lab.len + 1).is_err());
}

#[test]
fn k2_a_record_of_another_layout_is_refused_and_left_alone() {
    for packed in [false, true] {
        for (at, value) in [(8, 2u16), (8, u16::MAX), (10, 0), (10, SIZE + 1)] {
            let lab = Lab::new(packed);
            drop(lab.start().unwrap());
            lab.file.write_all_at(&value.to_ne_bytes(), at).unwrap();
            let mut before = vec![0; usize::try_from(lab.len).unwrap()];
            lab.file.read_exact_at(&mut before, 0).unwrap();
            let refused = lab.start().map(|_| ());
            assert!(
                matches!(
                    refused,
                    Err(TrackedError::Inflight(InflightError::Foreign { .. }))
                ),
                "{at} {value}: {refused:?}"
            );
            let mut after = vec![0; before.len()];
            lab.file.read_exact_at(&mut after, 0).unwrap();
            assert_eq!(before, after);
        }
    }
}

#[test]
fn k2_a_record_of_a_ring_that_was_set_up_anew_is_started_anew() {
    let mut lab = Lab::new(false);
    let mut queue = lab.start().unwrap();
    let mut chain = chain();
    for _ in 0..2 {
        lab.guest.offer(&lab.memory, 1);
    }
    let head = queue.pop(&mut chain).unwrap().unwrap();
    queue.push(head, 0);
    queue.publish();
    let _in_flight = queue.pop(&mut chain).unwrap().unwrap();
    drop(queue);
    // The driver resets the device: its ring begins at 0 again, and nothing is in flight.
    lab.memory
        .write_slice(&[0; 4], GuestAddress(DEVICE))
        .unwrap();
    let queue = lab.start().unwrap();
    assert!(!queue.has_left());
    assert_eq!(queue.queue().base(), RingBase::Split { next_avail: 0 });
}

#[test]
fn k3_a_chain_that_is_broken_now_is_given_back_with_nothing_in_it() {
    for packed in [false, true] {
        let mut lab = Lab::new(packed);
        let mut queue = lab.start().unwrap();
        let mut chain = chain();
        lab.guest.offer(&lab.memory, 1);
        let _lost = queue.pop(&mut chain).unwrap().unwrap();
        drop(queue);
        // An indirect descriptor, which was not negotiated: in the ring, and in the record.
        let indirect = 4u16.to_le_bytes();
        let descriptor = if packed { 0 } else { u64::from(SIZE - 1) };
        let at = if packed { 14 } else { 12 };
        lab.memory
            .write_slice(&indirect, GuestAddress(16 * descriptor + at))
            .unwrap();
        lab.file.write_all_at(&indirect, 32 + 18).unwrap();
        let mut queue = lab.start().unwrap();
        let Err(PopError::Chain { head, .. }) = queue.pop(&mut chain) else {
            panic!("a broken chain was taken for a sound one");
        };
        queue.push(head, 0);
        queue.publish();
        assert_eq!(lab.guest.reap(&lab.memory), 1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Anything in the record and in the ring: no more chains than entries are served again, no panic, no end
    /// that does not come.
    #[test]
    fn k2_garbage_is_bounded(
        packed: bool,
        record in proptest::collection::vec(any::<u8>(), 0x140),
        small in proptest::collection::vec(0u8..9, 0x140),
        choice in proptest::collection::vec(0u8..4, 0x140),
        ring in proptest::collection::vec(any::<u8>(), 0x100),
        plausible: bool,
    ) {
        let lab = Lab::new(packed);
        // Mostly small numbers, which lead somewhere.
        let mut bytes: Vec<u8> = (record.iter().zip(&small).zip(&choice))
            .map(|((any, small), choice)| if *choice == 0 { *any } else { *small * (choice & 1) })
            .collect();
        bytes[8..12].copy_from_slice(&[1, 0, u8::try_from(SIZE).unwrap(), 0]);
        if plausible {
            for at in (if packed { 32..0x120 } else { 16..0x90 }).step_by(if packed { 32 } else { 16 }) {
                bytes[at] &= 1;
            }
        }
        let fits = bytes.len().min(usize::try_from(lab.len).unwrap());
        lab.file.write_all_at(&bytes[..fits], 0).unwrap();
        lab.memory.write_slice(&ring, GuestAddress(0)).unwrap();
        let Ok(mut queue) = lab.start() else {
            return Ok(());
        };
        let mut chain = chain();
        let mut heads = Vec::new();
        while queue.has_left() {
            match queue.pop(&mut chain) {
                Ok(Some(head)) | Err(PopError::Chain { head, .. }) => heads.push(head),
                Ok(None) | Err(_) => {}
            }
        }
        // And one that was popped, when the last of those left over could not be.
        prop_assert!(heads.len() <= usize::from(SIZE) + 1);
        for head in heads {
            queue.push(head, 0);
        }
        queue.publish();
    }
}
