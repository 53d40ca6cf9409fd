//! Messages of a front-end to a back-end and back, with an end to waiting: a back-end is no more trusted than a
//! front-end is.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::error::{During, LoadError, Message};
use crate::vhost_user::ancillary;
use crate::vhost_user::message::{
    BODY_MAX, DESCRIPTORS_MAX, HEADER_LEN, NEED_REPLY, REPLY, VERSION, encode, words,
};
use crate::vhost_user::request::Code;

/// The answer to a message.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// A connection to a back-end.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    socket: PathBuf,
    /// How long an answer may take. Setting memory up may take a back-end seconds (huge tables, pinning); one that
    /// serves somebody else answers never.
    patience: Duration,
    /// REPLY_ACK is negotiated.
    acknowledged: bool,
}

impl Connection {
    pub(super) fn open(socket: &Path, patience: Duration) -> Result<Self, LoadError> {
        let stream = UnixStream::connect(socket);
        let stream = stream.and_then(|stream| stream.set_nonblocking(true).map(|()| stream));
        Ok(Self {
            stream: stream.map_err(|source| LoadError::Connect {
                socket: socket.to_owned(),
                source,
            })?,
            socket: socket.to_owned(),
            patience,
            acknowledged: false,
        })
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// From here on each message that has no answer of its own is acknowledged.
    pub(super) fn acknowledge(&mut self) {
        self.acknowledged = true;
    }

    /// Sends a message that has no answer of its own, and waits for its acknowledgement if that is negotiated.
    pub(super) fn tell(
        &self,
        code: Code,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), LoadError> {
        let flags = if self.acknowledged { NEED_REPLY } else { 0 };
        let until = Instant::now() + self.patience;
        self.send(code, flags, body, fds, until)?;
        if !self.acknowledged {
            return Ok(());
        }
        match self.number(code, until)? {
            0 => Ok(()),
            answer => Err(LoadError::Refused {
                socket: self.socket.clone(),
                message: Message(code),
                answer,
            }),
        }
    }

    /// Sends a message and waits for its answer.
    pub(super) fn ask(&self, code: Code, body: &[u8]) -> Result<Answer, LoadError> {
        let until = Instant::now() + self.patience;
        self.send(code, 0, body, &[], until)?;
        self.answer(code, until)
    }

    /// The same where the answer is a number.
    pub(super) fn ask_number(&self, code: Code) -> Result<u64, LoadError> {
        let until = Instant::now() + self.patience;
        self.send(code, 0, &[], &[], until)?;
        self.number(code, until)
    }

    pub(super) fn broken(&self, code: Code, reason: impl Into<String>) -> LoadError {
        LoadError::Protocol {
            socket: self.socket.clone(),
            message: Message(code),
            reason: reason.into(),
        }
    }

    /// Whether the back-end has closed, or sent something that nobody asked for; without waiting.
    pub(super) fn gone(&self) -> bool {
        let mut byte = [0];
        loop {
            let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
            match nix::sys::socket::recv(self.stream.as_raw_fd(), &mut byte, flags) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return false,
                Ok(_) | Err(_) => return true,
            }
        }
    }

    fn closed(&self, code: Code) -> LoadError {
        LoadError::Closed {
            socket: self.socket.clone(),
            during: During::Message(Message(code)),
        }
    }

    fn failed(&self, code: Code, source: io::Error) -> LoadError {
        match source.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => self.closed(code),
            _ => LoadError::host(
                format!("{}: {:?}", self.socket.display(), Message(code)),
                source,
            ),
        }
    }

    fn wait(&self, code: Code, events: PollFlags, until: Instant) -> Result<(), LoadError> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.stream.as_fd(), events)];
            match poll(&mut fds, timeout) {
                Ok(0) if left.is_zero() => {
                    return Err(LoadError::Silent {
                        socket: self.socket.clone(),
                        message: Message(code),
                        patience: self.patience,
                    });
                }
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(self.failed(code, errno.into())),
            }
        }
    }

    fn send(
        &self,
        code: Code,
        flags: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
        until: Instant,
    ) -> Result<(), LoadError> {
        let message = encode(code as u32, VERSION | flags, body);
        let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let mut rights = if numbers.is_empty() { &[][..] } else { &rights };
        let mut rest = &message[..];
        while !rest.is_empty() {
            let parts = [IoSlice::new(rest)];
            let raw = self.stream.as_raw_fd();
            match sendmsg::<()>(raw, &parts, rights, MsgFlags::MSG_NOSIGNAL, None) {
                Ok(sent) => {
                    rest = &rest[sent..];
                    rights = &[];
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.wait(code, PollFlags::POLLOUT, until)?,
                Err(errno) => return Err(self.failed(code, errno.into())),
            }
        }
        Ok(())
    }

    fn answer(&self, code: Code, until: Instant) -> Result<Answer, LoadError> {
        let mut fds = Vec::new();
        let mut header = [0; HEADER_LEN];
        self.fill(code, &mut header, &mut fds, until)?;
        let [request, flags, size] = words(header);
        if request != code as u32 {
            return Err(self.broken(code, format!("it is an answer to message {request}")));
        }
        if flags & !NEED_REPLY != VERSION | REPLY {
            return Err(self.broken(code, format!("its flags are {flags:#x}")));
        }
        let fits = usize::try_from(size).ok().filter(|&size| size <= BODY_MAX);
        let Some(size) = fits else {
            let reason = format!("its body has {size} bytes, more than any answer");
            return Err(self.broken(code, reason));
        };
        let mut body = vec![0; size];
        self.fill(code, &mut body, &mut fds, until)?;
        Ok(Answer { body, fds })
    }

    fn number(&self, code: Code, until: Instant) -> Result<u64, LoadError> {
        let answer = self.answer(code, until)?;
        match <[u8; 8]>::try_from(answer.body.as_slice()) {
            Ok(bytes) => Ok(u64::from_ne_bytes(bytes)),
            Err(_) => {
                let reason = format!("its body has {} bytes and not 8", answer.body.len());
                Err(self.broken(code, reason))
            }
        }
    }

    fn fill(
        &self,
        code: Code,
        buffer: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        until: Instant,
    ) -> Result<(), LoadError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match ancillary::receive(&self.stream, &mut buffer[filled..], fds) {
                Ok(received) if received.truncated || fds.len() > DESCRIPTORS_MAX => {
                    return Err(self.broken(code, "it comes with too many descriptors"));
                }
                Ok(received) if received.len == 0 => return Err(self.closed(code)),
                Ok(received) => filled += received.len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(code, PollFlags::POLLIN, until)?;
                }
                Err(error) => return Err(self.failed(code, error)),
            }
        }
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
