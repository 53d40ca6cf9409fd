//! Messages of a front-end, mostly in an order and of a kind that gets somewhere.

use arbitrary::{Arbitrary, Result, Unstructured};

use crate::pick;

use super::files::Kind;

/// Messages of an input: beyond that a longer one covers nothing new.
const OPS_MAX: usize = 48;

/// Where the front-end has the three regions of its guest's memory.
const USER: u64 = 0x7000_0000_0000;

/// What a front-end sends until it goes.
#[derive(Debug)]
pub struct Input {
    pub(super) ops: Vec<Op>,
    /// Bytes of the last message that are still sent; the others never come.
    pub(super) cut_off: Option<u8>,
}

/// One message, and how it is cut up.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) code: u32,
    pub(super) flags: u32,
    /// What the header says, if not the truth.
    pub(super) said: Option<u32>,
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<Kind>,
    /// Lengths of the pieces it is sent in; the rest is one.
    pub(super) pieces: Vec<u8>,
    /// The piece that the descriptors go with.
    pub(super) fds_with: u8,
    /// Not answered before the next is sent.
    pub(super) pipelined: bool,
}

impl<'a> Arbitrary<'a> for Input {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let mut ops = Vec::new();
        // Most inputs begin as front-ends do, or nothing much would be reached.
        if !pick::rarely(u, 8)? {
            let more = if u.arbitrary()? { 1 << 34 } else { 0 };
            ops.push(Op::plain(16, (0x1_b22bu64).to_le_bytes().to_vec()));
            let features: u64 = 1 << 30 | 1 << 32 | 1 << 29 | 1 << 9 | more;
            ops.push(Op::plain(2, features.to_le_bytes().to_vec()));
            let mut table = Op::plain(5, words(&[3, 0]));
            for region in REGIONS {
                table.body.extend(longs(&region));
                table.fds.push(Kind::Ram);
            }
            ops.push(table);
        }
        while !u.is_empty() && ops.len() < OPS_MAX {
            ops.push(op(u)?);
        }
        let cut_off = if pick::rarely(u, 4)? {
            Some(u.arbitrary()?)
        } else {
            None
        };
        Ok(Self { ops, cut_off })
    }
}

/// Guest address, size, front-end's address, offset in the file.
const REGIONS: [[u64; 4]; 3] = [
    [0, 0x8000, USER, 0],
    [0x8000, 0x8000, USER + 0x8000, 0x8000],
    [0x10_0000, 0x4000, USER + 0x10_0000, 0x4000],
];

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

impl Op {
    fn plain(code: u32, body: Vec<u8>) -> Self {
        Self {
            code,
            flags: 9,
            said: None,
            body,
            fds: Vec::new(),
            pieces: Vec::new(),
            fds_with: 0,
            pipelined: false,
        }
    }

    /// One that is answered.
    pub(super) fn question(code: u32, body: Vec<u8>) -> Self {
        Self::plain(code, body)
    }

    fn with(mut self, fds: impl IntoIterator<Item = Kind>) -> Self {
        self.fds.extend(fds);
        self
    }
}

/// What is asked of every connection that has not ended: answers that depend on all that a back-end keeps.
pub(super) fn last_questions() -> Vec<Op> {
    let mut config = words(&[0, 60, 0]);
    config.resize(12 + 60, 0);
    let mut beyond = longs(&[0]);
    beyond.extend(longs(&[0x20_0000, 0x1000, USER + 0x20_0000, 0]));
    vec![
        Op::plain(40, Vec::new()),
        Op::plain(24, config),
        Op::plain(18, words(&[0, 1])),
        Op::plain(37, beyond).with([Kind::Ram]),
        Op::plain(11, words(&[0, 0])),
        Op::plain(11, words(&[1, 0])),
        Op::plain(15, Vec::new()),
        Op::plain(1, Vec::new()),
    ]
}

fn index(u: &mut Unstructured<'_>) -> Result<u32> {
    Ok(match u.int_in_range(0..=15u8)? {
        0..=9 => 0,
        10..=13 => 1,
        14 => 2,
        _ => *u.choose(&[3, 0xff, 0x100, 0x1_0000, u32::MAX])?,
    })
}

fn region(u: &mut Unstructured<'_>) -> Result<[u64; 4]> {
    let mut region = *u.choose(&REGIONS)?;
    if pick::rarely(u, 4)? {
        let field = u.choose_index(4)?;
        let wrong = [
            0,
            1,
            0x1000,
            region[field].wrapping_add(8),
            region[field].wrapping_sub(0x1000),
            u64::MAX - 0xfff,
            1 << 63,
        ];
        region[field] = *u.choose(&wrong)?;
    }
    Ok(region)
}

fn kind(u: &mut Unstructured<'_>, usual: Kind) -> Result<Kind> {
    if pick::rarely(u, 8)? {
        u.choose(Kind::ALL).copied()
    } else {
        Ok(usual)
    }
}

fn ring_fd(u: &mut Unstructured<'_>, code: u32) -> Result<Op> {
    let mut word = u64::from(index(u)?);
    let mut fds = vec![kind(u, Kind::Event)?];
    match u.int_in_range(0..=15u8)? {
        0..=10 => {}
        11..=13 => {
            word |= 0x100;
            fds.clear();
        }
        14 => word |= 1 << u.int_in_range(8..=63u8)?,
        _ => fds.clear(),
    }
    Ok(Op::plain(code, word.to_le_bytes().to_vec()).with(fds))
}

/// Descriptor table, used and available ring, as the message has them.
fn ring_address(u: &mut Unstructured<'_>) -> Result<[u64; 3]> {
    let slot = USER + 0x1000 * u.int_in_range(0..=7u64)?;
    let mut at = [slot, slot + 0x800, slot + 0x400];
    if pick::rarely(u, 6)? {
        let field = u.choose_index(3)?;
        at[field] = *u.choose(&[at[field] + 1, 0x10, 0x1000, USER + 0x20_0000])?;
    }
    Ok(at)
}

fn sound(u: &mut Unstructured<'_>) -> Result<Op> {
    let code = *u.choose(&[
        8u32, 9, 10, 11, 12, 12, 13, 14, 18, 18, // rings
        1, 2, 3, 4, 15, 16, 17, 36, 40, // features and questions
        5, 37, 38, // memory
        6, 7, 21, 24, 25, 31, 32, 34, 39, // the rest
    ])?;
    Ok(match code {
        1 | 3 | 4 | 15 | 17 | 34 | 36 | 40 => Op::plain(code, Vec::new()),
        2 => {
            let mut features: u64 = 1 << 32 | 1 << 30 | 1 << 29;
            for bit in [9u8, 11, 26, 34, 30] {
                if u.arbitrary()? {
                    features ^= 1 << bit;
                }
            }
            if pick::rarely(u, 8)? {
                features ^= 1 << u.int_in_range(0..=63u8)?;
            }
            Op::plain(2, longs(&[features]))
        }
        16 => {
            let mut features = 0x1_b22b;
            if u.arbitrary()? {
                features ^= 1 << u.int_in_range(0..=20u8)?;
            }
            Op::plain(16, longs(&[features]))
        }
        39 => Op::plain(39, longs(&[*u.choose(&[0, 1, 3, 11, 15, 0x80, 0x100])?])),
        8 => {
            let size = *u.choose(&[16, 8, 1, 2, 0, 3, 32, 0x1_0010])?;
            Op::plain(8, words(&[index(u)?, size]))
        }
        10 => {
            let bases = [0, 5, 0xffff, 0x8000_8000, 0x1_0000, 0x8010_8000];
            Op::plain(10, words(&[index(u)?, *u.choose(&bases)?]))
        }
        11 => Op::plain(11, words(&[index(u)?, u.int_in_range(0..=1)?])),
        18 => {
            let enable = *u.choose(&[1, 1, 0, 2, u32::MAX])?;
            Op::plain(18, words(&[index(u)?, enable]))
        }
        9 => {
            let flags = *u.choose(&[0, 0, 0, 1, 2])?;
            let mut body = words(&[index(u)?, flags]);
            body.extend(longs(&ring_address(u)?));
            body.extend(longs(&[0]));
            Op::plain(9, body)
        }
        12..=14 => ring_fd(u, code)?,
        5 => {
            let count = u.int_in_range(0..=4u32)?;
            let mut op = Op::plain(5, words(&[count, 0]));
            for _ in 0..count {
                op.body.extend(longs(&region(u)?));
                op.fds.push(kind(u, Kind::Ram)?);
            }
            op
        }
        37 | 38 => {
            let mut body = longs(&[0]);
            body.extend(longs(&region(u)?));
            let fds = if code == 37 {
                vec![kind(u, Kind::Ram)?]
            } else {
                Vec::new()
            };
            Op::plain(code, body).with(fds)
        }
        6 => {
            let size = *u.choose(&[64, 33, 32, 1, 0, 0x1000, 0x1001, u64::MAX])?;
            let offset = *u.choose(&[0, 0, 8, 0x1000, u64::MAX])?;
            Op::plain(6, longs(&[size, offset])).with([kind(u, Kind::Log)?])
        }
        7 => Op::plain(7, Vec::new()).with([kind(u, Kind::Event)?]),
        21 => Op::plain(21, Vec::new()).with([kind(u, Kind::Stream)?]),
        24 | 25 => {
            let offset = *u.choose(&[32, 0, 31, 20, 90, 96, 0x100, u32::MAX])?;
            let len = *u.choose(&[1u8, 8, 60, 96, 0, 255])?;
            let mut body = words(&[offset, u32::from(len), 0]);
            let value: u8 = u.arbitrary()?;
            body.resize(12 + usize::from(len), value);
            Op::plain(code, body)
        }
        31 | 32 => {
            // What SET_INFLIGHT_FD has to say is filled in from the reply to GET_INFLIGHT_FD.
            let mut body = longs(&[0, 0]);
            let queues = *u.choose(&[2u16, 1, 0, 3, u16::MAX])?;
            let entries = *u.choose(&[16u16, 8, 1, 0, 3, 32])?;
            body.extend(queues.to_le_bytes());
            body.extend(entries.to_le_bytes());
            if u.arbitrary()? {
                body.extend([0; 4]);
            }
            let fds = if code == 32 {
                vec![kind(u, Kind::Inflight)?]
            } else {
                Vec::new()
            };
            Op::plain(code, body).with(fds)
        }
        _ => unreachable!("not among the choices"),
    })
}

fn op(u: &mut Unstructured<'_>) -> Result<Op> {
    let mut op = sound(u)?;
    match u.int_in_range(0..=31u8)? {
        0..=15 => {}
        16..=22 => op.flags = 1,
        23 => op.code = *u.choose(&[0, 19, 20, 22, 26, 33, 35, 41, 42, 44, 45, 1000])?,
        24 => op.code = u.int_in_range(0..=50)?,
        25 => {
            let len = u.int_in_range(0..=300usize)?;
            op.body.resize(len, 0);
        }
        26 => {
            op.body.pop();
        }
        27 => op.body.push(0),
        28 => {
            let more = *u.choose(&[1usize, 1, 2, 8, 32, 33])?;
            for _ in 0..more {
                op.fds.push(*u.choose(Kind::ALL)?);
            }
        }
        29 => {
            op.fds.pop();
        }
        30 => op.flags = *u.choose(&[0, 2, 3, 5, 13, 17, 0x8000_0001])?,
        _ => op.said = Some(*u.choose(&[0x1001, u32::MAX])?),
    }
    for _ in 0..u.int_in_range(0..=3u8)? {
        op.pieces.push(u.int_in_range(1..=24)?);
    }
    op.fds_with = u.int_in_range(0..=3)?;
    op.pipelined = pick::rarely(u, 4)?;
    Ok(op)
}
