//! Instructions of a workload, counted by callgrind: the same on every run, so that they can be compared
//! and held to a bar.

use std::path::Path;
use std::process::Command;

use crate::Error;

/// Units of the shorter of two runs: enough that what does not cancel out vanishes.
const UNITS: u64 = 32_000;

/// Instructions of one more unit of the workload called `name`: the difference between a run of N units
/// and one of twice as many, so what starting and stopping costs cancels out. `load` is the program of
/// that name, optimised. With `within` only what is done inside the functions of that name counts, as
/// callgrind's `--toggle-collect` takes it.
///
/// # Errors
///
/// There is no valgrind, or the workload failed, or nothing was counted.
pub fn per_unit(load: &Path, name: &str, within: Option<&str>) -> Result<f64, Error> {
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
