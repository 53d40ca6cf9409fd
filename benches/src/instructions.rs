//! Instructions of a workload, counted by callgrind: the same on every run, so that they can be compared
//! and held to a bar.

use std::path::Path;
use std::process::Command;

use std::sync::Mutex;

use crate::figures::Figures;
use crate::{Error, workload};

/// Units of the shorter of two runs: enough that what does not cancel out vanishes.
const UNITS: u64 = 1_600;

/// Instructions of one more unit of the workload called `name`: the difference between a run of N units
/// and one of twice as many, so what starting and stopping costs cancels out. `load` is the program of
/// that name, optimised. What [`workload`] says does not belong to it does not count.
///
/// # Errors
///
/// There is no valgrind, or the workload failed, or nothing was counted.
pub fn per_unit(load: &Path, name: &str) -> Result<f64, Error> {
    let within = workload::counted_within(name);
    let collected = |units: u64| -> Result<u64, Error> {
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .args(within.map(|function| format!("--toggle-collect={function}")))
            .arg(load)
            .arg(name)
            .arg(units.to_string())
            .output()
            .map_err(|e| format!("valgrind: {e} (Debian package: valgrind)"))?;
        let text = String::from_utf8_lossy(&output.stderr);
        let line = text.lines().find_map(|line| line.split_once("Collected :"));
        match line {
            Some((_, number)) if output.status.success() => Ok(number.trim().parse()?),
            _ => Err(format!("valgrind: {text}").into()),
        }
    };
    let (short, long) = (collected(UNITS)?, collected(2 * UNITS)?);
    if long <= short {
        return Err(format!("{name}: nothing counted, {short} and {long} instructions").into());
    }
    Ok((long - short) as f64 / UNITS as f64)
}

/// Counts every workload that is held to a figure.
///
/// # Errors
///
/// As [`per_unit`].
pub fn count_all(load: &Path) -> Result<Figures, Error> {
    let compiler = compiler_of(load)?;
    let names = Mutex::new(workload::held());
    let counts = Mutex::new(Vec::new());
    let next = || names.lock().ok()?.next();
    std::thread::scope(|scope| {
        // As many at a time as there are processors: none disturbs the count of another.
        for _ in 0..std::thread::available_parallelism()?.get() {
            scope.spawn(|| {
                while let Some(name) = next() {
                    let count = per_unit(load, name).map(|count| (name.to_owned(), count));
                    counts.lock().expect("no panic while held").push(count);
                }
            });
        }
        Ok::<_, Error>(())
    })?;
    let counts = counts.into_inner()?;
    Ok(Figures {
        compiler,
        per_unit: counts.into_iter().collect::<Result<_, _>>()?,
    })
}

/// Version, commit and date of the rustc that has made a program: it leaves them in the section `.comment`.
fn compiler_of(program: &Path) -> Result<String, Error> {
    const MARK: &[u8] = b"rustc version ";
    let bytes = std::fs::read(program)?;
    let places = bytes.windows(MARK.len()).enumerate();
    let version = places
        .filter(|(_, window)| *window == MARK)
        .map(|(at, _)| &bytes[at + MARK.len()..])
        .find(|rest| rest.first().is_some_and(u8::is_ascii_digit))
        .and_then(|rest| rest.split_inclusive(|&byte| byte == b')').next())
        .and_then(|version| std::str::from_utf8(version).ok());
    version.map(str::to_owned).ok_or_else(|| {
        let program = program.display();
        format!("{program} does not say which rustc has made it: was it stripped?").into()
    })
}
