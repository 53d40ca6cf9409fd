//! Committed instruction counts, and the comparison of a fresh count with them.
//!
//! The file, `benches/instructions.txt`, has a line `compiler VERSION`, then a line `WORKLOAD INSTRUCTIONS` for each
//! workload that is [held](crate::workload::held); `#` begins a comment.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::path::PathBuf;

use crate::Error;

/// How much a figure may differ before somebody is told. Another choice of the compiler's, of what to make a
/// call of, moves a figure by one or two per cent.
const TOLERANCE: f64 = 0.05;

/// Counts the workloads anew and writes the file.
pub const WRITE: &str =
    "BENCH_WRITE_FIGURES=1 cargo test --release -p benches --test instructions figures";

/// Instructions per unit of each workload, and the compiler that made them.
#[derive(Clone, Debug, PartialEq)]
pub struct Figures {
    /// Version, commit and date of rustc. The same code costs something else with another one.
    pub compiler: String,
    /// By the workload's name.
    pub per_unit: BTreeMap<String, f64>,
}

impl Figures {
    /// Where the committed ones are.
    pub fn path() -> PathBuf {
        [env!("CARGO_MANIFEST_DIR"), "instructions.txt"]
            .iter()
            .collect()
    }

    /// Reads the file's text.
    ///
    /// # Errors
    ///
    /// A line that is neither a comment nor a name and a figure, a name twice, or no compiler. Says which line.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let mut compiler = None;
        let mut per_unit = BTreeMap::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let wrong = || format!("line {}: {line:?}", number + 1);
            let (name, value) = line.split_once(char::is_whitespace).ok_or_else(wrong)?;
            let value = value.trim();
            let is_first = if name == "compiler" {
                compiler.replace(value.to_owned()).is_none()
            } else {
                let figure: f64 = value.parse().map_err(|_| wrong())?;
                per_unit.insert(name.to_owned(), figure).is_none()
            };
            if !is_first {
                return Err(format!("{}: a second time", wrong()).into());
            }
        }
        let compiler = compiler.ok_or("no line says which compiler")?;
        Ok(Self { compiler, per_unit })
    }

    /// Compares what was counted with these, the committed ones. Returns what is to be said although nothing is wrong:
    /// figures that fell far enough to be written down.
    ///
    /// # Errors
    ///
    /// A figure rose by more than 5 %, a workload has none, there is one of no workload, or these are of another
    /// compiler; all of it in one message, with what to do.
    pub fn compare(&self, counted: &Self) -> Result<Vec<String>, Error> {
        let (mut wrong, mut notices) = (String::new(), Vec::new());
        if self.compiler != counted.compiler {
            let (committed, present) = (&self.compiler, &counted.compiler);
            let version = committed.split(' ').next().unwrap_or_default();
            let _ = writeln!(
                wrong,
                "the committed figures are of rustc {committed}, this is {present}, whose code costs something \
                 else: compare with `cargo +{version}`, or count a tree without your changes anew"
            );
        }
        for (name, &now) in &counted.per_unit {
            let Some(&before) = self.per_unit.get(name) else {
                let _ = writeln!(wrong, "{name}: {now:.1} counted, and no figure committed");
                continue;
            };
            let change = now / before - 1.0;
            let said = format!(
                "{name}: {before:.1} instructions committed, {now:.1} counted, {:+.1} %",
                100.0 * change
            );
            if change > TOLERANCE {
                wrong += &said;
                wrong.push('\n');
            } else if change < -TOLERANCE {
                notices.push(said);
            }
        }
        for name in self.per_unit.keys() {
            if !counted.per_unit.contains_key(name) {
                let _ = writeln!(wrong, "{name}: a figure is committed, of no workload");
            }
        }
        if wrong.is_empty() {
            return Ok(notices);
        }
        let path = Self::path();
        Err(format!(
            "{wrong}\
             `valgrind --tool=callgrind target/release/load WORKLOAD 6400` and callgrind_annotate show what costs it. If \
             it must be so, say why in the commit, and have {} written anew: {WRITE}",
            path.display()
        )
        .into())
    }
}

/// The file's text.
impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widest = self.per_unit.keys().map(String::len).max().unwrap_or(0);
        writeln!(
            f,
            "# Instructions per unit, counted by callgrind. README.md says of what. Written by:\n# {WRITE}"
        )?;
        writeln!(f, "compiler {}", self.compiler)?;
        for (name, figure) in &self.per_unit {
            writeln!(f, "{name:widest$} {figure:>7.1}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload;

    fn figures(per_unit: &[(&str, f64)]) -> Figures {
        Figures {
            compiler: "1.2.3 (abc 2026-01-01)".to_owned(),
            per_unit: per_unit
                .iter()
                .map(|&(name, figure)| (name.to_owned(), figure))
                .collect(),
        }
    }

    #[test]
    fn what_is_written_reads_as_the_same_and_nothing_else_is_taken_for_figures() {
        let written = figures(&[("ring", 285.1), ("a-longer-name", 1042.0)]);
        assert_eq!(Figures::parse(&written.to_string()).unwrap(), written);
        for wrong in [
            "ring 1",
            "compiler 1\nring",
            "compiler 1\nring x",
            "compiler 1\nring 1\nring 1",
            "compiler 1\ncompiler 1",
        ] {
            assert!(Figures::parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_rise_of_more_than_five_per_cent_is_an_error_that_names_the_workload_and_both_figures() {
        let committed = figures(&[("ring", 200.0), ("queue", 100.0)]);
        let counted = figures(&[("ring", 209.9), ("queue", 104.9)]);
        assert!(committed.compare(&counted).unwrap().is_empty());
        let counted = figures(&[("ring", 210.1), ("queue", 100.0)]);
        let message = committed.compare(&counted).unwrap_err().to_string();
        for part in ["ring: 200.0", "210.1 counted", WRITE] {
            assert!(message.contains(part), "{message}");
        }
        assert!(!message.contains("queue"), "{message}");
    }

    #[test]
    fn a_fall_is_told_and_no_error() {
        let committed = figures(&[("ring", 200.0), ("queue", 100.0)]);
        let counted = figures(&[("ring", 189.9), ("queue", 95.1)]);
        let notices = committed.compare(&counted).unwrap();
        assert_eq!(notices.len(), 1);
        assert!(notices[0].starts_with("ring: 200.0"), "{notices:?}");
    }

    #[test]
    fn figures_without_a_workload_or_of_another_compiler_and_workloads_without_one_are_errors() {
        let one = figures(&[("ring", 200.0)]);
        let two = figures(&[("ring", 200.0), ("queue", 100.0)]);
        assert!(one.compare(&two).is_err());
        assert!(two.compare(&one).is_err());
        let other = Figures {
            compiler: "1.2.4".to_owned(),
            ..one.clone()
        };
        let message = one.compare(&other).unwrap_err().to_string();
        assert!(message.contains("cargo +1.2.3"), "{message}");
    }

    #[test]
    fn the_committed_file_has_a_figure_of_each_workload_that_is_held() {
        let committed = std::fs::read_to_string(Figures::path()).unwrap();
        let committed = Figures::parse(&committed).unwrap();
        let names: Vec<_> = committed.per_unit.keys().map(String::as_str).collect();
        let mut held: Vec<_> = workload::held().collect();
        held.sort_unstable();
        assert_eq!(names, held);
    }
}
