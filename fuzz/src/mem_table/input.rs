//! Memory tables as a front-end sends them, and what is asked of them.

use arbitrary::{Arbitrary, Result, Unstructured};

use crate::pick;

const PAGE: u64 = 0x1000;

/// Where regions and questions tend to be, in either address space.
const BASES: [u64; 4] = [0, 0x1_0000_0000, 0x7f00_0000_0000, u64::MAX - 16 * PAGE + 1];

/// What happens to a set of memory maps.
#[derive(Debug)]
pub struct Input {
    pub(super) ops: Vec<Op>,
}

/// Which of the prepared files.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Kind {
    /// Eight pages.
    Large,
    /// Three pages and a bit.
    Odd,
    Empty,
    ReadOnly,
    WriteOnly,
    Path,
    Directory,
    Device,
}

/// A region, not checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Region {
    pub(super) guest: u64,
    pub(super) size: u64,
    pub(super) frontend: u64,
    pub(super) file: Kind,
    pub(super) offset: u64,
}

/// Which field of a region to remove is wrong.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(super) enum Wrong {
    Guest,
    Size,
    Frontend,
}

/// One step. Maps are taken modulo how many there are.
#[derive(Debug)]
pub(super) enum Op {
    New(Vec<Region>),
    /// As many one-page regions, for the limit.
    NewMany(u16),
    With {
        map: u8,
        region: Region,
    },
    Without {
        map: u8,
        which: u8,
        wrong: Option<Wrong>,
    },
    Guest {
        map: u8,
        at: u64,
        len: u64,
    },
    Frontend {
        map: u8,
        at: u64,
        len: u64,
    },
    Write {
        map: u8,
        at: u64,
        len: u16,
    },
    Drop {
        map: u8,
    },
}

/// Addresses that matter: starts and ends of regions seen so far.
struct Landmarks {
    guest: Vec<u64>,
    frontend: Vec<u64>,
}

impl<'a> Arbitrary<'a> for Input {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let mut landmarks = Landmarks {
            guest: BASES.to_vec(),
            frontend: BASES.to_vec(),
        };
        let mut ops = vec![Op::New(regions(u, &mut landmarks)?)];
        while !u.is_empty() {
            ops.push(op(u, &mut landmarks)?);
        }
        Ok(Self { ops })
    }
}

fn op(u: &mut Unstructured<'_>, landmarks: &mut Landmarks) -> Result<Op> {
    let kind = u.int_in_range(0..=63u8)?;
    // Mostly the newest.
    let map = if pick::rarely(u, 4)? {
        u.arbitrary()?
    } else {
        0
    };
    Ok(match kind {
        0..=15 => Op::Guest {
            map,
            at: near(u, &landmarks.guest)?,
            len: length(u)?,
        },
        16..=27 => Op::Frontend {
            map,
            at: near(u, &landmarks.frontend)?,
            len: length(u)?,
        },
        28..=35 => Op::Write {
            map,
            at: near(u, &landmarks.guest)?,
            len: u.int_in_range(0..=0x1800)?,
        },
        36..=49 => Op::With {
            map,
            region: region(u, landmarks)?,
        },
        50..=55 => Op::Without {
            map,
            which: u.arbitrary()?,
            wrong: if pick::rarely(u, 4)? {
                Some(u.arbitrary()?)
            } else {
                None
            },
        },
        56..=59 => Op::New(regions(u, landmarks)?),
        60..=62 => Op::Drop { map },
        _ if pick::rarely(u, 16)? => Op::NewMany(u.int_in_range(505..=512)?),
        _ => Op::NewMany(u.int_in_range(0..=24)?),
    })
}

fn regions(u: &mut Unstructured<'_>, landmarks: &mut Landmarks) -> Result<Vec<Region>> {
    let count = u.int_in_range(0..=6)?;
    (0..count).map(|_| region(u, landmarks)).collect()
}

fn near(u: &mut Unstructured<'_>, landmarks: &[u64]) -> Result<u64> {
    let at = landmarks[usize::from(u.arbitrary::<u8>()?) % landmarks.len()];
    Ok(match u.int_in_range(0..=15u8)? {
        0..=3 => at,
        4..=6 => at.wrapping_sub(1),
        7..=10 => at.wrapping_add(u.int_in_range(0..=2 * PAGE)?),
        11..=13 => at.wrapping_sub(u.int_in_range(0..=2 * PAGE)?),
        14 => at.wrapping_add(u.int_in_range(0..=16)?),
        _ => u.arbitrary()?,
    })
}

fn length(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=15u8)? {
        0..=5 => u.int_in_range(0..=0x20)?,
        6..=11 => u.int_in_range(0..=4 * PAGE)?,
        12..=13 => PAGE * u.int_in_range(0..=8)?,
        14 => u64::MAX - u.int_in_range(0..=PAGE)?,
        _ => u.arbitrary()?,
    })
}

/// A region that mostly is sound by itself, and mostly in nobody's way.
fn region(u: &mut Unstructured<'_>, landmarks: &mut Landmarks) -> Result<Region> {
    let size = match u.int_in_range(0..=31u8)? {
        0..=19 => PAGE * u.int_in_range(1..=3)?,
        20..=27 => u.int_in_range(1..=2 * PAGE)?,
        28 => 0,
        29 => PAGE << u.int_in_range(0..=51)?,
        30 => u64::MAX - u.int_in_range(0..=2 * PAGE)?,
        _ => u.arbitrary()?,
    };
    let mut place = |landmarks: &[u64], mask: u64| -> Result<u64> {
        Ok(match u.int_in_range(0..=15u8)? {
            // Right after another: the newest, at best.
            0..=6 => *landmarks.last().unwrap_or(&0),
            7..=9 => landmarks[usize::from(u.arbitrary::<u8>()?) % landmarks.len()],
            10..=13 => {
                let base = BASES[usize::from(u.arbitrary::<u8>()?) % BASES.len()];
                base.wrapping_add(PAGE * u.int_in_range(0..=24)?)
            }
            14 => near(u, landmarks)? & mask,
            _ => near(u, landmarks)?,
        })
    };
    let guest = place(&landmarks.guest, !0xf)?;
    let frontend = place(&landmarks.frontend, !0)?;
    let file = match u.int_in_range(0..=63u8)? {
        0..=40 => Kind::Large,
        41..=57 => Kind::Odd,
        58 => Kind::Empty,
        59 => Kind::ReadOnly,
        60 => Kind::WriteOnly,
        61 => Kind::Path,
        62 => Kind::Directory,
        _ => Kind::Device,
    };
    let offset = match u.int_in_range(0..=31u8)? {
        0..=23 => (guest & 0xfff) + PAGE * u.int_in_range(0..=2)?,
        24..=27 => (guest & 0xf) + 16 * u.int_in_range(0..=0x400)?,
        28..=29 => u.int_in_range(0..=9 * PAGE)?,
        30 => u64::MAX - u.int_in_range(0..=2 * PAGE)?,
        _ => u.arbitrary()?,
    };
    landmarks.guest.extend([guest, guest.wrapping_add(size)]);
    landmarks
        .frontend
        .extend([frontend, frontend.wrapping_add(size)]);
    Ok(Region {
        guest,
        size,
        frontend,
        file,
        offset,
    })
}
