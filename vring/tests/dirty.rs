//! Every byte that the ring writes to guest memory is marked in vm-memory's bitmap, and none beside the
//! ring's: here with a bitmap of one bit per byte. What pages come of it is in `memory`.
//!
//! A write of what was there already would be missed by comparing bytes. So before each operation the
//! bytes that the device only writes are made something that no device writes there.

mod rig;

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use proptest::prelude::*;
use rig::{PLAIN, both, segment, size};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};
use vring::driver::{Driver, Layout};
use vring::{Chain, Head, Queue, QueueConfig, RingAddresses, RingBase, RingFeatures};

type Memory = GuestMemoryMmap<AtomicBitmap>;

const LEN: usize = 0x400;
const ENTRIES: u16 = 4;
/// No id, length or index here is so large, and AVAIL and USED of a used descriptor are equal.
const POISON: u8 = 0xa5;
/// Most steps of a run, so that indices stay below [`POISON`].
const STEPS: usize = 60;

/// One region whose bitmap has a bit for each byte.
fn memory() -> Arc<Memory> {
    const READ_AND_WRITE: i32 = 1 | 2;
    let bitmap = AtomicBitmap::new(LEN, NonZeroUsize::MIN);
    let region = MmapRegionBuilder::new_with_bitmap(LEN, bitmap)
        .with_mmap_prot(READ_AND_WRITE)
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    Arc::new(Memory::from_regions(vec![region]).unwrap())
}

fn bytes(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; LEN];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

fn write(memory: &Memory, at: usize, bytes: &[u8]) {
    let at = GuestAddress(u64::try_from(at).unwrap());
    memory.write_slice(bytes, at).unwrap();
}

/// The bytes marked; forgets them.
fn take_marks(memory: &Memory) -> Vec<usize> {
    let region = memory.find_region(GuestAddress(0)).unwrap();
    let bitmap = (**region).bitmap();
    let marks = (0..LEN).filter(|&at| bitmap.is_addr_set(at)).collect();
    bitmap.reset();
    marks
}

/// The bytes that `operation` wrote among those it only writes, with those marked.
fn written_and_marked(
    memory: &Memory,
    only_written: &[Range<usize>],
    operation: impl FnOnce(),
) -> (Vec<usize>, Vec<usize>) {
    let before = bytes(memory);
    for range in only_written {
        write(memory, range.start, &vec![POISON; range.len()]);
    }
    let poisoned = bytes(memory);
    take_marks(memory);
    operation();
    let marks = take_marks(memory);
    let after = bytes(memory);
    let written: Vec<_> = (0..LEN).filter(|&at| after[at] != poisoned[at]).collect();
    for at in only_written.iter().cloned().flatten() {
        if !written.contains(&at) {
            write(memory, at, &before[at..=at]);
        }
    }
    (written, marks)
}

/// What guest and device do. Which of what there is: modulo how many there are.
#[derive(Clone, Copy, Debug)]
enum Step {
    Add(u16),
    Reap,
    Pop,
    Push { which: usize, len: u32 },
    Publish,
    Decide,
    Disable,
    Enable,
    Pass,
}

struct Ring {
    memory: Arc<Memory>,
    guest: Driver<Memory>,
    queue: Queue<Memory>,
    chain: Chain,
    heads: Vec<Head>,
    /// The used ring, or the device's event structure.
    device_area: Range<usize>,
    /// A packed ring's descriptors; empty for a split ring.
    descriptors: Range<usize>,
    /// Written by `push`, which leaves the marking to the next `publish`.
    unmarked: Vec<usize>,
}

fn areas(addresses: RingAddresses, packed: bool) -> (Range<usize>, Range<usize>) {
    let area = |start: GuestAddress, len: usize| {
        let start = usize::try_from(start.0).unwrap();
        start..start + len
    };
    let entries = usize::from(ENTRIES);
    if packed {
        let descriptors = area(addresses.descriptor_area, 16 * entries);
        (area(addresses.device_area, 4), descriptors)
    } else {
        (area(addresses.device_area, 6 + 8 * entries), 0..0)
    }
}

impl Ring {
    /// Starts a queue, and checks the marks of that.
    fn start(features: RingFeatures) -> Self {
        let memory = memory();
        let size = size(u32::from(ENTRIES));
        let layout = Layout::new(GuestAddress(0x100), size, features).unwrap();
        let addresses = layout.addresses();
        let guest = Driver::new(Arc::clone(&memory), addresses, size, features).unwrap();
        let config = QueueConfig {
            size,
            addresses,
            features,
            base: RingBase::fresh(features),
        };
        let (device_area, descriptors) = areas(addresses, features.packed);
        // A start reads a split ring's index, which is behind the flags that it writes.
        let len = if features.packed { 4 } else { 2 };
        let first = device_area.start..device_area.start + len;
        let mut queue = None;
        let (written, marks) = written_and_marked(&memory, std::slice::from_ref(&first), || {
            queue = Some(Queue::start(Arc::clone(&memory), &config).unwrap());
        });
        assert_eq!(written, first.collect::<Vec<_>>());
        assert_eq!(marks, written);
        Self {
            memory,
            guest,
            queue: queue.unwrap(),
            chain: Chain::for_queue(size),
            heads: Vec::new(),
            device_area,
            descriptors,
            unmarked: Vec::new(),
        }
    }

    /// Does one step, checks its marks, and returns how many bytes the device wrote.
    fn step(&mut self, step: Step) -> usize {
        match step {
            Step::Add(count) => {
                let buffers = vec![segment(0x200, 8); usize::from(count)];
                // A full ring is as good a step as any.
                let _ = self.guest.add_chain(&[], &buffers);
                self.guest.publish();
            }
            Step::Reap => while self.guest.poll_used().is_some() {},
            _ => {}
        }
        let mut only_written = vec![self.device_area.clone()];
        // Whoever looks for chains reads descriptors.
        if !matches!(step, Step::Pop | Step::Enable | Step::Pass) {
            only_written.push(self.descriptors.clone());
        }
        let memory = Arc::clone(&self.memory);
        let (written, marks) = written_and_marked(&memory, &only_written, || self.act(step));

        let ring = |at: &usize| self.device_area.contains(at) || self.descriptors.contains(at);
        assert!(written.iter().all(ring), "{step:?} wrote {written:x?}");
        assert!(marks.iter().all(ring), "{step:?} marked {marks:x?}");
        let now = written.iter().filter(|at| !marks.contains(at));
        if matches!(step, Step::Push { .. }) {
            self.unmarked.extend(now);
        } else {
            let now: Vec<_> = now.collect();
            assert!(now.is_empty(), "{step:?} left {now:x?} unmarked");
        }
        self.unmarked.retain(|at| !marks.contains(at));
        if matches!(step, Step::Publish | Step::Pass) {
            let left = &self.unmarked;
            assert!(left.is_empty(), "{step:?} left {left:x?} unmarked");
        }
        written.len()
    }

    fn act(&mut self, step: Step) {
        let Self {
            queue,
            chain,
            heads,
            ..
        } = self;
        match step {
            Step::Add(_) | Step::Reap => {}
            Step::Pop => heads.extend(queue.pop(chain).unwrap()),
            Step::Push { which, len } => {
                if !heads.is_empty() {
                    queue.push(heads.remove(which % heads.len()), len);
                }
            }
            Step::Publish => {
                queue.publish();
            }
            Step::Decide => {
                queue.should_notify();
            }
            Step::Disable => queue.disable_notification(),
            Step::Enable => {
                queue.enable_notification();
            }
            Step::Pass => {
                let mut batch = queue.batch(2);
                while let Some(head) = batch.pop(chain).unwrap() {
                    batch.push(head, 1);
                }
                let _ = batch.finish();
            }
        }
    }
}

fn features(event_idx: bool, in_order: bool) -> [RingFeatures; 2] {
    both(RingFeatures {
        event_idx,
        in_order,
        ..PLAIN
    })
}

/// That the tests here see writes at all: how many bytes each step writes.
#[test]
fn each_operation_writes_and_marks_what_the_format_has() {
    let push = Step::Push { which: 0, len: 8 };
    for (event_idx, in_order) in [(false, false), (true, false), (false, true), (true, true)] {
        for features in features(event_idx, in_order) {
            let mut ring = Ring::start(features);
            for _ in 0..3 {
                ring.step(Step::Add(1));
            }
            for _ in 0..3 {
                assert_eq!(ring.step(Step::Pop), 0);
            }
            // A used element at once; of used descriptors all but the first of a batch.
            let staged: Vec<_> = (0..3).map(|_| ring.step(push)).collect();
            let published = ring.step(Step::Publish);
            match (features.packed, in_order) {
                (false, false) => assert_eq!((staged, published), (vec![8; 3], 2)),
                (true, false) => assert_eq!((staged, published), (vec![0, 8, 8], 8)),
                // One for all three, which were written in full.
                (false, true) => assert_eq!((staged, published), (vec![0; 3], 8 + 2)),
                (true, true) => assert_eq!((staged, published), (vec![0; 3], 8)),
            }
            assert_eq!(ring.step(Step::Decide), 0);
            let disabled = ring.step(Step::Disable);
            assert_eq!(ring.step(Step::Disable), 0, "it has been said");
            let enabled = ring.step(Step::Enable);
            match (features.packed, event_idx) {
                (false, false) => assert_eq!((disabled, enabled), (2, 2)),
                (false, true) => assert_eq!((disabled, enabled), (0, 2)),
                (true, _) => assert_eq!((disabled, enabled), (4, 4)),
            }
        }
    }
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1..=ENTRIES).prop_map(Step::Add),
        2 => Just(Step::Reap),
        4 => Just(Step::Pop),
        4 => (any::<usize>(), 0..=8u32).prop_map(|(which, len)| Step::Push { which, len }),
        2 => Just(Step::Publish),
        1 => Just(Step::Decide),
        1 => Just(Step::Disable),
        1 => Just(Step::Enable),
        1 => Just(Step::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn every_byte_written_is_marked_whatever_is_done(
        (event_idx, in_order) in any::<(bool, bool)>(),
        steps in proptest::collection::vec(step(), 1..STEPS),
    ) {
        for features in features(event_idx, in_order) {
            let mut ring = Ring::start(features);
            for &step in &steps {
                ring.step(step);
            }
        }
    }
}
