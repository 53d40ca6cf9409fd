//! What was measured, with fio's names where fio has one.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::front_end::Backend;
use super::job::Outcome;
use super::measure::{Tallies, Tally};
use super::options::LoadOptions;
use super::ring::Kind;

/// The percentiles that fio tells.
const PERCENTILES: [f64; 17] = [
    1.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.95,
    99.99,
];

/// What was measured: of the span after `ramp_time`, and all queues of all devices together.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// Version of the crate that measured.
    pub blk_dataplane_version: &'static str,
    /// What was asked for.
    pub options: LoadOptions,
    /// The first back-end.
    pub backend: Backend,
    /// The others.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub more_backends: Vec<Backend>,
    /// The longest span of a queue, in milliseconds.
    pub runtime_ms: f64,
    /// Requests that succeeded.
    pub total_ios: u64,
    /// The same a second.
    pub iops: f64,
    /// Bytes a second, read and written.
    pub bw_bytes: f64,
    /// Reads; `None` if there was none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read: Option<Direction>,
    /// Writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write: Option<Direction>,
    /// Flushes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flush: Option<Direction>,
    /// Requests that failed, or whose status the device did not write.
    pub errors: u64,
    /// Blocks that were read and checked, those read back after the measured span included.
    pub verified_blocks: u64,
    /// Those of them that were not what was written.
    pub verify_errors: u64,
    /// Kicks: the client told the device of new requests.
    pub kicks: u64,
    /// Interrupts: the device told the client of completions.
    pub interrupts: u64,
    /// Kicks a request.
    pub kicks_per_io: f64,
    /// Interrupts a request.
    pub interrupts_per_io: f64,
    /// How often the client slept.
    pub sleeps: u64,
    /// Processor time of the client's threads for each request, in nanoseconds.
    pub client_cpu_ns_per_io: f64,
    /// Processor time of the back-end for each request, in nanoseconds; `None` without `backend_pid`.
    pub backend_cpu_ns_per_io: Option<f64>,
    /// What was odd and is no error.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// Requests of one kind.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Direction {
    /// Requests that succeeded.
    pub total_ios: u64,
    /// Their bytes.
    pub io_bytes: u64,
    /// Requests a second.
    pub iops: f64,
    /// Bytes a second.
    pub bw_bytes: f64,
    /// Requests that failed.
    pub errors: u64,
    /// How long those that succeeded took.
    pub lat_ns: Latencies,
}

/// Latencies in nanoseconds, to three digits. Of a paced load they count from when a request was due.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Latencies {
    /// The shortest.
    pub min: u64,
    /// The longest.
    pub max: u64,
    /// Their mean.
    pub mean: f64,
    /// Standard deviation.
    pub stddev: f64,
    /// Percentiles: of a hundred requests so many took at most so long.
    #[serde(rename = "percentile", serialize_with = "as_fio_has_them")]
    pub percentiles: Vec<(f64, u64)>,
    /// All of them.
    #[serde(skip)]
    pub(super) histogram: Histogram<u64>,
}

fn as_fio_has_them<S: Serializer>(
    percentiles: &Vec<(f64, u64)>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(percentiles.len()))?;
    for (percentile, value) in percentiles {
        map.serialize_entry(&format!("{percentile:.6}"), value)?;
    }
    map.end()
}

impl Report {
    pub(super) fn new(
        options: &LoadOptions,
        backends: Vec<Backend>,
        outcomes: &[Outcome],
        notes: Vec<String>,
    ) -> Self {
        let mut tallies = Tallies::new();
        for outcome in outcomes {
            tallies.add(&outcome.tallies);
        }
        let sum = |of: fn(&Outcome) -> u64| outcomes.iter().map(of).sum::<u64>();
        let span = Duration::from_nanos(
            outcomes
                .iter()
                .map(|outcome| outcome.span)
                .max()
                .unwrap_or(0),
        );
        let direction = |kind| Direction::new(tallies.of(kind), kind, options, span);
        let (read, write, flush) = (
            direction(Kind::Read),
            direction(Kind::Write),
            direction(Kind::Flush),
        );
        let all = || [&read, &write, &flush].into_iter().flatten();
        let total_ios = all().map(|direction| direction.total_ios).sum();
        let bytes: u64 = all().map(|direction| direction.io_bytes).sum();
        let errors: u64 = all().map(|direction| direction.errors).sum();
        let errors = errors + sum(|outcome| outcome.verified.errors);
        let per_io = |amount: u64| ratio(amount, total_ios);
        // Each thread has looked at the whole process's, at about the same two times.
        let backend = outcomes.iter().filter_map(|outcome| outcome.backend_cpu);
        let backend = backend.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)));
        let (kicks, interrupts) = (
            sum(|outcome| outcome.kicks),
            sum(|outcome| outcome.interrupts),
        );
        let mut backends = backends.into_iter();
        Self {
            blk_dataplane_version: env!("CARGO_PKG_VERSION"),
            options: options.clone(),
            backend: backends
                .next()
                .unwrap_or_else(|| unreachable!("there is a socket")),
            more_backends: backends.collect(),
            runtime_ms: span.as_secs_f64() * 1e3,
            total_ios,
            iops: per_second(total_ios, span),
            bw_bytes: per_second(bytes, span),
            kicks_per_io: per_io(kicks),
            interrupts_per_io: per_io(interrupts),
            client_cpu_ns_per_io: per_io(sum(|outcome| outcome.client_cpu)),
            backend_cpu_ns_per_io: backend.map(|(begin, end)| per_io(end.saturating_sub(begin))),
            read,
            write,
            flush,
            errors,
            verified_blocks: sum(|outcome| outcome.verified.blocks),
            verify_errors: sum(|outcome| outcome.verified.wrong),
            kicks,
            interrupts,
            sleeps: sum(|outcome| outcome.sleeps),
            notes,
        }
    }

    /// As one JSON object, with a newline at its end.
    pub fn to_json(&self) -> String {
        // Maps with keys that are strings, and numbers: there is nothing that could fail.
        let mut json = serde_json::to_string_pretty(self).unwrap_or_default();
        json.push('\n');
        json
    }
}

impl Direction {
    fn new(tally: &Tally, kind: Kind, options: &LoadOptions, span: Duration) -> Option<Self> {
        if tally.ios == 0 && tally.errors == 0 {
            return None;
        }
        let io_bytes = match kind {
            Kind::Flush => 0,
            Kind::Read | Kind::Write => tally.ios * options.bs,
        };
        Some(Self {
            total_ios: tally.ios,
            io_bytes,
            iops: per_second(tally.ios, span),
            bw_bytes: per_second(io_bytes, span),
            errors: tally.errors,
            lat_ns: Latencies::new(&tally.latencies),
        })
    }
}

impl Latencies {
    fn new(histogram: &Histogram<u64>) -> Self {
        let values = histogram.value_at_percentiles(PERCENTILES);
        Self {
            min: histogram.min(),
            max: histogram.max(),
            mean: histogram.mean(),
            stddev: histogram.stdev(),
            percentiles: PERCENTILES.into_iter().zip(values).collect(),
            histogram: histogram.clone(),
        }
    }

    /// How long `percentile` of a hundred requests took at most.
    pub fn at_percentile(&self, percentile: f64) -> u64 {
        self.histogram.value_at_percentile(percentile)
    }
}

#[expect(clippy::cast_precision_loss, reason = "three digits count")]
fn ratio(amount: u64, of: u64) -> f64 {
    if of == 0 {
        0.0
    } else {
        amount as f64 / of as f64
    }
}

#[expect(clippy::cast_precision_loss, reason = "three digits count")]
fn per_second(amount: u64, span: Duration) -> f64 {
    if span.is_zero() {
        0.0
    } else {
        amount as f64 / span.as_secs_f64()
    }
}
