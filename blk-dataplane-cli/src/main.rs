//! `blk-dataplane`: serves a disk image to virtual machines over vhost-user-blk.
//!
//! Follows QEMU's conventions for vhost-user back-end programs (docs/interop/vhost-user.rst). Only
//! arguments, wiring and the exit code are here; what the program does is in the library.

mod arguments;
mod cpu_list;
mod diagnostics;
mod failure;
mod features;
mod image_notes;
mod inherited_fd;
mod qemu_hint;
mod report;
mod signals;
mod size;

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::process::ExitCode;

use blk_dataplane::vhost_user::Server;
use blk_dataplane::{Backing, Device, Image, ImageOptions, SigbusGuard};
use clap::Parser;
use nix::sys::signal::Signal;

use arguments::Arguments;
use failure::{EXIT_HOST, Failure, bind_failure, device_failure, image_failure, start_failure};

/// Printed by `--print-capabilities`. The features are those of the `vhost-user-blk` section of
/// QEMU's vhost-user.json schema.
const CAPABILITIES: &str = r#"{
  "type": "block",
  "features": [
    "read-only",
    "blk-file"
  ]
}
"#;

fn main() -> ExitCode {
    // vhost-user.rst: other options and arguments are ignored, right or wrong, and the program exits with 0.
    if std::env::args_os().any(|argument| argument == "--print-capabilities") {
        return match std::io::stdout().write_all(CAPABILITIES.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::from(EXIT_HOST),
        };
    }
    let arguments = Arguments::parse();
    diagnostics::init(arguments.verbose);
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            say(&format!("blk-dataplane: {}\n", failure.message));
            ExitCode::from(failure.code)
        }
    }
}

/// Writes to standard error. `eprintln!` would panic where nobody reads it any more.
fn say(text: &str) {
    // There is nobody left to tell.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    // Before anything is opened: a number that was not inherited must not name a descriptor of ours.
    let inherited = match arguments.fd {
        Some(number) => Some((number, inherited_socket(number)?)),
        None => None,
    };
    // Before any thread starts: they inherit the mask, so that the signals are taken from the
    // descriptor alone and none can end the program in the middle of a request.
    let ending = signals::block(&[Signal::SIGTERM, Signal::SIGINT])?;
    let others = signals::block(&[Signal::SIGHUP, Signal::SIGUSR1])?;
    signals::survive_file_size_limit()?;
    // A front-end that truncates the memory of its guest costs itself, and not everybody served after it.
    SigbusGuard::install().map_err(|error| Failure::host(format!("SIGBUS handler: {error}")))?;
    let options = arguments.device_options();
    // Before the image: a bad option leaves no new file behind.
    let refused = |error| device_failure(&error, arguments.blk_file.as_deref());
    options.check().map_err(refused)?;
    let backing = open_backing(arguments)?;
    let device = Device::new(backing, &options).map_err(refused)?;
    Server::probe(&device).map_err(|error| start_failure(&error))?;
    let server = match inherited {
        Some((number, fd)) => Server::inherited(fd, device.clone()).map_err(|error| {
            Failure::usage(format!(
                "--fd={number}: {error}; pass one, listening or connected"
            ))
        })?,
        None => Server::bind(&arguments.socket_path()?, device.clone())
            .map_err(|error| bind_failure(&error))?,
    };
    signals::obey(others, device.clone())?;
    if arguments.verbose > 0 {
        let features = features::describe(device.features());
        say(&format!("blk-dataplane: features {features}\n"));
    }
    announce(&server, &device)?;
    server
        .serve(&ending)
        .map_err(|error| Failure::host(error.to_string()))
}

fn inherited_socket(number: i32) -> Result<OwnedFd, Failure> {
    inherited_fd::take(number).map_err(|error| {
        Failure::usage(format!(
            "--fd={number}: {error}; pass an open Unix stream socket as descriptor {number}"
        ))
    })
}

fn open_backing(arguments: &Arguments) -> Result<Backing, Failure> {
    let Some(path) = &arguments.blk_file else {
        // clap sees to it that one of the two is there.
        return Ok(Backing::null(arguments.null.unwrap_or_default()));
    };
    let mut wanted = arguments.create;
    if let Some(size) = arguments.create
        && Image::create_if_missing(path, size).map_err(|error| image_failure(&error))?
    {
        say(&format!(
            "blk-dataplane: created {} ({size} bytes, sparse)\n",
            path.display()
        ));
        wanted = None;
    }
    let options = ImageOptions {
        read_only: arguments.read_only,
        force_share: arguments.force_share,
        ..ImageOptions::default()
    };
    let image = Image::open(path, &options).map_err(|error| image_failure(&error))?;
    for note in image_notes::about(&image, wanted) {
        say(&format!("blk-dataplane: {}: {note}\n", path.display()));
    }
    Ok(Backing::Image(image))
}

/// One `ready` line on stdout, once a front-end may connect; how to attach it on stderr.
fn announce(server: &Server, device: &Device) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    let ready = match server.path() {
        Some(path) => {
            say(&qemu_hint::attach(path, device));
            // As it is, whatever bytes that are: a script connects to what it reads here.
            let path = path.as_os_str().as_bytes();
            stdout.write_all(&[b"ready ", path, b"\n"].concat())
        }
        None => writeln!(stdout, "ready"),
    };
    ready
        .and_then(|()| stdout.flush())
        .map_err(|error| Failure::host(format!("cannot write to standard output: {error}")))
}
