//! What an operator learns of I/O that fails: each is counted by its kind, and the first of a kind is told, the
//! next ones together.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ioq::{IoError, IoErrorKind};

use crate::counters::{Counter, Counters};
use crate::device::Backing;

/// A failing disk fails thousands of operations a second, and a guest can see to it that they go on.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// Kinds as they are counted and told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    NoSpace,
    Storage,
    FileEnded,
    Other,
}

const KINDS: usize = 4;

impl Kind {
    fn of(error: IoErrorKind) -> Self {
        match error {
            IoErrorKind::NoSpace => Self::NoSpace,
            IoErrorKind::Storage => Self::Storage,
            IoErrorKind::UnexpectedEof => Self::FileEnded,
            _ => Self::Other,
        }
    }

    fn counter(self, counters: &Counters) -> &Counter {
        match self {
            Self::NoSpace => &counters.failed_no_space,
            Self::Storage => &counters.failed_storage,
            Self::FileEnded => &counters.failed_file_ended,
            Self::Other => &counters.failed_otherwise,
        }
    }

    fn remedy(self) -> &'static str {
        match self {
            Self::NoSpace => "make room on its file system; the guest may go on then",
            Self::Storage => "see the kernel's log",
            Self::FileEnded => "it is shorter than the guest was told: was it truncated?",
            Self::Other => "see the kernel's log",
        }
    }
}

/// Of one kind.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    last: Option<Instant>,
    /// Failures since then.
    untold: u64,
}

impl Told {
    /// How many to tell of at `now`, this one included; none if it is too soon.
    fn due(&mut self, now: Instant) -> Option<u64> {
        self.untold += 1;
        if self.last.is_some_and(|last| now < last + TELL_EVERY) {
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

/// Counts the failures of a data thread's operations, and tells of them.
#[derive(Debug)]
pub(super) struct Failures {
    image: String,
    counters: Arc<Counters>,
    told: [Told; KINDS],
}

impl Failures {
    pub(super) fn new(backing: &Backing, counters: Arc<Counters>) -> Self {
        let image = match backing {
            Backing::Image(image) => image.path().display().to_string(),
            _ => "the device".to_owned(),
        };
        Self {
            image,
            counters,
            told: [Told::default(); KINDS],
        }
    }

    #[cold]
    pub(super) fn note(&mut self, error: &IoError) {
        let kind = Kind::of(error.kind());
        kind.counter(&self.counters).add(1);
        if let Some(times) = self.told[kind as usize].due(Instant::now()) {
            let (image, remedy) = (&self.image, kind.remedy());
            tracing::warn!(times, "I/O on {image} failed: {error}; {remedy}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_failure_is_told_at_once_and_the_next_ones_together() {
        let mut told = Told::default();
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(told.due(start), Some(1));
        for _ in 0..1000 {
            assert_eq!(told.due(after(9)), None);
        }
        assert_eq!(told.due(after(10)), Some(1001));
        assert_eq!(told.due(after(11)), None);
        assert_eq!(told.due(after(1000)), Some(2));
    }
}
