//! docs/performance.md: what is between two marks is written anew, the rest is left as it is.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use super::figures::Figures;
use super::from_here;
use super::plots;
use super::results::{Record, Results};
use super::rows::{Job, Row, Series};
use super::sample::Metric;
use super::verdict::Verdict;
use crate::Error;

const BEGIN: &str =
    "<!-- versus: begin. From here to the end mark `make versus` writes; write above or below. -->";
const END: &str = "<!-- versus: end -->";

/// Of a file that is not there yet.
const TITLE: &str = "# Performance\n";

/// Puts the report into `file`.
pub(crate) fn write(
    file: &Path,
    plots: &Path,
    rows: &[Row],
    results: &Results,
    figures: &Figures<'_>,
    verdicts: &[Verdict],
) -> Result<(), Error> {
    if let Some(directory) = file.parent() {
        fs::create_dir_all(directory)?;
    }
    let before = fs::read_to_string(file).unwrap_or_default();
    let part = part(plots, rows, results, figures, verdicts)?;
    let text = replace(&before, &part).map_err(|error| format!("{}: {error}", file.display()))?;
    fs::write(file, text).map_err(|error| format!("{}: {error}", from_here(file)))?;
    Ok(())
}

/// The text with what is between the marks replaced; at its end if there are none.
fn replace(text: &str, part: &str) -> Result<String, String> {
    let part = format!("{BEGIN}\n\n{part}\n{END}\n");
    match (text.find(BEGIN), text.find(END)) {
        (Some(begin), Some(end)) if begin < end => {
            let after = text[end + END.len()..].trim_start_matches('\n');
            let gap = if after.is_empty() { "" } else { "\n" };
            Ok(format!("{}{part}{gap}{after}", &text[..begin]))
        }
        (None, None) if text.trim().is_empty() => Ok(format!("{TITLE}\n{part}")),
        (None, None) => Ok(format!("{}\n\n{part}", text.trim_end())),
        _ => Err(format!(
            "of the marks {BEGIN:?} and {END:?} both are needed, in this order, or none"
        )),
    }
}

fn part(
    plots: &Path,
    rows: &[Row],
    results: &Results,
    figures: &Figures<'_>,
    verdicts: &[Verdict],
) -> Result<String, Error> {
    let mut text = String::new();
    about(&mut text, results)?;
    bars(&mut text, verdicts)?;
    pictures(&mut text, plots)?;
    writeln!(text, "### Figures and commands\n")?;
    writeln!(
        text,
        "Medians of {} rounds. CPU is the processor time of all threads per request, of the back-end or of the whole \
         process of a bare loop or fio, and of the client; kicks and interrupts are per request. The commands come \
         after these, which make the images:\n",
        results.rounds
    )?;
    code(&mut text, &results.preparation)?;
    let (with_bars, others): (Vec<&Row>, Vec<&Row>) =
        rows.iter().partition(|row| !row.bars.is_empty());
    for row in with_bars {
        section(&mut text, &row.title, &[row], results, figures)?;
    }
    for (series, title) in [
        (Series::Depth, "Cost per request over the depth"),
        (
            Series::Devices,
            "Cost per request over devices in one process",
        ),
        (
            Series::MemoryRegions,
            "Cost per request over regions of guest memory",
        ),
        (Series::Latency, "Latency over the depth"),
    ] {
        let of_series = |row: &&&Row| row.points.iter().any(|point| point.0 == series);
        let rows: Vec<&Row> = others.iter().filter(of_series).copied().collect();
        if !rows.is_empty() {
            section(&mut text, title, &rows, results, figures)?;
        }
    }
    failures(&mut text, results)?;
    Ok(text)
}

fn about(text: &mut String, results: &Results) -> Result<(), Error> {
    writeln!(text, "## Side by side\n")?;
    writeln!(
        text,
        "Measured on {} by `{}`: {} rounds, in each of which every contender has its turn of {} s on every row, in {:.0} \
         minutes together. A ratio is taken within each round, and its median is given, with the smallest and the \
         largest. Absolute figures are of this machine and that hour.\n",
        results.date,
        results.command,
        results.rounds,
        results.runtime,
        (results.took / 60.0).ceil(),
    )?;
    writeln!(text, "| | |\n|---|---|")?;
    for (name, value) in results.machine.iter().chain(&results.versions) {
        writeln!(text, "| {name} | {} |", value.replace('|', "\\|"))?;
    }
    for (name, remedy) in &results.missing {
        writeln!(
            text,
            "| {name} | not measured, for it was not there: {remedy} |"
        )?;
    }
    writeln!(text)?;
    Ok(())
}

fn bars(text: &mut String, verdicts: &[Verdict]) -> Result<(), Error> {
    let met = verdicts.iter().filter(|verdict| verdict.is_met()).count();
    writeln!(text, "### The bars\n")?;
    writeln!(
        text,
        "{met} of {} are met. Each peer is taken at its best: the variant of its that did best in the row.\n",
        verdicts.len()
    )?;
    writeln!(
        text,
        "| work | who | what | against | bar | figure | rounds | |\n|---|---|---|---|---|---:|---|---|"
    )?;
    for verdict in verdicts {
        writeln!(
            text,
            "| {} (`{}`) | {} | {} | {} | {} | {} | {} | {} |",
            verdict.work,
            verdict.row,
            verdict.ours,
            verdict.what,
            verdict.against,
            verdict.bar(),
            verdict.shown(),
            verdict.spread(),
            if verdict.is_met() {
                "met"
            } else {
                "**NOT met**"
            },
        )?;
    }
    writeln!(text)?;
    Ok(())
}

fn pictures(text: &mut String, plots: &Path) -> Result<(), Error> {
    let directory = plots.file_name().unwrap_or_default().to_string_lossy();
    for (name, caption) in plots::ALL {
        if plots.join(name).exists() {
            writeln!(text, "![{caption}]({directory}/{name})\n")?;
        }
    }
    Ok(())
}

/// Rows that share a table.
fn section(
    text: &mut String,
    title: &str,
    rows: &[&Row],
    results: &Results,
    figures: &Figures<'_>,
) -> Result<(), Error> {
    let records: Vec<&Record> = rows
        .iter()
        .flat_map(|row| results.records.iter().filter(|record| record.row == row.id))
        .collect();
    let Some(first) = rows.first() else {
        return Ok(());
    };
    if records.is_empty() {
        return Ok(());
    }
    let mut heading = title.to_owned();
    if let Some(initial) = heading.get_mut(..1) {
        initial.make_ascii_uppercase();
    }
    writeln!(text, "#### {heading}\n")?;
    let columns = columns(first.job);
    let names: Vec<_> = columns.iter().map(|column| column.title).collect();
    writeln!(text, "| row | | {} |", names.join(" | "))?;
    writeln!(text, "|---|---|{}", "---:|".repeat(columns.len()))?;
    for row in rows {
        for known in figures.contenders_of(&row.id) {
            let cell = |column: &Column| {
                let figure = figures.figure(&row.id, &known.name, column.metric);
                figure.map_or_else(String::new, |figure| (column.show)(figure))
            };
            let cells: Vec<_> = columns.iter().map(cell).collect();
            writeln!(
                text,
                "| `{}` | {} | {} |",
                row.id,
                known.name,
                cells.join(" | ")
            )?;
        }
    }
    writeln!(text, "\n<details><summary>Commands</summary>\n")?;
    let mut lines = Vec::new();
    let mut told = HashSet::new();
    for record in records {
        if told.insert((&record.row, &record.contender)) {
            lines.push(format!("# {}: {}", record.row, record.contender));
            lines.extend(record.commands.iter().cloned());
        }
    }
    code(text, &lines)?;
    writeln!(text, "</details>\n")?;
    Ok(())
}

fn code(text: &mut String, lines: &[String]) -> Result<(), Error> {
    writeln!(text, "```sh\n{}\n```\n", lines.join("\n"))?;
    Ok(())
}

fn failures(text: &mut String, results: &Results) -> Result<(), Error> {
    let mut failures = results.failures().peekable();
    if failures.peek().is_none() {
        return Ok(());
    }
    writeln!(text, "### What failed\n")?;
    for (record, error) in failures {
        writeln!(
            text,
            "- `{}`, {}, round {}: {}",
            record.row,
            record.contender,
            record.round + 1,
            error.replace('\n', " ")
        )?;
    }
    writeln!(text)?;
    Ok(())
}

struct Column {
    title: &'static str,
    metric: Metric,
    show: fn(f64) -> String,
}

fn columns(job: Job) -> Vec<Column> {
    let column = |title, metric, show| Column {
        title,
        metric,
        show,
    };
    let mib = |kib: f64| format!("{:.1}", kib / 1024.0);
    match job {
        Job::Load(_) => vec![
            column("requests/s", Metric::Rate, thousands),
            column("CPU, ns", Metric::BackendCpu, thousands),
            column("client CPU, ns", Metric::ClientCpu, thousands),
            column("median, us", Metric::Median, microseconds),
            column("99 %, us", Metric::P99, microseconds),
            column("kicks", Metric::Kicks, |each| format!("{each:.3}")),
            column("interrupts", Metric::Interrupts, |each| {
                format!("{each:.3}")
            }),
        ],
        Job::Start => vec![column("exec to ready, ms", Metric::Start, |ms| {
            format!("{ms:.1}")
        })],
        Job::Idle => vec![
            column("alone: CPU, ns/s", Metric::IdleCpu, thousands),
            column("resident, MiB", Metric::Resident, mib),
            column("proportional, MiB", Metric::Proportional, mib),
            column("with a guest: CPU, ns/s", Metric::ConnectedCpu, thousands),
            column(
                "resident without the guest's, MiB",
                Metric::ConnectedResident,
                mib,
            ),
        ],
    }
}

/// A whole number with commas.
fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn microseconds(nanoseconds: f64) -> String {
    let value = nanoseconds / 1e3;
    if value < 100.0 {
        format!("{value:.1}")
    } else {
        thousands(value)
    }
}

#[cfg(test)]
mod tests {
    use super::super::figures::tests::results;
    use super::super::{rows, verdict};
    use super::*;

    #[test]
    fn what_is_around_the_marks_stays() {
        let first = replace("", "one").unwrap();
        assert!(first.starts_with("# Performance\n\n<!-- versus: begin"));
        let with_profile = format!("{first}\n## Profile\n\nhot\n");
        let second = replace(&with_profile, "two").unwrap();
        assert!(second.ends_with("two\n<!-- versus: end -->\n\n## Profile\n\nhot\n"));
        assert!(!second.contains("one"));
        assert_eq!(replace(&second, "two").unwrap(), second);
    }

    #[test]
    fn a_file_without_marks_gets_them_at_its_end() {
        let text = replace("# Mine\n\nwords\n", "part").unwrap();
        assert!(text.starts_with("# Mine\n\nwords\n\n<!-- versus: begin"));
    }

    #[test]
    fn one_mark_alone_is_an_error_and_nothing_is_lost() {
        assert!(replace(&format!("a\n{BEGIN}\nb"), "part").is_err());
        assert!(replace(&format!("{END}\n{BEGIN}"), "part").is_err());
    }

    #[test]
    fn numbers_are_easy_to_read() {
        assert_eq!(thousands(1_234_567.4), "1,234,567");
        assert_eq!(thousands(999.6), "1,000");
        assert_eq!(thousands(0.0), "0");
        assert_eq!(microseconds(2_940.0), "2.9");
        assert_eq!(microseconds(1_234_500.0), "1,234");
    }

    #[test]
    fn the_report_has_each_figure_with_its_command_and_each_failure() {
        let results = results(&[
            ("null-d32", "blk-dataplane", &[4.0e6, 4.0e6, 5.0e6]),
            ("null-d32", "qemu 7, aio=native", &[1.0e6, 1.0e6, f64::NAN]),
            ("scale-depth-16", "blk-dataplane", &[3.0e6]),
        ]);
        let (figures, rows) = (Figures::new(&results), rows::all(false));
        let verdicts = verdict::judge(&rows, &results, &figures);
        let text = part(
            Path::new("/x/performance"),
            &rows,
            &results,
            &figures,
            &verdicts,
        )
        .unwrap();
        for expected in [
            "| `null-d32` | blk-dataplane | 4,000,000 | 250 |",
            "# null-d32: blk-dataplane\nserve &\nload",
            "4.00x | 4.00 .. 4.00 | **NOT met** |",
            "| `scale-depth-16` | blk-dataplane | 3,000,000 | 333 |",
            "| crosvm | not measured, for it was not there: build it |",
            "- `null-d32`, qemu 7, aio=native, round 3: it has ended",
        ] {
            assert!(text.contains(expected), "{expected:?} in\n{text}");
        }
    }
}
