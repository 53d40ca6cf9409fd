//! One front-end, from connect to disconnect.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use hostmem::MemoryMap;
use vhost::vhost_user::{BackendReqHandler, Error};

use super::backend::Backend;
use super::config_channel::{ConfigChannel, handed_over_next};
use super::handed::Handed;
use crate::data_thread::StartError;
use crate::dataplane::{DataPlane, StopError};
use crate::device::Device;

/// Refused messages that are logged one by one; a front-end that sends more is noted once.
const REFUSALS_LOGGED: u32 = 20;

/// Serves `stream` until it ends, then drains the device and lets go of the front-end's memory.
///
/// What is made of the `vhost` crate's errors: a refusal by the state machine has been answered
/// where an answer was due, so the connection goes on, except where the message has no way to say
/// no. Anything else means that the stream is at its end or cannot be trusted any more: the crate
/// has not always read the message's body then. That goes for `SocketRetry` too: the crate retries
/// headers itself, and by the time a body fails its header has been taken.
pub(super) fn serve(
    device: &Device,
    stream: UnixStream,
    handed: Arc<Handed>,
) -> Result<(), ConnectionError> {
    let memory = Arc::new(MemoryMap::empty());
    let plane = DataPlane::start(device, Arc::clone(&memory))?;
    let backend = Arc::new(Mutex::new(Backend::new(plane, memory, handed)));
    let looked_at = stream.try_clone()?;
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&backend));
    tracing::info!("front-end connected");
    let mut refusals = 0u32;
    loop {
        let channel = handed_over_next(&looked_at);
        match handler.handle_request() {
            Ok(()) => {
                if let Some(channel) = channel {
                    backend
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .tell_of_changes(ConfigChannel::new(channel));
                }
            }
            Err(Error::Disconnected) => break,
            Err(Error::ReqHandlerError(why)) => {
                refusals = refusals.saturating_add(1);
                if refusals <= REFUSALS_LOGGED {
                    tracing::warn!(%why, "refused a message");
                } else if refusals == REFUSALS_LOGGED + 1 {
                    tracing::warn!("refused more messages; they are no longer logged");
                }
                if backend
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .must_close()
                {
                    break;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "closing the connection");
                break;
            }
        }
    }
    // The socket goes first: the front-end learns at once that nobody listens any more.
    drop((handler, looked_at));
    if let Some(backend) = Arc::into_inner(backend) {
        let backend = backend.into_inner().unwrap_or_else(PoisonError::into_inner);
        backend.end()?;
    }
    tracing::info!("front-end gone, device drained");
    Ok(())
}

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
