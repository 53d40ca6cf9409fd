//! Random requests in random framings on two queues, against a disk that is a vector.

use std::collections::HashMap;

use blk_dataplane::Engine;
use proptest::prelude::*;

use crate::support::embedded::Embedded;
use crate::support::pattern;
use crate::support::queue::{
    BLK_FLUSH, Completed, EVENT_IDX, GuestQueue, INDIRECT, RING_PACKED, VERSION_1,
};
use crate::support::request::{Framing, OK, Request, Table};
use crate::support::scratch::{Kind, Scratch};

/// Sectors of the model disk: small, so that requests meet and merge.
const SECTORS: u64 = 1024;

/// Bounds the time: a case takes some 10 ms.
const CASES: u32 = 48;

#[derive(Clone, Copy, Debug)]
enum Op {
    Read,
    Write,
    Flush,
    GetId,
}

#[derive(Clone, Debug)]
struct Step {
    queue: usize,
    op: Op,
    sector: u64,
    sectors: u64,
    readable: Vec<usize>,
    writable: Vec<usize>,
    indirect: bool,
    skew: u64,
    /// Publish what has been added so far.
    publish: bool,
}

fn step() -> impl Strategy<Value = Step> {
    let op = prop_oneof![
        4 => Just(Op::Read),
        4 => Just(Op::Write),
        1 => Just(Op::Flush),
        1 => Just(Op::GetId),
    ];
    // Mostly small, up to 64 KiB.
    let sectors = prop_oneof![3 => 1u64..=16, 1 => 1u64..=128];
    let part = prop_oneof![
        Just(512usize),
        Just(16),
        1usize..40,
        1usize..5000,
        Just(4096)
    ];
    let parts = proptest::collection::vec(part, 0..6);
    let skew = prop_oneof![3 => Just(0u64), 1 => 0u64..512];
    (
        (0usize..2, op, 0..SECTORS, sectors),
        (parts.clone(), parts, any::<bool>(), skew, any::<bool>()),
    )
        .prop_map(
            |((queue, op, at, sectors), (readable, writable, indirect, skew, publish))| Step {
                queue,
                op,
                sector: at.min(SECTORS - sectors),
                sectors,
                readable,
                writable,
                indirect,
                skew,
                publish,
            },
        )
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![Just(Kind::Disk), Just(Kind::Shm), Just(Kind::Buffered)]
}

fn engine() -> impl Strategy<Value = Engine> {
    prop_oneof![Just(Engine::LinuxAio), Just(Engine::IoUring)]
}

/// Ring sizes below and above the batch (128) and what may be in flight (256).
fn size() -> impl Strategy<Value = u32> {
    prop_oneof![Just(2u32), Just(4), Just(128), Just(1024)]
}

/// What a request in flight will have done.
struct Expected {
    op: Op,
    sector: u64,
    sectors: u64,
    /// What a read must find.
    data: Vec<u8>,
}

struct Guest {
    queues: [GuestQueue; 2],
    expected: [HashMap<u32, Expected>; 2],
    disk: Vec<u8>,
}

impl Guest {
    fn bytes(sector: u64, sectors: u64) -> std::ops::Range<usize> {
        let start = usize::try_from(sector * 512).unwrap();
        start..start + usize::try_from(sectors * 512).unwrap()
    }

    /// Whether `step` would race with a request in flight: either of them writes where both are.
    fn conflicts(&self, step: &Step) -> bool {
        if !matches!(step.op, Op::Read | Op::Write) {
            return false;
        }
        self.expected.iter().flat_map(HashMap::values).any(|other| {
            let overlap = step.sector < other.sector + other.sectors
                && other.sector < step.sector + step.sectors;
            let both_transfer = matches!(other.op, Op::Read | Op::Write);
            let one_writes = matches!(step.op, Op::Write) || matches!(other.op, Op::Write);
            both_transfer && one_writes && overlap
        })
    }

    fn settle(&mut self, queue: usize, done: &Completed) {
        let expected = self.expected[queue].remove(&done.head).unwrap();
        assert_eq!(done.status, Some(OK));
        let len = usize::try_from(done.len).unwrap();
        match expected.op {
            Op::Read => {
                assert_eq!(len, expected.data.len() + 1);
                assert!(done.data == expected.data, "at sector {}", expected.sector);
            }
            Op::Write | Op::Flush => assert_eq!(len, 1),
            Op::GetId => assert_eq!((len, &done.data), (21, &expected.data)),
        }
    }

    fn take_all(&mut self) {
        for queue in 0..2 {
            self.queues[queue].publish();
        }
        for queue in 0..2 {
            while self.queues[queue].outstanding() > 0 {
                let done = self.queues[queue].next();
                self.settle(queue, &done);
            }
            self.queues[queue].arena.reset();
        }
    }

    fn add(&mut self, step: &Step, seed: u64, indirect: bool) {
        let range = Self::bytes(step.sector, step.sectors);
        let (request, data) = match step.op {
            Op::Read => (
                Request::read(step.sector, range.len()),
                self.disk[range].to_vec(),
            ),
            Op::Write => {
                let data = pattern(seed, range.len());
                let request = Request::write(step.sector, &data);
                self.disk[range].copy_from_slice(&data);
                (request, data)
            }
            Op::Flush => (Request::flush(), Vec::new()),
            Op::GetId => (
                Request::get_id(20),
                crate::support::scratch::SERIAL.as_bytes().to_vec(),
            ),
        };
        let size = usize::try_from(self.queues[step.queue].size()).unwrap();
        let framing = Framing::cut(&step.readable, &step.writable).skew(step.skew);
        let framing = if indirect && step.indirect {
            framing.table(Table::Indirect)
        } else if GuestQueue::descriptors(&request, &framing) <= size {
            framing
        } else {
            // The ring cannot hold it: two buffers always fit.
            Framing::joined().skew(step.skew)
        };
        let needed = GuestQueue::descriptors(&request, &framing);
        if usize::from(self.queues[step.queue].driver.free()) < needed {
            self.take_all();
        }
        let head = self.queues[step.queue].add(&request, &framing);
        let expected = Expected {
            op: step.op,
            sector: step.sector,
            sectors: step.sectors,
            data,
        };
        self.expected[step.queue].insert(head, expected);
        if step.publish {
            self.queues[step.queue].publish();
            while let Some(done) = self.queues[step.queue].poll() {
                self.settle(step.queue, &done);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: CASES,
        failure_persistence: None,
        max_shrink_time: 20_000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn device_behaves_like_a_vector_of_bytes(
        kind in kind(),
        sizes in [size(), size()],
        event_idx in any::<bool>(),
        indirect in any::<bool>(),
        (flush, packed) in any::<(bool, bool)>(),
        engine in engine(),
        steps in proptest::collection::vec(step(), 1..150),
    ) {
        let mut features = VERSION_1;
        for (bit, on) in [
            (EVENT_IDX, event_idx),
            (INDIRECT, indirect),
            (BLK_FLUSH, flush),
            (RING_PACKED, packed),
        ] {
            features |= if on { bit } else { 0 };
        }
        let disk = pattern(99, usize::try_from(SECTORS * 512).unwrap());
        let scratch = Scratch::new(kind, &disk);
        let mut vmm = Embedded::new(&scratch.device_through(engine));
        let queues = [0u16, 1].map(|index| {
            vmm.queue_with(index, sizes[usize::from(index)], features)
        });
        let expected = [HashMap::new(), HashMap::new()];
        let mut guest = Guest { queues, expected, disk };
        for (seed, step) in (1..).zip(&steps) {
            if guest.conflicts(step) {
                guest.take_all();
            }
            guest.add(step, seed, indirect);
        }
        guest.take_all();
        vmm.plane.stop().unwrap();
        prop_assert!(scratch.content() == guest.disk);
    }
}
