//! The load generator against the server of this crate, and against back-ends that are wrong in every way.

#[path = "../support/mod.rs"]
#[expect(dead_code, reason = "what only the other tests need")]
mod support;

mod fake;

mod hostile;
mod loads;
mod verifying;

use std::path::PathBuf;
use std::time::Duration;

use blk_dataplane::load::{LoadError, LoadOptions, Report};

/// What every test starts from: it ends by itself and soon, and gives up late.
fn options() -> LoadOptions {
    LoadOptions {
        number_ios: Some(300),
        io_timeout: support::DEADLINE,
        ..LoadOptions::default()
    }
}

/// Without an end, for loads that something else ends.
fn endless() -> LoadOptions {
    LoadOptions {
        number_ios: None,
        runtime: Some(Duration::from_secs(3600)),
        ..options()
    }
}

fn run(socket: &std::path::Path, options: &LoadOptions) -> Result<Report, LoadError> {
    let _watchdog = support::Watchdog::start();
    blk_dataplane::load::run(&[PathBuf::from(socket)], options, |_| ())
}
