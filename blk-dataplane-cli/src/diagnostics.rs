//! What is said on stderr while serving.

use tracing_subscriber::filter::LevelFilter;

use crate::standard_error::StandardError;

/// Warnings always, connections with `-v`, rings and malformed requests with `-vv`, and with
/// `-vvv` each request when it is taken on and when it is answered.
pub(crate) fn init(verbose: u8) {
    let level = match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(|| StandardError)
        .with_ansi(false)
        // A standard error that has gone must not become a panic on whichever thread had to say
        // something.
        .log_internal_errors(false)
        .init();
}
