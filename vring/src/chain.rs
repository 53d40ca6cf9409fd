//! A descriptor chain as owned values, and copying in and out of its buffers.

use vm_memory::{Bytes, GuestAddress, GuestMemory};

use crate::{ChainFault, QueueSize};

/// Most entries an indirect table may have.
///
/// The specification limits a chain to the queue size (virtio 1.3 §2.7.5.3.1), but Linux drivers
/// exceed it with indirect tables and devices have always let them, up to 1024 entries: the
/// kernel's own limit on the parts of one vectored I/O (`UIO_MAXIOV`), which a longer request
/// could not be submitted under anyway. It bounds the work of one pop and the storage of
/// [`Chain`].
pub const MAX_INDIRECT_DESCRIPTORS: u16 = 1024;

/// Most bytes in one chain (virtio 1.3 §2.7.5.2, driver MUST NOT exceed).
const MAX_CHAIN_BYTES: u64 = 1 << 32;

/// One buffer of a chain, as the driver described it.
///
/// `addr + len` does not overflow and `len` is not zero. Whether there is memory behind it is
/// not known yet: the consumer finds out when it translates the address for its I/O.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Segment {
    /// Guest-physical address of the first byte.
    pub addr: GuestAddress,
    /// Length in bytes.
    pub len: u32,
}

/// Storage for one descriptor chain, owned and reused by the caller.
///
/// Allocated once with room for the longest chain its queue can produce, and never grown. The
/// readable buffers come first, then the writable ones, each in the driver's order; descriptors
/// of length zero are left out.
///
/// ```
/// use vring::{Chain, QueueSize};
///
/// let chain = Chain::for_queue(QueueSize::new(128)?);
/// assert!(chain.readable().is_empty() && chain.writable().is_empty());
/// # Ok::<(), vring::ConfigError>(())
/// ```
///
/// The default is one without room, which takes no memory and holds no chain but the empty one: for
/// [`std::mem::take`] to leave behind where the storage is a field of what serves the request.
#[derive(Debug)]
pub struct Chain {
    segments: Box<[Segment]>,
    used: usize,
    /// Segments before the first writable one.
    readable: usize,
    /// Of `MAX_CHAIN_BYTES`, what those have left.
    readable_left: u64,
    /// Of `MAX_CHAIN_BYTES`, what all have left.
    bytes_left: u64,
}

impl Default for Chain {
    fn default() -> Self {
        Self::in_storage(Box::default())
    }
}

impl Chain {
    /// Storage for any chain of a queue of `size` entries: direct descriptors, and an indirect
    /// table of up to [`MAX_INDIRECT_DESCRIPTORS`] at their end.
    pub fn for_queue(size: QueueSize) -> Self {
        let empty = Segment {
            addr: GuestAddress(0),
            len: 0,
        };
        let capacity = Self::capacity_for(size.get());
        Self::in_storage(vec![empty; capacity].into_boxed_slice())
    }

    fn in_storage(segments: Box<[Segment]>) -> Self {
        Self {
            segments,
            used: 0,
            readable: 0,
            readable_left: MAX_CHAIN_BYTES,
            bytes_left: MAX_CHAIN_BYTES,
        }
    }

    /// The indirect descriptor itself takes one of the queue's, and leaves no segment.
    fn capacity_for(size: u16) -> usize {
        usize::from(size) - 1 + usize::from(MAX_INDIRECT_DESCRIPTORS)
    }

    /// Buffers the device may read, in order.
    #[inline]
    pub fn readable(&self) -> &[Segment] {
        &self.segments[..self.readable]
    }

    /// Buffers the device may write, in order.
    #[inline]
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.readable..self.used]
    }

    /// Bytes in [`readable`](Self::readable); readable and writable together are at most 2^32.
    #[inline]
    pub const fn readable_len(&self) -> u64 {
        MAX_CHAIN_BYTES - self.readable_left
    }

    /// Bytes in [`writable`](Self::writable); readable and writable together are at most 2^32.
    #[inline]
    pub const fn writable_len(&self) -> u64 {
        self.readable_left - self.bytes_left
    }

    /// Forgets the segments, keeps the storage.
    #[inline]
    pub const fn clear(&mut self) {
        self.used = 0;
        self.readable = 0;
        self.readable_left = MAX_CHAIN_BYTES;
        self.bytes_left = MAX_CHAIN_BYTES;
    }

    /// Begins a chain anew.
    #[inline(always)]
    pub(crate) const fn refill(&mut self) -> Filling<'_> {
        self.readable = 0;
        self.readable_left = MAX_CHAIN_BYTES;
        Filling {
            used: 0,
            bytes_left: MAX_CHAIN_BYTES,
            chain: self,
        }
    }

    /// Gathers readable bytes from `offset` on into `buf`, whatever buffers they are split over,
    /// and returns how many there were: `min(buf.len(), readable_len - offset)`.
    ///
    /// # Errors
    ///
    /// [`BufferError`] if a buffer is not in `memory`; `buf` then holds the bytes before it.
    #[inline]
    pub fn copy_from_readable<M: GuestMemory>(
        &self,
        memory: &M,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<usize, BufferError> {
        let mut completed = 0;
        for piece in pieces(self.readable(), offset, buf.len()) {
            let part = &mut buf[completed..completed + piece.len];
            // A partial read is one that met a hole.
            match memory.read(part, piece.addr) {
                Ok(read) if read == piece.len => completed += read,
                Ok(read) => return Err(piece.unmapped(completed, read)),
                Err(_) => return Err(piece.unmapped(completed, 0)),
            }
        }
        Ok(completed)
    }

    /// Scatters `buf` into the writable bytes from `offset` on, whatever buffers they are split
    /// over, and returns how many fitted: `min(buf.len(), writable_len - offset)`.
    ///
    /// # Errors
    ///
    /// [`BufferError`] if a buffer is not in `memory`; the bytes before it are written, and
    /// [`BufferError::completed`] says how many, for the used length.
    #[inline]
    pub fn copy_to_writable<M: GuestMemory>(
        &self,
        memory: &M,
        offset: u64,
        buf: &[u8],
    ) -> Result<usize, BufferError> {
        let mut completed = 0;
        for piece in pieces(self.writable(), offset, buf.len()) {
            let part = &buf[completed..completed + piece.len];
            match memory.write(part, piece.addr) {
                Ok(written) if written == piece.len => completed += written,
                Ok(written) => return Err(piece.unmapped(completed, written)),
                Err(_) => return Err(piece.unmapped(completed, 0)),
            }
        }
        Ok(completed)
    }
}

/// A chain in the making.
///
/// What changes with each descriptor is kept here and not beside the storage, so that the compiler has it in registers
/// from one to the next. Hence the inlining: a call would want it in memory.
pub(crate) struct Filling<'a> {
    chain: &'a mut Chain,
    used: usize,
    bytes_left: u64,
}

impl Filling<'_> {
    /// Appends one buffer of the walk, checking what holds for a chain as a whole.
    #[inline(always)]
    pub(crate) fn append(
        &mut self,
        address: u64,
        len: u32,
        writable: bool,
    ) -> Result<(), ChainFault> {
        // Zero length is not forbidden; it describes nothing (row D8).
        if len == 0 {
            return Ok(());
        }
        let bytes = u64::from(len);
        if address.checked_add(bytes).is_none() {
            return Err(ChainFault::BufferOverflow { address, len });
        }
        let Some(bytes_left) = self.bytes_left.checked_sub(bytes) else {
            return Err(ChainFault::TooManyBytes);
        };
        let chain = &mut *self.chain;
        let Some(segment) = chain.segments.get_mut(self.used) else {
            return Err(ChainFault::StorageTooSmall);
        };
        // At most the number of segments.
        let used = self.used.wrapping_add(1);
        if !writable {
            if chain.readable != self.used {
                return Err(ChainFault::ReadableAfterWritable);
            }
            chain.readable = used;
            chain.readable_left = bytes_left;
        }
        *segment = Segment {
            addr: GuestAddress(address),
            len,
        };
        self.used = used;
        self.bytes_left = bytes_left;
        Ok(())
    }

    /// The chain is what was appended.
    #[inline(always)]
    pub(crate) const fn end(self) {
        self.chain.used = self.used;
        self.chain.bytes_left = self.bytes_left;
    }
}

/// A buffer of a chain lies outside guest memory, wholly or in part: the guest's fault, answered
/// like a [`ChainFault`] unless the status byte can still be written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{len} bytes at {address:#x} are not all in guest memory")]
pub struct BufferError {
    /// Guest-physical address of the piece that failed.
    pub address: u64,
    /// Its length in bytes.
    pub len: usize,
    /// Bytes copied before the hole was met, over all pieces.
    pub completed: usize,
}

/// The part of one segment a copy touches; `len` is never zero.
struct Piece {
    addr: GuestAddress,
    len: usize,
}

impl Piece {
    #[cold]
    const fn unmapped(&self, before: usize, within: usize) -> BufferError {
        BufferError {
            address: self.addr.0,
            len: self.len,
            completed: before + within,
        }
    }
}

/// The pieces of `segments` that cover `count` bytes from byte `offset` on, or fewer if they end.
#[inline]
fn pieces(segments: &[Segment], offset: u64, count: usize) -> impl Iterator<Item = Piece> {
    let mut skip = offset;
    let mut left = count;
    segments
        .iter()
        .map_while(move |segment| {
            if left == 0 {
                return None;
            }
            let len = u64::from(segment.len);
            if skip >= len {
                skip -= len;
                return Some(None);
            }
            // `len` fits usize on every target with 32 bits or more, so the saturated value only
            // ever loses against `left`.
            let piece = usize::try_from(len - skip).unwrap_or(usize::MAX).min(left);
            // No overflow: `skip < len` and the walk checked `addr + len`.
            let addr = GuestAddress(segment.addr.0 + skip);
            skip = 0;
            left -= piece;
            Some(Some(Piece { addr, len: piece }))
        })
        .flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::GuestMemoryMmap;

    use super::*;

    fn chain() -> Chain {
        Chain::for_queue(QueueSize::new(4).unwrap())
    }

    impl Chain {
        /// Goes on where the last one ended.
        fn append(&mut self, address: u64, len: u32, writable: bool) -> Result<(), ChainFault> {
            let mut filling = Filling {
                used: self.used,
                bytes_left: self.bytes_left,
                chain: self,
            };
            let appended = filling.append(address, len, writable);
            filling.end();
            appended
        }
    }

    #[test]
    fn storage_holds_the_longest_chain_of_its_queue_and_no_more() {
        let mut chain = chain();
        for _ in 0..3 + 1024 {
            chain.append(0, 1, true).unwrap();
        }
        assert_eq!(chain.append(0, 1, true), Err(ChainFault::StorageTooSmall));
    }

    #[test]
    fn d9_exactly_four_gib_is_the_most_a_chain_may_have() {
        let mut chain = chain();
        chain.append(0, u32::MAX, false).unwrap();
        chain.append(0, 1, true).unwrap();
        assert_eq!(chain.readable_len() + chain.writable_len(), 1 << 32);
        assert_eq!(chain.append(0, 1, true), Err(ChainFault::TooManyBytes));
    }

    #[test]
    fn default_storage_has_no_room() {
        let mut chain = Chain::default();
        assert_eq!(chain.append(0, 0, false), Ok(()));
        assert_eq!(chain.append(0, 1, false), Err(ChainFault::StorageTooSmall));
        assert!(chain.readable().is_empty() && chain.writable().is_empty());
    }

    #[test]
    fn clear_forgets_everything() {
        let mut chain = chain();
        chain.append(0, 8, false).unwrap();
        chain.append(0, 8, true).unwrap();
        chain.clear();
        assert_eq!((chain.readable_len(), chain.writable_len()), (0, 0));
        assert!(chain.readable().is_empty() && chain.writable().is_empty());
    }

    #[test]
    fn d5_a_hole_in_a_buffer_is_an_error_that_says_how_far_the_copy_came() {
        let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let mut chain = chain();
        chain.append(0xff0, 8, true).unwrap();
        chain.append(0xffc, 8, true).unwrap();
        let fault = chain.copy_to_writable(&mem, 0, &[7; 16]).unwrap_err();
        assert_eq!((fault.address, fault.completed), (0xffc, 12));
        let mut written = [0; 4];
        mem.read_slice(&mut written, GuestAddress(0xffc)).unwrap();
        assert_eq!(written, [7; 4]);
    }

    #[test]
    fn d7_a_buffer_over_two_adjacent_regions_is_copied_whole() {
        let mem = GuestMemoryMmap::<()>::from_ranges(&[
            (GuestAddress(0), 0x1000),
            (GuestAddress(0x1000), 0x1000),
        ])
        .unwrap();
        mem.write_slice(&[1, 2, 3, 4], GuestAddress(0xffe)).unwrap();
        let mut chain = chain();
        chain.append(0xffe, 4, false).unwrap();
        let mut buf = [0; 4];
        assert_eq!(chain.copy_from_readable(&mem, 0, &mut buf), Ok(4));
        assert_eq!(buf, [1, 2, 3, 4]);
    }

    proptest! {
        #[test]
        fn copies_do_not_depend_on_how_the_buffers_are_split(
            lens in proptest::collection::vec(1u32..40, 1..8),
            offset in 0u64..200,
            count in 0usize..200,
        ) {
            let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
            let mut chain = chain();
            let mut flat = Vec::new();
            // Segments in descending order, so that no two touch in guest memory.
            for (i, &len) in lens.iter().enumerate() {
                let addr = 0x1000 - 0x80 * u64::try_from(i).unwrap();
                chain.append(addr, len, false).unwrap();
                for b in 0..u64::from(len) {
                    let byte = u8::try_from(flat.len() % 251).unwrap();
                    mem.write_obj(byte, GuestAddress(addr + b)).unwrap();
                    flat.push(byte);
                }
            }
            for &len in &lens {
                chain.append(0x2000, len, true).unwrap();
            }
            let from = usize::try_from(offset).unwrap().min(flat.len());
            let expected = &flat[from..(from + count).min(flat.len())];

            let mut buf = vec![0; count];
            let copied = chain.copy_from_readable(&mem, offset, &mut buf).unwrap();
            prop_assert_eq!(&buf[..copied], expected);
            prop_assert_eq!(
                chain.copy_to_writable(&mem, offset, &buf).unwrap(),
                expected.len()
            );
        }

        #[test]
        fn scatter_writes_the_bytes_of_a_flat_model_and_no_others(
            lens in proptest::collection::vec(1u32..40, 1..8),
            offset in 0u64..200,
            data in proptest::collection::vec(1u8.., 0..200),
        ) {
            let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
            let mut chain = chain();
            let mut model = vec![0u8; 0x4000];
            let mut places = Vec::new();
            for (i, &len) in lens.iter().enumerate() {
                let addr = 0x1000 - 0x80 * u64::try_from(i).unwrap();
                chain.append(addr, len, true).unwrap();
                places.extend((addr..addr + u64::from(len)).map(|a| usize::try_from(a).unwrap()));
            }
            let skip = usize::try_from(offset).unwrap();
            for (&place, &byte) in places.iter().skip(skip).zip(&data) {
                model[place] = byte;
            }
            chain.copy_to_writable(&mem, offset, &data).unwrap();
            let mut all = vec![0; 0x4000];
            mem.read_slice(&mut all, GuestAddress(0)).unwrap();
            prop_assert_eq!(all, model);
        }
    }
}
