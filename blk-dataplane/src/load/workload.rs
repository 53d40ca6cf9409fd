//! Which request comes next.

use super::options::LoadOptions;
use super::ring::Kind;

/// Random numbers from a counter: SplitMix64, whose every step is a few instructions and whose every seed is good.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    #[inline]
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// A number below `bound`, by multiplication: no division, and as even as 64 bits allow.
#[inline]
fn below(random: u64, bound: u64) -> u64 {
    ((u128::from(random) * u128::from(bound)) >> 64) as u64
}

/// A request: blocks are numbered from the beginning of what the queue uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) kind: Kind,
    pub(super) block: u64,
}

/// The requests of one queue.
#[derive(Clone, Debug)]
pub(super) struct Workload {
    random: Random,
    /// Blocks there are.
    blocks: u64,
    next: u64,
    is_random: bool,
    mix: Mix,
    /// A flush after so many writes; 0: none.
    fsync: u64,
    unflushed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mix {
    Only(Kind),
    /// Reads of a hundred; the others are writes.
    Reads(u64),
}

/// Which blocks of a device one queue uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    /// Its first block, counted from `offset`.
    pub(super) first: u64,
    pub(super) blocks: u64,
}

impl Share {
    /// Random loads go anywhere; sequential ones would read the same blocks as another queue does at the same time,
    /// and verified ones must know who wrote last, so those are dealt out.
    pub(super) fn of(options: &LoadOptions, blocks: u64, job: u16) -> Self {
        if options.rw.is_random() && !options.verify {
            return Self { first: 0, blocks };
        }
        let each = blocks / u64::from(options.numjobs);
        Self {
            first: each * u64::from(job),
            blocks: each,
        }
    }
}

impl Workload {
    /// `blocks`, not 0, is what the queue uses; no two queues of all devices have the same `stream`.
    pub(super) fn new(options: &LoadOptions, blocks: u64, stream: u64) -> Self {
        let rw = options.rw;
        let mix = match (rw.reads(), rw.writes()) {
            (true, true) => match options.rwmixread {
                0 => Mix::Only(Kind::Write),
                100 => Mix::Only(Kind::Read),
                reads => Mix::Reads(reads.into()),
            },
            (true, false) => Mix::Only(Kind::Read),
            (false, true) => Mix::Only(Kind::Write),
            (false, false) => Mix::Only(Kind::Flush),
        };
        let mut seeds = Random::new(options.randseed);
        let seed = seeds.next() ^ Random::new(stream).next();
        Self {
            random: Random::new(seed),
            blocks,
            next: 0,
            is_random: rw.is_random(),
            mix,
            fsync: options.fsync,
            unflushed: 0,
        }
    }

    /// What all requests are, if they are anywhere and all of one kind: then [`step_anywhere`](Self::step_anywhere) has them.
    #[inline]
    pub(super) fn only_anywhere(&self) -> Option<Kind> {
        match self.mix {
            Mix::Only(kind) if self.is_random && self.fsync == 0 => Some(kind),
            _ => None,
        }
    }

    /// The next request where all are of this kind and anywhere.
    #[inline]
    pub(super) fn step_anywhere(&mut self, kind: Kind) -> Step {
        Step {
            kind,
            block: below(self.random.next(), self.blocks),
        }
    }

    #[inline]
    pub(super) fn next(&mut self) -> Step {
        let (kind, random) = match self.mix {
            Mix::Only(kind) if !self.is_random => (kind, 0),
            Mix::Only(kind) => (kind, self.random.next()),
            Mix::Reads(reads) => {
                let random = self.random.next();
                // The low half decides on the kind; the block comes from the top.
                let reads = below(random << 32, 100) < reads;
                (if reads { Kind::Read } else { Kind::Write }, random)
            }
        };
        if self.fsync != 0 && kind == Kind::Write {
            if self.unflushed == self.fsync {
                self.unflushed = 0;
                return Step {
                    kind: Kind::Flush,
                    block: 0,
                };
            }
            self.unflushed += 1;
        }
        if kind == Kind::Flush {
            return Step { kind, block: 0 };
        }
        let block = if self.is_random {
            below(random, self.blocks)
        } else {
            let block = self.next;
            self.next = if block + 1 == self.blocks {
                0
            } else {
                block + 1
            };
            block
        };
        Step { kind, block }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::load::Pattern;

    fn options(rw: Pattern) -> LoadOptions {
        LoadOptions {
            rw,
            ..LoadOptions::default()
        }
    }

    #[test]
    fn sequential_requests_go_round() {
        let mut workload = Workload::new(&options(Pattern::Write), 3, 0);
        let blocks: Vec<_> = (0..7).map(|_| workload.next().block).collect();
        assert_eq!(blocks, [0, 1, 2, 0, 1, 2, 0]);
        assert_eq!(workload.next().kind, Kind::Write);
    }

    #[test]
    fn a_flush_follows_as_many_writes_as_were_asked_for() {
        let options = LoadOptions {
            fsync: 2,
            ..options(Pattern::RandWrite)
        };
        let mut workload = Workload::new(&options, 10, 0);
        let kinds: Vec<_> = (0..6).map(|_| workload.next().kind).collect();
        let once = [Kind::Write, Kind::Write, Kind::Flush];
        assert_eq!(kinds, [once, once].concat());
    }

    #[test]
    fn flushes_alone_are_flushes() {
        let mut workload = Workload::new(&options(Pattern::Flush), 10, 0);
        assert!((0..9).all(|_| workload.next().kind == Kind::Flush));
    }

    #[test]
    fn a_mix_has_its_share_of_reads_and_every_block_has_its_turn_in_both() {
        let options = LoadOptions {
            rwmixread: 70,
            ..options(Pattern::RandRw)
        };
        let mut workload = Workload::new(&options, 16, 0);
        let mut counts = [[0u32; 16]; 2];
        for _ in 0..100_000 {
            let step = workload.next();
            let block = usize::try_from(step.block).unwrap();
            counts[usize::from(step.kind == Kind::Read)][block] += 1;
        }
        let [writes, reads] = counts;
        let read: u32 = reads.iter().sum();
        assert!((69_000..71_000).contains(&read), "{read}");
        assert!(
            reads.iter().all(|&count| (3_900..4_900).contains(&count)),
            "{reads:?}"
        );
        assert!(
            writes.iter().all(|&count| (1_600..2_200).contains(&count)),
            "{writes:?}"
        );
    }

    #[test]
    fn seeds_and_queues_differ_and_the_same_ones_are_the_same() {
        let blocks = |seed, stream| {
            let options = LoadOptions {
                randseed: seed,
                ..options(Pattern::RandRead)
            };
            let mut workload = Workload::new(&options, 1 << 40, stream);
            [(); 4].map(|()| workload.next().block)
        };
        assert_eq!(blocks(1, 0), blocks(1, 0));
        assert_ne!(blocks(1, 0), blocks(2, 0));
        assert_ne!(blocks(1, 0), blocks(1, 1));
    }

    proptest! {
        #[test]
        fn no_block_is_outside(seed: u64, blocks in 1u64.., random: bool) {
            let rw = if random { Pattern::RandRw } else { Pattern::Rw };
            let options = LoadOptions { randseed: seed, ..options(rw) };
            let mut workload = Workload::new(&options, blocks, 3);
            for _ in 0..20 {
                prop_assert!(workload.next().block < blocks);
            }
        }

        #[test]
        fn shares_of_queues_do_not_meet(blocks in 1u64..1_000_000, jobs in 1u16..=256) {
            prop_assume!(blocks >= u64::from(jobs));
            let options = LoadOptions { numjobs: jobs, ..options(Pattern::Read) };
            let mut end = 0;
            for job in 0..jobs {
                let share = Share::of(&options, blocks, job);
                prop_assert!(share.first >= end && share.blocks > 0);
                end = share.first + share.blocks;
            }
            prop_assert!(end <= blocks);
        }
    }
}
