//! Buffers the safe calls accept.

// UNSAFETY: implements `IoBuf`, a promise about raw memory, for types that keep it, and one such type made of the
// global allocator's memory.
#![expect(unsafe_code)]

use std::alloc::{self, Layout};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::{fmt, slice};

use libc::iovec;

/// A buffer that owns its memory, so that a queue may keep it while the kernel uses the memory.
///
/// # Safety
/// - [`IoBuf::segment`] names memory valid for reads and writes of its length, always the same
///   memory until the value is dropped or its owner changes it, wherever the value is moved.
/// - While the value is owned by a queue, nothing else reads or writes that memory and no
///   reference to it exists. A `Box` moved into the queue claims its memory anew with every
///   move, so it does not qualify; a `Vec` does not.
/// - Every byte of the memory is initialised, and any byte value is valid.
pub unsafe trait IoBuf {
    /// The memory.
    fn segment(&mut self) -> iovec;
}

// SAFETY: a vector's elements stay where they are when the vector is moved; nobody else owns them.
unsafe impl IoBuf for Vec<u8> {
    fn segment(&mut self) -> iovec {
        iovec {
            iov_base: self.as_mut_ptr().cast(),
            iov_len: self.len(),
        }
    }
}

// SAFETY: the buffer keeps the promise; the tag has no part in the memory.
unsafe impl<B: IoBuf, T> IoBuf for (B, T) {
    fn segment(&mut self) -> iovec {
        self.0.segment()
    }
}

/// Owned, zeroed memory of a given alignment, as `O_DIRECT` demands.
///
/// ```
/// let buf = ioq::AlignedBuf::new(8192, 4096).expect("memory");
/// assert_eq!(buf.len(), 8192);
/// assert!(buf.as_ptr().addr().is_multiple_of(4096));
/// ```
///
/// Large ones take no physical memory until they are used, page by page.
pub struct AlignedBuf {
    /// The first byte that is aligned.
    data: NonNull<u8>,
    len: usize,
    align: usize,
    /// What was allocated, around it.
    base: NonNull<u8>,
    layout: Layout,
}

/// Up to this alignment zeroed memory comes from calloc(3), which knows that fresh pages are zeroes; above it the
/// allocator writes the zeroes itself, and every page is there at once.
const CALLOC_ALIGN: usize = 16;

// SAFETY: the memory is owned by the value alone.
unsafe impl Send for AlignedBuf {}
// SAFETY: `&AlignedBuf` only gives `&[u8]`.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// `len` zero bytes at a multiple of `align` bytes. `None` if `align` is not a power of two,
    /// `len` is 0 or beyond `isize::MAX`, or there is no memory.
    pub fn new(len: usize, align: usize) -> Option<Self> {
        // Checks the two.
        Layout::from_size_align(len, align)
            .ok()
            .filter(|layout| layout.size() > 0)?;
        let (slack, allocated) = match align {
            ..=CALLOC_ALIGN => (0, align),
            _ => (align, CALLOC_ALIGN),
        };
        let layout = Layout::from_size_align(len.checked_add(slack)?, allocated).ok()?;
        // SAFETY: the layout's size is not 0.
        let base = NonNull::new(unsafe { alloc::alloc_zeroed(layout) })?;
        // At most `slack`, which is a multiple of it.
        let skipped = base.addr().get().next_multiple_of(align) - base.addr().get();
        debug_assert!(skipped <= slack);
        // SAFETY: `skipped + len` bytes are within what was allocated.
        let data = unsafe { base.add(skipped) };
        Some(Self {
            data,
            len,
            align,
            base,
            layout,
        })
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: so many initialised bytes, owned by self.
        unsafe { slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes it the only reference.
        unsafe { slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this layout.
        unsafe { alloc::dealloc(self.base.as_ptr(), self.layout) };
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuf")
            .field("len", &self.len)
            .field("align", &self.align)
            .finish_non_exhaustive()
    }
}

// SAFETY: the memory is on the heap, owned by the value alone, zeroed when allocated.
unsafe impl IoBuf for AlignedBuf {
    fn segment(&mut self) -> iovec {
        iovec {
            iov_base: self.data.as_ptr().cast(),
            iov_len: self.len,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_buf_refuses_what_it_cannot_be() {
        assert!(AlignedBuf::new(0, 512).is_none());
        assert!(AlignedBuf::new(512, 3).is_none());
        assert!(AlignedBuf::new(usize::MAX, 512).is_none());
    }

    #[test]
    fn aligned_buf_is_zeroed_aligned_and_as_long_as_asked() {
        for align in [1, 8, 16, 32, 512, 4096, 1 << 21] {
            for len in [1, 511, 4096, 1 << 20] {
                let mut buf = AlignedBuf::new(len, align).unwrap();
                assert_eq!(buf.as_ptr().addr() % align, 0, "{len} {align}");
                assert!(buf.iter().all(|&byte| byte == 0), "{len} {align}");
                assert_eq!((buf.len(), buf.segment().iov_len), (len, len));
                buf.fill(0xff);
            }
        }
    }

    #[test]
    fn segment_stays_put_when_the_buffer_moves() {
        let mut buf = (AlignedBuf::new(4096, 4096).unwrap(), "tag");
        buf.0[0] = 9;
        let before = buf.segment().iov_base;
        let mut moved = Box::new(buf);
        assert_eq!(moved.segment().iov_base, before);
        assert_eq!(moved.0[0], 9);
    }
}
