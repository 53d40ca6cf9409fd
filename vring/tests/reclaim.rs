//! A queue that goes on where one that died has stopped.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryMmap};
use vring::driver::{Driver, Layout};
use vring::{
    Chain, Leftover, PackedPosition, Queue, QueueConfig, QueueSize, ReclaimError, RingBase,
    RingDescriptor, RingFeatures, Segment,
};

type Memory = GuestMemoryMmap<()>;

struct Lab {
    memory: Arc<Memory>,
    guest: Driver<Memory>,
    config: QueueConfig,
    chain: Chain,
}

fn segment(name: u64) -> Segment {
    Segment {
        addr: GuestAddress(0x4000 + 0x100 * name),
        len: 16,
    }
}

impl Lab {
    fn new(packed: bool) -> Self {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x8000)]).unwrap();
        let memory = Arc::new(memory);
        let size = QueueSize::new(8).unwrap();
        let features = RingFeatures {
            packed,
            ..RingFeatures::default()
        };
        let addresses = Layout::new(GuestAddress(0), size, features)
            .unwrap()
            .addresses();
        let guest = Driver::new(Arc::clone(&memory), addresses, size, features).unwrap();
        let config = QueueConfig {
            size,
            addresses,
            features,
            base: RingBase::fresh(features),
        };
        Self {
            memory,
            guest,
            config,
            chain: Chain::for_queue(size),
        }
    }

    fn start(&self, base: RingBase) -> Queue<Memory> {
        let config = QueueConfig {
            base,
            ..self.config
        };
        Queue::start(Arc::clone(&self.memory), &config).unwrap()
    }
}

#[test]
fn split_chain_of_a_predecessor_is_served_once_more_and_given_back() {
    let mut lab = Lab::new(false);
    let first = lab.guest.add_chain(&[segment(0)], &[segment(1)]).unwrap();
    let second = lab.guest.add_chain(&[segment(2)], &[]).unwrap();
    lab.guest.publish();
    let mut dead = lab.start(lab.config.base);
    let _ = dead.pop(&mut lab.chain).unwrap().unwrap();
    drop(dead);

    let mut queue = lab.start(RingBase::Split { next_avail: 1 });
    let head = queue
        .reclaim(Leftover::Split(first), &mut lab.chain)
        .unwrap();
    assert_eq!(lab.chain.readable(), [segment(0)]);
    assert_eq!(lab.chain.writable(), [segment(1)]);
    assert_eq!(queue.in_flight(), 1);
    // Not one that unpop takes back: the position has not moved.
    let head = queue.unpop(head).unwrap_err();
    for impossible in [first, 8, u16::MAX] {
        let refused = queue.reclaim(Leftover::Split(impossible), &mut lab.chain);
        assert_eq!(refused, Err(ReclaimError::Impossible));
    }
    queue.unreclaim(head).unwrap();
    assert_eq!(queue.in_flight(), 0);
    let head = queue
        .reclaim(Leftover::Split(first), &mut lab.chain)
        .unwrap();
    queue.push(head, 16);
    let head = queue.pop(&mut lab.chain).unwrap().unwrap();
    assert_eq!(head.index(), second);
    queue.push(head, 0);
    queue.publish();
    assert_eq!(lab.guest.poll_used().unwrap().id, u32::from(first));
    assert_eq!(lab.guest.poll_used().unwrap().id, u32::from(second));
}

#[test]
fn packed_chain_of_a_predecessor_is_taken_from_its_record() {
    let mut lab = Lab::new(true);
    let first = lab.guest.add_chain(&[segment(0)], &[segment(1)]).unwrap();
    let second = lab.guest.add_chain(&[segment(2)], &[]).unwrap();
    lab.guest.publish();
    let Queue::Packed(mut dead) = lab.start(lab.config.base) else {
        panic!("not packed");
    };
    let mut record = Vec::new();
    let _lost = dead.pop(&mut lab.chain).unwrap().unwrap();
    dead.describe_latest(|descriptor| record.push(descriptor));
    assert_eq!(record.len(), 2);
    // The second is done first; its used descriptor takes the place of the first's.
    let head = dead.pop(&mut lab.chain).unwrap().unwrap();
    dead.push(head, 0);
    dead.publish();
    assert_eq!(lab.guest.poll_used().unwrap().id, u32::from(second));
    let RingBase::Packed { avail, used } = dead.base() else {
        panic!("not packed");
    };
    assert_eq!((avail.index, used.index), (3, 1));
    drop(dead);

    let mut queue = lab.start(RingBase::Packed { avail, used });
    let with = |flags: u16| {
        let mut record = record.clone();
        record[0].flags = flags;
        record
    };
    let impossible: [&[RingDescriptor]; 4] = [&[], &record[..1], &with(0), &[record[0]; 9]];
    for record in impossible {
        let refused = queue.reclaim(Leftover::Packed(record), &mut lab.chain);
        assert_eq!(refused, Err(ReclaimError::Impossible), "{record:?}");
    }
    let refused = queue.reclaim(Leftover::Split(0), &mut lab.chain);
    assert_eq!(refused, Err(ReclaimError::Impossible));
    let head = queue
        .reclaim(Leftover::Packed(&record), &mut lab.chain)
        .unwrap();
    assert_eq!(lab.chain.readable(), [segment(0)]);
    assert_eq!(lab.chain.writable(), [segment(1)]);
    let again = queue.reclaim(Leftover::Packed(&record), &mut lab.chain);
    assert_eq!(again, Err(ReclaimError::Impossible), "the id is in flight");
    queue.push(head, 16);
    queue.publish();
    let used = lab.guest.poll_used().unwrap();
    assert_eq!((used.id, used.len), (u32::from(first), 16));
}

#[test]
fn used_descriptors_that_were_staged_and_not_published_are_taken_back() {
    let mut lab = Lab::new(true);
    let ids: Vec<_> = (0..3)
        .map(|name| lab.guest.add_chain(&[segment(name)], &[]).unwrap())
        .collect();
    lab.guest.publish();
    let Queue::Packed(mut dead) = lab.start(lab.config.base) else {
        panic!("not packed");
    };
    let mut records = Vec::new();
    let mut heads = Vec::new();
    while let Some(head) = dead.pop(&mut lab.chain).unwrap() {
        dead.describe_latest(|descriptor| records.push(descriptor));
        heads.push(head);
    }
    // All three are staged, and the second and third are written to the ring. Then it dies.
    for head in heads {
        dead.push(head, 0);
    }
    drop(dead);

    let base = RingBase::Packed {
        avail: PackedPosition {
            index: 3,
            wrap: true,
        },
        used: PackedPosition::FIRST,
    };
    let Queue::Packed(mut queue) = lab.start(base) else {
        panic!("not packed");
    };
    queue.discard_staged();
    let mut heads: Vec<_> = records
        .iter()
        .map(|&record| queue.reclaim(&[record], &mut lab.chain).unwrap())
        .collect();
    queue.push(heads.remove(2), 0);
    queue.publish();
    assert_eq!(lab.guest.poll_used().unwrap().id, u32::from(ids[2]));
    assert_eq!(lab.guest.poll_used(), None, "what the dead one had staged");
    for head in heads {
        queue.push(head, 0);
    }
    queue.publish();
    assert_eq!(lab.guest.poll_used().unwrap().id, u32::from(ids[0]));
    assert_eq!(lab.guest.poll_used().unwrap().id, u32::from(ids[1]));
}
