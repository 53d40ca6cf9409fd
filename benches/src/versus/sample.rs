//! What a client has printed, as figures.

use serde_json::Value;

/// A figure of a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Metric {
    /// Requests per second.
    Rate,
    /// Median latency, nanoseconds.
    Median,
    /// 99th percentile of the latency, nanoseconds.
    P99,
    /// Processor time of the back-end per request, nanoseconds.
    BackendCpu,
    /// Processor time of the client per request, nanoseconds.
    ClientCpu,
    /// Kicks per request.
    Kicks,
    /// Interrupts per request.
    Interrupts,
    /// From exec to the socket accepting, milliseconds.
    Start,
    /// Processor time while nobody is connected, nanoseconds per second.
    IdleCpu,
    /// Processor time while a guest is connected and does nothing, nanoseconds per second.
    ConnectedCpu,
    /// Resident memory while nobody is connected, KiB.
    Resident,
    /// Resident memory while a guest is connected and does nothing, without the guest's own, KiB.
    ConnectedResident,
    /// Its share of the resident memory, with what it shares with others divided (PSS), nobody connected, KiB.
    Proportional,
}

impl Metric {
    pub(crate) fn more_is_better(self) -> bool {
        self == Self::Rate
    }

    /// What the client has printed of it. `None`: nothing.
    pub(crate) fn of(self, printed: &Value) -> Option<f64> {
        match printed.get("fio version") {
            Some(_) => self.of_fio(printed),
            None => self.of_ours(printed),
        }
    }

    /// Of the load generator, of `floor`, and of what this program measures by itself.
    fn of_ours(self, printed: &Value) -> Option<f64> {
        let latency = |name: &str| {
            direction(printed, "total_ios")?
                .get("lat_ns")?
                .get("percentile")?
                .get(name)?
                .as_f64()
        };
        let number = |pointer: &str| printed.pointer(pointer)?.as_f64();
        match self {
            Self::Rate => number("/iops"),
            Self::Median => latency("50.000000"),
            Self::P99 => latency("99.000000"),
            Self::BackendCpu => number("/backend_cpu_ns_per_io"),
            Self::ClientCpu => number("/client_cpu_ns_per_io"),
            Self::Kicks => number("/kicks_per_io"),
            Self::Interrupts => number("/interrupts_per_io"),
            Self::Start => number("/start_ms/median"),
            Self::IdleCpu => number("/alone/cpu_ns_per_second"),
            Self::ConnectedCpu => number("/connected/cpu_ns_per_second"),
            Self::Resident => number("/alone/resident_kib"),
            Self::ConnectedResident => number("/connected/resident_own_kib"),
            Self::Proportional => number("/alone/proportional_kib"),
        }
    }

    fn of_fio(self, printed: &Value) -> Option<f64> {
        let job = printed.pointer("/jobs/0")?;
        let side = direction(job, "total_ios")?;
        let number = |of: &Value, name: &str| of.get(name)?.as_f64();
        let latency = |name: &str| {
            let percentiles = side.pointer("/lat_ns/percentile")?;
            number(percentiles, name)
        };
        match self {
            Self::Rate => number(side, "iops"),
            Self::Median => latency("50.000000"),
            Self::P99 => latency("99.000000"),
            // A process of its own, all of it on the one processor.
            Self::BackendCpu => {
                let percent = number(job, "usr_cpu")? + number(job, "sys_cpu")?;
                let nanoseconds = number(side, "runtime")? * 1e6;
                Some(percent / 100.0 * nanoseconds / number(side, "total_ios")?)
            }
            _ => None,
        }
    }
}

/// Reads or writes, whichever were made.
fn direction<'a>(of: &'a Value, count: &str) -> Option<&'a Value> {
    ["read", "write"]
        .into_iter()
        .filter_map(|side| of.get(side))
        .find(|side| side.get(count).and_then(Value::as_u64) > Some(0))
}

/// What tells whether a client's run was one to count, though it has exited with success.
pub(crate) fn check(printed: &Value) -> Result<(), String> {
    let count = |pointer: &str| printed.pointer(pointer).and_then(Value::as_u64);
    for pointer in ["/errors", "/verify_errors", "/jobs/0/error"] {
        if let Some(errors @ 1..) = count(pointer) {
            return Err(format!("{pointer}: {errors}"));
        }
    }
    Ok(())
}

/// A measurement in a few words, for who watches.
pub(crate) fn brief(result: &Result<Value, String>) -> String {
    let printed = match result {
        Ok(printed) => printed,
        Err(error) => return format!("FAILED: {}", error.lines().next().unwrap_or_default()),
    };
    let mut words = Vec::new();
    let mut add = |metric: Metric, unit: &str, divisor: f64| {
        if let Some(value) = metric.of(printed) {
            words.push(format!("{:.1} {unit}", value / divisor));
        }
    };
    add(Metric::Rate, "k/s", 1e3);
    add(Metric::Median, "us", 1e3);
    add(Metric::BackendCpu, "ns CPU", 1.0);
    add(Metric::Start, "ms", 1.0);
    add(Metric::IdleCpu, "ns CPU/s", 1.0);
    add(Metric::ConnectedCpu, "ns CPU/s", 1.0);
    add(Metric::Resident, "KiB", 1.0);
    words.join("  ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn bench() -> Value {
        json!({
            "blk_dataplane_version": "0.1.0",
            "runtime_ms": 1000.0, "total_ios": 800_000, "iops": 800_000.5, "bw_bytes": 3.2e9,
            "read": {"total_ios": 0, "lat_ns": {"percentile": {"50.000000": 1}}},
            "write": {"total_ios": 800_000, "errors": 0,
                "lat_ns": {"min": 1, "percentile": {"50.000000": 41_000, "99.000000": 90_000}}},
            "errors": 0, "verify_errors": 0,
            "kicks_per_io": 0.03, "interrupts_per_io": 0.04,
            "client_cpu_ns_per_io": 120.5, "backend_cpu_ns_per_io": 150.25
        })
    }

    #[test]
    fn the_load_generator_is_understood() {
        let bench = bench();
        assert_eq!(Metric::Rate.of(&bench), Some(800_000.5));
        assert_eq!(Metric::Median.of(&bench), Some(41_000.0));
        assert_eq!(Metric::P99.of(&bench), Some(90_000.0));
        assert_eq!(Metric::BackendCpu.of(&bench), Some(150.25));
        assert_eq!(Metric::ClientCpu.of(&bench), Some(120.5));
        assert_eq!(Metric::Kicks.of(&bench), Some(0.03));
        assert_eq!(Metric::Interrupts.of(&bench), Some(0.04));
        assert_eq!(Metric::Start.of(&bench), None);
    }

    #[test]
    fn what_is_null_or_missing_is_no_figure() {
        let mut bench = bench();
        bench["backend_cpu_ns_per_io"] = Value::Null;
        bench.as_object_mut().unwrap().remove("write");
        assert_eq!(Metric::BackendCpu.of(&bench), None);
        assert_eq!(Metric::Median.of(&bench), None);
        assert_eq!(Metric::Rate.of(&json!({})), None);
    }

    #[test]
    fn fio_is_understood() {
        let fio = json!({
            "fio version": "fio-3.33",
            "jobs": [{
                "error": 0, "usr_cpu": 10.0, "sys_cpu": 30.0,
                "read": {"total_ios": 100_000, "iops": 99_000.0, "runtime": 1010,
                    "lat_ns": {"percentile": {"50.000000": 300_000, "99.000000": 400_000}}},
                "write": {"total_ios": 0, "iops": 0.0, "runtime": 0}
            }]
        });
        assert_eq!(Metric::Rate.of(&fio), Some(99_000.0));
        assert_eq!(Metric::Median.of(&fio), Some(300_000.0));
        assert_eq!(Metric::P99.of(&fio), Some(400_000.0));
        // 40 % of 1.01 s over 100,000 requests.
        assert!((Metric::BackendCpu.of(&fio).unwrap() - 4040.0).abs() < 0.001);
        assert_eq!(Metric::Kicks.of(&fio), None);
    }

    #[test]
    fn floor_is_understood() {
        let floor = json!({
            "iops": 5.0, "backend_cpu_ns_per_io": 7.0, "errors": 0,
            "read": {"total_ios": 3, "lat_ns": {"percentile": {"50.000000": 9}}}
        });
        assert_eq!(Metric::Rate.of(&floor), Some(5.0));
        assert_eq!(Metric::Median.of(&floor), Some(9.0));
        assert_eq!(Metric::BackendCpu.of(&floor), Some(7.0));
    }

    #[test]
    fn a_run_with_errors_does_not_count() {
        let mut bench = bench();
        assert_eq!(check(&bench), Ok(()));
        bench["verify_errors"] = 2.into();
        assert_eq!(check(&bench), Err("/verify_errors: 2".to_owned()));
        assert!(check(&json!({"jobs": [{"error": 5}]})).is_err());
    }

    #[test]
    fn a_failure_is_told_in_its_first_line() {
        let failed = Err("no such file\nand more".to_owned());
        assert_eq!(brief(&failed), "FAILED: no such file");
        assert!(brief(&Ok(bench())).starts_with("800.0 k/s  41.0 us"));
    }
}
