//! The descriptors that a front-end sends, and what is open in this process.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};

use event_poll::EventNotifier;
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// Kinds of descriptor.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    Event,
    /// A file for guest memory.
    Ram,
    /// A page for the log of written pages.
    Log,
    /// The memory that GET_INFLIGHT_FD gave; before there was one, an event.
    Inflight,
    Pipe,
    Stream,
    Datagram,
}

impl Kind {
    pub(super) const ALL: &[Self] = &[
        Self::Event,
        Self::Ram,
        Self::Log,
        Self::Inflight,
        Self::Pipe,
        Self::Stream,
        Self::Datagram,
    ];
}

/// In bytes.
pub(super) const RAM_LEN: u64 = 0x1_0000;
pub(super) const LOG_LEN: u64 = 0x1000;

#[derive(Debug)]
pub(super) struct Files {
    event: EventNotifier,
    ram: File,
    log: File,
    pipe: OwnedFd,
    stream: (UnixStream, UnixStream),
    datagram: UnixDatagram,
    pub(super) inflight: Option<OwnedFd>,
}

fn memory(name: &str, len: u64) -> File {
    let file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

impl Files {
    pub(super) fn new() -> Self {
        Self {
            event: EventNotifier::new().unwrap(),
            ram: memory("fuzz-ram", RAM_LEN),
            log: memory("fuzz-log", LOG_LEN),
            pipe: std::io::pipe().unwrap().0.into(),
            stream: UnixStream::pair().unwrap(),
            datagram: UnixDatagram::unbound().unwrap(),
            inflight: None,
        }
    }

    pub(super) fn fd(&self, kind: Kind) -> BorrowedFd<'_> {
        match kind {
            Kind::Event => self.event.as_fd(),
            Kind::Ram => self.ram.as_fd(),
            Kind::Log => self.log.as_fd(),
            Kind::Inflight => self
                .inflight
                .as_ref()
                .map_or_else(|| self.event.as_fd(), AsFd::as_fd),
            Kind::Pipe => self.pipe.as_fd(),
            Kind::Stream => self.stream.0.as_fd(),
            Kind::Datagram => self.datagram.as_fd(),
        }
    }
}

/// Descriptors open in this process.
pub(super) fn open() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Receives bytes and a descriptor, if one comes with them: opened anew by its number, which is then closed, since
/// nothing here is unsafe.
pub(super) fn receive(socket: &UnixStream, bytes: &mut [u8]) -> (usize, Option<OwnedFd>) {
    let mut room = nix::cmsg_space!(RawFd);
    let mut parts = [IoSliceMut::new(bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let raw = socket.as_raw_fd();
    let message = match recvmsg::<()>(raw, &mut parts, Some(&mut room), flags) {
        Err(Errno::ECONNRESET) => return (0, None),
        received => received.unwrap(),
    };
    let mut fd = None;
    for part in message.cmsgs().unwrap() {
        if let ControlMessageOwned::ScmRights(numbers) = part {
            for number in numbers {
                let name = format!("/proc/self/fd/{number}");
                let file = File::options().read(true).write(true).open(name).unwrap();
                fd = Some(file.into());
                nix::unistd::close(number).unwrap();
            }
        }
    }
    (message.bytes, fd)
}
