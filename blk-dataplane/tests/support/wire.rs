//! The vhost-user protocol byte by byte, for what a well-behaved front-end library does not send.

use std::io::{ErrorKind, IoSlice, Read};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::DEADLINE;

/// Request codes (vhost-user.rst), written out here: the tests are an oracle of their own.
pub(crate) const GET_FEATURES: u32 = 1;
pub(crate) const SET_FEATURES: u32 = 2;
pub(crate) const SET_OWNER: u32 = 3;
pub(crate) const SET_MEM_TABLE: u32 = 5;
pub(crate) const SET_VRING_NUM: u32 = 8;
pub(crate) const SET_VRING_ADDR: u32 = 9;
pub(crate) const SET_VRING_BASE: u32 = 10;
pub(crate) const GET_VRING_BASE: u32 = 11;
pub(crate) const SET_VRING_KICK: u32 = 12;
pub(crate) const SET_VRING_CALL: u32 = 13;
pub(crate) const SET_VRING_ERR: u32 = 14;
pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
pub(crate) const SET_VRING_ENABLE: u32 = 18;
pub(crate) const SET_LOG_BASE: u32 = 6;
pub(crate) const SET_LOG_FD: u32 = 7;
pub(crate) const GET_QUEUE_NUM: u32 = 17;
pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
pub(crate) const GET_CONFIG: u32 = 24;
pub(crate) const SET_CONFIG: u32 = 25;
pub(crate) const GET_INFLIGHT_FD: u32 = 31;
pub(crate) const SET_INFLIGHT_FD: u32 = 32;
pub(crate) const RESET_DEVICE: u32 = 34;
pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
pub(crate) const ADD_MEM_REG: u32 = 37;
pub(crate) const REM_MEM_REG: u32 = 38;
pub(crate) const SET_STATUS: u32 = 39;
pub(crate) const GET_STATUS: u32 = 40;

/// In the word of kick, call and err: there is no descriptor.
pub(crate) const NOFD: u64 = 1 << 8;

/// Protocol version 1, the lowest two bits of a header's flags.
pub(crate) const V1: u32 = 1;
pub(crate) const REPLY: u32 = 4;
pub(crate) const NEED_REPLY: u32 = 8;

/// VHOST_F_LOG_ALL
pub(crate) const LOG_ALL: u64 = 1 << 26;
pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Protocol features.
pub(crate) const P_MQ: u64 = 1;
pub(crate) const P_LOG_SHMFD: u64 = 1 << 1;
pub(crate) const P_REPLY_ACK: u64 = 1 << 3;
pub(crate) const P_BACKEND_REQ: u64 = 1 << 5;
pub(crate) const P_CONFIG: u64 = 1 << 9;
pub(crate) const P_INFLIGHT_SHMFD: u64 = 1 << 12;
pub(crate) const P_RESET_DEVICE: u64 = 1 << 13;
pub(crate) const P_CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
pub(crate) const P_STATUS: u64 = 1 << 16;
/// All that there are of these.
pub(crate) const P_ALL: u64 = P_MQ
    | P_LOG_SHMFD
    | P_REPLY_ACK
    | P_BACKEND_REQ
    | P_CONFIG
    | P_INFLIGHT_SHMFD
    | P_RESET_DEVICE
    | P_CONFIGURE_MEM_SLOTS
    | P_STATUS;

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Message {
        code: u32,
        flags: u32,
        body: Vec<u8>,
    },
    /// The other end closed.
    Closed,
}

impl Answer {
    pub(crate) fn value(&self) -> u64 {
        match self {
            Self::Message { body, .. } => u64::from_le_bytes(body[..8].try_into().unwrap()),
            Self::Closed => panic!("closed"),
        }
    }
}

pub(crate) struct Wire {
    pub(crate) stream: UnixStream,
}

pub(crate) fn header(code: u32, flags: u32, size: u32) -> Vec<u8> {
    [code, flags, size].map(u32::to_le_bytes).concat()
}

/// Header and body.
pub(crate) fn message(code: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = header(code, flags, u32::try_from(body.len()).unwrap());
    bytes.extend_from_slice(body);
    bytes
}

/// The body of messages about one ring.
pub(crate) fn vring_state(index: u32, num: u32) -> Vec<u8> {
    [index, num].map(u32::to_le_bytes).concat()
}

impl Wire {
    pub(crate) fn connect(path: &Path) -> Self {
        Self::over(UnixStream::connect(path).unwrap())
    }

    pub(crate) fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        Self { stream }
    }

    /// Sends bytes with descriptors. False if the other end has closed.
    pub(crate) fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights };
        let mut rest = bytes;
        let mut rights = rights;
        while !rest.is_empty() {
            let iov = [IoSlice::new(rest)];
            let flags = MsgFlags::MSG_NOSIGNAL;
            match sendmsg::<()>(self.stream.as_raw_fd(), &iov, rights, flags, None) {
                Ok(sent) => rest = &rest[sent..],
                Err(nix::errno::Errno::EPIPE | nix::errno::Errno::ECONNRESET) => return false,
                Err(errno) => panic!("sendmsg: {errno}"),
            }
            rights = &[];
        }
        true
    }

    pub(crate) fn send(&self, code: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        self.send_bytes(&message(code, flags, body), fds)
    }

    /// The next message from the other end; fails at the deadline.
    pub(crate) fn receive(&mut self) -> Answer {
        let mut header = [0; 12];
        match self.stream.read_exact(&mut header) {
            Ok(()) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset
                ) =>
            {
                return Answer::Closed;
            }
            Err(error) => panic!("no answer: {error}"),
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let mut body = vec![0; usize::try_from(word(8)).unwrap()];
        self.stream.read_exact(&mut body).unwrap();
        Answer::Message {
            code: word(0),
            flags: word(4),
            body,
        }
    }

    pub(crate) fn ask(&mut self, code: u32, body: &[u8]) -> Answer {
        self.send(code, V1, body, &[]);
        self.receive()
    }

    /// Sends a message that wants an acknowledgement; whether it was a good one.
    pub(crate) fn acknowledged(&mut self, code: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        assert!(self.send(code, V1 | NEED_REPLY, body, fds));
        let answer = self.receive();
        assert!(
            matches!(&answer, Answer::Message { code: c, flags, .. } if *c == code && *flags == V1 | REPLY),
            "{answer:?}"
        );
        answer.value() == 0
    }

    /// Owner, features and protocol features, with acknowledgements from then on.
    pub(crate) fn negotiate(&mut self, features: u64) {
        assert!(self.send(SET_OWNER, V1, &[], &[]));
        let offered = self.ask(GET_FEATURES, &[]).value();
        assert_eq!(offered & features, features);
        let features = features | PROTOCOL_FEATURES;
        assert!(self.send(SET_FEATURES, V1, &features.to_le_bytes(), &[]));
        let offered = self.ask(GET_PROTOCOL_FEATURES, &[]).value();
        let wanted = P_MQ | P_CONFIG | P_REPLY_ACK | P_CONFIGURE_MEM_SLOTS;
        assert_eq!(offered & wanted, wanted);
        assert!(self.send(SET_PROTOCOL_FEATURES, V1, &wanted.to_le_bytes(), &[]));
    }

    /// Whether the other end still talks.
    pub(crate) fn is_alive(&mut self) -> bool {
        self.send(GET_FEATURES, V1, &[], &[]) && self.receive() != Answer::Closed
    }
}
