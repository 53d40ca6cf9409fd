//! The vhost-user-blk server: a front-end connects over a Unix socket, hands over its memory and
//! rings, and the [`DataPlane`](crate::DataPlane) serves them.
//!
//! Offered besides the device's own features: the protocol features MQ, CONFIG, REPLY_ACK,
//! CONFIGURE_MEM_SLOTS (libblkio insists on the last three), BACKEND_REQ, by which a front-end is told of a new
//! capacity, INFLIGHT_SHMFD, LOG_SHMFD, RESET_DEVICE and STATUS.
//!
//! ```text
//! socket ─ ancillary ─> stream ───> request ──> session ───────> backend ──> DataPlane
//!          recvmsg,     pieces to   bytes to    may it be sent,  what it
//!          owned fds    messages    values      what is answered does
//! ```
//!
//! A message that is refused leaves everything as it was. If the front-end asked for a reply it gets
//! a non-zero one; otherwise the refusal is logged.
//!
//! ```no_run
//! use blk_dataplane::vhost_user::Server;
//! use blk_dataplane::{Backing, Device, DeviceOptions};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::new(Backing::null(1 << 30), &DeviceOptions::default())?;
//! let server = Server::bind("/tmp/null.sock".as_ref(), device)?;
//! let until = event_poll::EventNotifier::new()?; // readable: stop
//! server.serve(&until)?;
//! # Ok(())
//! # }
//! ```

pub(crate) mod ancillary;
mod backend;
mod config_channel;
mod handed;
mod listener;
pub(crate) mod message;
pub(crate) mod request;
mod server;
mod serving;
mod session;
mod stream;
mod vring_state;

pub use listener::{BindError, SocketOptions};
pub use server::{ServeError, Server};
