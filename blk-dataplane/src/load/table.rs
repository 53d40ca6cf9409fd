//! The report for people, in the way of fio's.

use std::fmt;

use super::report::{Direction, Report};

/// Percentiles that the table has a column for.
const COLUMNS: [f64; 6] = [1.0, 50.0, 90.0, 99.0, 99.9, 99.99];

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let options = &self.options;
        let devices = 1 + self.more_backends.len();
        writeln!(
            f,
            "{}: bs={} iodepth={} numjobs={} devices={devices} {} {} queue-size={}: {:.3} s",
            options.rw,
            Bytes(options.bs),
            options.iodepth,
            options.numjobs,
            if options.packed { "packed" } else { "split" },
            if options.poll { "polling" } else { "sleeping" },
            self.backend.queue_size,
            self.runtime_ms / 1e3,
        )?;
        writeln!(
            f,
            "  total: IOPS={}, BW={}/s, {} requests, {} errors, {} verify errors",
            Count(self.iops),
            BytesF(self.bw_bytes),
            self.total_ios,
            self.errors,
            self.verify_errors
        )?;
        for (name, direction) in [
            ("read", &self.read),
            ("write", &self.write),
            ("flush", &self.flush),
        ] {
            if let Some(direction) = direction {
                of_direction(f, name, direction)?;
            }
        }
        writeln!(
            f,
            "  per request: kicks={:.4}, interrupts={:.4}; the client slept {} times",
            self.kicks_per_io, self.interrupts_per_io, self.sleeps
        )?;
        write!(
            f,
            "  cpu per request: client={}",
            Nanos(self.client_cpu_ns_per_io)
        )?;
        match self.backend_cpu_ns_per_io {
            Some(time) => writeln!(f, ", back-end={}", Nanos(time)),
            None => writeln!(f, ", back-end unknown (--backend-pid)"),
        }
    }
}

fn of_direction(f: &mut fmt::Formatter<'_>, name: &str, direction: &Direction) -> fmt::Result {
    let lat = &direction.lat_ns;
    writeln!(
        f,
        "  {name}: IOPS={}, BW={}/s, {} requests, {} errors",
        Count(direction.iops),
        BytesF(direction.bw_bytes),
        direction.total_ios,
        direction.errors
    )?;
    #[expect(clippy::cast_precision_loss, reason = "three digits are printed")]
    let nanos = |value: u64| Nanos(value as f64);
    writeln!(
        f,
        "    lat: min={}, max={}, mean={}, stddev={}",
        nanos(lat.min),
        nanos(lat.max),
        Nanos(lat.mean),
        Nanos(lat.stddev)
    )?;
    write!(f, "    lat percentiles:")?;
    for (percentile, value) in &lat.percentiles {
        if COLUMNS.contains(percentile) {
            write!(f, " {percentile}%={}", nanos(*value))?;
        }
    }
    writeln!(f)
}

/// Three digits and a unit.
fn scaled(f: &mut fmt::Formatter<'_>, mut value: f64, step: f64, units: &[&str]) -> fmt::Result {
    let mut unit = 0;
    while value >= step && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    write!(f, "{value:.digits$}{}", units[unit])
}

struct Count(f64);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.0, 1e3, &["", "k", "M"])
    }
}

struct BytesF(f64);

impl fmt::Display for BytesF {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.0, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB"])
    }
}

struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_multiple_of(1 << 20) {
            write!(f, "{}m", self.0 >> 20)
        } else if self.0.is_multiple_of(1 << 10) {
            write!(f, "{}k", self.0 >> 10)
        } else {
            write!(f, "{}", self.0)
        }
    }
}

struct Nanos(f64);

impl fmt::Display for Nanos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.0, 1e3, &["ns", "us", "ms", "s"])
    }
}
