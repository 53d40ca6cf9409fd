//! `blk-dataplane`: serves disk images to virtual machines over vhost-user-blk.
//!
//! Follows QEMU's conventions for vhost-user back-end programs (docs/interop/vhost-user.rst) and systemd's for
//! services. Only arguments, wiring and the exit code are here; what the program does is in the library.

mod activation;
mod arguments;
mod backing;
mod bench;
mod config_file;
mod cpu_list;
mod device_arguments;
mod device_name;
mod diagnostics;
#[cfg(test)]
mod documents;
mod failure;
mod features;
mod image_notes;
mod inherited_fd;
mod open_files;
mod origin;
mod qemu_hint;
mod report;
mod served;
mod service_manager;
mod settings;
mod signals;
mod size;
mod standard_error;

use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::process::ExitCode;
use std::sync::Arc;

use blk_dataplane::SigbusGuard;
use blk_dataplane::vhost_user::Server;
use nix::sys::signal::Signal;

use arguments::{Arguments, Command, ProgramArguments};
use failure::{EXIT_HOST, Failure};
use origin::Origin;
use served::{Description, Served};
use service_manager::ServiceManager;
use standard_error::say;

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
    match Arguments::of_process().and_then(obey) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            say(&format!("blk-dataplane: {}\n", failure.message));
            ExitCode::from(failure.code)
        }
    }
}

fn obey(arguments: Arguments) -> Result<(), Failure> {
    if let Some(Command::Bench(arguments)) = arguments.command {
        return bench::run(&arguments);
    }
    let (program, devices) = describe(arguments)?;
    run(&program, &devices)
}

/// What the command line and the configuration file ask for.
fn describe(arguments: Arguments) -> Result<(ProgramArguments, Vec<Description>), Failure> {
    let mut program = arguments.program;
    let mut devices = Vec::new();
    if let Some(path) = arguments.config {
        let configuration = config_file::read(&path)?;
        program = program.or(&configuration.program);
        for described in configuration.devices {
            devices.push(Description {
                arguments: described.arguments,
                origin: Origin::File {
                    path: path.clone(),
                    lines: described.lines,
                },
            });
        }
    }
    for (index, text) in arguments.devices.iter().enumerate() {
        let origin = Origin::Device(index + 1);
        let described = settings::split(text).and_then(|pairs| settings::device(&pairs));
        let arguments = described.map_err(|refused| origin.place(Failure::usage(refused.why)))?;
        devices.push(Description { arguments, origin });
    }
    if devices.is_empty() {
        devices.push(Description {
            arguments: arguments.device,
            origin: Origin::Flags,
        });
    }
    Ok((program, devices))
}

fn run(program: &ProgramArguments, descriptions: &[Description]) -> Result<(), Failure> {
    diagnostics::init(program.verbose);
    let checked = served::check(descriptions)?;
    // Before any thread starts: they inherit the mask, so that the signals are taken from the
    // descriptor alone and none can end the program in the middle of a request.
    let ending = Arc::new(signals::block(&[Signal::SIGTERM, Signal::SIGINT])?);
    let others = signals::block(&[Signal::SIGHUP, Signal::SIGUSR1])?;
    signals::survive_file_size_limit()?;
    // A front-end that truncates the memory of its guest costs itself, and not everybody served after it.
    SigbusGuard::install().map_err(|error| Failure::host(format!("SIGBUS handler: {error}")))?;
    open_files::raise_limit();
    let served = served::open(checked, program.exit_on_disconnect)?;
    let manager = Arc::new(ServiceManager::from_environment());
    signals::Obeying {
        ending: Arc::clone(&ending),
        others,
        devices: served.iter().map(|each| each.named.clone()).collect(),
        manager: Arc::clone(&manager),
    }
    .start()?;
    if program.verbose > 0 {
        for Served { named, .. } in &served {
            let features = features::describe(named.device.features());
            say(&format!("{}features {features}\n", named.prefix()));
        }
    }
    announce(&served)?;
    manager.ready(served.len());
    let servers = served.into_iter().map(|each| each.server).collect();
    let ended = Server::serve_all(servers, &ending);
    // The thread that waits for signals does so at once; it may not have had the time, or no signal.
    manager.stopping();
    ended.map_err(|error| Failure::host(error.to_string()))
}

/// A `ready` line for each device on stdout, once front-ends may connect to all of them; how to attach
/// them on stderr.
fn announce(served: &[Served]) -> Result<(), Failure> {
    let sockets = served.iter();
    let sockets = sockets.filter_map(|each| Some((each.server.path()?, &each.named)));
    say(&qemu_hint::attach(sockets));
    let mut ready = Vec::new();
    for Served { server, .. } in served {
        ready.extend_from_slice(b"ready");
        if let Some(path) = server.path() {
            ready.push(b' ');
            // As it is, whatever bytes that are: a script connects to what it reads here.
            ready.extend_from_slice(path.as_os_str().as_bytes());
        }
        ready.push(b'\n');
    }
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(&ready)
        .and_then(|()| stdout.flush())
        .map_err(|error| Failure::host(format!("cannot write to standard output: {error}")))
}
