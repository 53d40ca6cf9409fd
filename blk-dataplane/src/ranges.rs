//! Discard, write-zeroes and secure erase (virtio 1.3 §5.2.6): requests whose data are ranges of the disk.

use crate::SECTOR_SIZE;
use crate::request::{Geometry, Status};

/// Length of `struct virtio_blk_discard_write_zeroes`: sector, number of sectors, flags.
pub(crate) const SEGMENT_LEN: usize = 16;

/// Segments in one request. Each becomes one system call on a worker thread, so more of them in a request
/// save the guest little; Linux's file systems trim in ranges that are mostly larger.
pub(crate) const SEGMENTS_MAX: usize = 16;

/// Sectors in one discarded range, 2 GiB: what the file system does for one call, such as freeing extents
/// under a journal, holds up a drain.
pub(crate) const DISCARD_SECTORS_MAX: u32 = 1 << 22;

/// Sectors in one zeroed range, 64 MiB: where the file system has no better way the zeroes are written.
pub(crate) const WRITE_ZEROES_SECTORS_MAX: u32 = 1 << 17;

/// Sectors in one securely erased range, 128 MiB: flash erases that in about a second, and a drain waits for it.
pub(crate) const SECURE_ERASE_SECTORS_MAX: u32 = 1 << 18;

/// Flag of a write-zeroes segment: the range may lose its storage (`VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`).
const FLAG_UNMAP: u32 = 1;

/// What is done to ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RangeKind {
    Discard,
    WriteZeroes,
    SecureErase,
}

/// How much of one kind a request may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RangeLimit {
    /// In one range.
    pub(crate) max_sectors: u32,
    /// What is done in units of so many sectors; ranges that are no multiples are done as far as possible.
    pub(crate) alignment: u32,
}

impl RangeLimit {
    /// Ranges in one request, the same for all kinds.
    #[expect(clippy::cast_possible_truncation, reason = "16")]
    pub(crate) const MAX_SEGMENTS: u32 = SEGMENTS_MAX as u32;
}

/// What a device does to ranges; `None` for what it does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RangeLimits {
    pub(crate) discard: Option<RangeLimit>,
    pub(crate) write_zeroes: Option<RangeLimit>,
    /// Whether zeroed ranges may lose their storage.
    pub(crate) may_unmap: bool,
    pub(crate) secure_erase: Option<RangeLimit>,
}

impl RangeLimits {
    /// None of them.
    pub(crate) const NONE: Self = Self {
        discard: None,
        write_zeroes: None,
        may_unmap: false,
        secure_erase: None,
    };

    pub(crate) fn of(&self, kind: RangeKind) -> Option<RangeLimit> {
        match kind {
            RangeKind::Discard => self.discard,
            RangeKind::WriteZeroes => self.write_zeroes,
            RangeKind::SecureErase => self.secure_erase,
        }
    }

    pub(crate) fn max_segments(&self, kind: RangeKind) -> usize {
        self.of(kind).map_or(0, |_| SEGMENTS_MAX)
    }
}

/// One range, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// It may lose its storage.
    pub(crate) unmap: bool,
}

/// Checks the segments of a request, owned copies (hostile-inputs T1), and fills `ranges` with those that
/// are not empty. Returns how many. If any is wrong nothing may be done (B19-B21).
pub(crate) fn parse(
    segments: &[[u8; SEGMENT_LEN]],
    kind: RangeKind,
    geometry: &Geometry,
    ranges: &mut [Range; SEGMENTS_MAX],
) -> Result<usize, Status> {
    // §5.2.6.2: the device MUST say UNSUPP to any unknown flag, and to unmap in all but write-zeroes. Before
    // the rest, so that the answer does not depend on the order of segments.
    let known = match kind {
        RangeKind::Discard | RangeKind::SecureErase => 0,
        RangeKind::WriteZeroes => FLAG_UNMAP,
    };
    if segments
        .iter()
        .any(|segment| split(segment).2 & !known != 0)
    {
        return Err(Status::Unsupported);
    }
    let max_sectors = geometry
        .ranges
        .of(kind)
        .map_or(0, |limit| limit.max_sectors);
    let block_size = u64::from(geometry.block_size);
    let mut count = 0;
    for segment in segments {
        let (sector, sectors, flags) = split(segment);
        if sectors > max_sectors {
            return Err(Status::IoErr);
        }
        let offset = sector.checked_mul(SECTOR_SIZE).ok_or(Status::IoErr)?;
        let len = u64::from(sectors) * SECTOR_SIZE;
        let end = offset.checked_add(len).ok_or(Status::IoErr)?;
        let whole_blocks = offset.is_multiple_of(block_size) && len.is_multiple_of(block_size);
        if end > geometry.capacity || !whole_blocks {
            return Err(Status::IoErr);
        }
        if len == 0 {
            continue;
        }
        let place = ranges.get_mut(count).ok_or(Status::IoErr)?;
        *place = Range {
            offset,
            len,
            unmap: flags & FLAG_UNMAP != 0 && geometry.ranges.may_unmap,
        };
        count += 1;
    }
    Ok(count)
}

/// Sector, number of sectors, flags.
fn split(segment: &[u8; SEGMENT_LEN]) -> (u64, u32, u32) {
    let [
        s0,
        s1,
        s2,
        s3,
        s4,
        s5,
        s6,
        s7,
        n0,
        n1,
        n2,
        n3,
        f0,
        f1,
        f2,
        f3,
    ] = *segment;
    (
        u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
        u32::from_le_bytes([n0, n1, n2, n3]),
        u32::from_le_bytes([f0, f1, f2, f3]),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: Geometry = Geometry {
        capacity: 1 << 40,
        block_size: 512,
        read_only: false,
        ranges: RangeLimits {
            discard: Some(RangeLimit {
                max_sectors: 1 << 12,
                alignment: 8,
            }),
            write_zeroes: Some(RangeLimit {
                max_sectors: 1 << 10,
                alignment: 1,
            }),
            may_unmap: true,
            secure_erase: Some(RangeLimit {
                max_sectors: 1 << 11,
                alignment: 8,
            }),
        },
    };

    const KINDS: [RangeKind; 3] = [
        RangeKind::Discard,
        RangeKind::WriteZeroes,
        RangeKind::SecureErase,
    ];

    fn segment(sector: u64, sectors: u32, flags: u32) -> [u8; SEGMENT_LEN] {
        let mut bytes = [0; SEGMENT_LEN];
        bytes[..8].copy_from_slice(&sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
        bytes[12..].copy_from_slice(&flags.to_le_bytes());
        bytes
    }

    fn ask(
        kind: RangeKind,
        segments: &[[u8; SEGMENT_LEN]],
        disk: &Geometry,
    ) -> Result<Vec<Range>, Status> {
        let mut ranges = [Range::default(); SEGMENTS_MAX];
        parse(segments, kind, disk, &mut ranges).map(|count| ranges[..count].to_vec())
    }

    #[test]
    fn b19_flags_that_are_not_known_are_unsupported_whatever_else_is_wrong() {
        let far = segment(u64::MAX, 1, 0);
        for flags in [1, 2, 1 << 31, u32::MAX] {
            let flagged = segment(0, 8, flags);
            for segments in [[flagged, far], [far, flagged]] {
                for kind in [RangeKind::Discard, RangeKind::SecureErase] {
                    let answer = ask(kind, &segments, &DISK);
                    assert_eq!(answer, Err(Status::Unsupported), "{flags:#x}");
                }
                if flags != 1 {
                    let answer = ask(RangeKind::WriteZeroes, &segments, &DISK);
                    assert_eq!(answer, Err(Status::Unsupported), "{flags:#x}");
                }
            }
        }
    }

    #[test]
    fn unmap_is_a_wish_that_the_device_need_not_grant() {
        let thick = Geometry {
            ranges: RangeLimits {
                may_unmap: false,
                ..DISK.ranges
            },
            ..DISK
        };
        for (disk, flags, unmap) in [(DISK, 1, true), (DISK, 0, false), (thick, 1, false)] {
            let expected = Range {
                offset: 512,
                len: 1024,
                unmap,
            };
            let answer = ask(RangeKind::WriteZeroes, &[segment(1, 2, flags)], &disk);
            assert_eq!(answer, Ok(vec![expected]));
        }
    }

    #[test]
    fn b20_ranges_past_the_end_or_past_all_numbers_are_ioerr() {
        let last = DISK.capacity / 512 - 1;
        for kind in KINDS {
            assert!(ask(kind, &[segment(last, 1, 0)], &DISK).is_ok());
            for (sector, sectors) in [
                (last, 2),
                (last + 1, 1),
                (u64::MAX, 1),
                (u64::MAX / 512, 1),
                (0, u32::MAX),
            ] {
                // The good one before it is not done either.
                let segments = [segment(0, 8, 0), segment(sector, sectors, 0)];
                assert_eq!(ask(kind, &segments, &DISK), Err(Status::IoErr));
            }
        }
    }

    #[test]
    fn b21_empty_ranges_are_nothing_to_do_and_too_long_ones_ioerr() {
        for kind in KINDS {
            let max = DISK.ranges.of(kind).unwrap().max_sectors;
            let empty = segment(5, 0, 0);
            assert_eq!(ask(kind, &[empty, empty], &DISK), Ok(Vec::new()));
            let answer = ask(kind, &[empty, segment(0, max, 0)], &DISK).unwrap();
            assert_eq!(answer.len(), 1);
            let answer = ask(kind, &[segment(0, max + 1, 0)], &DISK);
            assert_eq!(answer, Err(Status::IoErr));
        }
    }

    #[test]
    fn parts_of_a_block_are_refused() {
        let disk = Geometry {
            block_size: 4096,
            ..DISK
        };
        for (sector, sectors, fine) in [(8, 8, true), (0, 80, true), (1, 8, false), (8, 7, false)] {
            for kind in KINDS {
                let answer = ask(kind, &[segment(sector, sectors, 0)], &disk);
                assert_eq!(answer.is_ok(), fine);
            }
        }
    }
}
