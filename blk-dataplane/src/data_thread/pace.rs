//! Looking for work for a while before sleeping, as long as that pays.

use std::time::Duration;

use event_poll::{BusyPoll, PollSettings};

use crate::counters::Counters;

/// What the thread waits for. How long that takes has nothing to do with each other, the one being up to the
/// guest and the other to the disk, so each has a window of its own: a disk that takes 90 µs must not
/// keep the next request of a busy guest from being caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiting {
    /// Nothing is in flight.
    Requests,
    /// And whatever else the guest sends meanwhile.
    Completions,
}

/// Polling before the sleep.
#[derive(Debug)]
pub(super) struct Pace {
    requests: BusyPoll,
    completions: BusyPoll,
    /// Since the last pass that found work.
    waiting: Option<Waiting>,
}

impl Pace {
    pub(super) fn new(poll_max: Duration) -> Self {
        let busy = BusyPoll::new(PollSettings::up_to(poll_max));
        Self {
            requests: busy.clone(),
            completions: busy,
            waiting: None,
        }
    }

    /// A pass found work.
    #[inline]
    pub(super) fn work(&mut self, counters: &Counters) {
        if let Some(waiting) = self.waiting.take() {
            let busy = self.of(waiting);
            let before = busy.stats();
            busy.found();
            let after = busy.stats();
            counters.polls_paid.add(after.paid - before.paid);
            counters.polls_in_vain.add(after.in_vain - before.in_vain);
        }
    }

    /// A pass found nothing. True: look again. False: it is time to sleep.
    pub(super) fn keep_polling(&mut self, in_flight: bool) -> bool {
        let waiting = *self.waiting.get_or_insert(if in_flight {
            Waiting::Completions
        } else {
            Waiting::Requests
        });
        self.of(waiting).keep_polling()
    }

    fn of(&mut self, waiting: Waiting) -> &mut BusyPoll {
        match waiting {
            Waiting::Requests => &mut self.requests,
            Waiting::Completions => &mut self.completions,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counters::CounterSnapshot;

    const LONG: Duration = event_poll::POLL_MAX_LIMIT;

    #[test]
    fn each_idle_is_counted_once_for_what_it_waited_for() {
        let counters = Counters::default();
        let mut pace = Pace::new(LONG);
        for paid in 1..=3 {
            // What an idle waits for is what was in flight when it began.
            assert!(pace.keep_polling(paid == 2));
            assert!(pace.keep_polling(false));
            pace.work(&counters);
            pace.work(&counters);
            assert_eq!(counters.snapshot().polls_paid, paid);
        }
        assert_eq!(pace.requests.stats().paid, 2);
        assert_eq!(pace.completions.stats().paid, 1);
    }

    #[test]
    fn switched_off_nothing_is_polled_or_counted() {
        let counters = Counters::default();
        let mut pace = Pace::new(Duration::ZERO);
        for in_flight in [false, true] {
            assert!(!pace.keep_polling(in_flight));
            pace.work(&counters);
        }
        let CounterSnapshot {
            polls_paid,
            polls_in_vain,
            ..
        } = counters.snapshot();
        assert_eq!((polls_paid, polls_in_vain), (0, 0));
    }
}
