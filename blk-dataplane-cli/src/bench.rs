//! `blk-dataplane bench`: the load generator's arguments, output and exit code. What it does is in the library.

pub(crate) mod arguments;

use std::fs;
use std::io::{self, IsTerminal, Write};

use blk_dataplane::load::{self, LoadError, Progress, Report};

use nix::sys::signal::Signal;

use crate::Failure;
use crate::signals;
use crate::standard_error::say;
use arguments::{BenchArguments, Eta, OutputFormat};

pub(crate) fn run(arguments: &BenchArguments) -> Result<(), Failure> {
    let tells = match arguments.eta {
        Eta::Auto => io::stderr().is_terminal(),
        Eta::Always => true,
        Eta::Never => false,
    };
    let progress = |progress: &Progress| {
        if tells {
            say(&line(progress));
        }
    };
    // Of this thread and those that it starts: the report is printed, whoever has had enough.
    let ending = signals::block(&[Signal::SIGINT, Signal::SIGTERM])?;
    let options = arguments.load_options();
    let report =
        load::run_until(&arguments.sockets, &options, ending, progress).map_err(failure)?;
    for note in &report.notes {
        say(&format!("blk-dataplane: {note}\n"));
    }
    print(arguments, &report)?;
    if let Some(path) = &arguments.plot {
        let drawn = report.to_svg().map_err(|error| error.to_string());
        drawn
            .and_then(|svg| fs::write(path, svg).map_err(|error| error.to_string()))
            .map_err(|error| {
                Failure::host(format!(
                    "--plot: cannot write {}: {error}; give another path",
                    path.display()
                ))
            })?;
    }
    if report.errors + report.verify_errors > 0 {
        return Err(Failure::host(format!(
            "requests that failed: {}, blocks that were wrong: {}; the back-end's own messages may say why",
            report.errors, report.verify_errors
        )));
    }
    Ok(())
}

fn failure(error: LoadError) -> Failure {
    let message = error.to_string();
    match error {
        LoadError::Option { .. } => Failure::usage(message),
        LoadError::Connect { source, .. } => {
            let remedy = match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    "start a back-end there, or give its --socket-path"
                }
                io::ErrorKind::PermissionDenied => "check the socket's owner, group and mode",
                _ => "give the --socket-path of a back-end that runs",
            };
            Failure::usage(format!("--socket-path: {message}; {remedy}"))
        }
        _ => Failure::host(message),
    }
}

fn line(progress: &Progress) -> String {
    let of = progress
        .total
        .map_or_else(String::new, |total| format!("/{}", total.as_secs()));
    let ramp = if progress.measuring {
        ""
    } else {
        " (not measured yet)"
    };
    format!(
        "{}{of} s: {:.0} requests/s, {:.1} MiB/s, {} in flight{ramp}\n",
        progress.elapsed.as_secs(),
        progress.iops,
        progress.bw_bytes / f64::from(1 << 20),
        progress.in_flight
    )
}

fn print(arguments: &BenchArguments, report: &Report) -> Result<(), Failure> {
    let text = match arguments.output_format {
        OutputFormat::Normal => report.to_string(),
        OutputFormat::Json => report.to_json(),
    };
    match &arguments.output {
        Some(path) => fs::write(path, text).map_err(|error| {
            Failure::host(format!(
                "--output: cannot write {}: {error}; give another path",
                path.display()
            ))
        }),
        None => {
            let mut stdout = io::stdout().lock();
            let written = stdout
                .write_all(text.as_bytes())
                .and_then(|()| stdout.flush());
            written
                .map_err(|error| Failure::host(format!("cannot write to standard output: {error}")))
        }
    }
}
