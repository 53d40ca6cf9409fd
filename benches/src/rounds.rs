//! Contenders measured in turn, so that whatever slows the machine down slows all of them.

use std::fmt;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::Error;

/// Rounds of a comparison; odd, so that the median is one of them.
pub const ROUNDS: usize = 21;

/// What the bench executable was asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// `cargo bench`: measure.
    Measure,
    /// `cargo test`: go through everything once, quickly.
    Test,
    /// `--list`: say nothing beside what criterion lists.
    List,
}

impl Mode {
    /// Reads the arguments as criterion does: cargo passes `--bench` to a bench and nothing to a
    /// test.
    pub fn from_args() -> Self {
        let has = |name: &str| std::env::args().any(|argument| argument == name);
        match (has("--list"), has("--bench") && !has("--test")) {
            (true, _) => Self::List,
            (false, true) => Self::Measure,
            (false, false) => Self::Test,
        }
    }

    /// `full` when measuring; else `quick`.
    pub fn pick<T>(self, full: T, quick: T) -> T {
        if self == Self::Measure { full } else { quick }
    }
}

type Run<'a> = Box<dyn FnMut(u64) -> Result<Duration, Error> + 'a>;

/// One column of a comparison: a name, and how long so many units take.
pub struct Contender<'a> {
    name: String,
    run: Run<'a>,
}

impl fmt::Debug for Contender<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Contender")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl<'a> Contender<'a> {
    /// `run(n)` does `n` units and says how long they took.
    pub fn new(
        name: impl Into<String>,
        run: impl FnMut(u64) -> Result<Duration, Error> + 'a,
    ) -> Self {
        Self {
            name: name.into(),
            run: Box::new(run),
        }
    }
}

/// Runs the contenders in turn, `units` each a round, and prints a line for each: units a second
/// (the median round, and the slowest and fastest), the processor time of a unit, all threads
/// of the process together, and the ratios of both to the **last** contender. A ratio is taken
/// within each round, and its median printed: the two were measured side by side.
///
/// # Errors
///
/// What a contender's run returned.
pub fn compare(
    mode: Mode,
    title: &str,
    units: u64,
    contenders: &mut [Contender<'_>],
) -> Result<(), Error> {
    compare_by_turns(mode, title, units, 1, contenders)
}

/// As [`compare`], and within a round too the contenders take turns, `turns` of them each: a
/// difference of some percent drowns in what happens to a machine from one tenth of a second to the next.
///
/// # Errors
///
/// What a contender's run returned.
pub fn compare_by_turns(
    mode: Mode,
    title: &str,
    units: u64,
    turns: u64,
    contenders: &mut [Contender<'_>],
) -> Result<(), Error> {
    if mode == Mode::List {
        return Ok(());
    }
    let (rounds, turns) = (mode.pick(ROUNDS, 1), mode.pick(turns.max(1), 1));
    let slice = units.div_ceil(turns);
    let mut samples = vec![Vec::with_capacity(rounds); contenders.len()];
    let mut first = 0;
    for _ in 0..rounds {
        let mut sums = vec![Sample::default(); contenders.len()];
        for _ in 0..turns {
            for turn in 0..contenders.len() {
                // Each goes first as often as the others.
                let who = (first + turn) % contenders.len();
                let cpu = cpu_time()?;
                sums[who].wall += (contenders[who].run)(slice)?;
                sums[who].cpu += cpu_time()?.saturating_sub(cpu);
            }
            first += 1;
        }
        for (samples, sum) in samples.iter_mut().zip(sums) {
            samples.push(sum);
        }
    }
    if mode == Mode::Test {
        println!("{title}: ok");
        return Ok(());
    }
    let units = (slice * turns) as f64;
    let floor = samples.last().cloned().unwrap_or_default();
    println!("\n{title} ({rounds} rounds of {units}, in turn)");
    println!(
        "  {:<34} {:>12} {:>26} {:>7} {:>11} {:>7}",
        "", "median/s", "slowest .. fastest", "ratio", "CPU ns each", "ratio"
    );
    for (contender, samples) in contenders.iter().zip(&samples) {
        let rates = sorted(samples.iter().map(|sample| units / seconds(sample.wall)));
        let cpu = sorted(samples.iter().map(|sample| seconds(sample.cpu) / units));
        let pairs = || samples.iter().zip(&floor);
        let rate = pairs().map(|(ours, floor)| seconds(floor.wall) / seconds(ours.wall));
        let cost = pairs().map(|(ours, floor)| seconds(ours.cpu) / seconds(floor.cpu));
        println!(
            "  {:<34} {:>12.0} {:>12.0} .. {:>10.0} {:>7.3} {:>11.0} {:>7.3}",
            contender.name,
            median(&rates),
            rates.first().copied().unwrap_or(f64::NAN),
            rates.last().copied().unwrap_or(f64::NAN),
            median(&sorted(rate)),
            median(&cpu) * 1e9,
            median(&sorted(cost)),
        );
    }
    Ok(())
}

/// What a contender took for a round.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    wall: Duration,
    cpu: Duration,
}

/// Never zero, to be divided by.
fn seconds(time: Duration) -> f64 {
    time.as_secs_f64().max(f64::MIN_POSITIVE)
}

/// Processor time of all threads of this process so far, those the kernel runs for io_uring included.
fn cpu_time() -> Result<Duration, Error> {
    let time = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?;
    Ok(Duration::from(time))
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    values
}

fn median(sorted: &[f64]) -> f64 {
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn the_median_of_an_odd_number_is_one_of_them() {
        assert_eq!(median(&sorted([3.0, 1.0, 2.0].into_iter())), 2.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn contenders_take_turns_and_each_goes_first() {
        let order = RefCell::new(String::new());
        let contender = |name: &'static str| {
            let order = &order;
            Contender::new(name, move |_| {
                order.borrow_mut().push_str(name);
                Ok(Duration::from_millis(1))
            })
        };
        compare(Mode::Measure, "t", 1, &mut [contender("a"), contender("b")]).unwrap();
        assert!(order.borrow().starts_with("abbaabba"));
        assert_eq!(order.borrow().len(), 2 * ROUNDS);
    }

    #[test]
    fn contenders_take_turns_within_a_round_and_do_all_of_it() {
        let (order, done) = (RefCell::new(String::new()), RefCell::new(0));
        let contender = |name: &'static str| {
            let (order, done) = (&order, &done);
            Contender::new(name, move |units| {
                order.borrow_mut().push_str(name);
                *done.borrow_mut() += units;
                Ok(Duration::from_millis(1))
            })
        };
        let mut both = [contender("a"), contender("b")];
        compare_by_turns(Mode::Measure, "t", 10, 3, &mut both).unwrap();
        drop(both);
        assert!(order.borrow().starts_with("abbaabba"));
        // Rounded up to whole turns.
        assert_eq!(done.into_inner(), 2 * 12 * ROUNDS as u64);
    }

    #[test]
    fn an_error_ends_the_comparison() {
        let mut failing = [Contender::new("a", |_| Err("no".into()))];
        assert!(compare(Mode::Test, "t", 1, &mut failing).is_err());
    }
}
