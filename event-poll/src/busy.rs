//! Polling before the sleep, against the clock.

use std::time::{Duration, Instant};

use crate::window::{PollSettings, PollStats, PollWindow};

/// Turns between two clock readings: as many as take about this long, so that reading it (some 25 ns, or
/// a system call where the machine has no usable counter) is a small part of polling, and the window
/// is not passed by much.
const CLOCK_STEP: Duration = Duration::from_micros(1);

/// Most turns between two clock readings, for turns that take next to nothing.
const CLOCK_TURNS_MAX: u32 = 64;

/// Decides, turn by turn of a caller's own loop, whether to look for work again or to sleep:
/// a [`PollWindow`] with a clock. [`EventPoll::run_polling`](crate::EventPoll::run_polling) is a loop
/// with this built in.
///
/// While work is there it costs one branch a turn, and no clock is read.
///
/// # Example
///
/// ```
/// use event_poll::{BusyPoll, EventNotifier, EventPoll, PollSettings, Token};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let kick = EventNotifier::new()?;
/// # let mut poll = EventPoll::new(1)?;
/// # poll.add(&kick, Token(0))?;
/// # kick.notify()?;
/// # struct Queue(u32);
/// # impl Queue {
/// #     fn serve(&mut self) -> bool { self.0 += 1; self.0 % 1000 == 0 }
/// #     fn ask_for_kicks(&mut self) -> bool { true }
/// #     fn refuse_kicks(&mut self) {}
/// # }
/// # let mut queue = Queue(0);
/// let mut busy = BusyPoll::new(PollSettings::default());
/// # for _ in 0..10_000 {
/// // loop {
/// if queue.serve() {
///     busy.found();
///     continue;
/// }
/// if busy.keep_polling() {
///     std::hint::spin_loop();
///     continue;
/// }
/// // False if something came before the kicks were asked for: it has to be fetched without one.
/// if queue.ask_for_kicks() {
///     for _event in poll.wait(None)? {
///         kick.test_and_clear()?;
/// #       kick.notify()?;
///     }
/// }
/// queue.refuse_kicks();
/// # }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct BusyPoll {
    window: PollWindow,
    phase: Phase,
    /// Turns between two clock readings at present.
    clock_turns: u32,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// The last turn found work, or nothing has been asked yet.
    Working,
    /// As `Polling`, the clock not read yet: most idles of a busy thread end before it would be.
    Beginning { window: Duration, turns_left: u32 },
    Polling {
        since: Instant,
        window: Duration,
        /// At the last reading of the clock.
        elapsed: Duration,
        /// Until the next.
        turns_left: u32,
    },
    /// Polled enough; whatever comes ends a sleep.
    Sleeping { since: Instant },
}

impl BusyPoll {
    /// Starts with a probe, if polling is not switched off.
    #[must_use]
    pub fn new(settings: PollSettings) -> Self {
        Self {
            window: PollWindow::new(settings),
            phase: Phase::Working,
            clock_turns: 1,
        }
    }

    /// A turn found work.
    #[inline]
    pub fn found(&mut self) {
        if !matches!(self.phase, Phase::Working) {
            self.end_idle(Instant::now);
        }
    }

    /// A turn found nothing. True: look again at once. False: ask for notifications, look once more, and
    /// sleep; it stays so until [`found`](Self::found), however often something else ends the sleep.
    #[inline]
    #[must_use]
    pub fn keep_polling(&mut self) -> bool {
        if let Phase::Beginning { turns_left, .. } | Phase::Polling { turns_left, .. } =
            &mut self.phase
            && *turns_left > 1
        {
            *turns_left -= 1;
            return true;
        }
        self.keep_polling_at(Instant::now)
    }

    /// Counters since [`new`](Self::new).
    #[must_use]
    pub const fn stats(&self) -> PollStats {
        self.window.stats()
    }

    /// The policy and its state.
    #[must_use]
    pub const fn window(&self) -> &PollWindow {
        &self.window
    }

    fn keep_polling_at(&mut self, now: impl FnOnce() -> Instant) -> bool {
        match &mut self.phase {
            Phase::Working => {
                if self.window.is_off() {
                    return false;
                }
                let window = self.window.begin();
                let turns_left = self.clock_turns;
                self.phase = if window.is_zero() {
                    Phase::Sleeping { since: now() }
                } else if self.window.is_probing() {
                    Phase::Polling {
                        since: now(),
                        window,
                        elapsed: Duration::ZERO,
                        turns_left,
                    }
                } else {
                    Phase::Beginning { window, turns_left }
                };
                !window.is_zero()
            }
            // The idle began about a step ago.
            &mut Phase::Beginning { window, .. } => {
                let now = now();
                self.phase = Phase::Polling {
                    since: now.checked_sub(CLOCK_STEP).unwrap_or(now),
                    window,
                    elapsed: CLOCK_STEP,
                    turns_left: self.clock_turns,
                };
                true
            }
            Phase::Polling {
                since,
                window,
                elapsed,
                turns_left,
            } => {
                let read = now().saturating_duration_since(*since);
                let step = read.saturating_sub(*elapsed);
                if step < CLOCK_STEP / 2 {
                    self.clock_turns = (self.clock_turns * 2).min(CLOCK_TURNS_MAX);
                } else if step > CLOCK_STEP * 2 {
                    self.clock_turns = (self.clock_turns / 2).max(1);
                }
                *elapsed = read;
                *turns_left = self.clock_turns;
                if read < *window {
                    return true;
                }
                self.phase = Phase::Sleeping { since: *since };
                false
            }
            Phase::Sleeping { .. } => false,
        }
    }

    #[cold]
    fn end_idle(&mut self, now: impl FnOnce() -> Instant) {
        match std::mem::replace(&mut self.phase, Phase::Working) {
            Phase::Working => {}
            Phase::Beginning { .. } => self.window.caught(Duration::ZERO),
            Phase::Polling { since, elapsed, .. } => {
                // Only a probe has to know when exactly.
                let after = if self.window.is_probing() {
                    now().saturating_duration_since(since)
                } else {
                    elapsed
                };
                self.window.caught(after);
            }
            Phase::Sleeping { since } => {
                self.window.slept(now().saturating_duration_since(since));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const MAX: Duration = Duration::from_micros(32);

    /// A clock that goes when told to, and counts its readings.
    struct Clock {
        start: Instant,
        nanos: Cell<u64>,
        readings: Cell<u32>,
    }

    impl Clock {
        fn new() -> Self {
            Self {
                start: Instant::now(),
                nanos: Cell::new(0),
                readings: Cell::new(0),
            }
        }

        fn pass(&self, nanos: u64) {
            self.nanos.set(self.nanos.get() + nanos);
        }

        fn read(&self) -> Instant {
            self.readings.set(self.readings.get() + 1);
            self.start + Duration::from_nanos(self.nanos.get())
        }

        /// Turns of `nanos` each until it is time to sleep; how many.
        fn poll_out(&self, busy: &mut BusyPoll, nanos: u64) -> u32 {
            let mut turns = 0;
            loop {
                let counting = matches!(
                    busy.phase,
                    Phase::Beginning {
                        turns_left: 2..,
                        ..
                    } | Phase::Polling {
                        turns_left: 2..,
                        ..
                    }
                );
                let again = if counting {
                    busy.keep_polling()
                } else {
                    busy.keep_polling_at(|| self.read())
                };
                if !again {
                    return turns;
                }
                turns += 1;
                self.pass(nanos);
            }
        }
    }

    #[test]
    fn polling_ends_with_the_window_and_the_clock_is_read_about_once_a_microsecond() {
        for turn_nanos in [5, 50, 500, 5_000] {
            let clock = Clock::new();
            let mut busy = BusyPoll::new(PollSettings::up_to(MAX));
            // The first idle finds out how long turns take.
            for idle in 0..3 {
                let (began, read) = (clock.nanos.get(), clock.readings.get());
                clock.poll_out(&mut busy, turn_nanos);
                let polled = clock.nanos.get() - began;
                assert!(polled >= 32_000, "{polled}");
                assert!(
                    polled <= 32_000 + 2_000 + turn_nanos,
                    "{polled} of {turn_nanos}"
                );
                let readings = clock.readings.get() - read;
                let most = if turn_nanos < 10 { 110 } else { 72 };
                assert!(idle == 0 || readings <= most, "{readings} of {turn_nanos}");
                // Probes again, and remembers how long turns take.
                busy = BusyPoll {
                    clock_turns: busy.clock_turns,
                    ..BusyPoll::new(PollSettings::up_to(MAX))
                };
            }
        }
    }

    #[test]
    fn switched_off_it_never_polls_and_never_reads_the_clock() {
        let mut busy = BusyPoll::new(PollSettings::OFF);
        for _ in 0..3 {
            assert!(!busy.keep_polling_at(|| panic!("read")));
            busy.found();
        }
        assert_eq!(busy.stats(), PollStats::default());
    }

    #[test]
    fn work_after_work_reads_no_clock_and_counts_nothing() {
        let mut busy = BusyPoll::new(PollSettings::default());
        for _ in 0..3 {
            busy.end_idle(|| panic!("read"));
        }
        assert_eq!(busy.stats(), PollStats::default());
    }

    #[test]
    fn a_wake_without_work_is_not_polled_after_and_does_not_end_the_idle() {
        let clock = Clock::new();
        let mut busy = BusyPoll::new(PollSettings::up_to(MAX));
        clock.poll_out(&mut busy, 1_000);
        for _ in 0..5 {
            clock.pass(50_000);
            assert!(!busy.keep_polling_at(|| clock.read()), "a timer, say");
        }
        busy.end_idle(|| clock.read());
        assert_eq!((busy.stats().in_vain, busy.stats().unpolled), (1, 0));
    }

    #[test]
    fn a_caught_idle_is_counted_and_the_next_begins_anew() {
        let clock = Clock::new();
        let mut busy = BusyPoll::new(PollSettings::up_to(MAX));
        for idle in 1..=4 {
            assert!(busy.keep_polling_at(|| clock.read()));
            clock.pass(10_000);
            busy.end_idle(|| clock.read());
            assert_eq!(busy.stats().paid, idle);
            assert_eq!(busy.window().window(), Duration::from_micros(20));
        }
    }
}
