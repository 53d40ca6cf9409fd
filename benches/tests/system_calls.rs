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

#[test]
fn ioq_makes_one_system_call_a_batch_and_vring_none() {
    assert_eq!(
        system_calls_per_unit("bare-batch-1"),
        1.0,
        "the counter counts"
    );
    assert_eq!(system_calls_per_unit("ioq-batch-1"), 1.0);
    assert_eq!(system_calls_per_unit("ioq-batch-32"), 1.0 / 32.0);
    assert_eq!(system_calls_per_unit("vring-split-direct"), 0.0);
    assert_eq!(system_calls_per_unit("vring-packed-direct"), 0.0);
}

#[test]
fn a_request_through_the_device_costs_no_more_system_calls_than_its_wakes() {
    // At depth 1 nothing can be shared: kick, call, a sleep and a clear on either side, and for the image
    // an io_submit and a sleep for its completion. How much of a batch is shared at depth 32 is up to
    // the scheduler; not to grow with the requests in it is what matters.
    assert!(system_calls_per_unit("disk-null-depth-1") <= 8.0);
    assert!(system_calls_per_unit("disk-image-depth-1") <= 12.0);
    assert!(system_calls_per_unit("disk-image-depth-32") <= 1.0);
}
