//! The vhost-user-blk server: a front-end connects over a Unix socket, hands over its memory and
//! rings, and the [`DataPlane`](crate::DataPlane) serves them.
//!
//! Offered besides the device's own features: the protocol features MQ, CONFIG, REPLY_ACK,
//! CONFIGURE_MEM_SLOTS (libblkio insists on the last three) and BACKEND_REQ, by which a front-end is told of a
//! new capacity. The message layer is the `vhost` crate's; `connection.rs` says what is made of its errors.
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

mod backend;
mod config_channel;
mod connection;
mod handed;
mod listener;
mod server;
mod serving;
mod vring_state;

pub use listener::{BindError, SocketOptions};
pub use server::{ServeError, Server};
