//! What the inputs of the ring targets have in common: places in guest memory, and buffers there.

use arbitrary::{Arbitrary, Result, Unstructured};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vring::Segment;

use crate::pick;

pub(crate) type Memory = GuestMemoryMmap<()>;

/// Start and length of the memory's regions: two neighbours, a hole, and a small one.
pub(crate) const REGIONS: [(u64, usize); 3] = [(0, 0x4000), (SEAM, 0x5000), (ISLAND, 0x1000)];
const SEAM: u64 = 0x4000;
const END: u64 = 0x9000;
const ISLAND: u64 = 0x10000;
const ISLAND_LEN: u64 = 0x1000;

/// Room for an indirect table one entry longer than may be.
const TABLES: u64 = SEAM;

/// All of [`REGIONS`], zeroed.
pub(crate) fn memory() -> Memory {
    Memory::from_ranges(&REGIONS.map(|(at, len)| (GuestAddress(at), len))).unwrap()
}

/// An address: mostly in memory, at times at an edge of it, rarely anywhere.
pub(crate) fn address(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=31u8)? {
        0..=21 => u.int_in_range(0..=END - 1)?,
        22..=24 => SEAM - 0x40 + u.int_in_range(0..=0x80)?,
        25..=27 => END - 0x40 + u.int_in_range(0..=0x80)?,
        28..=29 => ISLAND - 0x20 + u.int_in_range(0..=ISLAND_LEN + 0x40)?,
        30 => u64::MAX - u.int_in_range(0..=0x10000)?,
        _ => u.arbitrary()?,
    })
}

/// The same for an area of a ring: mostly aligned.
pub(crate) fn area(u: &mut Unstructured<'_>, alignment: u64) -> Result<u64> {
    let any = address(u)?;
    Ok(if pick::rarely(u, 8)? {
        any
    } else {
        any & !(alignment - 1)
    })
}

/// Where an indirect table goes: its first entries may lie before the seam.
pub(crate) fn table(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=7u8)? {
        0..=4 => TABLES + 16 * u.int_in_range(0..=8)?,
        5 => TABLES + u.int_in_range(0..=0x40)?,
        6 => TABLES - 0x40 + u.int_in_range(0..=0x40)?,
        _ => address(u)?,
    })
}

/// A ring's size: mostly so small that it goes round soon.
pub(crate) fn size(u: &mut Unstructured<'_>) -> Result<u16> {
    Ok(match u.int_in_range(0..=31u8)? {
        30 => 128,
        31 => 256,
        log2 => 1 << (log2 % 6),
    })
}

/// Where a well laid out ring starts.
pub(crate) fn base(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(0x10 * u.int_in_range(0..=0x100)?)
}

/// Address, length and flags of a descriptor as a test writes it, the lower three flags mostly.
pub(crate) fn raw(u: &mut Unstructured<'_>) -> Result<(u64, u32, u16)> {
    let flags = if pick::rarely(u, 16)? {
        u.arbitrary()?
    } else {
        u.int_in_range(0..=7)?
    };
    // An indirect descriptor wants a table that is likely to be there, or to be there in part; as
    // long as may be, or one entry longer.
    let (addr, len) = if flags & 4 != 0 && !pick::rarely(u, 8)? {
        let near = if pick::rarely(u, 8)? { END } else { TABLES };
        let at = near - 0x40 + u.int_in_range(0..=0x80)?;
        let entries = if pick::rarely(u, 16)? {
            u.int_in_range(1023..=1025)?
        } else {
            u.int_in_range(1..=8)?
        };
        (at, 16 * entries)
    } else {
        (address(u)?, pick::length(u)?)
    };
    Ok((addr, len, flags))
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) addr: u64,
    pub(crate) len: u32,
}

impl<'a> Arbitrary<'a> for Piece {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self {
            addr: address(u)?,
            len: pick::length(u)?,
        })
    }
}

/// Buffers of a chain. Some are repeated, which makes long chains without a long input.
#[derive(Debug)]
pub(crate) struct Buffers {
    pub(crate) readable: Vec<Piece>,
    pub(crate) writable: Vec<Piece>,
}

impl Buffers {
    /// A request as they mostly are, somewhere that does not matter.
    pub(crate) fn plain() -> Self {
        Self {
            readable: vec![Piece { addr: 0, len: 16 }],
            writable: vec![Piece { addr: 0, len: 1 }],
        }
    }
}

impl<'a> Arbitrary<'a> for Buffers {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let mut pieces = || {
            let count = u.int_in_range(0..=4)?;
            let mut pieces = (0..count)
                .map(|_| u.arbitrary())
                .collect::<Result<Vec<Piece>>>()?;
            if pick::rarely(u, 32)? {
                let count = usize::from(u.int_in_range(0..=1100u16)?);
                pieces = pieces.into_iter().cycle().take(count).collect();
            }
            Ok(pieces)
        };
        Ok(Self {
            readable: pieces()?,
            writable: pieces()?,
        })
    }
}

/// The pieces as a driver takes them.
pub(crate) fn segments(pieces: &[Piece]) -> Vec<Segment> {
    let segment = |piece: &Piece| Segment {
        addr: GuestAddress(piece.addr),
        len: piece.len,
    };
    pieces.iter().map(segment).collect()
}
