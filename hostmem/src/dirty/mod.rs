//! Which pages of guest memory were written to, for whoever copies it while the guest runs.

mod bitmap;
mod log;
mod switch;
#[cfg(test)]
mod switch_tests;

use crate::sync;

pub use bitmap::{RegionBitmap, RegionBitmapSlice};
pub use log::{DirtyLog, LogError};

/// Whether there is a log, and which: one for all regions and all maps of a guest.
pub(crate) type LogSwitch = switch::Switch<DirtyLog>;
