//! The guest side of a packed ring against a naive device, over any history.

mod naive_device;
mod rig;

use std::collections::VecDeque;

use naive_device::{Buffer, Chain, PACKED, SIZE, driver, used};
use proptest::prelude::*;
use rig::{BUFFERS, TABLE, segment};
use vm_memory::GuestAddress;
use vring::driver::{EVENT_DESC, Used};
use vring::{RingFeatures, Segment};

#[derive(Clone, Debug)]
enum Step {
    Add {
        readable: u16,
        writable: u16,
        indirect: bool,
    },
    Publish,
    Pop,
    Push {
        which: usize,
        short: bool,
    },
    Poll,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let one = prop_oneof![
        4 => (0u16..4, 0u16..4, any::<bool>()).prop_map(|(readable, writable, indirect)| {
            Step::Add { readable, writable, indirect }
        }),
        2 => Just(Step::Publish),
        4 => Just(Step::Pop),
        4 => (0usize..8, any::<bool>()).prop_map(|(which, short)| Step::Push { which, short }),
        3 => Just(Step::Poll),
    ];
    proptest::collection::vec(one, 1..200)
}

fn segments(count: u16, at: u64) -> Vec<Segment> {
    (0..count)
        .map(|i| segment(at + 0x100 * u64::from(i), u32::from(i) + 1))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn what_is_added_is_what_a_naive_device_pops_and_what_it_pushes_comes_back(
        index in 0..SIZE, wrap: bool, in_order: bool, steps in steps(),
    ) {
        let features = RingFeatures { in_order, ..PACKED };
        let (mut driver, mut device) = driver(features, index, wrap);
        let mut staged: VecDeque<Chain> = VecDeque::new();
        let mut available: VecDeque<Chain> = VecDeque::new();
        let mut popped: VecDeque<Chain> = VecDeque::new();
        let mut completed: VecDeque<Used> = VecDeque::new();
        let mut free = SIZE;
        let mut free_after: VecDeque<u16> = VecDeque::new();
        let mut table = TABLE;
        for step in steps {
            match step {
                Step::Add { readable, writable, indirect } => {
                    let (readable, writable) = (segments(readable, BUFFERS), segments(writable, 0));
                    let mut buffers: Vec<Buffer> = Vec::new();
                    buffers.extend(readable.iter().map(|s| (s.addr.0, s.len, false)));
                    buffers.extend(writable.iter().map(|s| (s.addr.0, s.len, true)));
                    if buffers.is_empty() {
                        buffers.push((0, 0, false));
                    }
                    let (added, descriptors) = if indirect {
                        let table = GuestAddress(table);
                        (driver.add_indirect(table, &readable, &writable).ok(), 1)
                    } else {
                        let descriptors = u16::try_from(buffers.len()).unwrap();
                        (driver.add_chain(&readable, &writable).ok(), descriptors)
                    };
                    prop_assert_eq!(added.is_some(), descriptors <= free);
                    if let Some(id) = added {
                        free -= descriptors;
                        // More tables than chains outstanding: none is overwritten.
                        table = if table > TABLE + 0xf00 { TABLE } else { table + 0x100 };
                        staged.push_back(Chain { id, buffers, descriptors });
                    }
                }
                Step::Publish => {
                    prop_assert_eq!(driver.publish(), staged.len());
                    available.append(&mut staged);
                }
                Step::Pop => {
                    let chain = device.pop();
                    prop_assert_eq!(&chain, &available.pop_front());
                    popped.extend(chain);
                }
                Step::Push { which, short } if in_order => {
                    // A run: all up to this one, the last alone perhaps written short.
                    let Some(last) = popped.get(which).cloned() else { continue };
                    let mut descriptors = 0;
                    for chain in popped.drain(..=which) {
                        descriptors += chain.descriptors;
                        free_after.push_back(chain.descriptors);
                        let full = chain.buffers.iter().filter(|b| b.2).map(|b| b.1).sum();
                        let len = if chain == last && short { 0 } else { full };
                        completed.push_back(used(chain.id, len, true));
                    }
                    let len = completed.back().unwrap().len;
                    device.push(last.id, len, descriptors);
                }
                Step::Push { which, .. } => {
                    let Some(chain) = popped.remove(which) else { continue };
                    device.push(chain.id, 77, chain.descriptors);
                    completed.push_back(used(chain.id, 77, true));
                    free_after.push_back(chain.descriptors);
                }
                Step::Poll => {
                    prop_assert_eq!(driver.has_used(), !completed.is_empty());
                    prop_assert_eq!(driver.poll_used(), completed.pop_front());
                    free += free_after.pop_front().unwrap_or(0);
                }
            }
            prop_assert_eq!(driver.free(), free);
            // No two chains outstanding share an id.
            let mut ids: Vec<_> = [&staged, &available, &popped]
                .into_iter()
                .flatten()
                .map(|chain| chain.id)
                .collect();
            let outstanding = ids.len();
            ids.sort_unstable();
            ids.dedup();
            prop_assert_eq!(ids.len(), outstanding);
        }
    }

    /// Kick if the device's event is among the descriptors published since the last decision.
    #[test]
    fn kick_decisions_agree_with_the_specification(
        index in 0..SIZE,
        wrap: bool,
        batches in proptest::collection::vec((1u16..=SIZE, 0..SIZE + 2, any::<bool>(), 0u16..4), 1..30),
    ) {
        let features = RingFeatures { event_idx: true, ..PACKED };
        let (mut driver, mut device) = driver(features, index, wrap);
        let mut seen = Vec::new();
        for (count, event, event_wrap, decide) in batches {
            for _ in 0..count {
                let next = driver.next_avail();
                seen.push((next.index, next.wrap));
                driver.add_chain(&[segment(BUFFERS, 8)], &[]).unwrap();
            }
            driver.publish();
            while let Some(chain) = device.pop() {
                device.push(chain.id, 0, 1);
                driver.poll_used().unwrap();
            }
            device.ask(event | u16::from(event_wrap) << 15, EVENT_DESC);
            // One decision for several publications, sometimes: more than two passes.
            if decide == 0 {
                let expected = seen.contains(&(event, event_wrap));
                prop_assert_eq!(driver.needs_kick(), expected);
                seen.clear();
            }
        }
    }
}
