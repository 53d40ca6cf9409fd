//! A block request by the letter of virtio 1.3 §5.2.6 and of the project's answers to bad input:
//! a pure function of guest memory, chain and device.

use vring::ChainFault;

use super::input::{DISCARD, WRITE_ZEROES};
use super::planes::{CAPACITY, SERIAL, Served};
use crate::naive_memory::NaiveMemory;
use crate::naive_walk::Buffer;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Ranges in one request.
const SEGMENTS_MAX: u64 = 16;

/// What becomes of a request.
#[derive(Debug)]
pub(super) struct Prediction {
    pub(super) used_len: u32,
    /// Address and value of the status byte; `None` if there is none to trust.
    pub(super) status: Option<(u64, u8)>,
    pub(super) effect: Effect,
    /// Bytes of guest memory that decide about the request.
    pub(super) looked_at: Vec<(u64, u64)>,
    /// Where the device may write in any case.
    pub(super) writable: Vec<(u64, u64)>,
}

#[derive(Debug)]
pub(super) enum Effect {
    Nothing,
    /// Bytes of the disk to each of these places, in order.
    Read {
        offset: usize,
        places: Vec<(u64, u64)>,
    },
    Write {
        offset: usize,
        data: Vec<u8>,
    },
    /// Ranges of bytes become zero: on the files that back these disks a discard does that too.
    Zero(Vec<(usize, usize)>),
    Flush,
    /// Bytes to each of these addresses.
    Id(Vec<(u64, u8)>),
}

/// The byte addresses of buffers, one after the other.
fn bytes(buffers: &[Buffer]) -> impl Iterator<Item = u64> {
    buffers
        .iter()
        .flat_map(|buffer| buffer.addr..buffer.addr + u64::from(buffer.len))
}

/// Ranges of the first `len` bytes from `skip` on.
fn ranges(buffers: &[Buffer], skip: u64, len: u64) -> Vec<(u64, u64)> {
    let (mut skip, mut left) = (skip, len);
    let mut ranges = Vec::new();
    for buffer in buffers {
        let from = skip.min(u64::from(buffer.len));
        skip -= from;
        let take = left.min(u64::from(buffer.len) - from);
        left -= take;
        if take > 0 {
            ranges.push((buffer.addr + from, take));
        }
    }
    ranges
}

fn total(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|buffer| u64::from(buffer.len)).sum()
}

/// Used length: the status byte counts only if there is no gap before it.
fn used_len(written: u64, data: u64) -> u32 {
    let len = if written == data {
        written + 1
    } else {
        written
    };
    u32::try_from(len).expect("only what fits memory is written")
}

/// The feature bit that a type needs.
fn accepted_by(kind: u32) -> u64 {
    if kind == DISCARD { 1 << 13 } else { 1 << 14 }
}

/// The ranges of a sound request that are not empty, or the status that refuses it.
fn zeroed(kind: u32, segments: &[u8], served: &Served) -> Result<Vec<(usize, usize)>, u8> {
    let (known, most) = if kind == DISCARD {
        (0, 1 << 22)
    } else {
        (1, 1 << 17)
    };
    let segments: Vec<(u64, u32, u32)> = segments
        .chunks(16)
        .map(|segment| {
            (
                u64::from_le_bytes(segment[..8].try_into().expect("eight")),
                u32::from_le_bytes(segment[8..12].try_into().expect("four")),
                u32::from_le_bytes(segment[12..].try_into().expect("four")),
            )
        })
        .collect();
    // Said of each before anything else is looked at.
    if segments.iter().any(|(_, _, flags)| flags & !known != 0) {
        return Err(UNSUPP);
    }
    let mut zeroed = Vec::new();
    for (sector, sectors, _) in segments {
        let (offset, len) = (u128::from(sector) * 512, u128::from(sectors) * 512);
        let block = u128::from(served.block_size);
        let sound = sectors <= most
            && offset + len <= CAPACITY as u128
            && offset % block == 0
            && len % block == 0;
        if !sound {
            return Err(IOERR);
        }
        if len > 0 {
            let below = "below the capacity";
            let offset = usize::try_from(offset).expect(below);
            zeroed.push((offset, usize::try_from(len).expect(below)));
        }
    }
    Ok(zeroed)
}

/// Decides about one request.
pub(super) fn predict(
    memory: &NaiveMemory,
    chain: Result<Vec<Buffer>, ChainFault>,
    served: &Served,
    features: u64,
) -> Prediction {
    let mut prediction = Prediction {
        used_len: 0,
        status: None,
        effect: Effect::Nothing,
        looked_at: Vec::new(),
        writable: Vec::new(),
    };
    let Ok(buffers) = chain else {
        return prediction;
    };
    let split = buffers.partition_point(|buffer| !buffer.writable);
    let (readable, writable) = buffers.split_at(split);
    prediction.writable = ranges(writable, 0, u64::MAX);
    let Some(last) = writable.last() else {
        return prediction;
    };
    let status_addr = last.addr + u64::from(last.len) - 1;
    if memory.byte(status_addr).is_none() {
        return prediction;
    }
    let room = total(writable) - 1;
    let refuse = |mut prediction: Prediction, status| {
        prediction.status = Some((status_addr, status));
        prediction.used_len = used_len(0, room);
        prediction
    };
    if total(readable) < 16 {
        return refuse(prediction, IOERR);
    }
    prediction.looked_at = ranges(readable, 0, 16);
    let header: Option<Vec<u8>> = bytes(readable).take(16).map(|at| memory.byte(at)).collect();
    let Some(header) = header else {
        return prediction;
    };
    let kind = u32::from_le_bytes(header[..4].try_into().expect("four"));
    let sector = u64::from_le_bytes(header[8..].try_into().expect("eight"));
    let given = total(readable) - 16;
    match kind {
        0 | 1 => {
            let (wanted, other) = if kind == 0 {
                (room, given)
            } else {
                (given, room)
            };
            let offset = u128::from(sector) * 512;
            let block = u128::from(served.block_size);
            let sound = other == 0
                && wanted > 0
                && offset % block == 0
                && u128::from(wanted) % block == 0
                && offset + u128::from(wanted) <= CAPACITY as u128
                && (kind == 0 || !served.read_only);
            if !sound {
                return refuse(prediction, IOERR);
            }
            let offset = usize::try_from(offset).expect("below the capacity");
            let places = if kind == 0 {
                ranges(writable, 0, room)
            } else {
                ranges(readable, 16, given)
            };
            let data: Option<Vec<Vec<u8>>> = places
                .iter()
                .map(|&(at, len)| memory.range(at, len))
                .collect();
            let Some(data) = data else { return prediction };
            if kind == 0 {
                prediction.used_len = used_len(room, room);
                prediction.effect = Effect::Read { offset, places };
            } else {
                prediction.used_len = used_len(0, room);
                prediction.looked_at.extend(&places);
                prediction.effect = Effect::Write {
                    offset,
                    data: data.concat(),
                };
            }
        }
        4 => {
            prediction.used_len = used_len(0, room);
            prediction.effect = Effect::Flush;
        }
        8 => {
            let places = bytes(writable).take(usize::try_from(room).expect("64 bits"));
            let id: Vec<(u64, u8)> = places.zip(SERIAL.bytes()).collect();
            let mapped = id
                .iter()
                .take_while(|(at, _)| memory.byte(*at).is_some())
                .count();
            let whole = mapped == id.len();
            prediction.effect = Effect::Id(id[..mapped].to_vec());
            if !whole {
                return prediction;
            }
            prediction.used_len = used_len(mapped as u64, room);
        }
        DISCARD | WRITE_ZEROES if features & accepted_by(kind) != 0 => {
            let places = ranges(readable, 16, given);
            let sound = !served.read_only
                && room == 0
                && given.is_multiple_of(16)
                && (1..=SEGMENTS_MAX).contains(&(given / 16));
            if !sound {
                return refuse(prediction, IOERR);
            }
            let data: Option<Vec<Vec<u8>>> = places
                .iter()
                .map(|&(at, len)| memory.range(at, len))
                .collect();
            let Some(data) = data else { return prediction };
            prediction.looked_at.extend(&places);
            match zeroed(kind, &data.concat(), served) {
                Ok(zeroed) => prediction.effect = Effect::Zero(zeroed),
                Err(status) => return refuse(prediction, status),
            }
            prediction.used_len = 1;
        }
        _ => return refuse(prediction, UNSUPP),
    }
    prediction.status = Some((status_addr, OK));
    prediction
}
