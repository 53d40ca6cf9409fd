//! System calls per request, whatever the machine.

use std::process::{Command, Stdio};

use benches::syscalls;

const UNITS: u64 = 640;

/// System calls of one more unit, start and stop cancelled out.
fn system_calls_per_unit(workload: &str) -> f64 {
    let count = |units: u64| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_load"));
        command
            .arg(workload)
            .arg(units.to_string())
            .stdout(Stdio::null());
        let counts = syscalls::count(command).unwrap();
        counts.values().sum::<u64>()
    };
    (count(2 * UNITS) as f64 - count(UNITS) as f64) / UNITS as f64
}

// One test for all: the counter waits for any child of this process, so two must not run side by side.
#[test]
fn ioq_makes_one_system_call_a_batch_and_vring_none() {
    assert_eq!(
        system_calls_per_unit("bare-batch-1"),
        1.0,
        "the counter counts"
    );
    assert_eq!(system_calls_per_unit("ioq-batch-1"), 1.0);
    assert_eq!(system_calls_per_unit("ioq-batch-32"), 1.0 / 32.0);
    assert_eq!(system_calls_per_unit("vring-direct"), 0.0);
}
