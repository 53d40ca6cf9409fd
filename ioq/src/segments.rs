//! Storage of the slots' iovecs: one mapping, a fixed region per slot.

// UNSAFETY: the storage is a raw anonymous mapping, because the global allocator would touch
// (and so commit) every page of an aligned zeroed block that may be a gigabyte of mostly
// unused room.
#![expect(unsafe_code)]

use std::io;
use std::ptr::{self, NonNull};
use std::slice;

use libc::iovec;

/// Bytes of a cache line; only speed depends on it.
const CACHE_LINE: usize = 64;

/// Why segments do not fit a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FillError {
    /// More than a slot holds.
    TooMany,
    /// Their lengths' sum exceeds 2⁶³ − 1.
    TooLong,
}

/// What [`Segments::fill`] has made of an operation's segments.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Filled {
    /// How many there are.
    pub(crate) count: u16,
    /// Their bytes, at most 2⁶³ − 1.
    pub(crate) total: u64,
    /// The segment, if there is one only: it is not in the slot.
    pub(crate) single: iovec,
}

/// Of no memory.
pub(crate) const NO_SEGMENT: iovec = iovec {
    iov_base: ptr::null_mut(),
    iov_len: 0,
};

/// The iovecs of every slot that has more than one.
///
/// The distance between two slots is an *odd* number of cache lines: with a power of two, such as
/// the 4 KiB of 256 iovecs, the first lines of all slots would share one set of the L1 cache (64
/// sets of 64 bytes repeat every 4 KiB) and evict one another though most of the cache is
/// idle. An odd number of lines walks through all the sets.
#[derive(Debug)]
pub(crate) struct Segments {
    base: NonNull<u8>,
    bytes: usize,
    stride: usize,
    slots: u16,
    per_slot: u16,
}

// SAFETY: the mapping is owned by this value alone, and any thread may read, write and unmap it.
unsafe impl Send for Segments {}

impl Segments {
    /// Room for `per_slot` iovecs in each of `slots` slots, none of it touched yet. The error
    /// carries the bytes asked for.
    pub(crate) fn new(slots: u16, per_slot: u16) -> Result<Self, (usize, io::Error)> {
        let lines = (usize::from(per_slot) * size_of::<iovec>()).div_ceil(CACHE_LINE) | 1;
        let stride = lines * CACHE_LINE;
        // At most 65,535 × 16,448 bytes, about 1 GiB; mmap refuses 0.
        let bytes = (stride * usize::from(slots)).max(1);
        // SAFETY: a new anonymous mapping at an address the kernel chooses replaces nothing.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err((bytes, io::Error::last_os_error()));
        }
        let Some(base) = NonNull::new(base.cast()) else {
            return Err((bytes, io::Error::from_raw_os_error(libc::ENOMEM)));
        };
        Ok(Self {
            base,
            bytes,
            stride,
            slots,
            per_slot,
        })
    }

    pub(crate) fn per_slot(&self) -> u16 {
        self.per_slot
    }

    fn region(&self, slot: u16) -> *mut iovec {
        // Slots come from this crate's own free list. The check costs a compare and keeps a
        // mistake there from becoming a wild pointer.
        assert!(slot < self.slots, "slot out of range");
        // SAFETY: slot < slots, so the offset is within the mapping of stride × slots bytes.
        // It is a multiple of 64, which is enough alignment for an iovec.
        unsafe {
            self.base
                .as_ptr()
                .add(usize::from(slot) * self.stride)
                .cast()
        }
    }

    /// The slot's iovecs from `first` on, `count` of them.
    pub(crate) fn get(&self, slot: u16, first: u16, count: u16) -> &[iovec] {
        let region = self.region(slot);
        // SAFETY: a region is `per_slot` iovecs, always initialised (zeroes are an iovec); `&self`
        // keeps writers out, since the kernel only reads them.
        let all = unsafe { slice::from_raw_parts(region, usize::from(self.per_slot)) };
        &all[usize::from(first)..usize::from(first) + usize::from(count)]
    }

    fn get_mut(&mut self, slot: u16) -> &mut [iovec] {
        let region = self.region(slot);
        // SAFETY: as in `get`; `&mut self` makes it the only reference.
        unsafe { slice::from_raw_parts_mut(region, usize::from(self.per_slot)) }
    }

    /// Copies `segments` into the slot, joining neighbours that touch in host memory and
    /// dropping empty ones. A single one does not go to the slot's storage: it is in the result.
    #[inline]
    pub(crate) fn fill(
        &mut self,
        slot: u16,
        segments: impl IntoIterator<Item = iovec>,
    ) -> Result<Filled, FillError> {
        let mut last = NO_SEGMENT;
        // Segments before `last`, all of them in the slot.
        let mut before = 0u16;
        let mut total = 0u64;
        for segment in segments {
            if segment.iov_len == 0 {
                continue;
            }
            // The sum of two that are at most i64::MAX fits.
            total = i64::try_from(segment.iov_len)
                .ok()
                .map(|len| total + len.cast_unsigned())
                .filter(|&sum| i64::try_from(sum).is_ok())
                .ok_or(FillError::TooLong)?;
            if last.iov_len == 0 {
                last = segment;
            } else if last.iov_base.addr().checked_add(last.iov_len)
                == Some(segment.iov_base.addr())
            {
                last.iov_len += segment.iov_len;
            } else {
                self.put(slot, before, last)?;
                before += 1;
                last = segment;
            }
        }
        if before == 0 {
            return Ok(Filled {
                count: u16::from(last.iov_len > 0),
                total,
                single: last,
            });
        }
        self.put(slot, before, last)?;
        Ok(Filled {
            count: before + 1,
            total,
            single: NO_SEGMENT,
        })
    }

    fn put(&mut self, slot: u16, at: u16, segment: iovec) -> Result<(), FillError> {
        let to = self.get_mut(slot).get_mut(usize::from(at));
        *to.ok_or(FillError::TooMany)? = segment;
        Ok(())
    }

    /// Drops `bytes` from the front of the slot's iovecs `first..first + count`, and returns the
    /// new `first` and `count`.
    pub(crate) fn advance(
        &mut self,
        slot: u16,
        mut first: u16,
        mut count: u16,
        mut bytes: u64,
    ) -> (u16, u16) {
        let region = self.get_mut(slot);
        while count > 0 && bytes > 0 {
            let segment = &mut region[usize::from(first)];
            match usize::try_from(bytes) {
                Ok(part) if part < segment.iov_len => {
                    segment.iov_base = segment.iov_base.wrapping_byte_add(part);
                    segment.iov_len -= part;
                    break;
                }
                // An iov_len is below 2⁶³ (`fill`), so it fits.
                _ => bytes = bytes.saturating_sub(segment.iov_len as u64),
            }
            first += 1;
            count -= 1;
        }
        (first, count)
    }
}

impl Drop for Segments {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length and nothing refers to it now.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn iov(base: usize, len: usize) -> iovec {
        iovec {
            iov_base: ptr::without_provenance_mut(base),
            iov_len: len,
        }
    }

    fn pairs(segments: &[iovec]) -> Vec<(usize, usize)> {
        segments
            .iter()
            .map(|s| (s.iov_base.addr(), s.iov_len))
            .collect()
    }

    #[test]
    fn slots_start_in_every_l1_set() {
        for per_slot in [1, 4, 128, 256, 1024] {
            let segments = Segments::new(64, per_slot).unwrap();
            let mut sets: Vec<_> = (0..64)
                .map(|slot| segments.region(slot).addr() / CACHE_LINE % 64)
                .collect();
            sets.sort_unstable();
            sets.dedup();
            assert_eq!(sets.len(), 64, "{per_slot} segments per slot");
        }
    }

    #[test]
    fn largest_storage_commits_no_memory() {
        let segments = Segments::new(u16::MAX, 1024).unwrap();
        let mut resident = vec![0u8; segments.bytes.div_ceil(4096)];
        // SAFETY: the vector has a byte for each page of the mapping.
        let rc = unsafe {
            libc::mincore(
                segments.base.as_ptr().cast(),
                segments.bytes,
                resident.as_mut_ptr(),
            )
        };
        assert_eq!(rc, 0);
        assert_eq!(resident.iter().filter(|&&page| page & 1 != 0).count(), 0);
    }

    #[test]
    fn touching_segments_are_joined_and_empty_ones_dropped() {
        let mut segments = Segments::new(2, 2).unwrap();
        let input = [
            iov(0x1000, 16),
            iov(0x9000, 0),
            iov(0x1010, 16),
            iov(0x5000, 8),
        ];
        let filled = segments.fill(1, input).unwrap();
        assert_eq!((filled.count, filled.total), (2, 40));
        assert_eq!(pairs(segments.get(1, 0, 2)), [(0x1000, 32), (0x5000, 8)]);
        let filled = segments.fill(1, [iov(0x9000, 0), iov(0x1000, 8), iov(0x1008, 8)]);
        let filled = filled.unwrap();
        assert_eq!((filled.count, filled.total), (1, 16));
        assert_eq!(pairs(&[filled.single]), [(0x1000, 16)]);
        assert_eq!(segments.fill(1, []).unwrap().count, 0);
    }

    #[test]
    fn too_many_or_too_long_is_refused() {
        let mut segments = Segments::new(1, 2).unwrap();
        let apart = [iov(0x1000, 16), iov(0x3000, 16), iov(0x5000, 16)];
        assert_eq!(segments.fill(0, apart).unwrap_err(), FillError::TooMany);
        for huge in [
            [iov(0x1000, usize::MAX / 2), iov(0x1, 1)],
            [iov(0x1000, 1), iov(0x1, usize::MAX)],
        ] {
            assert_eq!(segments.fill(0, huge).unwrap_err(), FillError::TooLong);
        }
    }

    proptest! {
        #[test]
        fn advance_leaves_the_bytes_a_naive_walk_leaves(
            lens in prop::collection::vec(1usize..20, 2..8),
            cuts in prop::collection::vec(0u64..25, 0..8),
        ) {
            let mut segments = Segments::new(1, 8).unwrap();
            let input: Vec<_> =
                lens.iter().enumerate().map(|(i, &len)| iov((i + 1) * 0x1000, len)).collect();
            let mut naive: Vec<usize> =
                input.iter().flat_map(|s| s.iov_base.addr()..s.iov_base.addr() + s.iov_len).collect();
            let mut count = segments.fill(0, input).unwrap().count;
            let mut first = 0;
            for cut in cuts {
                (first, count) = segments.advance(0, first, count, cut);
                let cut = usize::try_from(cut).unwrap().min(naive.len());
                naive.drain(..cut);
                let left: Vec<usize> = segments
                    .get(0, first, count)
                    .iter()
                    .flat_map(|s| s.iov_base.addr()..s.iov_base.addr() + s.iov_len)
                    .collect();
                prop_assert_eq!(&left, &naive);
            }
        }
    }
}
