//! The bars held against the figures.

use std::fmt;

use super::contenders::name_of_ours;
use super::figures::Figures;
use super::results::Results;
use super::rows::{Against, Bar, FLAT, Floor, Limit, Ours, Row, Series};
use super::sample::Metric;
use super::statistics::Summary;

/// A bar, what came of it, and whether that is enough.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Verdict {
    /// The row's name, and its title.
    pub(crate) row: String,
    pub(crate) work: String,
    /// What is compared, in words.
    pub(crate) what: String,
    pub(crate) ours: String,
    /// With whom; nobody if the figure is its own.
    pub(crate) against: String,
    pub(crate) limit: Limit,
    pub(crate) unit: Unit,
    /// Over the rounds. `None`: one of the two has no figure.
    pub(crate) figure: Option<Summary>,
}

/// Of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Times,
    Milliseconds,
    MiB,
    NanosecondsPerSecond,
}

impl Verdict {
    /// What was not measured is not met.
    pub(crate) fn is_met(&self) -> bool {
        self.figure
            .is_some_and(|figure| self.limit.is_met_by(figure.median))
    }

    pub(crate) fn bar(&self) -> String {
        let limit = |limit| self.unit.show(limit);
        match self.limit {
            Limit::AtLeast(at_least) => format!("at least {}", limit(at_least)),
            Limit::AtMost(0.0) => "none".to_owned(),
            Limit::AtMost(at_most) => format!("at most {}", limit(at_most)),
            Limit::MoreThan(more_than) => format!("more than {}", limit(more_than)),
        }
    }

    pub(crate) fn shown(&self) -> String {
        match self.figure {
            None => "not measured".to_owned(),
            Some(figure) => self.unit.show(figure.median),
        }
    }

    pub(crate) fn spread(&self) -> String {
        self.figure.map_or_else(String::new, |figure| {
            format!(
                "{} .. {}",
                self.unit.number(figure.min),
                self.unit.number(figure.max)
            )
        })
    }

    pub(crate) fn word(&self) -> &'static str {
        if self.is_met() { "met" } else { "NOT met" }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let against = match self.against.as_str() {
            "" => String::new(),
            against => format!(" of {against}"),
        };
        write!(
            f,
            "{:<8} {:<24} {}: {}{against}: {} ({})",
            self.word(),
            self.row,
            self.ours,
            self.what,
            self.shown(),
            self.bar()
        )
    }
}

impl Unit {
    fn of(metric: Metric) -> Self {
        match metric {
            Metric::Start => Self::Milliseconds,
            Metric::Resident | Metric::ConnectedResident | Metric::Proportional => Self::MiB,
            Metric::IdleCpu | Metric::ConnectedCpu => Self::NanosecondsPerSecond,
            _ => Self::Times,
        }
    }

    fn number(self, value: f64) -> String {
        match self {
            // A quarter and 1/4.3 are to be told from what is near them.
            Self::Times if value < 1.0 => format!("{value:.3}"),
            Self::Times => format!("{value:.2}"),
            Self::Milliseconds => format!("{value:.1}"),
            Self::MiB => format!("{:.1}", value / 1024.0),
            Self::NanosecondsPerSecond => format!("{value:.0}"),
        }
    }

    fn show(self, value: f64) -> String {
        let unit = match self {
            Self::Times => "x",
            Self::Milliseconds => " ms",
            Self::MiB => " MiB",
            Self::NanosecondsPerSecond => " ns/s",
        };
        format!("{}{unit}", self.number(value))
    }
}

/// All bars of the rows that were measured, in the rows' order, and then those of the lines.
pub(crate) fn judge(rows: &[Row], results: &Results, figures: &Figures<'_>) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for row in rows {
        for bar in &row.bars {
            verdicts.extend(judge_bar(row, bar, results, figures));
        }
    }
    for (series, from, what) in Series::FLAT {
        let points: Vec<&Row> = rows
            .iter()
            .filter(|row| {
                let is_counted = |&(of, x): &(Series, u16)| of == series && x >= from;
                row.points.iter().any(is_counted)
            })
            .collect();
        if points.len() < 2 {
            continue;
        }
        let ours = name(Ours::Default);
        verdicts.push(Verdict {
            row: format!("scale: {}", what.split([',', ' ']).next().unwrap_or(what)),
            work: format!("null device, over {what}"),
            what: "processor time per request, dearest point : cheapest".to_owned(),
            ours: ours.clone(),
            against: String::new(),
            limit: Limit::AtMost(FLAT),
            unit: Unit::Times,
            figure: flatness(&points, &ours, results.rounds, figures),
        });
    }
    verdicts
}

/// How much dearer a request is at the dearest point than at the cheapest, in each round.
fn flatness(points: &[&Row], ours: &str, rounds: usize, figures: &Figures<'_>) -> Option<Summary> {
    // Which points these are is decided by the medians: in each round some point or other is by chance the dearest.
    let medians: Option<Vec<(&str, f64)>> = points
        .iter()
        .map(|row| {
            let figure = figures.figure(&row.id, ours, Metric::BackendCpu)?;
            Some((row.id.as_str(), figure))
        })
        .collect();
    let medians = medians?;
    let by_cost = |a: &&(&str, f64), b: &&(&str, f64)| a.1.total_cmp(&b.1);
    let (cheapest, _) = medians.iter().min_by(by_cost)?;
    let (dearest, _) = medians.iter().max_by(by_cost)?;
    let of = |row: &str| {
        let mut of_rounds = figures.rounds(row, ours, Metric::BackendCpu);
        of_rounds.resize(rounds.max(of_rounds.len()), None);
        of_rounds
    };
    Summary::of_ratios(&of(dearest), &of(cheapest))
}

fn judge_bar(row: &Row, bar: &Bar, results: &Results, figures: &Figures<'_>) -> Vec<Verdict> {
    let ours = name(bar.ours);
    let verdict = |against: &str, figure| Verdict {
        row: row.id.clone(),
        work: row.title.clone(),
        what: what(bar.metric).to_owned(),
        ours: ours.clone(),
        against: against.to_owned(),
        limit: bar.limit,
        unit: Unit::of(bar.metric),
        figure,
    };
    let against = |other: &str| {
        let figure = figures.ratio(&row.id, &ours, other, bar.metric);
        verdict(other, figure)
    };
    match bar.against {
        Against::Nobody => vec![verdict("", figures.summary(&row.id, &ours, bar.metric))],
        Against::Ours(variant) => vec![against(&name(variant))],
        Against::Floor(engine) => vec![against(match engine {
            Floor::Libaio => "bare loop, io_submit",
            Floor::IoUring => "bare loop, io_uring",
            Floor::Memcpy => "bare loop, memcpy",
        })],
        Against::Fio(engine) => vec![against(match engine {
            Floor::Libaio => "fio, libaio",
            _ => "fio, io_uring",
        })],
        Against::Qemu | Against::EveryPeer => {
            let only_qemu = bar.against == Against::Qemu;
            let peers = figures.best_of_each_family(&row.id, bar.metric, |known| {
                known.is_peer && (known.is_qemu || !only_qemu)
            });
            if peers.is_empty() && !results.records.is_empty() {
                return vec![verdict("qemu-storage-daemon", None)];
            }
            peers.iter().map(|peer| against(&peer.name)).collect()
        }
    }
}

/// The name of this back-end in this variant.
pub(crate) fn name(ours: Ours) -> String {
    match name_of_ours(ours) {
        "" => "blk-dataplane".to_owned(),
        variant => format!("blk-dataplane, {variant}"),
    }
}

fn what(metric: Metric) -> &'static str {
    match metric {
        Metric::Rate => "requests a second",
        Metric::Median => "median latency",
        Metric::P99 => "99th percentile of the latency",
        Metric::BackendCpu => "processor time per request",
        Metric::ClientCpu => "the client's processor time per request",
        Metric::Kicks => "kicks per request",
        Metric::Interrupts => "interrupts per request",
        Metric::Start => "from exec to the socket accepting",
        Metric::IdleCpu => "processor time, nobody connected",
        Metric::ConnectedCpu => "processor time, an idle guest connected",
        Metric::Resident => "resident memory, nobody connected",
        Metric::ConnectedResident => "resident memory without the guest's, an idle guest connected",
        Metric::Proportional => "proportional memory",
    }
}

#[cfg(test)]
mod tests {
    use super::super::figures::tests::results;
    use super::super::rows;
    use super::*;

    fn row(id: &str) -> Row {
        rows::all(false)
            .into_iter()
            .find(|row| row.id == id)
            .unwrap()
    }

    fn judge_one(row: &Row, rates: &[(&str, &str, &[f64])]) -> Vec<Verdict> {
        let results = results(rates);
        judge(std::slice::from_ref(row), &results, &Figures::new(&results))
    }

    #[test]
    fn each_version_of_qemu_is_a_bar_of_its_own() {
        let verdicts = judge_one(
            &row("null-d32"),
            &[
                ("null-d32", "blk-dataplane", &[430.0, 450.0, 10.0]),
                ("null-d32", "qemu 7, aio=native", &[100.0, 100.0, 1.0]),
                ("null-d32", "qemu 10, aio=native", &[200.0, 200.0, 2.0]),
            ],
        );
        let words: Vec<_> = verdicts
            .iter()
            .map(|verdict| (verdict.against.as_str(), verdict.shown(), verdict.word()))
            .collect();
        assert_eq!(
            words,
            [
                ("qemu 7, aio=native", "4.50x".to_owned(), "met"),
                ("qemu 10, aio=native", "2.25x".to_owned(), "NOT met"),
                // The processor time, of which these results have the inverse of the rate.
                ("qemu 7, aio=native", "0.222x".to_owned(), "met"),
                ("qemu 10, aio=native", "0.444x".to_owned(), "NOT met"),
            ]
        );
        assert_eq!(verdicts[0].bar(), "at least 4.30x");
        assert_eq!(verdicts[0].spread(), "4.30 .. 10.00");
    }

    #[test]
    fn what_was_not_measured_is_not_met() {
        let verdicts = judge_one(
            &row("null-d64-poll"),
            &[("null-d64-poll", "blk-dataplane", &[1.0])],
        );
        assert_eq!(verdicts.len(), 1);
        assert_eq!(verdicts[0].shown(), "not measured");
        assert_eq!(verdicts[0].word(), "NOT met");
    }

    #[test]
    fn a_disk_is_held_against_fio_of_the_same_engine_and_every_peer() {
        let id = "disk-randread-d32";
        let verdicts = judge_one(
            &row(id),
            &[
                (id, "blk-dataplane", &[97.0]),
                (id, "blk-dataplane, io_uring", &[96.0]),
                (id, "qemu 7, aio=native", &[97.0]),
                (id, "SPDK", &[90.0]),
                (id, "fio, libaio", &[100.0]),
                (id, "fio, io_uring", &[100.0]),
            ],
        );
        let words: Vec<_> = verdicts
            .iter()
            .map(|verdict| (verdict.against.as_str(), verdict.word()))
            .collect();
        assert_eq!(
            words,
            [
                ("fio, libaio", "met"),
                ("fio, io_uring", "NOT met"),
                // As fast is not ahead.
                ("qemu 7, aio=native", "NOT met"),
                ("SPDK", "met"),
            ]
        );
    }

    #[test]
    fn flat_is_the_dearest_point_by_the_cheapest_once_batching_has_set_in() {
        let rows: Vec<Row> = ["scale-depth-1", "scale-depth-32", "scale-depth-256"]
            .map(row)
            .to_vec();
        // Processor time is the inverse: 1, 0.1 and 0.08.
        let results = results(&[
            ("scale-depth-1", "blk-dataplane", &[1.0, 1.0]),
            ("scale-depth-32", "blk-dataplane", &[10.0, 10.0]),
            ("scale-depth-256", "blk-dataplane", &[12.5, 12.5]),
        ]);
        let verdicts = judge(&rows, &results, &Figures::new(&results));
        assert_eq!(verdicts.len(), 1);
        assert_eq!(verdicts[0].shown(), "1.25x");
        assert!(verdicts[0].is_met());
    }

    #[test]
    fn a_verdict_is_a_line() {
        let verdicts = judge_one(
            &row("tmpfs-seqread-d32"),
            &[
                ("tmpfs-seqread-d32", "blk-dataplane", &[3.0]),
                ("tmpfs-seqread-d32", "blk-dataplane, merging off", &[2.0]),
            ],
        );
        assert_eq!(
            verdicts[0].to_string(),
            "met      tmpfs-seqread-d32        blk-dataplane: requests a second of blk-dataplane, merging off: 1.50x \
             (at least 1.50x)"
        );
    }
}
