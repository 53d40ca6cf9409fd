//! A bare loop of `io_submit`, io_uring or memcpy, alone in its process: see `floor --help`.

use benches::{Error, floor};
use clap::Parser;

fn main() -> Result<(), Error> {
    println!("{:#}", floor::run(&floor::Arguments::parse())?);
    Ok(())
}
