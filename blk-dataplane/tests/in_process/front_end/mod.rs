//! A front-end over the socket, good and hostile, by the rows of hostile-inputs.md. Messages that must be refused:
//! NACK leaves everything as it was, CLOSE ends the connection and no more than that.

mod config_space;
mod control;
mod fds;
mod framing;
mod lifecycle;
mod log_and_record;
mod memory_table;
mod recovery;
mod ring_setup;
mod serving;

use std::sync::Arc;

use crate::support::front_end::{FrontEnd, Served};
use crate::support::queue::{FEATURES, GuestQueue};
use crate::support::ram::GuestRam;
use crate::support::request::{Framing, OK, Request};
use crate::support::scratch::null_device;
use crate::support::wire::{Answer, NEED_REPLY, V1, Wire, vring_state};

pub(super) const DISK: usize = 1 << 20;

pub(super) fn serve() -> Served {
    Served::new(null_device(1 << 20))
}

/// The server goes on with the next front-end.
pub(super) fn assert_serves(served: &Served) {
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let mut queue = front.up();
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
}

/// Negotiated, memory set, no ring.
pub(super) fn ready(served: &Served) -> FrontEnd {
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    front.negotiate(FEATURES);
    front.set_memory(&[0, 1, 2]);
    front
}

/// With everything negotiated, and memory set.
pub(super) fn ready_with(served: &Served, ram: &Arc<GuestRam>) -> FrontEnd {
    let mut front = served.connect(ram);
    front.negotiate_all(FEATURES);
    front.set_memory(&[0, 1, 2]);
    front
}

/// Whether the server refused, by acknowledgement or by closing.
pub(super) fn refused(
    wire: &mut Wire,
    code: u32,
    body: &[u8],
    fds: &[std::os::fd::BorrowedFd<'_>],
) -> bool {
    !wire.send(code, V1 | NEED_REPLY, body, fds)
        || match wire.receive() {
            Answer::Closed => true,
            answer => answer.value() != 0,
        }
}

/// Publishes many reads on `queue`.
pub(super) fn keep_busy(queue: &mut GuestQueue, count: u64) {
    for number in 0..count {
        let request = Request::read(number * 16 % 2000, 8192);
        queue.add(&request, &Framing::classic(&request));
    }
    queue.publish();
}

/// The body of SET_MEM_TABLE for regions (guest, size, user, offset).
pub(super) fn table(regions: &[[u64; 4]]) -> Vec<u8> {
    let mut body = vring_state(u32::try_from(regions.len()).unwrap(), 0);
    body.extend(regions.iter().flatten().flat_map(|word| word.to_le_bytes()));
    body
}
