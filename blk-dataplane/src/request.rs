//! One virtio-blk request (virtio 1.3 §5.2.6): from the owned copy of its header and the lengths of
//! its parts to what is to be done. Pure: no memory, no I/O.

use virtio_bindings::virtio_blk as spec;

use crate::SECTOR_SIZE;
use crate::device::bit;
use crate::lifetime::LIFETIME_LEN;
use crate::ranges::{RangeKind, RangeLimits, SEGMENT_LEN};

/// Length of `struct virtio_blk_req`'s header: type, reserved, sector.
pub(crate) const HEADER_LEN: usize = 16;

/// Length of the string that `VIRTIO_BLK_T_GET_ID` returns (§5.2.6): NUL padded, no NUL when full.
pub(crate) const ID_LEN: usize = spec::VIRTIO_BLK_ID_BYTES as usize;

/// `VIRTIO_BLK_F_LIFETIME` (§5.2.3), which virtio-bindings has not.
pub(crate) const VIRTIO_BLK_F_LIFETIME: u32 = 15;

/// `VIRTIO_BLK_T_GET_LIFETIME` (§5.2.6), likewise.
pub(crate) const VIRTIO_BLK_T_GET_LIFETIME: u32 = 10;

/// The status byte (§5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupported = 2,
}
const _: () = assert!(Status::Ok as u32 == spec::VIRTIO_BLK_S_OK);
const _: () = assert!(Status::IoErr as u32 == spec::VIRTIO_BLK_S_IOERR);
const _: () = assert!(Status::Unsupported as u32 == spec::VIRTIO_BLK_S_UNSUPP);

/// What the device allows. The capacity may change while it runs, the rest does not.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    /// In bytes.
    pub(crate) capacity: u64,
    /// In bytes; a power of two from 512.
    pub(crate) block_size: u32,
    pub(crate) read_only: bool,
    pub(crate) ranges: RangeLimits,
}

/// What a well-formed request asks for. Offsets and lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Read {
        offset: u64,
        len: u64,
    },
    Write {
        offset: u64,
        len: u64,
    },
    Flush,
    GetId,
    GetLifetime,
    /// A discard, write-zeroes or secure erase of so many segments, which are the data.
    Ranges {
        kind: RangeKind,
        count: usize,
    },
}

/// What a driver has accepted of the request types that need a feature.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Accepted {
    pub(crate) discard: bool,
    pub(crate) write_zeroes: bool,
    pub(crate) secure_erase: bool,
    pub(crate) lifetime: bool,
}

impl Accepted {
    /// Of the feature bits that the driver has accepted and those that the device offers.
    ///
    /// What few devices have is not done for a driver that accepts it unasked (B27). Discards and write-zeroes
    /// are not looked at here: on a read-only device they fail as writes do (B15).
    pub(crate) fn of(features: u64, offered: u64) -> Self {
        let both = features & offered;
        Self {
            discard: features & bit(spec::VIRTIO_BLK_F_DISCARD) != 0,
            write_zeroes: features & bit(spec::VIRTIO_BLK_F_WRITE_ZEROES) != 0,
            secure_erase: both & bit(spec::VIRTIO_BLK_F_SECURE_ERASE) != 0,
            lifetime: both & bit(VIRTIO_BLK_F_LIFETIME) != 0,
        }
    }
}

/// The lengths of a request's parts, header and status byte taken off.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DataLen {
    /// What the driver wrote for the device.
    pub(crate) readable: u64,
    /// Where the device may write, before the status byte.
    pub(crate) writable: u64,
}

/// Decides what a request does, or the status that refuses it. `header` is the owned copy: the guest
/// cannot change it any more (hostile-inputs T1).
#[inline]
pub(crate) fn parse(
    header: &[u8; HEADER_LEN],
    data: DataLen,
    geometry: &Geometry,
    accepted: Accepted,
) -> Result<Action, Status> {
    let (kind, sector) = split_header(header);
    match kind {
        // §5.2.6: data of an IN is device-writable; a driver that gives readable data instead made
        // a mistake, and transferring part of it would hide that (hostile-inputs B14).
        spec::VIRTIO_BLK_T_IN if data.readable == 0 => {
            let (offset, len) = range(sector, data.writable, geometry)?;
            Ok(Action::Read { offset, len })
        }
        spec::VIRTIO_BLK_T_OUT if data.writable == 0 => {
            // §5.2.6.2: a read-only device MUST fail writes and MUST NOT write.
            if geometry.read_only {
                return Err(Status::IoErr);
            }
            let (offset, len) = range(sector, data.readable, geometry)?;
            Ok(Action::Write { offset, len })
        }
        spec::VIRTIO_BLK_T_IN | spec::VIRTIO_BLK_T_OUT => Err(Status::IoErr),
        // B11: data or a sector on a flush break driver rules (§5.2.6.1) but say nothing else:
        // flushing is the safe answer, and the data is never looked at.
        spec::VIRTIO_BLK_T_FLUSH => Ok(Action::Flush),
        // B24: the driver MUST give 20 bytes; min(20, given) are written.
        spec::VIRTIO_BLK_T_GET_ID => Ok(Action::GetId),
        spec::VIRTIO_BLK_T_DISCARD if accepted.discard => {
            ranges(RangeKind::Discard, data, geometry)
        }
        spec::VIRTIO_BLK_T_WRITE_ZEROES if accepted.write_zeroes => {
            ranges(RangeKind::WriteZeroes, data, geometry)
        }
        spec::VIRTIO_BLK_T_SECURE_ERASE if accepted.secure_erase => {
            ranges(RangeKind::SecureErase, data, geometry)
        }
        // The driver has to give room for the whole structure.
        VIRTIO_BLK_T_GET_LIFETIME if accepted.lifetime => {
            if data.writable < LIFETIME_LEN as u64 {
                return Err(Status::IoErr);
            }
            Ok(Action::GetLifetime)
        }
        // §5.2.6.2: unknown, not offered and not accepted types (B16, B18, B27). SCSI commands are never offered.
        _ => Err(Status::Unsupported),
    }
}

/// Checks the shape of a request that consists of segments (B14, B15, B17).
fn ranges(kind: RangeKind, data: DataLen, geometry: &Geometry) -> Result<Action, Status> {
    let segment = SEGMENT_LEN as u64;
    let count = usize::try_from(data.readable / segment).map_err(|_| Status::IoErr)?;
    let wrong = geometry.read_only
        || data.writable != 0
        || !data.readable.is_multiple_of(segment)
        || !(1..=geometry.ranges.max_segments(kind)).contains(&count);
    if wrong {
        return Err(Status::IoErr);
    }
    Ok(Action::Ranges { kind, count })
}

/// Checks a transfer (B8, B9, B12, B13) and turns its sector into a byte offset.
#[inline]
fn range(sector: u64, len: u64, geometry: &Geometry) -> Result<(u64, u64), Status> {
    let block_size = u64::from(geometry.block_size);
    let offset = sector.checked_mul(SECTOR_SIZE).ok_or(Status::IoErr)?;
    let end = offset.checked_add(len).ok_or(Status::IoErr)?;
    // An empty transfer (B9) is refused: no driver sends one, and "done" would be a guess. Parts of
    // a block are refused too: writing them would mean read-modify-write, which races with
    // neighbours; `blk_size` tells the driver (QEMU does the same).
    // A mask, since a division takes as long as much of the rest.
    let whole_blocks = (offset | len) & (block_size - 1) == 0;
    if len == 0 || end > geometry.capacity || !whole_blocks {
        return Err(Status::IoErr);
    }
    Ok((offset, len))
}

/// The type in a header.
pub(crate) fn kind_of(header: &[u8; HEADER_LEN]) -> u32 {
    split_header(header).0
}

/// `type` and `sector`; the word between them is the ignored ioprio (B25).
fn split_header(header: &[u8; HEADER_LEN]) -> (u32, u64) {
    let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = *header;
    (
        u32::from_le_bytes([t0, t1, t2, t3]),
        u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: Geometry = Geometry {
        capacity: 1 << 20,
        block_size: 512,
        read_only: false,
        ranges: RangeLimits::NONE,
    };

    fn header(kind: u32, sector: u64) -> [u8; HEADER_LEN] {
        let mut bytes = [0xa5; HEADER_LEN];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        bytes
    }

    fn ask(kind: u32, sector: u64, readable: u64, writable: u64) -> Result<Action, Status> {
        parse(
            &header(kind, sector),
            DataLen { readable, writable },
            &DISK,
            Accepted::default(),
        )
    }

    #[test]
    fn b8_length_that_is_no_multiple_of_a_sector_is_ioerr() {
        for len in [1, 511, 513, 4095] {
            assert_eq!(ask(spec::VIRTIO_BLK_T_IN, 0, 0, len), Err(Status::IoErr));
            assert_eq!(ask(spec::VIRTIO_BLK_T_OUT, 0, len, 0), Err(Status::IoErr));
        }
    }

    #[test]
    fn b9_transfer_of_nothing_is_ioerr() {
        assert_eq!(ask(spec::VIRTIO_BLK_T_IN, 0, 0, 0), Err(Status::IoErr));
        assert_eq!(ask(spec::VIRTIO_BLK_T_OUT, 0, 0, 0), Err(Status::IoErr));
    }

    #[test]
    fn b12_only_the_range_up_to_capacity_is_served() {
        let last = DISK.capacity / 512 - 1;
        assert_eq!(
            ask(spec::VIRTIO_BLK_T_IN, last, 0, 512),
            Ok(Action::Read {
                offset: last * 512,
                len: 512
            })
        );
        assert_eq!(
            ask(spec::VIRTIO_BLK_T_IN, last, 0, 1024),
            Err(Status::IoErr)
        );
        assert_eq!(
            ask(spec::VIRTIO_BLK_T_OUT, last + 1, 512, 0),
            Err(Status::IoErr)
        );
    }

    #[test]
    fn b13_sector_near_2_to_the_64_is_ioerr() {
        for sector in [u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1, 1 << 55] {
            assert_eq!(
                ask(spec::VIRTIO_BLK_T_IN, sector, 0, 512),
                Err(Status::IoErr)
            );
        }
    }

    #[test]
    fn b14_data_in_the_wrong_direction_is_ioerr() {
        assert_eq!(ask(spec::VIRTIO_BLK_T_IN, 0, 512, 0), Err(Status::IoErr));
        assert_eq!(ask(spec::VIRTIO_BLK_T_OUT, 0, 0, 512), Err(Status::IoErr));
        assert_eq!(ask(spec::VIRTIO_BLK_T_IN, 0, 512, 512), Err(Status::IoErr));
    }

    #[test]
    fn b15_read_only_device_refuses_writes_and_still_flushes_and_tells_its_id() {
        let disk = Geometry {
            read_only: true,
            ..DISK
        };
        let data = DataLen {
            readable: 512,
            writable: 0,
        };
        let write = parse(
            &header(spec::VIRTIO_BLK_T_OUT, 0),
            data,
            &disk,
            Accepted::default(),
        );
        assert_eq!(write, Err(Status::IoErr));
        let none = DataLen {
            readable: 0,
            writable: 0,
        };
        assert_eq!(
            parse(
                &header(spec::VIRTIO_BLK_T_FLUSH, 0),
                none,
                &disk,
                Accepted::default()
            ),
            Ok(Action::Flush)
        );
        assert_eq!(
            parse(
                &header(spec::VIRTIO_BLK_T_GET_ID, 0),
                none,
                &disk,
                Accepted::default()
            ),
            Ok(Action::GetId)
        );
    }

    #[test]
    fn b16_b18_b27_types_that_are_not_offered_are_unsupported() {
        let offered = [
            spec::VIRTIO_BLK_T_IN,
            spec::VIRTIO_BLK_T_OUT,
            spec::VIRTIO_BLK_T_FLUSH,
            spec::VIRTIO_BLK_T_GET_ID,
        ];
        let odd = [spec::VIRTIO_BLK_T_BARRIER, 0xffff_ffff, 1 << 30];
        for kind in (0..64).chain(odd).filter(|kind| !offered.contains(kind)) {
            assert_eq!(
                ask(kind, 0, 512, 512),
                Err(Status::Unsupported),
                "type {kind:#x}"
            );
        }
    }

    #[test]
    fn b27_lifetime_wants_its_feature_and_room_for_the_whole_structure() {
        let accepted = Accepted::of(1 << 15, 1 << 15);
        for (writable, answer) in [
            (0, Err(Status::IoErr)),
            (5, Err(Status::IoErr)),
            (6, Ok(Action::GetLifetime)),
            (512, Ok(Action::GetLifetime)),
        ] {
            let data = DataLen {
                readable: 0,
                writable,
            };
            let header = header(VIRTIO_BLK_T_GET_LIFETIME, 0);
            assert_eq!(parse(&header, data, &DISK, accepted), answer);
            for (features, offered) in [(!(1 << 15), u64::MAX), (u64::MAX, !(1 << 15))] {
                let accepted = Accepted::of(features, offered);
                let answer = parse(&header, data, &DISK, accepted);
                assert_eq!(answer, Err(Status::Unsupported));
            }
        }
    }

    #[test]
    fn b11_flush_with_data_or_a_sector_is_a_flush() {
        assert_eq!(
            ask(spec::VIRTIO_BLK_T_FLUSH, 77, 512, 512),
            Ok(Action::Flush)
        );
    }

    #[test]
    fn parts_of_a_block_are_refused_on_a_4096_byte_block_device() {
        let disk = Geometry {
            block_size: 4096,
            ..DISK
        };
        let ask = |sector, len| {
            let data = DataLen {
                readable: len,
                writable: 0,
            };
            parse(
                &header(spec::VIRTIO_BLK_T_OUT, sector),
                data,
                &disk,
                Accepted::default(),
            )
        };
        assert_eq!(
            ask(8, 4096),
            Ok(Action::Write {
                offset: 4096,
                len: 4096
            })
        );
        assert_eq!(ask(1, 4096), Err(Status::IoErr));
        assert_eq!(ask(8, 512), Err(Status::IoErr));
    }
}
