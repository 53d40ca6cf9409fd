//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::parser::ValueSource;
use clap::{ArgAction, ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::Failure;
use crate::bench::arguments::BenchArguments;
use crate::device_arguments::DeviceArguments;

/// Serves disk images to virtual machines over vhost-user-blk.
///
/// Serves one front-end after another until SIGTERM or SIGINT, then completes what is in flight, writes the images
/// out and removes its sockets. On SIGHUP it reads the images' sizes anew, serves requests up to the new end from
/// then on, and has the guests told. On SIGUSR1 it prints its counters on standard error.
#[derive(Debug, Parser)]
#[command(name = "blk-dataplane", version, after_help = EXIT_CODES, allow_negative_numbers = true)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_value_name = "COMMAND"
)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,

    /// Serve this device, told by any of the device options below as key=value with commas between, like
    /// blk-file=/a.img,socket-path=/run/a.sock,read-only=on; a comma in a value is written twice. Once for each
    /// device, in place of those options.
    #[arg(long = "device", value_name = "OPTIONS")]
    pub(crate) devices: Vec<OsString>,

    /// Serve the devices of this TOML file: a `[[device]]` table for each, with any of the device options below, and
    /// above them the options here that have no path. Those of the command line count as well.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) program: ProgramArguments,

    /// Print this program's capabilities as JSON and exit; other options are ignored.
    #[arg(long)]
    pub(crate) print_capabilities: bool,

    #[command(
        flatten,
        next_help_heading = "Device options (one device; or in --device, or in --config)"
    )]
    pub(crate) device: DeviceArguments,
}

/// What the program does besides serving.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Bench(Box<BenchArguments>),
}

/// What concerns the program and not a device; also at the top of a configuration file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub(crate) struct ProgramArguments {
    /// Serve one front-end for each device, and exit when the last of them has gone.
    #[arg(long)]
    pub(crate) exit_on_disconnect: bool,

    /// Say more on stderr: features and connections; twice for every ring start and malformed request; three
    /// times for every request, which is slow.
    #[arg(short, long, action = ArgAction::Count)]
    pub(crate) verbose: u8,
}

impl Arguments {
    /// Parses the process's own; says what is wrong and exits where clap finds it.
    pub(crate) fn of_process() -> Result<Self, Failure> {
        let matches = Self::command().get_matches();
        let arguments = Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
        if let Some(flag) = flag_beside_devices(&matches) {
            return Err(Failure::usage(format!(
                "--{flag}: is for a single device; with --device or --config, write it in there, where it belongs to \
                 one of them"
            )));
        }
        Ok(arguments)
    }
}

/// A device's option that is given as a flag although devices are described in another way.
fn flag_beside_devices(matches: &ArgMatches) -> Option<String> {
    let given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    if !given("devices") && !given("config") {
        return None;
    }
    let command = Arguments::command();
    // The group that clap makes of each struct of options.
    let mut groups = command.get_groups();
    let group = groups.find(|group| group.get_id() == "DeviceArguments")?;
    let given = group.get_args().find(|id| given(id.as_str()))?;
    let mut options = command.get_arguments();
    let option = options.find(|option| option.get_id() == given)?;
    option.get_long().map(str::to_owned)
}

impl ProgramArguments {
    /// What either asks for.
    pub(crate) fn or(&self, other: &Self) -> Self {
        Self {
            exit_on_disconnect: self.exit_on_disconnect || other.exit_on_disconnect,
            verbose: self.verbose.max(other.verbose),
        }
    }
}

const EXIT_CODES: &str = "\
Exit codes:
  0  stopped by SIGTERM or SIGINT, or no front-end is left and none will come (--exit-on-disconnect, a connected
     --fd); the images are written out
  1  the host refused something: permission, descriptors, memory, I/O
  2  the command line or the configuration file, or what it names, is not usable";

#[cfg(test)]
mod tests {
    use super::*;

    fn beside(line: &str) -> Option<String> {
        let matches = Arguments::command().try_get_matches_from(line.split(' '));
        flag_beside_devices(&matches.unwrap())
    }

    #[test]
    fn options_of_a_device_are_in_one_place() {
        for flag in ["read-only", "num-queues=1", "null=1M", "latencies"] {
            let name = flag.split('=').next().map(str::to_owned);
            assert_eq!(beside(&format!("x --device null=1M --{flag}")), name);
            assert_eq!(beside(&format!("x --{flag} --config=f")), name);
            assert_eq!(beside(&format!("x --{flag}")), None);
        }
        assert_eq!(
            beside("x --device null=1M --device null=2M --config f -v"),
            None
        );
        assert_eq!(beside("x --exit-on-disconnect --device null=1M"), None);
    }

    #[test]
    fn options_of_the_program_add_up() {
        let of = |exit_on_disconnect, verbose| ProgramArguments {
            exit_on_disconnect,
            verbose,
        };
        assert_eq!(of(true, 0).or(&of(false, 2)), of(true, 2));
        assert_eq!(of(false, 1).or(&of(false, 0)), of(false, 1));
    }
}
