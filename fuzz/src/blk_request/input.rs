//! Requests as a guest frames them, and what control does meanwhile.

use arbitrary::{Arbitrary, Result, Unstructured};

use super::planes::SECTORS;
use crate::pick;

/// What one guest does with one device.
#[derive(Debug)]
pub struct Input {
    pub(super) kind: DeviceKind,
    pub(super) size: u16,
    pub(super) indirect_desc: bool,
    pub(super) event_idx: bool,
    pub(super) flush: bool,
    /// Where both indices start.
    pub(super) index: u16,
    pub(super) batches: Vec<Batch>,
    pub(super) ending: Ending,
    /// Which request types the driver has accepted.
    pub(super) discard: bool,
    pub(super) write_zeroes: bool,
}

/// Which of the devices that run in this process.
#[derive(Arbitrary, Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum DeviceKind {
    Buffered,
    Direct,
    Null,
    ReadOnly,
}

/// Requests that are in flight together, and what control does with them.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) control: Control,
    pub(super) requests: Vec<Request>,
    /// After everything is written: any field of any of the batch's descriptors.
    pub(super) pokes: Vec<Poke>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub(super) enum Control {
    Nothing,
    /// Stopped before the batch is published, and started after.
    Restart,
    Pause,
    Disable,
    /// While the batch is served.
    Drain,
    UpdateMemory,
    SetKick,
}

/// How it ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ending {
    Stop,
    /// `avail.idx` jumps by more than the ring is long.
    Jump {
        by: u16,
    },
    /// A head that is no descriptor.
    Head {
        beyond: u16,
    },
}

#[derive(Debug)]
pub(super) struct Request {
    pub(super) kind: u32,
    pub(super) ioprio: u32,
    pub(super) sector: u64,
    /// Of the header; 16 as a rule.
    pub(super) header_len: u32,
    /// Sector, number of sectors and flags of ranges: what the data begins with.
    pub(super) segments: Vec<(u64, u32, u32)>,
    /// Bytes for the device to read, after the header.
    pub(super) data_out: u32,
    /// Bytes for the device to write, before the status.
    pub(super) data_in: u32,
    /// Of the status; 1 as a rule.
    pub(super) status_len: u32,
    pub(super) cut: Cut,
    pub(super) framing: Framing,
    /// Of each buffer in guest memory.
    pub(super) alignment: u64,
    /// Bytes between buffers.
    pub(super) gap: u8,
    /// Descriptors in descending order.
    pub(super) reversed: bool,
}

/// Where buffers are cut.
#[derive(Clone, Debug)]
pub(super) enum Cut {
    /// Header, data, status.
    Usual,
    /// Header with the data, data with the status.
    Joined,
    /// Anywhere; equal places make empty buffers.
    At(Vec<u16>),
    /// Every so many bytes.
    Every(u8),
}

/// Where descriptors go.
#[derive(Clone, Copy, Debug)]
pub(super) enum Framing {
    Direct,
    Indirect,
    /// The rest in a table.
    Mixed {
        direct: u8,
    },
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Poke {
    /// Which descriptor, modulo how many there are.
    pub(super) which: u16,
    pub(super) field: Field,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Field {
    Addr(u64),
    Len(u32),
    Flags(u16),
    Next(u16),
}

impl<'a> Arbitrary<'a> for Input {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let size = 2 << u.int_in_range(0..=5u8)?;
        Ok(Self {
            kind: u.arbitrary()?,
            size,
            indirect_desc: !pick::rarely(u, 8)?,
            event_idx: u.arbitrary()?,
            flush: !pick::rarely(u, 4)?,
            index: if pick::rarely(u, 3)? {
                u.arbitrary()?
            } else {
                0u16.wrapping_sub(u.int_in_range(0..=8)?)
            },
            ending: match u.int_in_range(0..=31u8)? {
                30 => Ending::Jump {
                    by: u.int_in_range(size + 1..=u16::MAX)?,
                },
                31 => Ending::Head {
                    beyond: u.arbitrary()?,
                },
                _ => Ending::Stop,
            },
            batches: u.arbitrary_iter()?.take(4).collect::<Result<_>>()?,
            discard: !pick::rarely(u, 8)?,
            write_zeroes: !pick::rarely(u, 8)?,
        })
    }
}

impl<'a> Arbitrary<'a> for Batch {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let control = if pick::rarely(u, 6)? {
            u.arbitrary()?
        } else {
            Control::Nothing
        };
        let mut requests: Vec<Request> = u.arbitrary_iter()?.take(24).collect::<Result<_>>()?;
        // A file read or written from one end to the other: what merging is for.
        if pick::rarely(u, 3)? {
            let write = u.arbitrary()?;
            let mut sector = u.int_in_range(0..=SECTORS / 2)?;
            for request in &mut requests {
                let len = request.data_in.max(request.data_out).clamp(512, 1024) & !511;
                (request.kind, request.sector) = (u32::from(write), sector);
                (request.data_out, request.data_in) = if write { (len, 0) } else { (0, len) };
                sector += u64::from(len / 512);
            }
        }
        let pokes = if pick::rarely(u, 6)? {
            u.int_in_range(1..=3)?
        } else {
            0
        };
        Ok(Self {
            control,
            requests,
            pokes: (0..pokes).map(|_| u.arbitrary()).collect::<Result<_>>()?,
        })
    }
}

pub(super) const DISCARD: u32 = 11;
pub(super) const WRITE_ZEROES: u32 = 13;
pub(super) const SEGMENT_LEN: u32 = 16;

/// A range to discard or to zero, mostly one that there is.
fn segment(u: &mut Unstructured<'_>) -> Result<(u64, u32, u32)> {
    let sector = match u.int_in_range(0..=15u8)? {
        0..=11 => u.int_in_range(0..=SECTORS - 8)? & !7,
        12..=13 => u.int_in_range(0..=SECTORS)?,
        14 => u64::MAX / 512 - 1 + u.int_in_range(0..=3)?,
        _ => u.arbitrary()?,
    };
    let sectors = match u.int_in_range(0..=15u8)? {
        0..=9 => 8,
        10..=13 => u.int_in_range(0..=24)?,
        // What one range may have at most of either kind.
        14 => [1 << 17, 1 << 22][usize::from(u.arbitrary::<bool>()?)] + u.int_in_range(0..=1)?,
        _ => u.arbitrary()?,
    };
    let flags = match u.int_in_range(0..=15u8)? {
        0..=12 => 0,
        13..=14 => 1,
        _ => u.arbitrary()?,
    };
    Ok((sector, sectors, flags))
}

impl<'a> Arbitrary<'a> for Request {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let kind = match u.int_in_range(0..=31u8)? {
            0..=10 => 0,
            11..=21 => 1,
            22..=23 => 4,
            24 => DISCARD,
            25 => WRITE_ZEROES,
            26..=28 => 8,
            29 => u.int_in_range(0..=15)?,
            30 => 1 << u.int_in_range(0..=31)? | u.int_in_range(0..=1)?,
            _ => u.arbitrary()?,
        };
        let sector = match u.int_in_range(0..=31u8)? {
            0..=27 => u.int_in_range(0..=SECTORS - 1)?,
            28 => SECTORS - u.int_in_range(0..=4)?,
            29 => u64::MAX / 512 - 1 + u.int_in_range(0..=3)?,
            30 => u64::MAX - u.int_in_range(0..=8)?,
            _ => u.arbitrary()?,
        };
        let data = match u.int_in_range(0..=31u8)? {
            0..=19 => 512 * u.int_in_range(1..=4)?,
            20..=25 => 512 * u.int_in_range(0..=24)?,
            26..=27 => 4096,
            28..=29 => 20,
            30 => u.int_in_range(0..=64)?,
            _ => u.int_in_range(0..=0x3000)?,
        };
        let right_way = !pick::rarely(u, 24)?;
        let usual = |u: &mut Unstructured<'a>, usual: u32, most: u32| {
            if pick::rarely(u, 32)? {
                u.int_in_range(0..=most)
            } else {
                Ok(usual)
            }
        };
        let header_len = usual(u, 16, 20)?;
        let status_len = usual(u, 1, 3)?;
        let segments = match kind {
            DISCARD | WRITE_ZEROES => {
                let count = if pick::rarely(u, 8)? {
                    u.int_in_range(0..=18)?
                } else {
                    u.int_in_range(1..=4)?
                };
                (0..count).map(|_| segment(u)).collect::<Result<_>>()?
            }
            _ => Vec::new(),
        };
        let given_segments = u32::try_from(segments.len()).unwrap_or(0);
        let given = |wanted: bool| if wanted == right_way { data } else { 0 };
        let (mut data_out, mut data_in) = match kind {
            1 => (given(true), given(false)),
            4 => (0, 0),
            DISCARD | WRITE_ZEROES => (SEGMENT_LEN * given_segments, 0),
            8 => (0, if data == 512 { 20 } else { data % 40 }),
            _ => (given(false), given(true)),
        };
        if pick::rarely(u, 32)? {
            (data_out, data_in) = (u.int_in_range(0..=1024)?, u.int_in_range(0..=1024)?);
        }
        let cut = match u.int_in_range(0..=15u8)? {
            0..=7 => Cut::Usual,
            8..=10 => Cut::Joined,
            11..=14 => {
                let count = u.int_in_range(0..=7)?;
                Cut::At((0..count).map(|_| u.arbitrary()).collect::<Result<_>>()?)
            }
            _ => Cut::Every(u.int_in_range(1..=64)?),
        };
        let framing = match u.int_in_range(0..=7u8)? {
            0..=3 => Framing::Direct,
            4..=6 => Framing::Indirect,
            _ => Framing::Mixed {
                direct: u.int_in_range(0..=4)?,
            },
        };
        Ok(Self {
            kind,
            ioprio: if pick::rarely(u, 8)? {
                u.arbitrary()?
            } else {
                0
            },
            sector,
            header_len,
            segments,
            data_out,
            data_in,
            status_len,
            cut,
            framing,
            alignment: [16, 512, 1][usize::from(u.int_in_range(0..=2u8)?)],
            gap: if pick::rarely(u, 2)? {
                u.int_in_range(0..=33)?
            } else {
                0
            },
            reversed: u.arbitrary()?,
        })
    }
}

impl<'a> Arbitrary<'a> for Poke {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let field = match u.int_in_range(0..=7u8)? {
            0..=2 => Field::Addr(match u.int_in_range(0..=7u8)? {
                0..=3 => u.int_in_range(0..=0x1_8010)?,
                4 => 0x1_8000 - u.int_in_range(0..=0x200)?,
                5 => 0x1_0000 - u.int_in_range(0..=0x200)?,
                6 => u64::MAX - u.int_in_range(0..=0x400)?,
                _ => u.arbitrary()?,
            }),
            3..=4 => Field::Len(pick::length(u)?),
            5..=6 => Field::Flags(if pick::rarely(u, 8)? {
                u.arbitrary()?
            } else {
                u.int_in_range(0..=7)?
            }),
            _ => Field::Next(pick::near_u16(u, 64)?),
        };
        Ok(Self {
            which: u.arbitrary()?,
            field,
        })
    }
}
