//! Counts that do not depend on the clock: instructions, system calls and allocations per unit.
//!
//! Each is the difference between a run of N units and one of twice as many, so what starting and
//! stopping costs cancels out.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use benches::{Error, instructions, syscalls, workload};

/// Units of the shorter run under the system call counter, which slows the program down a lot.
const SYSTEM_CALL_UNITS: u64 = 3_200;

/// Units for allocations.
const ALLOCATION_UNITS: u64 = 100_000;

/// System calls listed by name; the rest are summed.
const NAMES: [(libc::c_long, &str); 7] = [
    (libc::SYS_io_submit, "io_submit"),
    (libc::SYS_io_getevents, "io_getevents"),
    (libc::SYS_io_uring_enter, "io_uring_enter"),
    (libc::SYS_read, "read"),
    (libc::SYS_write, "write"),
    (libc::SYS_epoll_wait, "epoll_wait"),
    (libc::SYS_futex, "futex"),
];

fn main() -> Result<(), Error> {
    let filter = std::env::args().nth(1).unwrap_or_default();
    let load = load()?;
    println!(
        "{:<36} {:>12} {:>12}  system calls per unit",
        "per unit", "instructions", "allocations"
    );
    for (name, _) in workload::WORKLOADS {
        if !name.contains(&filter) {
            continue;
        }
        let instructions = if is_single_threaded(name) {
            format!("{:.1}", instructions::per_unit(&load, name)?)
        } else {
            // Two threads that wait for each other take turns under valgrind: no figure to compare.
            "-".to_owned()
        };
        let allocations = workload::run(name, ALLOCATION_UNITS)?;
        println!(
            "{name:<36} {instructions:>12} {:>12.4}  {}",
            allocations as f64 / (ALLOCATION_UNITS / 2) as f64,
            system_calls(&load, name)?,
        );
    }
    Ok(())
}

fn is_single_threaded(name: &str) -> bool {
    !name.starts_with("disk")
}

/// The program `load`, built beside this one.
fn load() -> Result<PathBuf, Error> {
    let load = std::env::current_exe()?.with_file_name("load");
    if load.exists() {
        Ok(load)
    } else {
        Err(format!(
            "{} is missing: cargo build --release -p benches",
            load.display()
        )
        .into())
    }
}

fn system_calls(load: &Path, name: &str) -> Result<String, Error> {
    let counted = |units: u64| {
        let mut command = Command::new(load);
        command
            .arg(name)
            .arg(units.to_string())
            .stdout(Stdio::null());
        syscalls::count(command)
    };
    let (short, long) = (counted(SYSTEM_CALL_UNITS)?, counted(2 * SYSTEM_CALL_UNITS)?);
    let mut other = 0.0;
    let mut named = String::new();
    for (number, &count) in &long {
        let before = short.get(number).copied().unwrap_or(0);
        let each = (count as f64 - before as f64) / SYSTEM_CALL_UNITS as f64;
        match NAMES.iter().find(|(known, _)| known == number) {
            Some((_, name)) if each.abs() >= 0.0005 => named += &format!("{name} {each:.3}  "),
            Some(_) => {}
            None => other += each,
        }
    }
    Ok(format!("{named}other {other:.3}"))
}
