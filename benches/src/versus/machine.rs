//! What it was measured on.

use std::fs;
use std::process::Command;

use super::Arguments;
use crate::Error;

/// Load per processor above which figures are doubtful.
const QUIET: f64 = 0.25;

/// Says what the machine lacks.
pub(crate) fn check(arguments: &Arguments) -> Result<(), Error> {
    let cpus = online();
    for (option, cpu) in [
        ("--backend-cpu", arguments.backend_cpu),
        ("--client-cpu", arguments.client_cpu),
    ] {
        if cpu >= cpus {
            return Err(format!("{option} {cpu}: this machine has {cpus} processors").into());
        }
    }
    if arguments.backend_cpu == arguments.client_cpu {
        return Err(
            "--client-cpu: a processor of its own is needed, or two threads take turns".into(),
        );
    }
    if let Some(load) = load_average()
        && load > QUIET * cpus as f64
    {
        eprintln!("warning: the machine is busy (load {load}); the figures will be of that, too");
    }
    Ok(())
}

fn online() -> usize {
    // Not those that this process may use: the children are bound by number.
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let processors = cpuinfo.lines().filter(|line| line.starts_with("processor"));
    processors.count().max(1)
}

fn load_average() -> Option<f64> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// What identifies the machine, and its state: name and value.
pub(crate) fn describe(arguments: &Arguments) -> Vec<(String, String)> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let of_cpu = |name: &str| {
        let mut lines = cpuinfo.lines().filter_map(|line| line.split_once(':'));
        lines
            .find(|(key, _)| key.trim() == name)
            .map_or("?", |(_, value)| value.trim())
            .to_owned()
    };
    let first_line = |path: &str| {
        let text = fs::read_to_string(path).unwrap_or_default();
        text.lines().next().unwrap_or("?").trim().to_owned()
    };
    let virtual_machine = if of_cpu("flags").split(' ').any(|flag| flag == "hypervisor") {
        ", in a virtual machine"
    } else {
        ""
    };
    let memory = first_line("/proc/meminfo");
    let memory = memory.trim_start_matches("MemTotal:").trim();
    vec![
        (
            "processors".into(),
            format!(
                "{} x {} (family {}, model {}){virtual_machine}",
                online(),
                of_cpu("model name"),
                of_cpu("cpu family"),
                of_cpu("model")
            ),
        ),
        ("memory".into(), memory.to_owned()),
        (
            "kernel".into(),
            format!("Linux {}", first_line("/proc/sys/kernel/osrelease")),
        ),
        ("disk".into(), file_system_of(arguments)),
        (
            "load average at the start".into(),
            load_average().map_or_else(|| "?".to_owned(), |load| load.to_string()),
        ),
        (
            "bound".into(),
            format!(
                "back-ends, bare loops and fio to processor {}, the load generator to {}",
                arguments.backend_cpu, arguments.client_cpu
            ),
        ),
    ]
}

/// Device and file system of the disk image: the longest mount point that its directory is below.
fn file_system_of(arguments: &Arguments) -> String {
    let directory = arguments.disk.clone().unwrap_or_else(|| "/var/tmp".into());
    let directory = fs::canonicalize(&directory).unwrap_or(directory);
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let best = mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (device, point, kind) = (words.next()?, words.next()?, words.next()?);
            directory
                .starts_with(point)
                .then(|| (point.len(), format!("{kind} on {device}")))
        })
        .max();
    best.map_or_else(|| "?".to_owned(), |(_, text)| text)
}

/// Today in UTC, as `date` has it.
pub(crate) fn date() -> String {
    let output = Command::new("date").args(["-u", "+%F"]).output();
    output.map_or_else(
        |_| "?".to_owned(),
        |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[test]
    fn this_machine_is_described() {
        let description = describe(&Arguments::parse_from(["versus"]));
        let value = |name: &str| {
            let found = description.iter().find(|(key, _)| key == name);
            found.unwrap().1.clone()
        };
        assert!(value("kernel").starts_with("Linux "));
        assert!(value("memory").ends_with(" kB"));
        assert!(value("disk").contains(" on "), "{}", value("disk"));
    }

    #[test]
    fn one_processor_for_two_is_refused() {
        let arguments = Arguments::parse_from(["versus", "--client-cpu=0"]);
        assert!(check(&arguments).is_err());
        let arguments = Arguments::parse_from(["versus", "--backend-cpu=10000"]);
        assert!(check(&arguments).unwrap_err().to_string().contains("10000"));
    }
}
