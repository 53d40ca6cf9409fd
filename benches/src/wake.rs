//! What it takes to wake a thread that sleeps on an eventfd, on another processor: the floor of every latency that ends
//! with an interrupt for a client that sleeps, and what each interrupt costs whoever sends it.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::eventfd::EventFd;
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::Error;

/// How long the sleeper is left alone before it is woken, so that its processor has come to rest.
const REST: Duration = Duration::from_micros(30);

/// Longest time that is told from longer ones.
const LONGEST_NS: u64 = 1_000_000_000;

/// Wakes the thread `count` times; returns what is to be printed.
///
/// # Errors
///
/// One of the processors is not there, or the kernel gives no eventfd.
pub fn run(waker_cpu: usize, sleeper_cpu: usize, count: u64) -> Result<Value, Error> {
    let fd = EventFd::new()?;
    // When it was written to, and how often the sleeper has woken.
    let (written, woken) = (AtomicU64::new(0), AtomicU64::new(0));
    let start = Instant::now();
    let now = || u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let mut writes = Histogram::<u64>::new_with_max(LONGEST_NS, 3)?;
    let wakes = thread::scope(|scope| -> Result<Histogram<u64>, Error> {
        let sleeper = scope.spawn(|| -> Result<Histogram<u64>, String> {
            bind(sleeper_cpu)?;
            let mut wakes =
                Histogram::<u64>::new_with_max(LONGEST_NS, 3).map_err(|e| e.to_string())?;
            for number in 1..=count {
                let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
                poll(&mut fds, PollTimeout::NONE).map_err(|e| e.to_string())?;
                let at = now();
                fd.read().map_err(|e| e.to_string())?;
                wakes.saturating_record(at.saturating_sub(written.load(Ordering::Acquire)));
                woken.store(number, Ordering::Release);
            }
            Ok(wakes)
        });
        let bound = bind(waker_cpu);
        for number in 1..=count {
            let rested = now() + u64::try_from(REST.as_nanos())?;
            while now() < rested {
                std::hint::spin_loop();
            }
            let before = now();
            written.store(before, Ordering::Release);
            fd.write(1)?;
            writes.saturating_record(now() - before);
            while woken.load(Ordering::Acquire) != number && !sleeper.is_finished() {
                // Two on one processor take turns.
                thread::yield_now();
            }
        }
        let wakes = sleeper.join().map_err(|_| "the sleeper has panicked")??;
        bound?;
        Ok(wakes)
    })?;
    let told = |histogram: &Histogram<u64>| {
        json!({
            "p10": histogram.value_at_percentile(10.0),
            "p50": histogram.value_at_percentile(50.0),
            "p99": histogram.value_at_percentile(99.0),
        })
    };
    Ok(json!({ "wake_ns": told(&wakes), "write_ns": told(&writes), "total": count }))
}

fn bind(cpu: usize) -> Result<(), String> {
    let mut set = CpuSet::new();
    set.set(cpu)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
        .map_err(|errno| format!("CPU {cpu}: {errno}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wake_is_counted_even_on_one_processor() {
        let told = run(0, 0, 20).unwrap();
        assert_eq!(told["total"], 20);
        let of = |what: &str| told[what]["p50"].as_u64().unwrap();
        // A system call and more.
        assert!(of("wake_ns") > 100 && of("write_ns") > 100, "{told}");
    }

    #[test]
    fn a_processor_that_is_not_there_is_an_error() {
        assert!(run(0, 1023, 1).is_err());
    }
}
