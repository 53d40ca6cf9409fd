//! What it takes to wake a thread on another processor: `wake [WAKER-CPU SLEEPER-CPU [COUNT]]`. Prints JSON.

use benches::{Error, wake};

fn main() -> Result<(), Error> {
    let numbers = std::env::args().skip(1).map(|word| word.parse());
    let numbers: Vec<u64> = numbers.collect::<Result<_, _>>()?;
    let (waker, sleeper, count) = match numbers[..] {
        [] => (0, 1, 20_000),
        [waker, sleeper] => (waker, sleeper, 20_000),
        [waker, sleeper, count] => (waker, sleeper, count),
        _ => return Err("usage: wake [WAKER-CPU SLEEPER-CPU [COUNT]]".into()),
    };
    let told = wake::run(usize::try_from(waker)?, usize::try_from(sleeper)?, count)?;
    println!("{told:#}");
    Ok(())
}
