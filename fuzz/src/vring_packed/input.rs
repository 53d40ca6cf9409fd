//! What a guest and a device do to one packed ring, in any order.

use arbitrary::{Arbitrary, Result, Unstructured};

use crate::pick;
use crate::ring_input::{self, Buffers};

/// A guest, a device, and what they do.
#[derive(Debug)]
pub struct Input {
    pub(super) indirect_desc: bool,
    pub(super) event_idx: bool,
    pub(super) in_order: bool,
    pub(super) ring: Ring,
    /// Where both positions start; mostly in the ring.
    pub(super) start: Start,
    pub(super) ops: Vec<Op>,
}

impl<'a> Arbitrary<'a> for Input {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self {
            indirect_desc: !pick::rarely(u, 4)?,
            event_idx: u.arbitrary()?,
            in_order: pick::rarely(u, 4)?,
            ring: u.arbitrary()?,
            start: u.arbitrary()?,
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
        driver_event: u64,
        device_event: u64,
    },
}

impl<'a> Arbitrary<'a> for Ring {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let size = ring_input::size(u)?;
        let place = if pick::rarely(u, 16)? {
            Place::Raw {
                descriptors: ring_input::area(u, 16)?,
                driver_event: ring_input::area(u, 4)?,
                device_event: ring_input::area(u, 4)?,
            }
        } else {
            Place::Sound {
                base: ring_input::base(u)?,
            }
        };
        Ok(Self { size, place })
    }
}

/// A position, before it is known how large the ring is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Start {
    index: u16,
    wrap: bool,
    /// The index is taken as it is.
    raw: bool,
}

impl Start {
    /// The index and the wrap counter in a ring of `size`.
    pub(super) fn in_ring(self, size: u16) -> (u16, bool) {
        let index = if self.raw {
            self.index & 0x7fff
        } else {
            self.index % size
        };
        (index, self.wrap)
    }
}

impl<'a> Arbitrary<'a> for Start {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self {
            index: u.arbitrary()?,
            wrap: !u.arbitrary::<bool>()?,
            raw: pick::rarely(u, 32)?,
        })
    }
}

/// A descriptor as it stands in memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Raw {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) id: u16,
    pub(super) flags: u16,
}

impl<'a> Arbitrary<'a> for Raw {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let (addr, len, flags) = ring_input::raw(u)?;
        Ok(Self {
            addr,
            len,
            id: id(u)?,
            flags,
        })
    }
}

/// A buffer id: mostly one that a driver would use.
fn id(u: &mut Unstructured<'_>) -> Result<u16> {
    pick::near_u16(u, 8)
}

/// What is wrong with a state that is restored.
#[derive(Clone, Copy, Debug)]
pub(super) enum Change {
    /// Which no packed ring has.
    UsedIndex(u16),
    /// Base of the other format.
    Split(u16),
    Avail(u16),
    Used(u16),
    Ring(Ring),
}

impl<'a> Arbitrary<'a> for Change {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match u.int_in_range(0..=7u8)? {
            0 => Self::UsedIndex(u.arbitrary()?),
            1 => Self::Split(u.arbitrary()?),
            2..=4 => Self::Avail(u.arbitrary()?),
            5..=6 => Self::Used(u.arbitrary()?),
            _ => Self::Ring(u.arbitrary()?),
        })
    }
}

/// One step. Indices and positions are taken modulo what there is.
#[derive(Debug)]
pub(super) enum Op {
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
    /// As [`vring::RingBase`] in vhost-user's form.
    Resume {
        base: Option<(u16, u16)>,
    },
    Restore(Option<Change>),
    StartFresh {
        ring: Ring,
        start: Start,
    },
    /// Both, as they should: so many chains go round, and one interrupt is decided about.
    RoundTrip {
        count: u8,
        back: u8,
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
    /// So many descriptors before what is used, or a little beyond.
    SetDriverEvent {
        back: u8,
        flags: u16,
    },
    // The guest, misbehaving.
    AddRaw {
        descriptors: Vec<Raw>,
        id: Option<u16>,
    },
    /// Relative to where the device looks.
    WriteDescriptor {
        ahead: u8,
        raw: Raw,
    },
    WriteUsed {
        ahead: u8,
        raw: Raw,
    },
    WriteTableEntry {
        address: u64,
        entry: Raw,
    },
    WriteDriverEvent {
        desc: u16,
        flags: u16,
    },
    WriteDeviceEvent {
        desc: u16,
        flags: u16,
    },
    WriteBytes {
        address: u64,
        bytes: [u8; 8],
    },
}

impl<'a> Arbitrary<'a> for Op {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match u.int_in_range(0..=127u8)? {
            0..=17 => Self::Pop,
            18..=30 => Self::Push {
                which: u.arbitrary()?,
                len: pick::length(u)?,
            },
            31..=36 => Self::Publish,
            37..=40 => Self::Unpop {
                which: u.arbitrary()?,
            },
            41..=44 => Self::ShouldNotify,
            45..=48 => Self::EnableNotification,
            49..=51 => Self::DisableNotification,
            52..=53 => Self::HasAvailable,
            54..=56 => Self::Pass {
                limit: u.int_in_range(0..=8)?,
                keep: u.arbitrary()?,
            },
            57..=58 => Self::CopyFromReadable {
                offset: pick::length(u)?,
                count: u.int_in_range(0..=300)?,
            },
            59..=60 => Self::CopyToWritable {
                offset: pick::length(u)?,
                count: u.int_in_range(0..=300)?,
            },
            61 => Self::SetMemory(if pick::rarely(u, 2)? {
                Some(u.arbitrary()?)
            } else {
                None
            }),
            62 => Self::Resume {
                base: if pick::rarely(u, 4)? {
                    Some(u.arbitrary()?)
                } else {
                    None
                },
            },
            63..=64 => Self::Restore(if pick::rarely(u, 4)? {
                Some(u.arbitrary()?)
            } else {
                None
            }),
            65 => Self::StartFresh {
                ring: u.arbitrary()?,
                start: u.arbitrary()?,
            },
            66..=69 => Self::RoundTrip {
                count: u.int_in_range(0..=4)?,
                back: u.arbitrary()?,
            },
            70..=79 => Self::AddDirect(u.arbitrary()?),
            80..=89 => Self::AddIndirect {
                table: ring_input::table(u)?,
                buffers: u.arbitrary()?,
            },
            90..=99 => Self::GuestPublish,
            100..=102 => Self::NeedsKick,
            103..=107 => Self::PollUsed,
            108..=109 => Self::EnableInterrupts,
            110 => Self::DisableInterrupts,
            111..=113 => Self::SetDriverEvent {
                back: u.arbitrary()?,
                flags: u.int_in_range(0..=3)?,
            },
            114..=117 => {
                let count = u.int_in_range(1..=6)?;
                Self::AddRaw {
                    descriptors: (0..count)
                        .map(|_| u.arbitrary())
                        .collect::<Result<Vec<_>>>()?,
                    id: if pick::rarely(u, 2)? {
                        Some(id(u)?)
                    } else {
                        None
                    },
                }
            }
            118..=120 => Self::WriteDescriptor {
                ahead: u.int_in_range(0..=4)?,
                raw: {
                    let raw: Raw = u.arbitrary()?;
                    // Both bits of whose it is, and of which pass.
                    let bits = u16::from(u.int_in_range(0..=3u8)?);
                    let flags = raw.flags & !0x8080 | (bits & 1) << 7 | bits >> 1 << 15;
                    Raw { flags, ..raw }
                },
            },
            121 => Self::WriteUsed {
                ahead: u.int_in_range(0..=4)?,
                raw: u.arbitrary()?,
            },
            122..=123 => Self::WriteTableEntry {
                address: ring_input::table(u)?,
                entry: u.arbitrary()?,
            },
            124 => Self::WriteDriverEvent {
                // At the end of the ring, beyond it, or anywhere.
                desc: pick::near_u16(u, 32)? ^ u16::from(u.arbitrary::<bool>()?) << 15,
                flags: if pick::rarely(u, 4)? {
                    u.arbitrary()?
                } else {
                    2
                },
            },
            125 => Self::WriteDeviceEvent {
                desc: u.arbitrary()?,
                flags: u.arbitrary()?,
            },
            _ => Self::WriteBytes {
                address: ring_input::address(u)?,
                bytes: u.arbitrary()?,
            },
        })
    }
}
