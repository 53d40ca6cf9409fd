//! From descriptions to devices with sockets: all of them, or none and a message.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use blk_dataplane::Device;
use blk_dataplane::vhost_user::{Server, SocketOptions};
use nix::unistd::Group;

use crate::activation;
use crate::device_arguments::DeviceArguments;
use crate::failure::{bind_failure, device_failure, start_failure};
use crate::origin::Origin;
use crate::{Failure, backing, inherited_fd};

/// A device as the operator wants it.
#[derive(Debug)]
pub(crate) struct Description {
    pub(crate) arguments: DeviceArguments,
    pub(crate) origin: Origin,
}

/// A device, and what it goes by where there are several.
#[derive(Clone, Debug)]
pub(crate) struct Named {
    pub(crate) name: Option<String>,
    pub(crate) device: Device,
}

impl Named {
    /// What a message about it begins with.
    pub(crate) fn prefix(&self) -> String {
        match &self.name {
            Some(name) => format!("blk-dataplane: {name}: "),
            None => "blk-dataplane: ".into(),
        }
    }
}

/// A device on its socket.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) named: Named,
    pub(crate) server: Server,
}

/// Where a device is to be served.
#[derive(Debug)]
enum Socket {
    Path(PathBuf),
    /// `--fd`.
    Given(i32, OwnedFd),
    /// By whoever started the program.
    Passed(OwnedFd),
}

/// A description with all that can be known before anything is opened.
#[derive(Debug)]
pub(crate) struct Checked<'a> {
    description: &'a Description,
    name: Option<String>,
    socket: Socket,
}

impl Description {
    fn place<T>(&self, result: Result<T, Failure>) -> Result<T, Failure> {
        result.map_err(|failure| self.origin.place(failure))
    }

    fn device_failure(&self, error: &blk_dataplane::DeviceError) -> Failure {
        device_failure(error, self.arguments.blk_file.as_deref())
    }
}

/// Finds what can be found without opening anything, and takes the descriptors that were left open for the program.
/// To be called before anything is opened: a number that was not inherited must not name a descriptor of ours.
pub(crate) fn check(descriptions: &[Description]) -> Result<Vec<Checked<'_>>, Failure> {
    let arguments: Vec<_> = descriptions.iter().map(|each| &each.arguments).collect();
    let passed = activation::assign(activation::take()?, &arguments)?;
    let several = descriptions.len() > 1;
    let (mut names, mut paths) = (HashSet::new(), HashSet::new());
    let mut checked = Vec::new();
    for (index, (description, passed)) in descriptions.iter().zip(passed).enumerate() {
        let number = several.then_some(index);
        let each = description.place(Checked::new(description, number, passed))?;
        if let Some(name) = &each.name
            && !names.insert(name.clone())
        {
            return description.place(Err(Failure::usage(format!(
                "--name: two devices are called {name}; give each a --name of its own"
            ))));
        }
        if let Socket::Path(path) = &each.socket
            && !paths.insert(path.clone())
        {
            return description.place(Err(Failure::usage(format!(
                "--socket-path: two devices are to listen at {}; give each a --socket-path of its own",
                path.display()
            ))));
        }
        checked.push(each);
    }
    Ok(checked)
}

/// Opens the images, and then the sockets: whoever finds a socket finds a device behind it.
pub(crate) fn open(
    checked: Vec<Checked<'_>>,
    exit_on_disconnect: bool,
) -> Result<Vec<Served>, Failure> {
    let mut devices = Vec::new();
    for Checked { description, .. } in &checked {
        devices.push(description.place(open_device(description))?);
    }
    let mut served = Vec::new();
    for (each, device) in checked.into_iter().zip(devices) {
        let description = each.description;
        let server = each.socket.serve(description, device.clone());
        let mut server = description.place(server)?;
        if exit_on_disconnect {
            server = server.once();
        }
        let name = each.name;
        if let Some(name) = &name {
            server = server.named(name);
        }
        let named = Named { name, device };
        served.push(Served { named, server });
    }
    Ok(served)
}

impl<'a> Checked<'a> {
    /// `number` is the device's where there are several.
    fn new(
        description: &'a Description,
        number: Option<usize>,
        passed: Option<OwnedFd>,
    ) -> Result<Self, Failure> {
        let arguments = &description.arguments;
        arguments.check()?;
        let options = arguments.device_options();
        options
            .check()
            .map_err(|error| description.device_failure(&error))?;
        if passed.is_some() && arguments.socket_group.is_some() {
            return Err(Failure::usage(
                "--socket-group: the socket was made by whoever started the program; give it a group there \
                 (SocketGroup= in the socket unit)",
            ));
        }
        let name = arguments.name.clone();
        Ok(Self {
            description,
            name: name.or_else(|| Some(format!("blk{}", number?))),
            socket: Socket::of(arguments, passed)?,
        })
    }
}

fn open_device(description: &Description) -> Result<Device, Failure> {
    let arguments = &description.arguments;
    let backing = backing::open(arguments)?;
    let device = Device::new(backing, &arguments.device_options())
        .map_err(|error| description.device_failure(&error))?;
    Server::probe(&device).map_err(|error| start_failure(&error))?;
    Ok(device)
}

impl Socket {
    fn of(arguments: &DeviceArguments, passed: Option<OwnedFd>) -> Result<Self, Failure> {
        Ok(match (passed, arguments.fd) {
            (Some(socket), _) => Self::Passed(socket),
            (None, Some(number)) => Self::Given(number, inherited_socket(number)?),
            (None, None) => Self::Path(arguments.socket_path()?),
        })
    }

    fn serve(self, description: &Description, device: Device) -> Result<Server, Failure> {
        match self {
            Self::Path(path) => {
                let mut options = SocketOptions::default();
                if let Some(group) = &description.arguments.socket_group {
                    options.group = Some(number_of(group)?);
                }
                Server::bind_with(&path, &options, device).map_err(|error| bind_failure(&error))
            }
            Self::Given(number, fd) => Server::inherited(fd, device).map_err(|error| {
                Failure::usage(format!(
                    "--fd={number}: {error}; pass one, listening or connected"
                ))
            }),
            Self::Passed(fd) => Server::inherited(fd, device).map_err(|error| {
                Failure::usage(format!(
                    "LISTEN_FDS: {error}; write ListenStream= with a path in the socket unit"
                ))
            }),
        }
    }
}

fn inherited_socket(number: i32) -> Result<OwnedFd, Failure> {
    inherited_fd::take(number).map_err(|error| {
        Failure::usage(format!(
            "--fd={number}: {error}; pass an open Unix stream socket as descriptor {number}"
        ))
    })
}

/// Looked up late: doing so may open files and leave them open, and `--fd` is taken before.
fn number_of(group: &str) -> Result<u32, Failure> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    match Group::from_name(group) {
        Ok(Some(found)) => Ok(found.gid.as_raw()),
        Ok(None) => Err(Failure::usage(format!(
            "--socket-group: there is no group {group:?}; give a name or a number that getent group knows"
        ))),
        Err(errno) => Err(Failure::host(format!(
            "--socket-group: cannot look up {group:?}: {errno}; give its number"
        ))),
    }
}
