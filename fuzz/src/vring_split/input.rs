//! What a guest and a device do to one ring, in any order.

use arbitrary::{Arbitrary, Result, Unstructured};

use crate::pick;
use crate::ring_input::{self, Buffers};

/// A guest, a device, and what they do.
#[derive(Debug)]
pub struct Input {
    pub(crate) indirect_desc: bool,
    pub(crate) event_idx: bool,
    pub(crate) in_order: bool,
    /// Where both indices start.
    pub(crate) index: u16,
    pub(crate) ring: Ring,
    pub(crate) ops: Vec<Op>,
}

impl<'a> Arbitrary<'a> for Input {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let indirect_desc = !pick::rarely(u, 4)?;
        let bits: u8 = u.arbitrary()?;
        Ok(Self {
            indirect_desc,
            event_idx: bits & 1 == 1,
            in_order: bits >> 1 & 3 == 3,
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
pub(crate) struct Ring {
    pub(crate) size: u16,
    pub(crate) place: Place,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
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
        let size = ring_input::size(u)?;
        let place = if pick::rarely(u, 16)? {
            Place::Raw {
                descriptors: ring_input::area(u, 16)?,
                available: ring_input::area(u, 2)?,
                used: ring_input::area(u, 4)?,
            }
        } else {
            Place::Sound {
                base: ring_input::base(u)?,
            }
        };
        Ok(Self { size, place })
    }
}

/// Where `used_event` is, from what is published: mostly about there.
fn beyond(u: &mut Unstructured<'_>) -> Result<u16> {
    Ok(if pick::rarely(u, 8)? {
        u.arbitrary()?
    } else {
        0u16.wrapping_sub(u.int_in_range(0..=6)?).wrapping_add(2)
    })
}

/// A descriptor as it stands in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Raw {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl<'a> Arbitrary<'a> for Raw {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let (addr, len, flags) = ring_input::raw(u)?;
        Ok(Self {
            addr,
            len,
            flags,
            next: pick::near_u16(u, 8)?,
        })
    }
}

/// What is wrong with a state that is restored.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    /// Base of the other format.
    Packed(u16),
    NextAvail(u16),
    /// `None`: as of a packed ring.
    UsedIndex(Option<u16>),
    Ring(Ring),
}

impl<'a> Arbitrary<'a> for Change {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match u.int_in_range(0..=7u8)? {
            0 => Self::Packed(u.arbitrary()?),
            1..=4 => Self::NextAvail(u.arbitrary()?),
            5..=6 => Self::UsedIndex(u.arbitrary()?),
            _ => Self::Ring(u.arbitrary()?),
        })
    }
}

/// One step. Indices and positions are taken modulo what there is.
#[derive(Debug)]
pub(crate) enum Op {
    // The device.
    Pop,
    /// With the upper half of `which`, as much as there is room for.
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
    Pass {
        limit: u8,
        keep: u8,
    },
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
    Restore(Option<Change>),
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
    NeedsKick,
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
        Ok(match u.int_in_range(0..=139u8)? {
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
                table: ring_input::table(u)?,
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
                address: ring_input::table(u)?,
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
            127 => Self::WriteBytes {
                address: ring_input::address(u)?,
                bytes: u.arbitrary()?,
            },
            128..=133 => Self::Pass {
                limit: u.int_in_range(0..=8)?,
                keep: u.arbitrary()?,
            },
            134..=136 => Self::NeedsKick,
            _ => Self::Restore(if pick::rarely(u, 4)? {
                Some(u.arbitrary()?)
            } else {
                None
            }),
        })
    }
}
