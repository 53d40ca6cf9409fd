//! The report for people, in the way of fio's.

use std::fmt;

use super::report::{Direction, Report};

/// Percentiles on a line.
const COLUMNS: usize = 6;

impl Report {
    /// What was measured, on one line.
    pub(super) fn headline(&self) -> String {
        let options = &self.options;
        let mut line = format!(
            "{}: bs={}, iodepth={}, numjobs={}",
            options.rw,
            Size(options.bs),
            options.iodepth,
            options.numjobs
        );
        let devices = 1 + self.more_backends.len();
        if devices > 1 {
            line += &format!(", devices={devices}");
        }
        if let Some(rate) = options.rate_iops {
            line += &format!(", rate_iops={rate}");
        }
        let format = if options.packed { "packed" } else { "split" };
        let client = if options.poll { "polls" } else { "sleeps" };
        line + &format!(
            ", {format} rings of {}, client {client}",
            self.backend.queue_size
        )
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.headline())?;
        for backend in std::iter::once(&self.backend).chain(&self.more_backends) {
            writeln!(
                f,
                "  device {}: {}, {} queues, features {:#x}",
                backend.socket,
                Bytes(real(backend.capacity_bytes)),
                backend.num_queues,
                backend.negotiated_features
            )?;
        }
        let kinds = [
            ("read", &self.read),
            ("write", &self.write),
            ("flush", &self.flush),
        ];
        for (name, kind) in kinds {
            if let Some(kind) = kind {
                self.kind(f, name, kind)?;
            }
        }
        writeln!(
            f,
            "  all: IOPS={}, BW={}/s, {} requests in {:.3} s, {} errors",
            Count(self.iops),
            Bytes(self.bw_bytes),
            self.total_ios,
            self.runtime_ms / 1e3,
            self.errors
        )?;
        if self.options.verify {
            writeln!(
                f,
                "  verify: {} blocks checked, {} wrong",
                self.verified_blocks, self.verify_errors
            )?;
        }
        writeln!(
            f,
            "  notifications: {:.4} kicks and {:.4} interrupts a request; the client slept {} times",
            self.kicks_per_io, self.interrupts_per_io, self.sleeps
        )?;
        write!(
            f,
            "  cpu: client {} a request",
            Nanos(self.client_cpu_ns_per_io)
        )?;
        match self.backend_cpu_ns_per_io {
            Some(time) => writeln!(f, ", back-end {} a request", Nanos(time)),
            None => writeln!(f, " (--backend-pid tells the back-end's)"),
        }
    }
}

impl Report {
    fn kind(&self, f: &mut fmt::Formatter<'_>, name: &str, kind: &Direction) -> fmt::Result {
        let lat = &kind.lat_ns;
        writeln!(
            f,
            "  {name}: IOPS={}, BW={}/s, {} requests, {} errors",
            Count(kind.iops),
            Bytes(kind.bw_bytes),
            kind.total_ios,
            kind.errors
        )?;
        writeln!(
            f,
            "    lat: min={}, max={}, avg={}, stdev={}",
            Nanos(real(lat.min)),
            Nanos(real(lat.max)),
            Nanos(lat.mean),
            Nanos(lat.stddev)
        )?;
        writeln!(f, "    lat percentiles:")?;
        for line in lat.percentiles.chunks(COLUMNS) {
            write!(f, "     ")?;
            for (percentile, value) in line {
                let time = Nanos(real(*value)).to_string();
                write!(f, " {percentile:>5}%={time:<7}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

#[expect(clippy::cast_precision_loss, reason = "three digits are printed")]
fn real(value: u64) -> f64 {
    value as f64
}

/// Three digits and a unit.
fn scaled(f: &mut fmt::Formatter<'_>, mut value: f64, step: f64, units: &[&str]) -> fmt::Result {
    let mut unit = 0;
    while value >= step && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    let digits = match value {
        _ if unit == 0 => 0,
        value if value >= 100.0 => 0,
        value if value >= 10.0 => 1,
        _ => 2,
    };
    write!(f, "{value:.digits$}{}", units[unit])
}

/// A number.
#[derive(Clone, Copy, Debug)]
pub(super) struct Count(pub(super) f64);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.0, 1e3, &["", "k", "M"])
    }
}

/// Bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bytes(pub(super) f64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.0, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB"])
    }
}

/// Time in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Nanos(pub(super) f64);

impl fmt::Display for Nanos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.0, 1e3, &["ns", "us", "ms", "s"])
    }
}

/// Bytes as an option has them.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(20, "m"), (10, "k")];
        let unit = units
            .into_iter()
            .find(|&(shift, _)| self.0.is_multiple_of(1 << shift));
        let (shift, unit) = unit.unwrap_or((0, ""));
        write!(f, "{}{unit}", self.0 >> shift)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_a_unit() {
        let of = |value| {
            [
                Count(value).to_string(),
                Bytes(value).to_string(),
                Nanos(value).to_string(),
            ]
        };
        assert_eq!(of(0.0), ["0", "0B", "0ns"]);
        assert_eq!(of(999.0), ["999", "999B", "999ns"]);
        assert_eq!(of(1_234.0), ["1.23k", "1.21KiB", "1.23us"]);
        assert_eq!(of(45_678_901.0), ["45.7M", "43.6MiB", "45.7ms"]);
        assert_eq!(of(5e9), ["5000M", "4.66GiB", "5.00s"]);
    }

    #[test]
    fn sizes_are_written_as_they_are_given() {
        let of = |size| Size(size).to_string();
        assert_eq!(
            [of(512), of(4096), of(1536), of(1 << 20)],
            ["512", "4k", "1536", "1m"]
        );
    }
}
