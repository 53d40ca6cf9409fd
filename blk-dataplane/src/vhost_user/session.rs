//! One front-end, from connect to disconnect: what is taken, what is answered, and when it is over.
//!
//! | a message that | is answered |
//! |---|---|
//! | is carried out | with its own reply, or 0 if an acknowledgement is due |
//! | is refused (NACK) | not 0 if an acknowledgement is due, else with a line in the log |
//! | is refused and has a reply of its own | GET_CONFIG: with no bytes; others cannot say no: CLOSE |
//! | is no request known here | not 0 if an acknowledgement is due, else CLOSE: who sent it may wait for a reply |
//! | breaks the framing | CLOSE |
//!
//! A message that is refused has been read to its end, its descriptors are closed and nothing has changed.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use hostmem::MemoryMap;

use super::backend::{Answer, Backend, Refused};
use super::handed::Handed;
use super::message::{Reply, protocol};
use super::request::{Code, Request};
use super::stream::{Ended, Message, Stream};
use crate::data_thread::StartError;
use crate::dataplane::{DataPlane, StopError};
use crate::device::Device;

/// Refused messages that are logged one by one; a front-end that sends more is noted once (row Z3).
const REFUSALS_LOGGED: u32 = 20;

/// How long a memory map that was replaced may stay after the last request in it has completed. It goes here and not
/// on a data thread, which would stand still while the kernel takes a large one apart.
const RETIRED_FOR: Duration = Duration::from_millis(50);

/// How a connection can fail on our side.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    /// Nothing was served.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Nothing was served: no descriptor to be had.
    #[error(transparent)]
    Host(#[from] std::io::Error),
    /// Everything was served, and not all of it may have reached the disk.
    #[error(transparent)]
    Stop(#[from] StopError),
}

/// Serves `socket` until it ends, then drains the device and lets go of the front-end's memory.
pub(super) fn serve(
    device: &Device,
    socket: UnixStream,
    handed: Arc<Handed>,
) -> Result<(), ConnectionError> {
    let memory = Arc::new(MemoryMap::empty());
    let plane = DataPlane::start(device, Arc::clone(&memory))?;
    let mut session = Session {
        backend: Backend::new(plane, memory, handed)?,
        acked: 0,
        refusals: 0,
    };
    tracing::info!("front-end connected");
    session.run(&Stream::new(socket));
    // By now the socket is closed: the front-end has learnt at once that nobody listens any more.
    session.backend.end()?;
    tracing::info!("front-end gone, device drained");
    Ok(())
}

#[derive(Debug)]
struct Session {
    backend: Backend,
    /// Protocol features negotiated.
    acked: u64,
    refusals: u32,
}

/// What becomes of the connection.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    GoOn,
    Close,
}

impl Session {
    fn run(&mut self, stream: &Stream) {
        loop {
            while self.backend.holds_retired_memory()
                && matches!(stream.wait(RETIRED_FOR), Ok(false))
            {
                self.backend.drop_retired_memory();
            }
            match stream.receive() {
                Ok(message) => {
                    if self.answer(message, stream) == Next::Close {
                        return;
                    }
                }
                Err(Ended::Closed) => return,
                Err(error) => {
                    tracing::warn!(%error, "closing the connection");
                    return;
                }
            }
        }
    }

    fn answer(&mut self, message: Message, stream: &Stream) -> Next {
        let Message { header, body, fds } = message;
        let Some(code) = Code::of(header.code) else {
            drop(fds);
            self.note_refusal(&format!("request {} is not known", header.code));
            return if header.need_reply && self.acknowledges() {
                self.send(stream, header.code, &Answer::from(Reply::U64(1)))
            } else {
                Next::Close
            };
        };
        let outcome = Request::parse(code, &body, fds)
            .map_err(Refused::from)
            .and_then(|request| self.carry_out(code, request));
        // After the message: the one that negotiates acknowledgements is acknowledged.
        let due = header.need_reply && self.acknowledges();
        let answer = match outcome {
            Ok(Some(answer)) => Some(answer),
            Ok(None) => due.then(|| Reply::U64(0).into()),
            Err(why) => {
                self.note_refusal(&why.to_string());
                match code {
                    Code::GetConfig => Some(no_config(&body).into()),
                    Code::SetLogBase if due => Some(Reply::U64(1).into()),
                    _ if code.has_reply() => return Next::Close,
                    _ => due.then(|| Reply::U64(1).into()),
                }
            }
        };
        if !self.backend.is_alive() {
            tracing::error!("a data thread has ended; closing the connection");
            return Next::Close;
        }
        answer.map_or(Next::GoOn, |answer| self.send(stream, code as u32, &answer))
    }

    fn send(&self, stream: &Stream, code: u32, answer: &Answer) -> Next {
        match stream.send(&answer.reply.encode(code), answer.fd.as_ref()) {
            Ok(()) => Next::GoOn,
            Err(error) => {
                tracing::debug!(%error, "a reply could not be sent");
                Next::Close
            }
        }
    }

    /// Row S9.
    fn acknowledges(&self) -> bool {
        self.acked & protocol::REPLY_ACK != 0
    }

    fn carry_out(
        &mut self,
        code: Code,
        request: Request<OwnedFd>,
    ) -> Result<Option<Answer>, Refused> {
        if code.needs() & !self.acked != 0 {
            return Err(Refused::because(format!(
                "{code:?} needs protocol features {:#x}, which are not negotiated",
                code.needs()
            )));
        }
        match request {
            Request::GetProtocolFeatures => {
                Ok(Some(Reply::U64(self.backend.protocol_features()).into()))
            }
            Request::SetProtocolFeatures(features) => {
                // Row C7; INBAND_NOTIFICATIONS (C8) is none of those offered.
                let unknown = features & !self.backend.protocol_features();
                if unknown != 0 {
                    return Err(Refused::because(format!(
                        "protocol features {unknown:#x} were not offered"
                    )));
                }
                self.acked = features;
                Ok(None)
            }
            request => self.backend.carry_out(request),
        }
    }

    fn note_refusal(&mut self, why: &str) {
        self.refusals = self.refusals.saturating_add(1);
        if self.refusals <= REFUSALS_LOGGED {
            tracing::warn!(why, "refused a message");
        } else if self.refusals == REFUSALS_LOGGED + 1 {
            tracing::warn!("refused more messages; they are no longer logged");
        }
    }
}

/// The reply to a GET_CONFIG that asks for what there is not ("a zero length payload indicates an error"): that the
/// part has no bytes, with the offset and flags of the request as far as it had any.
fn no_config(body: &[u8]) -> Reply {
    let word = |at: usize| {
        let bytes = body.get(at..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u32::from_ne_bytes(*bytes))
    };
    Reply::Config {
        offset: word(0),
        flags: word(8),
        bytes: Vec::new(),
    }
}
