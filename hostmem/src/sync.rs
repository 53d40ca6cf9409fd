//! What the modules that are model-checked take from the standard library.
//!
//! `tests/models` compiles the same files against loom's versions of these, so they name them by
//! `super::sync`, and nothing else that synchronises.

pub(crate) use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
pub(crate) use std::sync::{Arc, Mutex, PoisonError};
pub(crate) use std::thread::yield_now;

pub(crate) use crate::barrier::{heavy, light};

/// [`std::cell::UnsafeCell`] with the interface of loom's.
#[derive(Debug, Default)]
pub(crate) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

impl<T> UnsafeCell<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(std::cell::UnsafeCell::new(value))
    }

    /// Whoever dereferences the pointer promises that nobody has a mutable one meanwhile.
    #[inline]
    pub(crate) fn with<R>(&self, f: impl FnOnce(*const T) -> R) -> R {
        f(self.0.get())
    }

    /// Whoever dereferences the pointer promises that nobody else has any meanwhile.
    pub(crate) fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
        f(self.0.get())
    }
}
