//! Why there is no report. Every message says whose fault it is and what to do.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::ring::RingFault;
use crate::vhost_user::request::Code;

/// Why a load ended before its time, or did not begin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// Nobody listens on the socket, or it may not be connected to. The caller's fault, or the host's.
    #[error("{}: cannot connect: {source}", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// What connect(2) said.
        source: io::Error,
    },
    /// An option that is wrong by itself, or that this back-end cannot do. The caller's fault.
    #[error("{option}: {reason}")]
    Option {
        /// The option, as the program `blk-dataplane bench` calls it.
        option: &'static str,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The back-end closed the connection: while it was set up, or while requests were in flight. The back-end's
    /// fault, or somebody ended it.
    #[error("{}: the back-end closed the connection {}; its own messages say why", socket.display(), during)]
    Closed {
        /// The socket.
        socket: PathBuf,
        /// When.
        during: During,
    },
    /// The back-end did not answer a message in time. Its fault; or it serves another front-end, and lets this one
    /// wait.
    #[error(
        "{}: no answer to {message:?} within {} s (--io-timeout); is another front-end connected to it?",
        socket.display(), patience.as_secs_f64()
    )]
    Silent {
        /// The socket.
        socket: PathBuf,
        /// The message.
        message: Message,
        /// How long was waited.
        patience: Duration,
    },
    /// The back-end refused a message. Its fault, or of an option it cannot serve.
    #[error("{}: the back-end refuses {message:?} (its answer is {answer}); its own messages say why", socket.display())]
    Refused {
        /// The socket.
        socket: PathBuf,
        /// The message.
        message: Message,
        /// The acknowledgement, which is not 0.
        answer: u64,
    },
    /// An answer that the specification does not know. The back-end's fault.
    #[error("{}: the answer to {message:?} is broken: {reason}", socket.display())]
    Protocol {
        /// The socket.
        socket: PathBuf,
        /// The message.
        message: Message,
        /// What is wrong with it.
        reason: String,
    },
    /// A feature is missing that a virtio-blk back-end of vhost-user cannot do without. The back-end's fault.
    #[error("{}: the back-end does not offer {feature}, without which no load can be put on it", socket.display())]
    Feature {
        /// The socket.
        socket: PathBuf,
        /// The feature.
        feature: &'static str,
    },
    /// It was to end at once ([`run_until`](super::run_until)), and has nothing to report.
    #[error("interrupted")]
    Interrupted,
    /// What the back-end wrote into a ring makes no sense. Its fault.
    #[error("{}: queue {queue}: {fault}", socket.display())]
    Ring {
        /// The socket.
        socket: PathBuf,
        /// The queue.
        queue: usize,
        /// What it wrote.
        fault: RingFault,
    },
    /// The back-end signalled its err descriptor: it does not go on with a ring. Its fault, or the load
    /// generator's.
    #[error("{}: queue {queue}: the back-end has given the ring up; its own messages say why", socket.display())]
    RingGivenUp {
        /// The socket.
        socket: PathBuf,
        /// The queue.
        queue: usize,
    },
    /// Requests are in flight and none has completed for long. The back-end's fault, or that of the disk under it.
    #[error(
        "{}: queue {queue}: {in_flight} requests are in flight and none has completed for {} s (--io-timeout)",
        socket.display(), patience.as_secs_f64()
    )]
    Stalled {
        /// The socket.
        socket: PathBuf,
        /// The queue.
        queue: usize,
        /// Requests in flight.
        in_flight: u64,
        /// How long was waited.
        patience: Duration,
    },
    /// The host refused something. Its fault, or an option asks for too much.
    #[error("{what}: {source}")]
    Host {
        /// What was refused.
        what: String,
        /// What the system call said.
        source: io::Error,
    },
}

impl LoadError {
    pub(super) fn option(option: &'static str, reason: impl Into<String>) -> Self {
        Self::Option {
            option,
            reason: reason.into(),
        }
    }

    pub(super) fn host(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Host {
            what: what.into(),
            source: source.into(),
        }
    }
}

/// When a connection was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum During {
    /// While the answer to a message was waited for.
    Message(Message),
    /// While requests were in flight.
    Load,
}

impl fmt::Display for During {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Message(message) => write!(f, "at {message:?}"),
            Self::Load => f.write_str("under load"),
        }
    }
}

/// A message of the vhost-user protocol, by its name.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Message(pub(super) Code);

impl fmt::Debug for Message {
    /// As the specification writes it: `GET_FEATURES`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = format!("{:?}", self.0);
        for (place, letter) in name.char_indices() {
            if place > 0 && letter.is_ascii_uppercase() {
                f.write_str("_")?;
            }
            write!(f, "{}", letter.to_ascii_uppercase())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_called_as_in_the_specification() {
        assert_eq!(
            format!("{:?}", Message(Code::GetVringBase)),
            "GET_VRING_BASE"
        );
        assert_eq!(format!("{:?}", Message(Code::SetOwner)), "SET_OWNER");
    }
}
