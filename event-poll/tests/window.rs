//! The poll window: against a naive model, and on simulated loads.

use std::time::Duration;

use event_poll::{POLL_MAX_LIMIT, PollSettings, PollStats, PollWindow};
use proptest::prelude::*;

const US: u64 = 1_000;
const MAX: u64 = 32 * US;

fn ns(nanos: u64) -> Duration {
    Duration::from_nanos(nanos)
}

fn settings(max: u64, grow: u32, shrink: u32) -> PollSettings {
    PollSettings {
        max: ns(max),
        grow,
        shrink,
    }
}

/// The rules as the documentation has them, one at a time, over the whole history.
mod naive {
    use super::*;

    #[derive(Clone, Copy, Debug)]
    pub(super) enum Idle {
        Caught { after: u64 },
        Slept { idle: u64 },
    }

    /// How long the next idle is polled, after `history`, and whether as a probe.
    pub(super) fn next(settings: PollSettings, history: &[Idle]) -> (u64, bool) {
        let max = u64::try_from(settings.max.min(POLL_MAX_LIMIT).as_nanos()).unwrap();
        let grow = u128::from(settings.grow.max(2));
        let least_4us =
            |window: u128| u64::try_from(window.max(4_000).min(u128::from(max))).unwrap();
        if max == 0 {
            return (0, false);
        }
        let mut window = 0;
        // Weights since the window was set, and short idles since there is none.
        let (mut balance, mut short) = (0, 0);
        let (mut interval, mut pause) = (16, 0);
        let mut polled = (max, true);
        for idle in history {
            let probe = polled.1;
            let mut given_up = false;
            match *idle {
                Idle::Caught { after } => {
                    if probe {
                        window = least_4us(u128::from(after) * grow);
                        balance = 0;
                    }
                    balance = if balance >= 7 { 8 } else { balance + 1 };
                    if balance == 8 {
                        interval = 16;
                    }
                }
                Idle::Slept { idle } if window == 0 => {
                    short = if idle <= max { short + 1 } else { 0 };
                    if short == 4 {
                        window = least_4us(u128::from(idle));
                        balance = 0;
                    } else {
                        given_up = probe;
                    }
                }
                Idle::Slept { idle } => {
                    let ahead = balance == 8;
                    balance -= 2;
                    if balance <= -8 {
                        given_up = true;
                    } else if idle <= max {
                        let grown = u128::from(window) * grow;
                        window = u64::try_from(grown.max(u128::from(idle)).min(u128::from(max)))
                            .unwrap();
                    } else if !ahead {
                        window = match settings.shrink {
                            0 | 1 => 0,
                            divisor => window / u64::from(divisor),
                        };
                        given_up = window < 4_000;
                    }
                }
            }
            if given_up {
                (window, short) = (0, 0);
                pause = interval;
                interval = if interval == 256 { 256 } else { interval * 2 };
            }
            polled = match (window, pause) {
                (0, 0) => (max, true),
                (0, _) => {
                    pause -= 1;
                    (0, false)
                }
                _ => (window, false),
            };
        }
        polled
    }
}

fn any_settings() -> impl Strategy<Value = PollSettings> {
    (
        prop_oneof![Just(0), 1..10 * US, Just(MAX), 0..100_000 * US],
        0..5u32,
        0..5u32,
    )
        .prop_map(|(max, grow, shrink)| settings(max, grow, shrink))
}

/// Idles of which many lie around the limit, and runs of the same.
fn any_idles() -> impl Strategy<Value = Vec<u64>> {
    let idle = prop_oneof![0..2 * MAX, Just(5 * US), Just(200 * US), any::<u64>()];
    proptest::collection::vec((idle, 1..30usize), 1..40).prop_map(|runs| {
        runs.into_iter()
            .flat_map(|(idle, count)| std::iter::repeat_n(idle, count))
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    #[test]
    fn the_window_is_what_the_naive_model_says(settings in any_settings(), idles in any_idles()) {
        let mut window = PollWindow::new(settings);
        let mut history = Vec::new();
        let mut expected = PollStats::default();
        for idle in idles {
            let (polled, probe) = naive::next(settings, &history);
            prop_assert_eq!(window.begin(), ns(polled));
            prop_assert_eq!(window.is_probing(), probe);
            if polled > 0 && idle <= polled {
                window.caught(ns(idle));
                history.push(naive::Idle::Caught { after: idle });
                expected.paid += 1;
            } else {
                window.slept(ns(idle));
                history.push(naive::Idle::Slept { idle });
                expected.in_vain += u64::from(polled > 0);
                expected.unpolled += u64::from(polled == 0);
                expected.in_vain_ns += polled;
            }
            prop_assert_eq!(window.stats(), expected);
        }
    }

    #[test]
    fn no_window_is_beyond_the_limit(settings in any_settings(), idles in any_idles()) {
        let mut window = PollWindow::new(settings);
        for idle in idles {
            let polled = window.begin();
            prop_assert!(polled <= settings.max.min(POLL_MAX_LIMIT));
            prop_assert!(window.window() <= settings.max);
            // Reports that fit no window either: nothing but nonsense may come of nonsense.
            match idle % 3 {
                0 => window.caught(ns(idle)),
                1 => window.slept(ns(idle)),
                _ => {}
            }
        }
    }

    #[test]
    fn whatever_came_before_long_idles_are_hardly_polled_for(
        idles in any_idles(),
        long in MAX + 1..u64::MAX,
    ) {
        let mut window = PollWindow::new(settings(MAX, 2, 2));
        for idle in idles {
            simulate_idle(&mut window, idle, 0);
        }
        let before = window.stats();
        for _ in 0..10_000 {
            simulate_idle(&mut window, long, 0);
        }
        let after = window.stats();
        // One forgiven, three halvings, five probes until they are rare, and the rare ones.
        prop_assert!(after.in_vain - before.in_vain <= 1 + 3 + 5 + 10_000 / 256 + 1);
        prop_assert_eq!(after.paid, before.paid);
    }

    #[test]
    fn whatever_came_before_short_idles_are_soon_caught(
        idles in any_idles(),
        short in 0..=MAX / 2,
        wake in 0..100 * US,
    ) {
        let mut window = PollWindow::new(settings(MAX, 2, 2));
        for idle in idles {
            simulate_idle(&mut window, idle, wake);
        }
        // At worst a window that is too short has to be given up, and then the next probe be awaited.
        for _ in 0..300 {
            simulate_idle(&mut window, short, wake);
        }
        let before = window.stats();
        for _ in 0..1000 {
            simulate_idle(&mut window, short, wake);
        }
        prop_assert_eq!(window.stats().paid - before.paid, 1000);
    }
}

/// One idle in which work comes after `gap`; a sleeper learns of it `wake` later.
fn simulate_idle(window: &mut PollWindow, gap: u64, wake: u64) {
    let polled = window.begin();
    if !polled.is_zero() && ns(gap) <= polled {
        window.caught(ns(gap));
    } else {
        window.slept(ns(gap.saturating_add(wake)));
    }
}

#[test]
fn zero_switches_polling_off() {
    let mut window = PollWindow::new(PollSettings::OFF);
    assert!(window.is_off());
    for _ in 0..1000 {
        assert_eq!(window.begin(), Duration::ZERO);
        window.slept(ns(US));
    }
    assert_eq!(window.stats().unpolled, 1000);
}

#[test]
fn the_window_grows_while_that_pays_and_shrinks_when_it_does_not() {
    let mut window = PollWindow::new(settings(MAX, 2, 2));
    // The first probe fails.
    simulate_idle(&mut window, 200 * US, 0);
    let mut after = |gap| {
        simulate_idle(&mut window, gap, 0);
        window.window()
    };
    // Four idles of 5 us in a row, slept through: as much would have been enough.
    let opened: Vec<_> = (0..4).map(|_| after(5 * US)).collect();
    assert_eq!(opened, [0, 0, 0, 5].map(|us| ns(us * US)));
    // Longer ones, within the limit: at least doubled, and to what would have been enough.
    let grown: Vec<_> = [6, 30, 30, 31]
        .into_iter()
        .map(|us| after(us * US))
        .collect();
    assert_eq!(grown, [10, 30, 30, 32].map(|us| ns(us * US)));
    // Beyond it.
    let shrunk: Vec<_> = (0..2).map(|_| after(200 * US)).collect();
    assert_eq!(shrunk, [16, 0].map(|us| ns(us * US)));
}

/// With a window of as much as the limit.
fn opened(grow: u32, shrink: u32) -> PollWindow {
    let mut window = PollWindow::new(settings(MAX, grow, shrink));
    simulate_idle(&mut window, 16 * US, 0);
    assert_eq!(window.window(), ns(32 * US));
    window
}

#[test]
fn long_idles_halve_the_window_until_none_is_left() {
    let mut window = opened(2, 2);
    let shrunk: Vec<_> = (0..5)
        .map(|_| {
            simulate_idle(&mut window, 200 * US, 0);
            window.window()
        })
        .collect();
    assert_eq!(shrunk, [16, 8, 4, 0, 0].map(|us| ns(us * US)));
}

#[test]
fn grow_and_shrink_are_factors_and_a_shrink_of_zero_gives_up_at_once() {
    for (shrink, expected) in [(0, 0), (1, 0), (4, 8 * US)] {
        let mut window = opened(4, shrink);
        simulate_idle(&mut window, 200 * US, 0);
        assert_eq!(window.window(), ns(expected), "shrink {shrink}");
    }
    let mut window = PollWindow::new(settings(MAX, 4, 2));
    simulate_idle(&mut window, US, 0);
    assert_eq!(window.window(), ns(4 * US));
    simulate_idle(&mut window, 5 * US, 0);
    assert_eq!(window.window(), ns(16 * US));
}

#[test]
fn one_hiccup_after_a_run_of_catches_is_forgiven_and_two_are_not() {
    let mut window = opened(2, 2);
    for _ in 0..8 {
        simulate_idle(&mut window, 16 * US, 0);
    }
    simulate_idle(&mut window, 1000 * US, 0);
    assert_eq!(window.window(), ns(32 * US));
    simulate_idle(&mut window, 1000 * US, 0);
    assert_eq!(window.window(), ns(16 * US));
}

#[test]
fn what_pays_only_every_other_time_is_given_up() {
    let mut window = opened(2, 2);
    for _ in 0..100 {
        simulate_idle(&mut window, 10 * US, 20 * US);
        simulate_idle(&mut window, 190 * US, 20 * US);
    }
    assert_eq!(window.window(), ns(0));
    assert!(window.stats().in_vain < 20, "{:?}", window.stats());
}

/// A load: what each idle would be, if nobody had to be woken.
struct Load {
    state: u64,
}

impl Load {
    fn new() -> Self {
        Self {
            state: 0x2545_f491_4f6c_dd1d,
        }
    }

    /// Uniform in `low..high`.
    fn between(&mut self, low: u64, high: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        low + (self.state >> 16) % (high - low)
    }

    /// Exponentially distributed: the gaps of a load that arrives at random.
    fn random_arrival(&mut self, mean: u64) -> u64 {
        let uniform = (self.between(0, 1 << 30) + 1) as f64 / f64::from(1u32 << 30);
        let gap = ns(mean).mul_f64(-uniform.ln());
        u64::try_from(gap.as_nanos()).unwrap()
    }
}

/// What a request costs with a sleep before it: some 10 us of processor time on the machine of the
/// benches. Issue 7 allows a fifth more.
const ALLOWED_PER_REQUEST: u64 = 2 * US;

/// Polls for `count` idles of `load`, and returns the share caught and the nanoseconds in vain of each.
fn run(count: u64, wake: u64, mut load: impl FnMut(u64) -> u64) -> (f64, u64) {
    let mut window = PollWindow::new(PollSettings::default());
    for index in 0..count {
        simulate_idle(&mut window, load(index), wake);
    }
    let stats = window.stats();
    assert_eq!(stats.paid + stats.in_vain + stats.unpolled, count);
    (stats.paid as f64 / count as f64, stats.in_vain_ns / count)
}

#[test]
fn a_paced_load_of_5000_requests_a_second_is_hardly_polled_for() {
    let mut load = Load::new();
    let (caught, wasted) = run(100_000, 30 * US, |_| load.between(180 * US, 220 * US));
    assert_eq!(caught, 0.0);
    assert!(wasted <= ALLOWED_PER_REQUEST / 10, "{wasted} ns each");
}

#[test]
fn random_arrivals_of_5000_requests_a_second_cost_less_than_is_allowed() {
    for wake in [0, 10 * US, 50 * US] {
        let mut load = Load::new();
        let (_, wasted) = run(100_000, wake, |_| load.random_arrival(200 * US));
        assert!(
            wasted <= ALLOWED_PER_REQUEST,
            "{wasted} ns each, wake {wake}"
        );
    }
}

#[test]
fn a_paced_load_that_waits_for_its_disk_costs_less_than_is_allowed() {
    // By turns the completion, after 10 us or 90, and the next request of 5000 a second.
    for disk in [10 * US, 90 * US] {
        let mut load = Load::new();
        let (_, wasted) = run(100_000, 20 * US, |index| {
            let disk = load.between(disk * 4 / 5, disk * 6 / 5);
            if index % 2 == 0 {
                disk
            } else {
                200 * US - disk
            }
        });
        // Two idles a request.
        assert!(2 * wasted <= ALLOWED_PER_REQUEST, "{wasted} ns each");
    }
}

#[test]
fn a_depth_1_stream_is_nearly_always_caught_although_its_sleeper_would_wake_late() {
    for wake in [0, 10 * US, 50 * US, 200 * US] {
        let mut load = Load::new();
        let (caught, _) = run(100_000, wake, |_| match load.between(0, 100) {
            // The guest is scheduled away, or has a timer tick.
            0 => 500 * US,
            _ => load.between(10 * US, 20 * US),
        });
        assert!(caught > 0.95, "{caught} with a wake of {wake}");
    }
}

#[test]
fn a_depth_1_stream_after_an_hour_of_paced_load_is_caught_within_256_requests() {
    let mut window = PollWindow::new(PollSettings::default());
    for _ in 0..100_000 {
        simulate_idle(&mut window, 200 * US, 30 * US);
    }
    let missed = (0..1000)
        .take_while(|_| {
            simulate_idle(&mut window, 15 * US, 50 * US);
            window.stats().paid == 0
        })
        .count();
    assert!(missed <= 256, "{missed}");
    let before = window.stats().paid;
    for _ in 0..100 {
        simulate_idle(&mut window, 15 * US, 50 * US);
    }
    assert_eq!(window.stats().paid - before, 100);
}

#[test]
fn bursts_are_caught_and_the_pause_between_them_costs_one_window() {
    // A hundred requests 5 us apart, then a pause of a millisecond.
    let (caught, wasted) = run(100_000, 20 * US, |index| match index % 100 {
        99 => 1000 * US,
        _ => 5 * US,
    });
    assert!(caught > 0.97, "{caught}");
    assert!(wasted * 100 <= MAX + MAX / 2, "{wasted} ns each");
}
