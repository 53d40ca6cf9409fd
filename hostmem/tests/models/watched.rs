//! Memory of which loom knows who touches it when.

// UNSAFETY: loom's cells are for code that shares them by other means; here they are never looked into.
#![expect(unsafe_code)]

/// Fails the model if it is freed while it is touched, or touched later.
#[derive(Default)]
pub(crate) struct Watched(loom::cell::UnsafeCell<()>);

// SAFETY: the cell holds nothing, and no pointer to it is dereferenced.
unsafe impl Sync for Watched {}

impl Watched {
    pub(crate) fn touch(&self) {
        self.0.with(|_| ());
    }

    pub(crate) fn free(&self) {
        self.0.with_mut(|_| ());
    }
}
