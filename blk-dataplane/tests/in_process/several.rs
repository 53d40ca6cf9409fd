//! Several devices served by one call, and how serving ends.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;

use blk_dataplane::Backing;
use blk_dataplane::testing::TestDisk;
use blk_dataplane::vhost_user::{ServeError, Server};
use event_poll::EventNotifier;
use ioq::testing::PowerLossDisk;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, send, shutdown};
use tempfile::TempDir;

use crate::load::Motor;
use crate::support::front_end::FrontEnd;
use crate::support::ram::GuestRam;
use crate::support::request::{Framing, OK, Request};
use crate::support::scratch::{Kind, Scratch, null_device, on_threads};
use crate::support::wire::{Answer, GET_FEATURES, V1, Wire, message};
use crate::support::{DEADLINE, Watchdog, eventually, pattern};

/// Servers at work, whose sockets are numbered.
struct Several {
    directory: TempDir,
    until: EventNotifier,
    thread: JoinHandle<Result<(), ServeError>>,
    _watchdog: Watchdog,
}

impl Several {
    fn new(make: impl FnOnce(&dyn Fn(usize) -> PathBuf) -> Vec<Server>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let servers = make(&|index| directory.path().join(index.to_string()));
        let until = EventNotifier::new().unwrap();
        let stop = until.try_clone().unwrap();
        let thread = std::thread::spawn(move || Server::serve_all(servers, &stop));
        Self {
            directory,
            until,
            thread,
            _watchdog: Watchdog::start(),
        }
    }

    fn path(&self, index: usize) -> PathBuf {
        self.directory.path().join(index.to_string())
    }

    fn front_end(&self, index: usize) -> FrontEnd {
        FrontEnd::connect(&self.path(index), &GuestRam::new())
    }

    fn wire(&self, index: usize) -> Wire {
        Wire::connect(&self.path(index))
    }

    fn stop(self) -> Result<(), ServeError> {
        self.until.notify().unwrap();
        self.wait()
    }

    fn wait(self) -> Result<(), ServeError> {
        eventually("the servers to stop", || self.thread.is_finished());
        self.thread.join().unwrap()
    }
}

fn null(path: PathBuf) -> Server {
    Server::bind(&path, null_device(1 << 20)).unwrap()
}

#[test]
fn each_socket_leads_to_its_own_device() {
    let images: Vec<_> = (0..3)
        .map(|n| Scratch::new(Kind::Shm, &pattern(n, 1 << 16)))
        .collect();
    let served = Several::new(|path| {
        let bind = |(n, image): (usize, &Scratch)| Server::bind(&path(n), image.device()).unwrap();
        images.iter().enumerate().map(bind).collect()
    });
    // All at the same time.
    let mut fronts: Vec<_> = (0..3).map(|index| served.front_end(index)).collect();
    let mut queues: Vec<_> = fronts.iter_mut().map(FrontEnd::up).collect();
    for (queue, image) in queues.iter_mut().zip(&images) {
        let read = queue.run(&Request::read(0, 4096));
        assert_eq!(read.status, Some(OK));
        assert_eq!(read.data, image.content()[..4096]);
    }
    served.stop().unwrap();
}

#[test]
fn s1_s13_front_ends_of_one_device_do_not_hold_up_another() {
    let image = Scratch::zeroed(Kind::Shm, 1 << 20);
    let served = Several::new(|path| {
        let other = Server::bind(&path(1), image.device()).unwrap();
        vec![null(path(0)), other, null(path(2)), null(path(3))]
    });
    // One stalls in the middle of a message, one never reads its replies, one has said nothing.
    let mut stalled = served.wire(0);
    stalled.stream.write_all(&[1, 0, 0]).unwrap();
    let flooding = served.wire(2);
    flooding.stream.set_nonblocking(true).unwrap();
    let question = message(GET_FEATURES, V1, &[]);
    while (&flooding.stream).write(&question).is_ok() {}
    let silent = served.wire(3);
    let mut front = served.front_end(1);
    let mut queue = front.up();
    for (n, sector) in (0..512u64).enumerate() {
        let data = pattern(sector, 512);
        let (status, _) = queue.answer(&Request::write(sector, &data));
        assert_eq!(status, Some(OK));
        let read = queue.run(&Request::read(sector, 512));
        assert_eq!((read.status, read.data), (Some(OK), data));
        // And the others come and go meanwhile.
        if n % 64 == 0 {
            let mut garbage = served.wire(0);
            let _ = garbage.stream.write_all(&[0xff; 64]);
        }
    }
    drop((stalled, flooding, silent));
    served.stop().unwrap();
}

#[test]
fn a_socket_that_is_shut_down_ends_its_own_device_and_is_told_at_the_end() {
    for how in [Shutdown::Read, Shutdown::Both] {
        let dead = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dead.path().join("s")).unwrap();
        let ours = listener.try_clone().unwrap();
        let served = Several::new(|path| {
            let inherited = Server::inherited(OwnedFd::from(listener), null_device(1 << 20));
            vec![inherited.unwrap(), null(path(1))]
        });
        // By whoever handed it down.
        shutdown(ours.as_raw_fd(), how).unwrap();
        let mut front = served.front_end(1);
        let mut queue = front.up();
        assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
        let ended = served.stop();
        assert!(matches!(ended, Err(ServeError::Host(_))), "{how:?}");
    }
}

#[test]
fn once_means_one_front_end_for_each_device_and_the_end_with_the_last() {
    let served = Several::new(|path| vec![null(path(0)).once(), null(path(1)).once()]);
    let mut first = served.front_end(0);
    let mut queue = first.up();
    assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
    assert!(
        !served.path(0).exists(),
        "nobody else can connect from now on"
    );
    drop((first, queue));
    let mut second = served.front_end(1);
    let mut queue = second.up();
    assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
    assert!(!served.thread.is_finished());
    drop((second, queue));
    served.wait().unwrap();
}

#[test]
fn whoever_connects_and_goes_without_a_word_is_not_the_one() {
    let served = Several::new(|path| vec![null(path(0)).once()]);
    for _ in 0..3 {
        drop(UnixStream::connect(served.path(0)).unwrap());
    }
    // As a second program does to see whether somebody is there.
    let refused = Server::bind(&served.path(0), null_device(1 << 20));
    assert!(refused.is_err());
    let mut front = served.front_end(0);
    let mut queue = front.up();
    assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
    drop((front, queue));
    served.wait().unwrap();
}

#[test]
fn connected_sockets_alone_end_with_the_last_of_them() {
    let (one, his) = UnixStream::pair().unwrap();
    let (other, hers) = UnixStream::pair().unwrap();
    let served = Several::new(|_| {
        [his, hers]
            .map(|end| Server::inherited(OwnedFd::from(end), null_device(1 << 20)).unwrap())
            .into()
    });
    drop(one);
    let mut other = Wire::over(other);
    assert!(other.is_alive());
    assert!(!served.thread.is_finished());
    drop(other);
    served.wait().unwrap();
}

#[test]
fn stopping_takes_the_socket_away_before_the_connection() {
    let served = Several::new(|path| vec![null(path(0))]);
    let mut front = served.front_end(0);
    let mut queue = front.up();
    assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
    let mut wire = front.wire();
    served.until.notify().unwrap();
    // The end of the stream.
    assert_eq!(wire.stream.read(&mut [0; 16]).unwrap(), 0);
    let again = UnixStream::connect(served.path(0)).unwrap_err();
    assert_eq!(again.kind(), std::io::ErrorKind::NotFound);
    served.wait().unwrap();
}

#[test]
fn out_of_band_data_is_no_front_end() {
    let served = Several::new(|path| vec![null(path(0))]);
    let odd = UnixStream::connect(served.path(0)).unwrap();
    odd.set_read_timeout(Some(DEADLINE)).unwrap();
    match send(odd.as_fd().as_raw_fd(), &[1], MsgFlags::MSG_OOB) {
        // poll(2) tells of it and read(2) does not: closed, rather than looked at again and again.
        Ok(_) => assert_eq!((&odd).read(&mut [0]).unwrap_or(0), 0),
        // A kernel that has none on these sockets.
        Err(errno) => assert_eq!(errno, Errno::EOPNOTSUPP),
    }
    let mut front = served.front_end(0);
    let mut queue = front.up();
    assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
    served.stop().unwrap();
}

#[test]
fn s6_a_front_end_that_is_shut_out_learns_it_before_its_disk_is_done() {
    // It stands still until it has a motor.
    let disk = PowerLossDisk::new(vec![0; 1 << 20], 1);
    let device = on_threads(Backing::Testing(TestDisk::from(&disk)), 1);
    let served = Several::new(|path| vec![Server::bind(&path(0), device).unwrap()]);
    let mut front = served.front_end(0);
    let mut queue = front.up();
    let write = Request::write(0, &[1; 512]);
    queue.add(&write, &Framing::classic(&write));
    queue.publish();
    eventually("the disk to have it", || disk.in_flight() == 1);
    let mut wire = front.wire();
    assert!(wire.send_bytes(&[0xff; 12], &[]));
    assert_eq!(wire.receive(), Answer::Closed);
    assert_eq!(disk.in_flight(), 1);
    let _motor = Motor::start(&disk);
    assert_eq!(queue.next().status, Some(OK), "completed all the same");
    served.stop().unwrap();
}
