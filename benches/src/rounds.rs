//! Contenders measured in turn, so that whatever slows the machine down slows all of them.

use std::fmt;
use std::time::Duration;

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
/// (the median round, and the slowest and fastest), and the ratio to the **last** contender. The
/// ratio is taken within each round, and its median printed: the two were measured side by side.
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
    if mode == Mode::List {
        return Ok(());
    }
    let rounds = mode.pick(ROUNDS, 1);
    let mut rates = vec![Vec::with_capacity(rounds); contenders.len()];
    for round in 0..rounds {
        for turn in 0..contenders.len() {
            // Each goes first as often as the others.
            let who = (round + turn) % contenders.len();
            let time = (contenders[who].run)(units)?;
            rates[who].push(units as f64 / time.as_secs_f64().max(f64::MIN_POSITIVE));
        }
    }
    if mode == Mode::Test {
        println!("{title}: ok");
        return Ok(());
    }
    let floor = rates.last().cloned().unwrap_or_default();
    println!("\n{title} ({rounds} rounds of {units}, in turn)");
    println!(
        "  {:<34} {:>12} {:>26} {:>8}",
        "", "median/s", "slowest .. fastest", "ratio"
    );
    for (contender, rates) in contenders.iter().zip(&rates) {
        let ratios = rates.iter().zip(&floor).map(|(rate, floor)| rate / floor);
        let sorted = sorted(rates.iter().copied());
        println!(
            "  {:<34} {:>12.0} {:>12.0} .. {:>10.0} {:>8.3}",
            contender.name,
            median(&sorted),
            sorted.first().copied().unwrap_or(f64::NAN),
            sorted.last().copied().unwrap_or(f64::NAN),
            median(&self::sorted(ratios)),
        );
    }
    Ok(())
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
    fn an_error_ends_the_comparison() {
        let mut failing = [Contender::new("a", |_| Err("no".into()))];
        assert!(compare(Mode::Test, "t", 1, &mut failing).is_err());
    }
}
