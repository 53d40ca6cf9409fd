//! How long to poll before a sleep: pure policy, no clock.

use std::time::Duration;

/// Limit unless the caller says otherwise. On a virtual machine a sleep and the wake after it cost some
/// 10 to 50 µs on either side; polling for longer than that saves nothing any more.
pub const DEFAULT_POLL_MAX: Duration = Duration::from_micros(32);

/// Longest limit. A thread that polls for longer than a scheduler's slice only takes the processor from
/// whoever would bring the work.
pub const POLL_MAX_LIMIT: Duration = Duration::from_millis(10);

/// The first window above none, in nanoseconds. Below some 4 µs a wait seldom ends, and the two clock
/// readings around it weigh.
const FIRST_WINDOW: u64 = 4_000;

/// Idles between two probes while polling does not pay, at first. A probe costs the limit, and what it
/// is to be small beside is the work of so many requests.
const PROBE_INTERVAL_MIN: u32 = 16;

/// And at last. With 32 µs every 256 idles, a paced load pays an eighth of a microsecond a request; a
/// load that polling would serve is found out within 256 requests.
const PROBE_INTERVAL_MAX: u32 = 256;

/// A poll in vain weighs as much as so many that caught something: polling pays if it ends two idles of
/// three. Fewer, and what it costs is more than a fifth of what those requests cost without.
const IN_VAIN_WEIGHT: i32 = 2;

/// How far polling may be ahead, and how far behind before it is given up. Eight: four polls in vain in
/// a row end it, and a run of eight catches proves it, a matter of some hundred microseconds either way.
const BALANCE_MAX: i32 = 8;

/// Idles within the limit in a row, slept through without polling, that begin it again. By chance, in
/// a load of which one idle in six is that short, this is one time in a thousand.
const SHORT_IDLES: u32 = 4;

/// What a [`PollWindow`] may do. QEMU has the same three as `poll-max-ns`, `poll-grow` and `poll-shrink`
/// of an iothread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PollSettings {
    /// Longest time to poll before a sleep, at most [`POLL_MAX_LIMIT`]; zero switches polling off.
    pub max: Duration,
    /// What a window is multiplied by when a longer one would have paid. 0 and 1 count as 2.
    pub grow: u32,
    /// What a window is divided by when it did not pay. 0 and 1: to nothing at once.
    pub shrink: u32,
}

impl PollSettings {
    /// No polling at all.
    pub const OFF: Self = Self::up_to(Duration::ZERO);

    /// Polling for up to `max`, windows doubled and halved.
    #[must_use]
    pub const fn up_to(max: Duration) -> Self {
        Self {
            max,
            grow: 2,
            shrink: 2,
        }
    }
}

impl Default for PollSettings {
    /// [`DEFAULT_POLL_MAX`], windows doubled and halved.
    fn default() -> Self {
        Self::up_to(DEFAULT_POLL_MAX)
    }
}

/// What came of polling; the counters wrap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PollStats {
    /// Idles that polling ended: sleeps saved.
    pub paid: u64,
    /// Idles that were polled through in vain, and slept through.
    pub in_vain: u64,
    /// Idles slept through without polling.
    pub unpolled: u64,
    /// Nanoseconds polled in vain.
    pub in_vain_ns: u64,
}

/// Decides how long to poll before each sleep, from how long the idles before it took. Has no clock:
/// it is told durations. [`BusyPoll`](crate::BusyPoll) is the same with one.
///
/// An *idle* begins when a turn of the loop finds nothing to do and ends with the next work. For each one,
/// [`begin`](Self::begin) gives the window: how long to poll. Then the caller reports
/// [`caught`](Self::caught) if work came while it polled, else, once it has slept,
/// [`slept`](Self::slept) with the length of the whole idle.
///
/// * An idle that a window within the limit would have caught makes the window grow; one that it did
///   makes it stay.
/// * An idle beyond the limit makes it shrink, at last to nothing. After a run of caught ones the first
///   such is forgiven.
/// * Polling that ends fewer than two idles of three is given up: the window is nothing at once.
/// * With no window left, an idle is polled up to the limit once in a while (a *probe*), because sleeping
///   itself lengthens what is measured: the sleeper has to be woken. A caught probe sets a window. Probes
///   get rarer while nothing comes of them, from every 16th idle to every 256th.
/// * Four idles in a row that were slept through, and were within the limit all the same, set a window too.
///
/// # Example
///
/// ```
/// use event_poll::{PollSettings, PollWindow};
/// use std::time::Duration;
///
/// let us = Duration::from_micros;
/// let mut window = PollWindow::new(PollSettings::up_to(us(32)));
/// // The first idle is a probe. Work after 10 µs: from now on twice that is polled.
/// assert_eq!(window.begin(), us(32));
/// window.caught(us(10));
/// assert_eq!(window.begin(), us(20));
/// // Idles of 200 µs: not worth it.
/// for _ in 0..3 {
///     window.slept(us(200));
///     window.begin();
/// }
/// assert_eq!(window.window(), us(0));
/// ```
#[derive(Clone, Debug)]
pub struct PollWindow {
    max: u64,
    grow: u64,
    shrink: u64,
    /// Nanoseconds; 0: polling does not pay at present.
    window: u64,
    /// This idle is polled up to the limit although there is no window.
    probing: bool,
    /// Idles to let pass until the next probe.
    until_probe: u32,
    probe_interval: u32,
    /// While there is a window: caught ones, less those in vain by their weight.
    balance: i32,
    /// While there is none: idles within the limit, in a row.
    short_idles: u32,
    stats: PollStats,
}

impl PollWindow {
    /// Starts with a probe.
    #[must_use]
    pub fn new(settings: PollSettings) -> Self {
        Self {
            max: nanos(settings.max.min(POLL_MAX_LIMIT)),
            grow: u64::from(settings.grow.max(2)),
            shrink: u64::from(settings.shrink),
            window: 0,
            probing: false,
            until_probe: 0,
            probe_interval: PROBE_INTERVAL_MIN,
            balance: 0,
            short_idles: 0,
            stats: PollStats::default(),
        }
    }

    /// Polling is switched off: [`begin`](Self::begin) always gives zero, and need not be asked.
    #[must_use]
    pub const fn is_off(&self) -> bool {
        self.max == 0
    }

    /// At the beginning of an idle: how long to poll. Zero: sleep at once.
    pub fn begin(&mut self) -> Duration {
        self.probing = false;
        if self.is_off() {
            return Duration::ZERO;
        }
        if self.window == 0 {
            if let Some(left) = self.until_probe.checked_sub(1) {
                self.until_probe = left;
            } else {
                self.probing = true;
            }
        }
        Duration::from_nanos(self.polled())
    }

    /// Work came `after` the beginning of the idle, while polling. Only after a probe has it to be exact.
    pub fn caught(&mut self, after: Duration) {
        self.stats.paid = self.stats.paid.wrapping_add(1);
        if self.is_off() {
            return;
        }
        if std::mem::take(&mut self.probing) {
            self.open(nanos(after).saturating_mul(self.grow));
        }
        self.balance = (self.balance + 1).min(BALANCE_MAX);
        if self.balance == BALANCE_MAX {
            self.probe_interval = PROBE_INTERVAL_MIN;
        }
    }

    /// Nothing came while polling, if there was any polling; then the caller slept, and work came at the
    /// end of an `idle` of that length in all.
    pub fn slept(&mut self, idle: Duration) {
        let polled = self.polled();
        if polled == 0 {
            self.stats.unpolled = self.stats.unpolled.wrapping_add(1);
        } else {
            self.stats.in_vain = self.stats.in_vain.wrapping_add(1);
            self.stats.in_vain_ns = self.stats.in_vain_ns.wrapping_add(polled);
        }
        if self.is_off() {
            return;
        }
        let short = nanos(idle) <= self.max;
        if self.window > 0 {
            self.in_vain(short.then(|| nanos(idle)));
            return;
        }
        self.short_idles = if short { self.short_idles + 1 } else { 0 };
        if self.short_idles == SHORT_IDLES {
            self.open(nanos(idle));
        } else if std::mem::take(&mut self.probing) {
            self.close();
        }
    }

    /// There was a window and it caught nothing. `wanted` is what would have, if within the limit.
    fn in_vain(&mut self, wanted: Option<u64>) {
        let forgiven = self.balance == BALANCE_MAX;
        self.balance -= IN_VAIN_WEIGHT;
        if self.balance <= -BALANCE_MAX {
            self.close();
        } else if let Some(wanted) = wanted {
            let grown = self.window.saturating_mul(self.grow);
            self.window = grown.max(wanted).min(self.max);
        } else if !forgiven {
            self.window = match self.shrink {
                0 | 1 => 0,
                divisor => self.window / divisor,
            };
            if self.window < FIRST_WINDOW {
                self.close();
            }
        }
    }

    fn open(&mut self, window: u64) {
        self.window = window.max(FIRST_WINDOW).min(self.max);
        self.balance = 0;
    }

    /// No polling until a probe or [`SHORT_IDLES`].
    fn close(&mut self) {
        self.window = 0;
        self.short_idles = 0;
        self.until_probe = self.probe_interval;
        self.probe_interval = (self.probe_interval * 2).min(PROBE_INTERVAL_MAX);
    }

    /// What the next idle is polled for, unless that is a probe.
    #[must_use]
    pub const fn window(&self) -> Duration {
        Duration::from_nanos(self.window)
    }

    /// Whether the idle that was begun last is a probe.
    #[must_use]
    pub const fn is_probing(&self) -> bool {
        self.probing
    }

    /// Counters since [`new`](Self::new).
    #[must_use]
    pub const fn stats(&self) -> PollStats {
        self.stats
    }

    fn polled(&self) -> u64 {
        if self.probing { self.max } else { self.window }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
