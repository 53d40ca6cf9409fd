use std::marker::PhantomData;

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

/// Where writes to a region are recorded for live migration.
///
/// It records nothing yet. It is a type of its own, and neither `()` nor an alias of it, so that
/// a log that is switched on at run time can move in here without a change to any user: they name
/// it, if at all, through [`GuestMemoryRegion::B`](vm_memory::GuestMemoryRegion::B).
#[derive(Debug)]
pub struct DirtyLog(());

impl DirtyLog {
    pub(crate) fn disabled() -> Self {
        Self(())
    }
}

/// The part of a [`DirtyLog`] that belongs to one slice of guest memory.
#[derive(Clone, Copy, Debug)]
pub struct DirtyLogSlice<'a>(PhantomData<&'a DirtyLog>);

impl<'a> WithBitmapSlice<'a> for DirtyLog {
    type S = DirtyLogSlice<'a>;
}

impl Bitmap for DirtyLog {
    fn mark_dirty(&self, _offset: usize, _len: usize) {}

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, _offset: usize) -> DirtyLogSlice<'_> {
        DirtyLogSlice(PhantomData)
    }
}

impl WithBitmapSlice<'_> for DirtyLogSlice<'_> {
    type S = Self;
}

impl BitmapSlice for DirtyLogSlice<'_> {}

impl Bitmap for DirtyLogSlice<'_> {
    fn mark_dirty(&self, _offset: usize, _len: usize) {}

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, _offset: usize) -> Self {
        *self
    }
}
