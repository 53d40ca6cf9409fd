//! Giving chains back in the order they came (`VIRTIO_F_IN_ORDER`, virtio 1.3 §2.7.9, §2.8.8).
//!
//! The device completes chains in any order. They wait here until all that arrived before them are
//! complete too, and are then given back in runs, one used element for each:
//!
//! ```text
//!   arrival      0      1      2      3      4      5      6
//!              full   full   short  full   full   open   full     written: all, less, in flight
//!             └───────────────────┘└────────────┘ │      │
//!                   run, ends at 2    run, ends    └──────┴── wait for 5
//!                   with its length   at 4
//! ```
//!
//! The used element names a run's last chain and has its length. The driver takes the chains before
//! it for completely used, so one that was not written in full can only be the last of its run.

/// Writable bytes of a chain that must have a used element of its own, whatever is written: more
/// than 32 bits of written bytes can equal. For a chain that is broken nobody knows how many it has.
const NEVER_SKIPPED: u64 = u64::MAX;

/// A chain between its pop and its used element.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    /// Bytes of its writable buffers, or [`NEVER_SKIPPED`].
    writable: u64,
    /// Bytes written, once it is complete.
    written: u32,
    head: u16,
    complete: bool,
}

/// Chains that one used element gives back.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Run {
    /// Head of the last one.
    pub(crate) last: u16,
    /// Bytes written to the last one; the others are written in full.
    pub(crate) written: u32,
    /// How many there are, the last one included.
    pub(crate) chains: u16,
}

/// The chains that have arrived and not been given back, in order.
#[derive(Debug)]
pub(crate) struct InOrder {
    /// By arrival number modulo the queue size. Enough for all: their heads differ, and each is
    /// below the queue size.
    arrivals: Box<[Arrival]>,
    /// By head: the number of its latest arrival, which may be long over.
    arrival_of: Box<[u16]>,
    /// Number of the oldest arrival here; free-running.
    first: u16,
    /// How many there are.
    count: u16,
    /// How many of them are not complete.
    in_flight: u16,
}

impl InOrder {
    /// Room for heads below `size`, a power of two; the only allocation.
    pub(crate) fn new(size: u16) -> Self {
        let nothing = Arrival {
            writable: 0,
            written: 0,
            head: 0,
            complete: false,
        };
        Self {
            arrivals: vec![nothing; usize::from(size)].into_boxed_slice(),
            arrival_of: vec![0; usize::from(size)].into_boxed_slice(),
            first: 0,
            count: 0,
            in_flight: 0,
        }
    }

    /// Nothing waits to be completed or to be given back.
    #[cfg(test)]
    const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Chains complete and not given back.
    pub(crate) const fn waiting(&self) -> u16 {
        self.count - self.in_flight
    }

    /// Chains not complete.
    pub(crate) const fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Notes that the chain at `head` was popped, the latest so far; false if one with the same head
    /// is still here, or the head is out of range. Until told how long the chain is, it is one that
    /// must have a used element of its own.
    #[inline]
    pub(crate) fn arrive(&mut self, head: u16) -> bool {
        if usize::from(head) >= self.arrival_of.len() || self.find(head).is_some() {
            return false;
        }
        let number = self.first.wrapping_add(self.count);
        self.arrival_of[usize::from(head)] = number;
        *self.at(number) = Arrival {
            writable: NEVER_SKIPPED,
            written: 0,
            head,
            complete: false,
        };
        self.count += 1;
        self.in_flight += 1;
        true
    }

    /// Says that the latest arrival is sound, with that many bytes of writable buffers.
    #[inline]
    pub(crate) fn set_latest_writable(&mut self, writable: u64) {
        if self.count != 0 {
            let latest = self.first.wrapping_add(self.count - 1);
            self.at(latest).writable = writable;
        }
    }

    /// Forgets the latest arrival, if it is the chain at `head` and not complete.
    pub(crate) fn retract(&mut self, head: u16) -> bool {
        match self.find(head) {
            Some(number)
                if number == self.first.wrapping_add(self.count - 1)
                    && !self.arrival(number).complete =>
            {
                self.count -= 1;
                self.in_flight -= 1;
                true
            }
            _ => false,
        }
    }

    /// Notes that `written` bytes were written to the chain at `head`, and that is all; false if it
    /// is not waited for.
    #[inline]
    pub(crate) fn complete(&mut self, head: u16, written: u32) -> bool {
        let Some(number) = self.find(head) else {
            return false;
        };
        let arrival = self.at(number);
        if arrival.complete {
            return false;
        }
        arrival.complete = true;
        arrival.written = written;
        self.in_flight -= 1;
        true
    }

    /// Takes the next run to be given back, telling `leave` of each of its chains in order; `None`
    /// if the oldest chain is not complete.
    ///
    /// As long as can be: it ends only where a chain was not written in full, or before one that is
    /// not complete.
    pub(crate) fn take_run(&mut self, mut leave: impl FnMut(u16)) -> Option<Run> {
        let mut run: Option<Run> = None;
        while self.count != 0 {
            let Arrival {
                writable,
                written,
                head,
                complete,
            } = *self.arrival(self.first);
            if !complete {
                break;
            }
            self.first = self.first.wrapping_add(1);
            self.count -= 1;
            leave(head);
            run = Some(Run {
                last: head,
                written,
                chains: run.map_or(0, |run| run.chains) + 1,
            });
            if u64::from(written) != writable {
                break;
            }
        }
        run
    }

    /// The number of the arrival with `head`, if it is here. What is left over from an earlier one
    /// points outside, or to another head.
    #[inline]
    fn find(&self, head: u16) -> Option<u16> {
        let number = *self.arrival_of.get(usize::from(head))?;
        let here = number.wrapping_sub(self.first) < self.count;
        (here && self.arrival(number).head == head).then_some(number)
    }

    #[inline]
    fn arrival(&self, number: u16) -> &Arrival {
        &self.arrivals[usize::from(number) & (self.arrivals.len() - 1)]
    }

    #[inline]
    fn at(&mut self, number: u16) -> &mut Arrival {
        let mask = self.arrivals.len() - 1;
        &mut self.arrivals[usize::from(number) & mask]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    const SIZE: u16 = 8;

    fn runs(in_order: &mut InOrder) -> Vec<Run> {
        std::iter::from_fn(|| in_order.take_run(|_| {})).collect()
    }

    fn arrive(in_order: &mut InOrder, head: u16, writable: u64) {
        assert!(in_order.arrive(head));
        in_order.set_latest_writable(writable);
    }

    #[test]
    fn chains_written_in_full_are_one_run_with_the_last_ones_length() {
        let mut in_order = InOrder::new(SIZE);
        for head in [3, 1, 2] {
            arrive(&mut in_order, head, 512);
        }
        for head in [2, 3, 1] {
            assert!(in_order.complete(head, 512));
        }
        let run = Run {
            last: 2,
            written: 512,
            chains: 3,
        };
        assert_eq!(runs(&mut in_order), [run]);
        assert!(in_order.is_empty());
    }

    #[test]
    fn a_chain_without_writable_buffers_is_always_written_in_full() {
        let mut in_order = InOrder::new(SIZE);
        for head in 0..3 {
            arrive(&mut in_order, head, 0);
            in_order.complete(head, 0);
        }
        assert_eq!(runs(&mut in_order).len(), 1);
    }

    #[test]
    fn a_broken_chain_ends_its_run_though_nothing_is_written() {
        let mut in_order = InOrder::new(SIZE);
        assert!(in_order.arrive(0));
        in_order.complete(0, 0);
        arrive(&mut in_order, 1, 0);
        in_order.complete(1, 0);
        assert_eq!(runs(&mut in_order).len(), 2);
    }

    #[test]
    fn a_chain_of_two_to_the_32_bytes_is_never_skipped() {
        let mut in_order = InOrder::new(SIZE);
        for head in 0..2 {
            arrive(&mut in_order, head, 1 << 32);
            in_order.complete(head, u32::MAX);
        }
        assert_eq!(runs(&mut in_order).len(), 2);
    }

    #[test]
    fn a_head_is_here_until_it_is_given_back() {
        let mut in_order = InOrder::new(SIZE);
        arrive(&mut in_order, 0, 0);
        arrive(&mut in_order, 1, 0);
        assert!(in_order.complete(1, 0));
        assert!(!in_order.complete(1, 0), "once");
        assert!(!in_order.arrive(1), "complete, and not given back");
        assert!(!in_order.retract(1), "complete");
        assert!(!in_order.retract(0), "not the latest");
        assert!(!in_order.arrive(SIZE));
        assert!(!in_order.complete(SIZE, 0));
        assert_eq!(runs(&mut in_order), []);
        in_order.complete(0, 0);
        assert_eq!(runs(&mut in_order).len(), 1);
        assert!(in_order.arrive(1));
        assert!(in_order.retract(1));
        assert!(in_order.is_empty() && !in_order.retract(1));
    }

    #[test]
    fn the_largest_queue_is_filled_and_emptied_across_the_wrap_of_numbers() {
        let mut in_order = InOrder::new(32768);
        for round in 0..5 {
            for head in 0..32768 {
                arrive(&mut in_order, head, 1);
            }
            for head in (0..32768).rev() {
                assert!(in_order.complete(head, u32::from(head != 32767)));
            }
            let expected = Run {
                last: 32767,
                written: 0,
                chains: 32768,
            };
            assert_eq!(runs(&mut in_order), [expected], "round {round}");
        }
    }

    /// What a device may do.
    #[derive(Clone, Debug)]
    enum Step {
        Pop { head: u16, writable: Option<u64> },
        Unpop,
        Push { which: usize, written: u32 },
        Publish,
    }

    fn step() -> impl Strategy<Value = Step> {
        let writable = prop_oneof![Just(None), (0u64..3).prop_map(Some)];
        prop_oneof![
            4 => (0..SIZE, writable).prop_map(|(head, writable)| Step::Pop { head, writable }),
            1 => Just(Step::Unpop),
            4 => (0usize..8, 0u32..3).prop_map(|(which, written)| Step::Push { which, written }),
            1 => Just(Step::Publish),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Against a list of (head, writable, written): the front leaves while it is complete.
        #[test]
        fn runs_agree_with_a_list(
            steps in proptest::collection::vec(step(), 1..200), start: u16,
        ) {
            let mut in_order = InOrder::new(SIZE);
            in_order.first = start;
            let mut list: VecDeque<(u16, Option<u64>, Option<u32>)> = VecDeque::new();
            for step in steps {
                match step {
                    Step::Pop { head, writable } => {
                        let fits = list.iter().all(|chain| chain.0 != head);
                        prop_assert_eq!(in_order.arrive(head), fits);
                        if fits {
                            if let Some(writable) = writable {
                                in_order.set_latest_writable(writable);
                            }
                            list.push_back((head, writable, None));
                        }
                    }
                    Step::Unpop => match list.back() {
                        Some(&(head, _, None)) => {
                            prop_assert!(in_order.retract(head));
                            list.pop_back();
                        }
                        Some(&(head, ..)) => prop_assert!(!in_order.retract(head)),
                        None => prop_assert!(!in_order.retract(0)),
                    },
                    Step::Push { which, written } => {
                        if let Some(chain) = list.get_mut(which) {
                            prop_assert_eq!(in_order.complete(chain.0, written), chain.2.is_none());
                            chain.2.get_or_insert(written);
                        }
                    }
                    Step::Publish => {
                        let mut left = Vec::new();
                        let mut runs = Vec::new();
                        while let Some(run) = in_order.take_run(|head| left.push(head)) {
                            runs.push(run);
                        }
                        let mut expected = Vec::new();
                        while let Some(&(head, writable, Some(written))) = list.front() {
                            list.pop_front();
                            expected.push((head, writable, written));
                        }
                        let heads: Vec<_> = expected.iter().map(|chain| chain.0).collect();
                        prop_assert_eq!(left, heads);
                        // Each run's chains but the last are written in full.
                        let mut chains = expected.iter();
                        for (i, run) in runs.iter().enumerate() {
                            for _ in 1..run.chains {
                                let &(_, writable, written) = chains.next().unwrap();
                                prop_assert_eq!(writable, Some(u64::from(written)));
                            }
                            let &(head, writable, written) = chains.next().unwrap();
                            prop_assert_eq!((run.last, run.written), (head, written));
                            // And it could not have been longer.
                            if i + 1 < runs.len() {
                                prop_assert_ne!(writable, Some(u64::from(written)));
                            }
                        }
                        prop_assert!(chains.next().is_none());
                    }
                }
                prop_assert_eq!(in_order.is_empty(), list.is_empty());
            }
        }
    }
}
