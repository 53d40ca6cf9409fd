//! Measures this back-end and every peer that is installed, side by side: see `versus --help`.

use std::process::ExitCode;

use benches::versus::{Arguments, run};
use clap::Parser;

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("versus: {error}");
            ExitCode::FAILURE
        }
    }
}
