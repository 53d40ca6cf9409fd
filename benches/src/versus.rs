//! This back-end and its peers side by side: the same images, the same load, by turns, each bound to a processor.
//!
//! ```text
//!   rows         what is measured, and the bars: data only
//!   contenders   who is measured, and how each is started
//!   measure      one measurement: start the back-end, run the client, stop it
//!   sample       what fio, `floor` and the load generator have printed, as figures
//!   statistics   medians, and ratios within each round
//!   verdict      the bars held against the figures
//!   report       docs/performance.md; plots: its pictures
//! ```

mod arguments;
mod backend;
mod client;
mod contenders;
mod figures;
mod idle;
mod machine;
mod measure;
mod places;
mod plots;
mod processes;
mod report;
mod results;
mod rows;
mod sample;
mod statistics;
mod verdict;

use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

pub use arguments::Arguments;
use contenders::Contenders;
use figures::Figures;
use measure::Measurement;
use places::Places;
use results::{Record, Results};
use rows::Row;

use crate::Error;

/// Measures, or reads what has been measured; writes the report and prints the bars.
///
/// # Errors
///
/// The machine lacks something, the message says what; or some measurement failed, which the report tells of too.
pub fn run(arguments: &Arguments) -> Result<(), Error> {
    let contenders = Contenders::find(arguments)?;
    let rows = rows::all(arguments.is_quick());
    let rows: Vec<Row> = rows
        .into_iter()
        .filter(|row| arguments.wants_row(&row.id))
        .collect();
    if rows.is_empty() {
        return Err("--rows: nothing matches; --list has the rows".into());
    }
    if arguments.list {
        return list(&rows, &contenders);
    }
    let results = match &arguments.from {
        Some(file) => Results::load(file)?,
        None => measure_all(arguments, &rows, &contenders)?,
    };
    let figures = Figures::new(&results);
    let verdicts = verdict::judge(&rows, &results, &figures);
    let output = arguments.output();
    plots::draw(&arguments.plots(), &rows, &results, &figures)?;
    report::write(
        &output,
        &arguments.plots(),
        &rows,
        &results,
        &figures,
        &verdicts,
    )?;
    for verdict in &verdicts {
        say(&verdict.to_string())?;
    }
    say(&format!("written: {}", output.display()))?;
    match results.failures().count() {
        0 => Ok(()),
        failed => Err(format!("{failed} measurements failed; the report says which").into()),
    }
}

fn list(rows: &[Row], contenders: &Contenders) -> Result<(), Error> {
    for row in rows {
        say(&format!("{:<24} {}", row.id, row.title))?;
        for contender in contenders.of(row) {
            say(&format!("{:<24}   {}", "", contender.name))?;
        }
    }
    for missing in &contenders.missing {
        say(&format!("not here: {}: {}", missing.name, missing.remedy))?;
    }
    Ok(())
}

fn say(line: &str) -> Result<(), Error> {
    writeln!(std::io::stdout().lock(), "{line}")?;
    Ok(())
}

/// All rows, `rounds` times over, the contenders of a row by turns and each the first of a round as often as the others.
fn measure_all(
    arguments: &Arguments,
    rows: &[Row],
    contenders: &Contenders,
) -> Result<Results, Error> {
    machine::check(arguments)?;
    let begun = Instant::now();
    std::fs::create_dir_all(&arguments.results)?;
    let load_generator = measure::load_generator(contenders.all())
        .ok_or("--contenders: this project's own program has to take part")?;
    let places = Places::new(arguments, rows)?;
    let mut results = Results::new(arguments, contenders, &places);
    let rounds = arguments.rounds();
    let total: usize = rows.iter().map(|row| contenders.of(row).count()).sum();
    for round in 0..rounds {
        let mut done = 0;
        for row in rows {
            let turns: Vec<_> = contenders.of(row).collect();
            for turn in 0..turns.len() {
                let contender = turns[(turn + round) % turns.len()];
                let measurement = Measurement {
                    arguments,
                    places: &places,
                    row,
                    contender,
                    load_generator: &load_generator,
                };
                let commands = measurement.shown();
                let result = measurement.run();
                done += 1;
                eprintln!(
                    "round {}/{rounds} {done:>3}/{total} {:>4} s  {:<24} {:<40} {}",
                    round + 1,
                    begun.elapsed().as_secs(),
                    row.id,
                    contender.name,
                    sample::brief(&result),
                );
                results.records.push(Record {
                    round,
                    row: row.id.clone(),
                    contender: contender.name.clone(),
                    commands,
                    result,
                });
            }
        }
        results.save(&arguments.results)?;
    }
    results.took = begun.elapsed().as_secs_f64();
    results.save(&arguments.results)?;
    Ok(results)
}

/// A path as it is written from the directory one stands in.
fn from_here(path: &Path) -> String {
    let here = std::env::current_dir().ok();
    let within = here.and_then(|here| path.strip_prefix(here).ok().map(Path::to_owned));
    within.as_deref().unwrap_or(path).display().to_string()
}
