//! The results as figures, by row and contender.

use std::collections::HashMap;

use serde_json::Value;

use super::results::{Known, Results};
use super::sample::Metric;
use super::statistics::Summary;

#[derive(Debug)]
pub(crate) struct Figures<'a> {
    /// By row and contender, what was printed in each round.
    printed: HashMap<(&'a str, &'a str), Vec<Option<&'a Value>>>,
    contenders: &'a [Known],
}

impl<'a> Figures<'a> {
    pub(crate) fn new(results: &'a Results) -> Self {
        let mut printed: HashMap<_, Vec<Option<&Value>>> = HashMap::new();
        for record in &results.records {
            let key = (record.row.as_str(), record.contender.as_str());
            let rounds = printed.entry(key).or_default();
            let needed = rounds.len().max(record.round + 1);
            rounds.resize(needed, None);
            rounds[record.round] = record.result.as_ref().ok();
        }
        Self {
            printed,
            contenders: &results.contenders,
        }
    }

    /// Who has a figure in this row, in the order they are listed in.
    pub(crate) fn contenders_of(&self, row: &str) -> Vec<&'a Known> {
        self.contenders
            .iter()
            .filter(|known| self.printed.contains_key(&(row, known.name.as_str())))
            .collect()
    }

    /// The figure of each round.
    pub(crate) fn rounds(&self, row: &str, contender: &str, metric: Metric) -> Vec<Option<f64>> {
        let printed = self.printed.get(&(row, contender));
        let values = printed.into_iter().flatten();
        values
            .map(|printed| printed.and_then(|printed| metric.of(printed)))
            .collect()
    }

    pub(crate) fn summary(&self, row: &str, contender: &str, metric: Metric) -> Option<Summary> {
        let rounds = self.rounds(row, contender, metric);
        Summary::of(rounds.into_iter().flatten())
    }

    /// The median.
    pub(crate) fn figure(&self, row: &str, contender: &str, metric: Metric) -> Option<f64> {
        Some(self.summary(row, contender, metric)?.median)
    }

    /// The first by so many times the second, within each round.
    pub(crate) fn ratio(
        &self,
        row: &str,
        contender: &str,
        other: &str,
        metric: Metric,
    ) -> Option<Summary> {
        Summary::of_ratios(
            &self.rounds(row, contender, metric),
            &self.rounds(row, other, metric),
        )
    }

    /// The variant of each family that does best in this row, among the contenders that `is_asked` for.
    pub(crate) fn best_of_each_family(
        &self,
        row: &str,
        metric: Metric,
        is_asked: impl Fn(&Known) -> bool,
    ) -> Vec<&'a Known> {
        let mut best: Vec<(&Known, f64)> = Vec::new();
        for known in self.contenders_of(row) {
            let Some(figure) = self.figure(row, &known.name, metric) else {
                continue;
            };
            if !is_asked(known) {
                continue;
            }
            let better = |than: f64| {
                if metric.more_is_better() {
                    figure > than
                } else {
                    figure < than
                }
            };
            match best
                .iter_mut()
                .find(|(other, _)| other.family == known.family)
            {
                Some(other) if better(other.1) => *other = (known, figure),
                Some(_) => {}
                None => best.push((known, figure)),
            }
        }
        best.into_iter().map(|(known, _)| known).collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::results::Record;
    use super::*;
    use serde_json::json;

    /// Results of rounds in which somebody reached these rates.
    pub(crate) fn results(rates: &[(&str, &str, &[f64])]) -> Results {
        let mut results = Results {
            date: "2026-11-28".into(),
            command: "make versus".into(),
            rounds: 3,
            runtime: 1.0,
            took: 61.0,
            machine: vec![("kernel".into(), "Linux 6".into())],
            versions: vec![("fio".into(), "fio-3".into())],
            missing: vec![("crosvm".into(), "build it".into())],
            preparation: vec!["dd".into()],
            contenders: Vec::new(),
            records: Vec::new(),
        };
        for &(row, contender, rates) in rates {
            if results
                .contenders
                .iter()
                .all(|known| known.name != contender)
            {
                let family = contender.split(',').next().unwrap();
                results.contenders.push(Known {
                    name: contender.into(),
                    family: family.into(),
                    is_qemu: family.starts_with("qemu"),
                    is_peer: family.starts_with("qemu") || family == "SPDK",
                });
            }
            for (round, &rate) in rates.iter().enumerate() {
                let result = if rate.is_nan() {
                    Err("it has ended".to_owned())
                } else {
                    Ok(json!({"iops": rate, "backend_cpu_ns_per_io": 1e9 / rate}))
                };
                results.records.push(Record {
                    round,
                    row: row.into(),
                    contender: contender.into(),
                    commands: vec!["serve &".into(), "load".into()],
                    result,
                });
            }
        }
        results
    }

    #[test]
    fn rounds_stay_in_their_places_when_one_fails() {
        let results = results(&[
            ("r", "a", &[1.0, f64::NAN, 3.0]),
            ("r", "b", &[1.0, 1.0, 1.0]),
        ]);
        let figures = Figures::new(&results);
        assert_eq!(
            figures.rounds("r", "a", Metric::Rate),
            [Some(1.0), None, Some(3.0)]
        );
        assert_eq!(figures.figure("r", "a", Metric::Rate), Some(2.0));
        let ratio = figures.ratio("r", "a", "b", Metric::Rate).unwrap();
        assert_eq!((ratio.min, ratio.max), (1.0, 3.0));
        assert_eq!(figures.figure("r", "nobody", Metric::Rate), None);
        assert_eq!(results.failures().count(), 1);
    }

    #[test]
    fn the_best_variant_is_the_fastest_and_the_one_of_least_cost() {
        let results = results(&[
            ("r", "qemu 7, native", &[5.0, 5.0, 90.0]),
            ("r", "qemu 7, io_uring", &[7.0, 7.0, 7.0]),
            ("r", "qemu 10, native", &[6.0, 6.0, 6.0]),
            ("r", "SPDK", &[9.0, 9.0, 9.0]),
        ]);
        let figures = Figures::new(&results);
        for metric in [Metric::Rate, Metric::BackendCpu] {
            let best = figures.best_of_each_family("r", metric, |known| known.is_qemu);
            let names: Vec<_> = best.iter().map(|known| known.name.as_str()).collect();
            assert_eq!(names, ["qemu 7, io_uring", "qemu 10, native"]);
        }
    }

    #[test]
    fn results_are_kept_as_they_are() {
        let directory = tempfile::tempdir().unwrap();
        let before = results(&[("r", "a", &[1.0, f64::NAN])]);
        before.save(directory.path()).unwrap();
        let after = Results::load(&directory.path().join("results.json")).unwrap();
        let json = |results: &Results| serde_json::to_value(results).unwrap();
        assert_eq!(json(&before), json(&after));
    }
}
