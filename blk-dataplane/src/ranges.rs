//! Discard and write-zeroes (virtio 1.3 §5.2.6): requests whose data are ranges of the disk.

use crate::SECTOR_SIZE;
use crate::request::{Geometry, Status};

/// Length of `struct virtio_blk_discard_write_zeroes`: sector, number of sectors, flags.
pub(crate) const SEGMENT_LEN: usize = 16;

/// Segments in one request. Each becomes one system call on a worker thread, so more of them in a request
/// save the guest little; Linux's file systems trim in ranges that are mostly larger.
pub(crate) const SEGMENTS_MAX: usize = 16;

/// Sectors in one discarded range, 2 GiB: what the file system does for one call, such as freeing extents
/// under a journal, holds up a drain.
const DISCARD_SECTORS_MAX: u32 = 1 << 22;

/// Sectors in one zeroed range, 64 MiB: where the file system has no better way the zeroes are written.
const WRITE_ZEROES_SECTORS_MAX: u32 = 1 << 17;

/// Flag of a write-zeroes segment: the range may lose its storage (`VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`).
const FLAG_UNMAP: u32 = 1;

/// What is done to ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RangeKind {
    Discard,
    WriteZeroes,
}

/// What a device does to ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RangeLimits {
    /// Discards free storage in units of so many bytes. `None`: there is nothing to discard.
    pub(crate) discard_alignment: Option<u32>,
    pub(crate) write_zeroes: bool,
    /// Whether zeroed ranges may lose their storage.
    pub(crate) may_unmap: bool,
}

/// What the configuration space says about one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RangeFields {
    pub(crate) max_sectors: u32,
    pub(crate) max_segments: u32,
}

impl RangeLimits {
    /// Neither.
    pub(crate) const NONE: Self = Self {
        discard_alignment: None,
        write_zeroes: false,
        may_unmap: false,
    };

    pub(crate) fn has(&self, kind: RangeKind) -> bool {
        match kind {
            RangeKind::Discard => self.discard_alignment.is_some(),
            RangeKind::WriteZeroes => self.write_zeroes,
        }
    }

    pub(crate) fn max_segments(&self, kind: RangeKind) -> usize {
        if self.has(kind) { SEGMENTS_MAX } else { 0 }
    }

    fn max_sectors(kind: RangeKind) -> u32 {
        match kind {
            RangeKind::Discard => DISCARD_SECTORS_MAX,
            RangeKind::WriteZeroes => WRITE_ZEROES_SECTORS_MAX,
        }
    }

    /// What the driver is told; `None` if the device does not do it.
    pub(crate) fn fields(&self, kind: RangeKind) -> Option<RangeFields> {
        self.has(kind).then(|| RangeFields {
            max_sectors: Self::max_sectors(kind),
            // A small number.
            max_segments: u32::try_from(SEGMENTS_MAX).unwrap_or(1),
        })
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
    // §5.2.6.2: the device MUST say UNSUPP to any unknown flag, and to unmap in a discard. Before the rest,
    // so that the answer does not depend on the order of segments.
    let known = match kind {
        RangeKind::Discard => 0,
        RangeKind::WriteZeroes => FLAG_UNMAP,
    };
    if segments
        .iter()
        .any(|segment| split(segment).2 & !known != 0)
    {
        return Err(Status::Unsupported);
    }
    let block_size = u64::from(geometry.block_size);
    let mut count = 0;
    for segment in segments {
        let (sector, sectors, flags) = split(segment);
        if sectors > RangeLimits::max_sectors(kind) {
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
            discard_alignment: Some(4096),
            write_zeroes: true,
            may_unmap: true,
        },
    };

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
                let answer = ask(RangeKind::Discard, &segments, &DISK);
                assert_eq!(answer, Err(Status::Unsupported), "{flags:#x}");
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
        for kind in [RangeKind::Discard, RangeKind::WriteZeroes] {
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
        for kind in [RangeKind::Discard, RangeKind::WriteZeroes] {
            let max = DISK.ranges.fields(kind).unwrap().max_sectors;
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
            let answer = ask(RangeKind::Discard, &[segment(sector, sectors, 0)], &disk);
            assert_eq!(answer.is_ok(), fine);
        }
    }
}
