//! Blocks that say what they are: where they belong, which write of them it was, and that they are whole.
//!
//! ```text
//! each sector:  magic | offset of the sector | generation of the block | seed | filler ... | checksum
//! ```
//!
//! Sectors and not blocks, since a device writes sectors: one that lost a part of a write would otherwise go
//! unnoticed. Filler depends on all of the header, so that no byte can be lost.

use std::fmt;

use super::workload::{Random, Step};
use crate::SECTOR_SIZE;

/// Words of a sector.
const WORDS: usize = 64;
const WORD: usize = 8;
const SECTOR: usize = WORDS * WORD;
const _: () = assert!(SECTOR as u64 == SECTOR_SIZE);

const MAGIC: u64 = u64::from_le_bytes(*b"blk-test");

/// Most blocks of one queue: four bytes of memory each, which are touched as they are written.
pub(super) const BLOCKS_MAX: u64 = 1 << 28;

/// Generation of a block that was not written in this run.
const UNKNOWN: u32 = 0;
/// Generation of a block whose write failed: any part of it may have been done.
const TORN: u32 = u32::MAX;

/// What is wrong with a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wrong {
    /// No magic: it was not written so, or has been overwritten.
    Foreign,
    /// It belongs at another offset.
    Misplaced { belongs: u64 },
    /// It is of an earlier write, or a later one, than it should be.
    Generation { found: u64, expected: u64 },
    /// Of a run with another seed.
    Seed,
    /// Header and filler do not go together.
    Corrupt,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign => f.write_str("holds something that --verify has not written"),
            Self::Misplaced { belongs } => write!(f, "holds what was written at {belongs}"),
            Self::Generation { found, expected } => {
                write!(f, "holds write {found} of it, and not write {expected}")
            }
            Self::Seed => f.write_str("holds what a run with another --randseed wrote"),
            Self::Corrupt => f.write_str("is corrupt"),
        }
    }
}

/// Fills a sector at `offset` of the device.
fn fill_sector(sector: &mut [u8; SECTOR], offset: u64, generation: u64, seed: u64) {
    let header = [MAGIC, offset, generation, seed];
    let mut random = filler(&header);
    let mut sum = 0u64;
    let (words, _) = sector.as_chunks_mut::<WORD>();
    let last = words.len() - 1;
    for (place, word) in words[..last].iter_mut().enumerate() {
        let value = header.get(place).copied().unwrap_or_else(|| random.next());
        sum = mixed(sum, value);
        *word = value.to_le_bytes();
    }
    words[last] = sum.to_le_bytes();
}

fn filler(header: &[u64; 4]) -> Random {
    let [_, offset, generation, seed] = *header;
    Random::new(offset ^ generation.rotate_left(40) ^ seed.rotate_left(20))
}

/// Every bit of `value` matters, and so does the order.
fn mixed(sum: u64, value: u64) -> u64 {
    (sum.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Checks a sector. `generation` is what it should have; `None`: any.
fn check_sector(
    sector: &[u8; SECTOR],
    offset: u64,
    generation: Option<u64>,
    seed: u64,
) -> Result<u64, Wrong> {
    let (words, _) = sector.as_chunks::<WORD>();
    let word = |place: usize| {
        words
            .get(place)
            .map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    if word(0) != MAGIC {
        return Err(Wrong::Foreign);
    }
    // As it is, whether or not it is what it should be: only a whole sector can tell where it belongs.
    let mut whole = [0; SECTOR];
    fill_sector(&mut whole, word(1), word(2), word(3));
    if whole != *sector {
        return Err(Wrong::Corrupt);
    }
    if word(1) != offset {
        return Err(Wrong::Misplaced { belongs: word(1) });
    }
    if word(3) != seed {
        return Err(Wrong::Seed);
    }
    match generation {
        Some(expected) if expected != word(2) => Err(Wrong::Generation {
            found: word(2),
            expected,
        }),
        _ => Ok(word(2)),
    }
}

/// What one queue knows of its blocks. Nobody else writes them.
#[derive(Debug)]
pub(super) struct Verifier {
    /// Of the first block, in bytes.
    offset: u64,
    block: usize,
    seed: u64,
    /// Writes of each block that have been done; [`UNKNOWN`], [`TORN`].
    generations: Vec<u32>,
    /// Blocks with a request in flight: two of them in any order would make two truths.
    busy: Vec<u64>,
    /// Whether a block that was not written in this run must be one of an earlier run.
    strict: bool,
    buffer: Vec<u8>,
    /// Where [`next_written`](Self::next_written) goes on.
    scanned: usize,
}

impl Verifier {
    /// Of `blocks` blocks of `block` bytes from `offset` on; `blocks` is at most [`BLOCKS_MAX`].
    pub(super) fn new(offset: u64, block: usize, blocks: u64, seed: u64, strict: bool) -> Self {
        debug_assert!(blocks <= BLOCKS_MAX);
        let blocks = usize::try_from(blocks).unwrap_or(0);
        Self {
            offset,
            block,
            seed,
            generations: vec![UNKNOWN; blocks],
            busy: vec![0; blocks.div_ceil(64)],
            strict,
            buffer: vec![0; block],
            scanned: 0,
        }
    }

    /// The step, or the same on the next block that no request is in flight for; `None` while there is none.
    pub(super) fn settle(&self, step: Step) -> Option<Step> {
        let blocks = self.generations.len();
        let wanted = usize::try_from(step.block).ok()?;
        // As many as may be in flight are at most to be passed over, and one more.
        let free = (wanted..blocks)
            .chain(0..wanted)
            .find(|&block| !self.is_busy(block))?;
        Some(Step {
            kind: step.kind,
            block: u64::try_from(free).ok()?,
        })
    }

    fn is_busy(&self, block: usize) -> bool {
        self.busy[block / 64] & (1 << (block % 64)) != 0
    }

    pub(super) fn take(&mut self, block: u64) {
        if let Ok(block) = usize::try_from(block) {
            self.busy[block / 64] |= 1 << (block % 64);
        }
    }

    fn give_back(&mut self, block: u64) -> usize {
        let block = usize::try_from(block).unwrap_or(usize::MAX);
        self.busy[block / 64] &= !(1 << (block % 64));
        block
    }

    /// What is to be written into a block now.
    pub(super) fn content(&mut self, block: u64) -> &[u8] {
        let generation = usize::try_from(block).map_or(UNKNOWN, |block| self.generations[block]);
        let generation = next(generation);
        let (sectors, _) = self.buffer.as_chunks_mut::<SECTOR>();
        let start = self.offset + block * self.block as u64;
        for (sector, offset) in sectors.iter_mut().zip((start..).step_by(SECTOR)) {
            fill_sector(sector, offset, generation.into(), self.seed);
        }
        &self.buffer
    }

    /// A write of the block has ended.
    pub(super) fn written(&mut self, block: u64, done: bool) {
        let block = self.give_back(block);
        let generation = &mut self.generations[block];
        *generation = if done { next(*generation) } else { TORN };
    }

    /// A read of the block has failed, and tells nothing.
    pub(super) fn not_read(&mut self, block: u64) {
        self.give_back(block);
    }

    /// A read of the block has ended: `copy` fills a buffer with what it returned.
    ///
    /// # Errors
    ///
    /// The first sector's offset that is wrong, and how.
    pub(super) fn read(
        &mut self,
        block: u64,
        copy: impl FnOnce(&mut [u8]),
    ) -> Result<(), (u64, Wrong)> {
        let index = self.give_back(block);
        let expected = match self.generations[index] {
            TORN => return Ok(()),
            UNKNOWN if !self.strict => return Ok(()),
            UNKNOWN => None,
            generation => Some(u64::from(generation)),
        };
        copy(&mut self.buffer);
        let (sectors, _) = self.buffer.as_chunks::<SECTOR>();
        let start = self.offset + block * self.block as u64;
        let mut generation = expected;
        for (sector, offset) in sectors.iter().zip((start..).step_by(SECTOR)) {
            match check_sector(sector, offset, generation, self.seed) {
                // All of a block are of one write, whichever it was.
                Ok(found) => generation = Some(found),
                Err(wrong) => return Err((offset, wrong)),
            }
        }
        Ok(())
    }

    /// Blocks that [`next_written`](Self::next_written) has to tell.
    pub(super) fn written_blocks(&self) -> u64 {
        let is_known = |generation: &&u32| !matches!(**generation, UNKNOWN | TORN);
        self.generations.iter().filter(is_known).count() as u64
    }

    /// One block after another that was written.
    pub(super) fn next_written(&mut self) -> Option<u64> {
        let rest = self.generations.get(self.scanned..)?;
        let found = rest
            .iter()
            .position(|generation| !matches!(*generation, UNKNOWN | TORN))?;
        let block = self.scanned + found;
        self.scanned = block + 1;
        Some(block as u64)
    }
}

/// The generation after one; neither of those that mean something else.
fn next(generation: u32) -> u32 {
    match generation {
        TORN => 1,
        generation if generation + 1 == TORN => 1,
        generation => generation + 1,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::load::ring::Kind;

    const BLOCK: usize = 2048;

    fn verifier(strict: bool) -> Verifier {
        Verifier::new(1 << 20, BLOCK, 100, 7, strict)
    }

    /// A write of the block that succeeds, and what it wrote.
    fn write(verifier: &mut Verifier, block: u64) -> Vec<u8> {
        verifier.take(block);
        let content = verifier.content(block).to_vec();
        verifier.written(block, true);
        content
    }

    fn read(verifier: &mut Verifier, block: u64, content: &[u8]) -> Result<(), (u64, Wrong)> {
        verifier.take(block);
        verifier.read(block, |buffer| buffer.copy_from_slice(content))
    }

    const FIFTH: u64 = (1 << 20) + 5 * BLOCK as u64;

    #[test]
    fn what_was_written_last_is_right_and_what_was_written_before_is_not() {
        let mut verifier = verifier(false);
        let first = write(&mut verifier, 5);
        assert_eq!(read(&mut verifier, 5, &first), Ok(()));
        let second = write(&mut verifier, 5);
        assert_eq!(read(&mut verifier, 5, &second), Ok(()));
        let stale = Wrong::Generation {
            found: 1,
            expected: 2,
        };
        assert_eq!(read(&mut verifier, 5, &first), Err((FIFTH, stale)));
        let mut torn = second;
        torn[1024..].copy_from_slice(&first[1024..]);
        assert_eq!(read(&mut verifier, 5, &torn), Err((FIFTH + 1024, stale)));
    }

    #[test]
    fn a_block_of_another_place_is_told_from_one_of_nobody() {
        let mut verifier = verifier(false);
        let other = write(&mut verifier, 4);
        write(&mut verifier, 5);
        let belongs = FIFTH - BLOCK as u64;
        let misplaced = Wrong::Misplaced { belongs };
        assert_eq!(read(&mut verifier, 5, &other), Err((FIFTH, misplaced)));
        assert_eq!(
            read(&mut verifier, 5, &[0; BLOCK]),
            Err((FIFTH, Wrong::Foreign))
        );
    }

    #[test]
    fn a_failed_write_leaves_anything() {
        let mut verifier = verifier(false);
        write(&mut verifier, 5);
        verifier.take(5);
        verifier.written(5, false);
        assert_eq!(read(&mut verifier, 5, &[3; BLOCK]), Ok(()));
        let content = write(&mut verifier, 5);
        assert_eq!(read(&mut verifier, 5, &content), Ok(()));
        assert_eq!(
            read(&mut verifier, 5, &[3; BLOCK]),
            Err((FIFTH, Wrong::Foreign))
        );
    }

    #[test]
    fn blocks_of_an_earlier_run_are_checked_where_nothing_else_may_be_there() {
        let mut earlier = verifier(false);
        write(&mut earlier, 5);
        let content = write(&mut earlier, 5);
        assert_eq!(read(&mut verifier(true), 5, &content), Ok(()));
        assert_eq!(
            read(&mut verifier(true), 5, &[0; BLOCK]),
            Err((FIFTH, Wrong::Foreign))
        );
        assert_eq!(read(&mut verifier(false), 5, &[0; BLOCK]), Ok(()));
        let mut other = Verifier::new(1 << 20, BLOCK, 100, 8, true);
        assert_eq!(read(&mut other, 5, &content), Err((FIFTH, Wrong::Seed)));
    }

    #[test]
    fn no_two_requests_are_in_flight_for_a_block() {
        let mut verifier = Verifier::new(0, BLOCK, 3, 1, false);
        let step = |block| Step {
            kind: Kind::Read,
            block,
        };
        for (wanted, got) in [(1, 1), (1, 2), (1, 0)] {
            let settled = verifier.settle(step(wanted)).unwrap();
            assert_eq!(settled.block, got);
            verifier.take(got);
        }
        assert_eq!(verifier.settle(step(2)), None);
        verifier.not_read(1);
        assert_eq!(verifier.settle(step(2)).unwrap().block, 1);
    }

    #[test]
    fn blocks_that_were_written_are_told_once_each() {
        let mut verifier = verifier(false);
        for block in [3, 99, 3, 0] {
            write(&mut verifier, block);
        }
        verifier.take(50);
        verifier.written(50, false);
        assert_eq!(verifier.written_blocks(), 3);
        let told: Vec<_> = std::iter::from_fn(|| verifier.next_written()).collect();
        assert_eq!(told, [0, 3, 99]);
    }

    #[test]
    fn generations_never_become_what_means_something_else() {
        assert_eq!(next(UNKNOWN), 1);
        assert_eq!(next(TORN), 1);
        assert_eq!(next(TORN - 1), 1);
        assert_eq!(next(TORN - 2), TORN - 1);
    }

    proptest! {
        #[test]
        fn any_byte_that_changes_is_noticed(place in 0..BLOCK, change in 1u8.., block in 0u64..100) {
            let mut verifier = verifier(false);
            let mut content = write(&mut verifier, block);
            content[place] ^= change;
            let sector = (1 << 20) + block * BLOCK as u64 + (place / SECTOR * SECTOR) as u64;
            let wrong = read(&mut verifier, block, &content).unwrap_err();
            prop_assert_eq!(wrong.0, sector);
            prop_assert!(matches!(wrong.1, Wrong::Corrupt | Wrong::Foreign));
        }
    }
}
