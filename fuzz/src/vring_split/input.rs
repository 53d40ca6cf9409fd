//! What a guest and a device do to one ring, in any order.

use arbitrary::{Arbitrary, Result, Unstructured};

use crate::pick;

/// Start and length of the memory's regions: two neighbours, a hole, and a small one.
pub(super) const REGIONS: [(u64, usize); 3] = [(0, 0x4000), (SEAM, 0x5000), (ISLAND, 0x1000)];
const SEAM: u64 = 0x4000;
const END: u64 = 0x9000;
const ISLAND: u64 = 0x10000;
const ISLAND_LEN: u64 = 0x1000;

/// Room for an indirect table one entry longer than may be.
const TABLES: u64 = SEAM;

/// A guest, a device, and what they do.
#[derive(Debug)]
pub struct Input {
    pub(super) indirect_desc: bool,
    pub(super) event_idx: bool,
    /// Where both indices start.
    pub(super) index: u16,
    pub(super) ring: Ring,
    pub(super) ops: Vec<Op>,
}

impl<'a> Arbitrary<'a> for Input {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self {
            indirect_desc: !pick::rarely(u, 4)?,
            event_idx: u.arbitrary()?,
            index: match u.int_in_range(0..=2u8)? {
                0 => 0,
                1 => 0xfff0 | u.int_in_range(0..=15)?,
                _ => u.arbitrary()?,
            },
            ring: u.arbitrary()?,
            ops: u.arbitrary()?,
        })
    }
}

/// Size and place of a ring.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ring {
    pub(super) size: u16,
    pub(super) place: Place,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// Where a driver would lay it out.
    Sound { base: u64 },
    /// Wherever: over itself, over a hole, misaligned, at the end of the address space.
    Raw {
        descriptors: u64,
        available: u64,
        used: u64,
    },
}

impl<'a> Arbitrary<'a> for Ring {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let size = match u.int_in_range(0..=31u8)? {
            30 => 128,
            31 => 256,
            log2 => 1 << (log2 % 6),
        };
        let place = if pick::rarely(u, 16)? {
            Place::Raw {
                descriptors: aligned_address(u, 16)?,
                available: aligned_address(u, 2)?,
                used: aligned_address(u, 4)?,
            }
        } else {
            Place::Sound {
                base: 0x10 * u.int_in_range(0..=0x100)?,
            }
        };
        Ok(Self { size, place })
    }
}

fn aligned_address(u: &mut Unstructured<'_>, alignment: u64) -> Result<u64> {
    let any = address(u)?;
    Ok(if pick::rarely(u, 8)? {
        any
    } else {
        any & !(alignment - 1)
    })
}

/// Where `used_event` is, from what is published: mostly about there.
fn beyond(u: &mut Unstructured<'_>) -> Result<u16> {
    Ok(if pick::rarely(u, 8)? {
        u.arbitrary()?
    } else {
        0u16.wrapping_sub(u.int_in_range(0..=6)?).wrapping_add(2)
    })
}

/// An address: mostly in memory, at times at an edge of it, rarely anywhere.
fn address(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=31u8)? {
        0..=21 => u.int_in_range(0..=END - 1)?,
        22..=24 => SEAM - 0x40 + u.int_in_range(0..=0x80)?,
        25..=27 => END - 0x40 + u.int_in_range(0..=0x80)?,
        28..=29 => ISLAND - 0x20 + u.int_in_range(0..=ISLAND_LEN + 0x40)?,
        30 => u64::MAX - u.int_in_range(0..=0x10000)?,
        _ => u.arbitrary()?,
    })
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) addr: u64,
    pub(super) len: u32,
}

impl<'a> Arbitrary<'a> for Piece {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self {
            addr: address(u)?,
            len: pick::length(u)?,
        })
    }
}

/// Buffers of a chain. `repeat` makes long ones without a long input.
#[derive(Debug)]
pub(super) struct Buffers {
    pub(super) readable: Vec<Piece>,
    pub(super) writable: Vec<Piece>,
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

/// A descriptor as it stands in memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Raw {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

impl<'a> Arbitrary<'a> for Raw {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let flags = if pick::rarely(u, 16)? {
            u.arbitrary()?
        } else {
            u.int_in_range(0..=7)?
        };
        // An indirect descriptor wants a table that is likely to be there.
        let (addr, len) = if flags & 4 != 0 && !pick::rarely(u, 8)? {
            let at = TABLES - 0x40 + u.int_in_range(0..=0x80)?;
            (at, 16 * u.int_in_range(1..=8)?)
        } else {
            (address(u)?, pick::length(u)?)
        };
        Ok(Self {
            addr,
            len,
            flags,
            next: pick::near_u16(u, 8)?,
        })
    }
}

/// One step. Indices and positions are taken modulo what there is.
#[derive(Debug)]
pub(super) enum Op {
    // The device.
    Pop,
    Push {
        which: u8,
        len: u32,
    },
    Publish,
    Unpop {
        which: u8,
    },
    ShouldNotify,
    EnableNotification,
    DisableNotification,
    HasAvailable,
    CopyFromReadable {
        offset: u32,
        count: u16,
    },
    CopyToWritable {
        offset: u32,
        count: u16,
    },
    SetMemory(Option<Ring>),
    Resume {
        base: Option<u16>,
    },
    StartFresh {
        ring: Ring,
        index: u16,
    },
    /// Both, as they should: so many chains go round, and one interrupt is decided about.
    RoundTrip {
        count: u8,
        beyond: u16,
    },
    // The guest.
    AddDirect(Buffers),
    AddIndirect {
        table: u64,
        buffers: Buffers,
    },
    GuestPublish,
    PollUsed,
    EnableInterrupts,
    DisableInterrupts,
    /// Relative to what is published.
    SetUsedEvent {
        beyond: u16,
    },
    SetAvailFlags(u16),
    // The guest, misbehaving.
    OfferRaw {
        descriptors: Vec<(u16, Raw)>,
        head: u16,
    },
    WriteTableEntry {
        address: u64,
        entry: Raw,
    },
    WriteAvailEntry {
        ahead: u16,
        head: u16,
    },
    MoveAvailIdx {
        by: u16,
    },
    SetUsedIdx(u16),
    SetUsedFlags(u16),
    SetAvailEvent(u16),
    WriteUsedEntry {
        position: u16,
        id: u32,
        len: u32,
    },
    WriteBytes {
        address: u64,
        bytes: [u8; 8],
    },
}

impl<'a> Arbitrary<'a> for Op {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        // Where a table goes: its first entries may lie before the seam.
        let table = |u: &mut Unstructured<'a>| {
            Ok(match u.int_in_range(0..=7u8)? {
                0..=4 => TABLES + 16 * u.int_in_range(0..=8)?,
                5 => TABLES + u.int_in_range(0..=0x40)?,
                6 => TABLES - 0x40 + u.int_in_range(0..=0x40)?,
                _ => address(u)?,
            })
        };
        Ok(match u.int_in_range(0..=127u8)? {
            0..=19 => Self::Pop,
            20..=31 => Self::Push {
                which: u.arbitrary()?,
                len: pick::length(u)?,
            },
            32..=37 => Self::Publish,
            38..=41 => Self::Unpop {
                which: u.arbitrary()?,
            },
            42..=45 => Self::ShouldNotify,
            46..=49 => Self::EnableNotification,
            50..=52 => Self::DisableNotification,
            53..=54 => Self::HasAvailable,
            55..=57 => Self::CopyFromReadable {
                offset: pick::length(u)?,
                count: u.int_in_range(0..=300)?,
            },
            58..=60 => Self::CopyToWritable {
                offset: pick::length(u)?,
                count: u.int_in_range(0..=300)?,
            },
            61 => Self::SetMemory(if pick::rarely(u, 2)? {
                Some(u.arbitrary()?)
            } else {
                None
            }),
            62..=63 => Self::Resume {
                base: if pick::rarely(u, 8)? {
                    Some(u.arbitrary()?)
                } else {
                    None
                },
            },
            64 => Self::StartFresh {
                ring: u.arbitrary()?,
                index: u.arbitrary()?,
            },
            65..=67 => Self::SetUsedEvent { beyond: beyond(u)? },
            68..=71 => Self::RoundTrip {
                count: u.int_in_range(0..=4)?,
                beyond: beyond(u)?,
            },
            72..=80 => Self::AddDirect(u.arbitrary()?),
            81..=90 => Self::AddIndirect {
                table: table(u)?,
                buffers: u.arbitrary()?,
            },
            91..=102 => Self::GuestPublish,
            103..=108 => Self::PollUsed,
            109..=110 => Self::EnableInterrupts,
            111 => Self::DisableInterrupts,
            112..=116 => {
                let count = u.int_in_range(1..=6)?;
                let descriptors = (0..count)
                    .map(|_| Ok((u.int_in_range(0..=7)?, u.arbitrary()?)))
                    .collect::<Result<Vec<(u16, Raw)>>>()?;
                let head = match pick::rarely(u, 8)? {
                    true => pick::near_u16(u, 8)?,
                    false => descriptors[0].0,
                };
                Self::OfferRaw { descriptors, head }
            }
            117..=118 => Self::WriteTableEntry {
                address: table(u)?,
                entry: u.arbitrary()?,
            },
            119 => Self::WriteAvailEntry {
                ahead: u.int_in_range(0..=4)?,
                head: pick::near_u16(u, 8)?,
            },
            120 => Self::MoveAvailIdx {
                by: if pick::rarely(u, 2)? {
                    u.arbitrary()?
                } else {
                    u.int_in_range(0..=3)?
                },
            },
            121..=122 => Self::SetAvailFlags(u.arbitrary()?),
            123 => Self::SetUsedIdx(u.arbitrary()?),
            124 => Self::SetUsedFlags(u.arbitrary()?),
            125 => Self::SetAvailEvent(u.arbitrary()?),
            126 => Self::WriteUsedEntry {
                position: u.arbitrary()?,
                id: u.arbitrary()?,
                len: u.arbitrary()?,
            },
            _ => Self::WriteBytes {
                address: address(u)?,
                bytes: u.arbitrary()?,
            },
        })
    }
}
