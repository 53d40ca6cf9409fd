use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use super::LogSwitch;

/// Where the writes to one region are recorded: vm-memory's [`Bitmap`] of a
/// [`Region`](crate::Region).
///
/// It leads to the [`DirtyLog`](crate::DirtyLog) of the guest, while there is one
/// ([`MemoryMap::start_log`](crate::MemoryMap::start_log)). Everything that writes through
/// vm-memory's slices and [`Bytes`](vm_memory::Bytes) marks what it wrote by itself, after it has
/// written it; what the kernel writes on our behalf is marked with
/// [`MemoryMap::mark_dirty`](crate::MemoryMap::mark_dirty).
#[derive(Debug)]
pub struct RegionBitmap {
    switch: Arc<LogSwitch>,
    /// Guest address of the mapping's first byte. With a region that does not start on a page of its
    /// file that may be below 0: it wraps then, and back again when an offset is added.
    guest_addr: u64,
}

impl RegionBitmap {
    pub(crate) fn new(switch: Arc<LogSwitch>, guest_addr: u64) -> Self {
        Self { switch, guest_addr }
    }
}

/// The part of a [`RegionBitmap`] that begins where one slice of guest memory does.
#[derive(Clone, Copy, Debug)]
pub struct RegionBitmapSlice<'a> {
    switch: &'a LogSwitch,
    /// Guest address of the slice's first byte.
    guest_addr: u64,
}

impl<'a> WithBitmapSlice<'a> for RegionBitmap {
    type S = RegionBitmapSlice<'a>;
}

impl Bitmap for RegionBitmap {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.slice_at(0).mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.slice_at(0).dirty_at(offset)
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> RegionBitmapSlice<'_> {
        RegionBitmapSlice {
            switch: &self.switch,
            guest_addr: self.guest_addr,
        }
        .slice_at(offset)
    }
}

impl WithBitmapSlice<'_> for RegionBitmapSlice<'_> {
    type S = Self;
}

impl BitmapSlice for RegionBitmapSlice<'_> {}

impl Bitmap for RegionBitmapSlice<'_> {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.switch
            .with(|log| log.mark(self.guest_addr.wrapping_add(offset as u64), len));
    }

    /// False while there is no log.
    fn dirty_at(&self, offset: usize) -> bool {
        let addr = self.guest_addr.wrapping_add(offset as u64);
        self.switch.with(|log| log.is_marked(addr)).unwrap_or(false)
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> Self {
        Self {
            guest_addr: self.guest_addr.wrapping_add(offset as u64),
            ..*self
        }
    }
}
