//! Telling the service manager what the program is about: `sd_notify(3)`, a datagram of a few words.
//!
//! What libraries for it add (statuses, watchdogs, descriptors kept) is not needed; the rest is one `sendto`.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Once;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::standard_error::say;

/// How long a manager may take to have room for a message. One that has none for that long is of no use to
/// anybody.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where messages go; nowhere if nobody has asked for any.
#[derive(Debug)]
pub(crate) struct ServiceManager {
    address: Option<SocketAddr>,
    /// Whether it has been told that the program ends.
    stopping: Once,
}

impl ServiceManager {
    /// The one that `NOTIFY_SOCKET` names.
    pub(crate) fn from_environment() -> Self {
        Self {
            address: address_in_environment(),
            stopping: Once::new(),
        }
    }

    /// Front-ends may connect.
    pub(crate) fn ready(&self, devices: usize) {
        let s = if devices == 1 { "" } else { "s" };
        self.tell(&format!("READY=1\nSTATUS=Serving {devices} device{s}"));
    }

    /// The images' sizes are being read anew; [`ready`](Self::ready) says when that is over.
    pub(crate) fn reloading(&self) {
        // By this the manager tells an answer to its signal from one to an earlier signal.
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
        self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={}", now.as_micros()));
    }

    /// What is in flight is completed and written out, and nobody can connect any more. Told once, and when this
    /// returns, whoever else has called it.
    pub(crate) fn stopping(&self) {
        self.stopping
            .call_once(|| self.tell("STOPPING=1\nSTATUS=Completing what is in flight"));
    }

    fn tell(&self, message: &str) {
        let Some(address) = &self.address else {
            return;
        };
        let sent = UnixDatagram::unbound().and_then(|socket| {
            socket.set_write_timeout(Some(PATIENCE))?;
            socket.send_to_addr(message.as_bytes(), address)
        });
        if let Err(error) = sent {
            say(&format!(
                "blk-dataplane: NOTIFY_SOCKET: {error}; nobody was told {message:?}\n"
            ));
        }
    }
}

fn address_in_environment() -> Option<SocketAddr> {
    let name = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty())?;
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        [b'/', ..] => SocketAddr::from_pathname(&name),
        // Of virtual machines' managers, which wait for a whole system and not for one program.
        _ => Err(io::Error::other(
            "neither a path nor an abstract socket's name",
        )),
    };
    address
        .inspect_err(|error| {
            say(&format!(
                "blk-dataplane: NOTIFY_SOCKET: {}: {error}; nobody is told that the program is ready\n",
                name.display()
            ));
        })
        .ok()
}
