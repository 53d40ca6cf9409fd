//! The command line.

use std::path::PathBuf;

use clap::Parser;

/// Rounds of a full run: odd, so that the median is one of them.
const ROUNDS: usize = 5;

/// Measures this back-end and every peer that is installed, by turns on the same images, and writes
/// docs/performance.md.
///
/// Build what it runs first: cargo build --release -p blk-dataplane-cli -p benches (ci/versus.sh does).
#[derive(Clone, Debug, Parser)]
pub struct Arguments {
    /// Only rows whose name contains one of these, with commas between; --list has the names.
    #[arg(long, value_name = "PATTERNS", value_delimiter = ',')]
    pub rows: Vec<String>,

    /// Only contenders whose name contains one of these, with commas between.
    #[arg(long, value_name = "PATTERNS", value_delimiter = ',')]
    pub contenders: Vec<String>,

    /// Rounds, in each of which every contender has its turn [default: 5; 1 if quick].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub rounds: Option<u16>,

    /// Seconds of each measurement [default: 0.8; 0.3 if quick].
    #[arg(long, value_name = "SECONDS")]
    pub runtime: Option<f64>,

    /// Look whether everything runs: one short round over small images, fewer points of each line.
    #[arg(long)]
    pub quick: bool,

    /// List the rows and who would be measured, and do nothing.
    #[arg(long)]
    pub list: bool,

    /// Measure this one as well: the command gets {socket} and {image} (the file to serve), or {socket} and {size}
    /// (the bytes of a device that stores nothing), and is measured on rows of that kind.
    #[arg(long, value_name = "NAME=COMMAND")]
    pub peer: Vec<String>,

    /// The program to measure [default: blk-dataplane beside this one].
    #[arg(long, value_name = "PATH")]
    pub program: Option<PathBuf>,

    /// The directory, in memory, for an image and the sockets [default: one made in /dev/shm, and removed].
    #[arg(long, value_name = "DIR")]
    pub shm: Option<PathBuf>,

    /// The directory, on a disk, for an image [default: one made in /var/tmp, and removed].
    #[arg(long, value_name = "DIR")]
    pub disk: Option<PathBuf>,

    /// MiB of the image in memory [default: 1024; 64 if quick].
    #[arg(long, value_name = "MIB")]
    pub shm_size: Option<u64>,

    /// MiB of the image on the disk [default: 2048; 64 if quick].
    #[arg(long, value_name = "MIB")]
    pub disk_size: Option<u64>,

    /// The processor of back-ends and floors.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub backend_cpu: usize,

    /// The processor of the client.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub client_cpu: usize,

    /// Where what each client has printed is kept, and what back-ends say on stderr.
    #[arg(long, value_name = "DIR", default_value = "target/versus")]
    pub results: PathBuf,

    /// Measure nothing: report what a results.json says.
    #[arg(long, value_name = "FILE")]
    pub from: Option<PathBuf>,

    /// The report, between two marks in this file [default: docs/performance.md of a full run, else performance.md
    /// in --results].
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

impl Arguments {
    pub(crate) fn is_quick(&self) -> bool {
        self.quick
    }

    pub(crate) fn rounds(&self) -> usize {
        let default = if self.quick { 1 } else { ROUNDS };
        self.rounds.map_or(default, usize::from)
    }

    pub(crate) fn runtime(&self) -> f64 {
        self.runtime.unwrap_or(if self.quick { 0.3 } else { 0.8 })
    }

    /// Seconds before each measurement that do not count: polling has learnt, caches are warm.
    pub(crate) fn ramp_time(&self) -> f64 {
        self.runtime() / 5.0
    }

    pub(crate) fn shm_mib(&self) -> u64 {
        self.shm_size.unwrap_or(if self.quick { 64 } else { 1024 })
    }

    pub(crate) fn disk_mib(&self) -> u64 {
        self.disk_size.unwrap_or(if self.quick { 64 } else { 2048 })
    }

    pub(crate) fn wants_row(&self, id: &str) -> bool {
        matches(&self.rows, id)
    }

    pub(crate) fn wants_contender(&self, name: &str) -> bool {
        matches(&self.contenders, name)
    }

    pub(crate) fn output(&self) -> PathBuf {
        let is_full = self.rows.is_empty() && self.contenders.is_empty() && !self.quick
            || self.from.is_some();
        match &self.output {
            Some(output) => output.clone(),
            None if is_full => "docs/performance.md".into(),
            None => self.results.join("performance.md"),
        }
    }

    /// A directory beside the report, of the same name.
    pub(crate) fn plots(&self) -> PathBuf {
        self.output().with_extension("")
    }
}

fn matches(patterns: &[String], name: &str) -> bool {
    patterns.is_empty() || patterns.iter().any(|pattern| name.contains(pattern))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_full_run_writes_into_the_documentation() {
        let output = |arguments: &[&str]| {
            let arguments = Arguments::parse_from([&["versus"], arguments].concat());
            arguments.output().display().to_string()
        };
        assert_eq!(output(&[]), "docs/performance.md");
        assert_eq!(output(&["--rounds=9"]), "docs/performance.md");
        assert_eq!(output(&["--quick"]), "target/versus/performance.md");
        assert_eq!(output(&["--rows=null"]), "target/versus/performance.md");
        assert_eq!(output(&["--quick", "--output=a.md"]), "a.md");
    }

    #[test]
    fn patterns_are_parts_of_names() {
        let arguments = Arguments::parse_from(["versus", "--rows=null,d64"]);
        assert!(arguments.wants_row("null-d32"));
        assert!(arguments.wants_row("disk-randread-d64"));
        assert!(!arguments.wants_row("tmpfs-d1"));
        assert!(arguments.wants_contender("anyone"));
    }
}
