//! `blk-dataplane`: serves a disk image to virtual machines over vhost-user-blk.
//!
//! Follows QEMU's conventions for vhost-user back-end programs (docs/interop/vhost-user.rst). Only
//! arguments, wiring and the exit code are here; what the program does is in the library.

mod arguments;
mod cpu_list;
mod diagnostics;
mod features;
mod inherited_fd;
mod qemu_hint;
mod size;

use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use blk_dataplane::vhost_user::{BindError, Server};
use blk_dataplane::{
    Backing, Caching, Device, DeviceError, Image, ImageError, ImageOptions, SigbusGuard,
};
use clap::Parser;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use arguments::Arguments;

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

/// What ends the program before its time: the message, with its remedy, and the exit code.
#[derive(Debug)]
struct Failure {
    message: String,
    code: u8,
}

/// A bad command line, or files that are not as it says. Also clap's own code.
const EXIT_USAGE: u8 = 2;
/// The host refused something: permission, memory, descriptors, I/O.
const EXIT_HOST: u8 = 1;

impl Failure {
    fn usage(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            code: EXIT_USAGE,
        }
    }

    fn host(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            code: EXIT_HOST,
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // vhost-user.rst: other options and arguments are ignored, and the program exits with 0.
    if arguments.print_capabilities {
        return match std::io::stdout().write_all(CAPABILITIES.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::from(EXIT_HOST),
        };
    }
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
    let signals = block_signals(&[Signal::SIGTERM, Signal::SIGINT])?;
    let resize = block_signals(&[Signal::SIGHUP])?;
    // A front-end that truncates the memory of its guest costs itself, and not everybody served after it.
    SigbusGuard::install().map_err(|error| Failure::host(format!("SIGBUS handler: {error}")))?;
    let options = arguments.device_options();
    // Before the image: a bad option leaves no new file behind.
    options.check().map_err(device_failure)?;
    let backing = open_backing(arguments)?;
    let device = Device::new(backing, &options).map_err(device_failure)?;
    Server::probe(&device)
        .map_err(|error| Failure::host(format!("the device cannot start: {error}")))?;
    let server = match inherited {
        Some((number, fd)) => Server::inherited(fd, device.clone())
            .map_err(|error| Failure::usage(format!("--fd={number}: {error}")))?,
        None => Server::bind(&arguments.socket_path()?, device.clone())
            .map_err(|error| bind_failure(&error))?,
    };
    resize_on(resize, device.clone())?;
    if arguments.verbose > 0 {
        let features = features::describe(device.features());
        say(&format!("blk-dataplane: features {features}\n"));
    }
    announce(&server, &device)?;
    server
        .serve(&signals)
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
    if let Some(size) = arguments.create
        && Image::create_if_missing(path, size).map_err(|error| image_failure(&error))?
    {
        say(&format!(
            "blk-dataplane: created {} ({size} bytes, sparse)
",
            path.display()
        ));
    }
    let options = ImageOptions {
        read_only: arguments.read_only,
        force_share: arguments.force_share,
        ..ImageOptions::default()
    };
    let image = Image::open(path, &options).map_err(|error| image_failure(&error))?;
    if let Caching::Buffered(reason) = image.caching() {
        say(&format!(
            "blk-dataplane: {}: using the page cache: {reason}
",
            path.display()
        ));
    }
    Ok(Backing::Image(image))
}

fn image_failure(error: &ImageError) -> Failure {
    let (option, remedy) = match error {
        ImageError::Open { source, .. } => (
            "--blk-file",
            match source.kind() {
                std::io::ErrorKind::NotFound => {
                    return Failure::usage(format!(
                        "--blk-file: {error}; give --create SIZE to create it"
                    ));
                }
                std::io::ErrorKind::IsADirectory => {
                    return Failure::usage(format!(
                        "--blk-file: {error}; give a raw disk image or a block device"
                    ));
                }
                std::io::ErrorKind::PermissionDenied => {
                    "check its permissions, or give --read-only if reading is enough"
                }
                std::io::ErrorKind::ReadOnlyFilesystem => "give --read-only",
                _ => "check that the file can be opened by this user",
            },
        ),
        ImageError::Create { .. } => (
            "--create",
            "check the directory's permissions and the file system's size limit",
        ),
        ImageError::InUse { .. } => (
            "--blk-file",
            "stop it, or give --force-share if both are meant to use it (a live migration)",
        ),
        ImageError::Lock { .. } => (
            "--blk-file",
            "its file system has no locks: give --force-share and see to it that nobody else writes",
        ),
        ImageError::NotAnImage { .. } => ("--blk-file", "give a raw disk image or a block device"),
        ImageError::TooSmall { .. } => (
            "--blk-file",
            "enlarge the image, for example with truncate -s 1G",
        ),
        _ => ("--blk-file", "check that the file can be read by this user"),
    };
    match error {
        ImageError::NotAnImage { .. } | ImageError::TooSmall { .. } | ImageError::InUse { .. } => {
            Failure::usage(format!("{option}: {error}; {remedy}"))
        }
        _ => Failure::host(format!("{option}: {error}; {remedy}")),
    }
}

fn device_failure(error: DeviceError) -> Failure {
    let option = match error {
        DeviceError::SerialTooLong { .. } => "--serial",
        DeviceError::NumQueues(_) => "--num-queues",
        DeviceError::QueueSize(_) => "--queue-size",
        DeviceError::BlockSize(_) | DeviceError::BlockTooSmall { .. } => "--block-size",
        DeviceError::Threads { .. } => "--num-threads",
        DeviceError::QueueThread { .. } => "--queue-threads",
        DeviceError::Cpu(_) => "--cpu-affinity",
        _ => "--null",
    };
    Failure::usage(format!("{option}: {error}"))
}

fn bind_failure(error: &BindError) -> Failure {
    match error {
        BindError::InUse { .. } => Failure::usage(format!(
            "--socket-path: {error}; stop it, or choose another --socket-path"
        )),
        BindError::NotASocket { .. } => Failure::usage(format!(
            "--socket-path: {error}; it is left alone: choose another --socket-path"
        )),
        BindError::TooLong { .. } => {
            Failure::usage(format!("--socket-path: {error}; choose a shorter one"))
        }
        _ => Failure::host(format!(
            "--socket-path: {error}; check that its directory exists and may be written to"
        )),
    }
}

/// Signals as a descriptor that becomes readable.
fn block_signals(signals: &[Signal]) -> Result<SignalFd, Failure> {
    let set: SigSet = signals.iter().copied().collect();
    set.thread_block()
        .and_then(|()| SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC))
        .map_err(|errno| Failure::host(format!("cannot watch for signals: {errno}")))
}

/// Reads the image's size anew at each signal, for as long as the program runs.
fn resize_on(signals: SignalFd, device: Device) -> Result<(), Failure> {
    let wait_and_resize = move || {
        while let Ok(Some(_)) = signals.read_signal() {
            match device.resize() {
                Ok(resized) => say(&format!(
                    "blk-dataplane: {} bytes; it was {}\n",
                    resized.new, resized.old
                )),
                Err(error) => say(&format!(
                    "blk-dataplane: the size stays as it was: {error}\n"
                )),
            }
        }
    };
    std::thread::Builder::new()
        .name("resize".into())
        .spawn(wait_and_resize)
        .map(drop)
        .map_err(|error| Failure::host(format!("cannot start a thread: {error}")))
}

/// One `ready` line on stdout, once a front-end may connect; how to attach it on stderr.
fn announce(server: &Server, device: &Device) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    let ready = match server.path() {
        Some(path) => {
            say(&qemu_hint::attach(path, device));
            writeln!(stdout, "ready {}", path.display())
        }
        None => writeln!(stdout, "ready"),
    };
    ready
        .and_then(|()| stdout.flush())
        .map_err(|error| Failure::host(format!("cannot write to standard output: {error}")))
}
