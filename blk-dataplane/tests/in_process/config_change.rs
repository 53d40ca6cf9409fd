//! A front-end that wants to know of a new capacity, and one that only says so.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use blk_dataplane::Device;

use crate::support::DEADLINE;
use crate::support::front_end::{FrontEnd, Served};
use crate::support::queue::FEATURES;
use crate::support::ram::GuestRam;
use crate::support::scratch::{Kind, Scratch};
use crate::support::wire::{Answer, NEED_REPLY, V1, Wire};

/// vhost-user.rst: SET_BACKEND_REQ_FD, and the message that comes.
const SET_BACKEND_REQ_FD: u32 = 21;
const CONFIG_CHANGE: [u8; 12] = [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

const SIZE: u64 = 1 << 20;

struct Setting {
    scratch: Scratch,
    device: Device,
    served: Served,
    size: u64,
}

impl Setting {
    fn new() -> Self {
        let scratch = Scratch::zeroed(Kind::Disk, 1 << 20);
        let device = scratch.device();
        let served = Served::new(device.clone());
        Self {
            scratch,
            device,
            served,
            size: SIZE,
        }
    }

    /// A front-end that may hand over a socket, with no ring yet.
    fn connected(&self) -> FrontEnd {
        let mut front = self.served.connect(&GuestRam::new());
        front.negotiate_all(FEATURES);
        front.set_memory(&[0, 1, 2]);
        front
    }

    /// The same with a ring that runs.
    fn front_end(&self) -> Wire {
        let mut front = self.connected();
        front.queue(0, 16);
        front.wire()
    }

    /// Another size, each time.
    fn resize(&mut self) {
        self.size += SIZE;
        self.scratch.truncate(self.size);
        assert_eq!(self.device.resize().unwrap().new, self.size);
    }
}

fn hand_over(wire: &mut Wire) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    assert!(wire.acknowledged(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]));
    // The acknowledgement comes from within the message's handling; the answer to the next message after it.
    assert!(wire.is_alive());
    ours.set_read_timeout(Some(DEADLINE)).unwrap();
    ours
}

#[track_caller]
fn assert_told(socket: &mut UnixStream) {
    let mut message = [0; 12];
    socket.read_exact(&mut message).unwrap();
    assert_eq!(message, CONFIG_CHANGE);
}

#[test]
fn front_end_is_told_of_each_new_capacity_and_reads_it() {
    let mut setting = Setting::new();
    let mut wire = setting.front_end();
    let mut socket = hand_over(&mut wire);
    for _ in 0..3 {
        setting.resize();
        assert_told(&mut socket);
        let mut body = [0u32, 8, 0].map(u32::to_le_bytes).concat();
        body.resize(20, 0);
        let Answer::Message { body, .. } = wire.ask(24, &body) else {
            panic!("closed");
        };
        assert_eq!(body[12..], (setting.size / 512).to_le_bytes());
    }
    // The same size again is no news.
    setting.device.resize().unwrap();
    socket.set_nonblocking(true).unwrap();
    let error = socket.read(&mut [0; 12]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
}

/// "Suspended device state": while all rings are stopped, the back-end sends nothing.
#[test]
fn change_while_no_ring_runs_is_told_when_one_does() {
    let mut setting = Setting::new();
    let mut front = setting.connected();
    let mut wire = front.wire();
    let mut socket = hand_over(&mut wire);
    let silent = |socket: &mut UnixStream| {
        socket.set_nonblocking(true).unwrap();
        let error = socket.read(&mut [0; 12]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
        socket.set_nonblocking(false).unwrap();
    };
    for _ in 0..3 {
        setting.resize();
        setting.resize();
        silent(&mut socket);
        let queue = front.queue(0, 16);
        assert_told(&mut socket);
        silent(&mut socket);
        setting.resize();
        assert_told(&mut socket);
        front.stop(&queue);
    }
}

#[test]
fn c15_later_socket_takes_the_place_of_an_earlier_one_and_ends_with_the_connection() {
    let mut setting = Setting::new();
    let mut wire = setting.front_end();
    let mut first = hand_over(&mut wire);
    let mut second = hand_over(&mut wire);
    setting.resize();
    assert_told(&mut second);
    assert_eq!(
        first.read(&mut [0; 12]).unwrap(),
        0,
        "closed, and nothing told"
    );
    drop(wire);
    assert_eq!(second.read(&mut [0; 12]).unwrap(), 0, "closed");
    setting.resize();
    let mut next = setting.front_end();
    let mut socket = hand_over(&mut next);
    setting.resize();
    assert_told(&mut socket);
}

#[test]
fn socket_that_is_never_read_keeps_nobody_from_resizing() {
    let mut setting = Setting::new();
    let mut wire = setting.front_end();
    let mut socket = hand_over(&mut wire);
    // Far more than a socket holds of messages this small.
    for _ in 0..2000 {
        setting.size = SIZE + (setting.size + 512) % SIZE;
        setting.scratch.truncate(setting.size);
        setting.device.resize().unwrap();
    }
    assert!(wire.is_alive());
    // Whole messages, however many.
    socket
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    assert_told(&mut socket);
    let mut rest = Vec::new();
    let _ = socket.read_to_end(&mut rest);
    assert!(rest.chunks(12).all(|message| message == CONFIG_CHANGE));
    // Nor one whose other end has gone.
    drop(socket);
    setting.resize();
    assert!(wire.is_alive());
}

#[test]
fn what_is_no_socket_is_refused_and_the_next_front_end_served() {
    let mut setting = Setting::new();
    let file = std::fs::File::open("/dev/null").unwrap();
    let datagrams = std::os::unix::net::UnixDatagram::unbound().unwrap();
    for bad in [
        &[file.as_fd()][..],
        &[datagrams.as_fd()],
        &[],
        &[file.as_fd(); 3],
    ] {
        let mut wire = setting.front_end();
        assert!(wire.send(SET_BACKEND_REQ_FD, V1 | NEED_REPLY, &[], bad));
        match wire.receive() {
            Answer::Closed => {}
            answer => assert_ne!(answer.value(), 0),
        }
        setting.resize();
    }
    let mut wire = setting.front_end();
    let mut socket = hand_over(&mut wire);
    setting.resize();
    assert_told(&mut socket);
}
