//! The clock that latencies are measured with.

use std::time::Instant;

/// Nanoseconds since it was made, or nothing if it is off.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(Option<Instant>);

impl Clock {
    pub(crate) fn new(on: bool) -> Self {
        Self(on.then(Instant::now))
    }

    pub(crate) fn now(&self) -> Option<u64> {
        // 585 years.
        self.0
            .map(|start| u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
}
