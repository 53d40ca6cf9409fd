//! The socket file: made, guarded, replaced and removed.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};

use blk_dataplane::vhost_user::{BindError, ServeError, Server};
use event_poll::EventNotifier;

use crate::support::eventually;
use crate::support::front_end::{FrontEnd, Served};
use crate::support::queue::FEATURES;
use crate::support::ram::GuestRam;
use crate::support::request::{OK, Request};
use crate::support::scratch::null_device;
use crate::support::wire::Wire;

#[test]
fn socket_is_for_owner_and_group_and_goes_with_the_server() {
    let served = Served::new(null_device(1 << 20));
    let path = served.path.clone();
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o660);
    served.stop().unwrap();
    assert!(!path.exists());
}

#[test]
fn stale_socket_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let server = Server::bind(&path, null_device(1 << 20)).unwrap();
    assert_eq!(server.path(), Some(path.as_path()));
    drop(UnixStream::connect(&path).unwrap());
    drop(server);
    assert!(!path.exists());
}

#[test]
fn live_socket_is_refused_and_left_alone() {
    let served = Served::new(null_device(1 << 20));
    let refused = Server::bind(&served.path, null_device(1 << 20));
    assert!(matches!(refused, Err(BindError::InUse { .. })));
    // Whoever lives there is none the worse for it, and its file is there.
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let mut queue = front.up();
    assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
}

#[test]
fn live_socket_with_a_full_backlog_is_refused_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
    let mut waiting = Vec::new();
    for _ in 0..4 {
        let fd = nix::sys::socket::socket(
            nix::sys::socket::AddressFamily::Unix,
            nix::sys::socket::SockType::Stream,
            nix::sys::socket::SockFlag::SOCK_NONBLOCK,
            None,
        )
        .unwrap();
        let address = nix::sys::socket::UnixAddr::new(&path).unwrap();
        let _ = nix::sys::socket::connect(std::os::fd::AsRawFd::as_raw_fd(&fd), &address);
        waiting.push(fd);
    }
    let refused = Server::bind(&path, null_device(1 << 20));
    assert!(matches!(refused, Err(BindError::InUse { .. })));
    assert!(path.exists());
}

#[test]
fn s12_what_is_no_socket_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "precious").unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    let subdirectory = dir.path().join("directory");
    fs::create_dir(&subdirectory).unwrap();
    for path in [&file, &link, &subdirectory] {
        let refused = Server::bind(path, null_device(1 << 20));
        assert!(
            matches!(refused, Err(BindError::NotASocket { .. })),
            "{path:?}"
        );
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert!(subdirectory.is_dir());
}

#[test]
fn paths_that_cannot_be_are_errors_that_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let long = dir.path().join("x".repeat(120));
    let refused = Server::bind(&long, null_device(1 << 20));
    assert!(matches!(refused, Err(BindError::TooLong { .. })));
    let nowhere = dir.path().join("missing/socket");
    let refused = Server::bind(&nowhere, null_device(1 << 20)).unwrap_err();
    assert!(matches!(refused, BindError::Host { .. }));
    assert!(refused.to_string().contains("missing/socket"));
}

#[test]
fn socket_that_somebody_else_put_there_since_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let server = Server::bind(&path, null_device(1 << 20)).unwrap();
    fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    drop(server);
    assert!(path.exists(), "the other's socket is still there");
    drop(other);
}

#[test]
fn inherited_listening_socket_is_served_and_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let server = Server::inherited(OwnedFd::from(listener), null_device(1 << 20)).unwrap();
    assert_eq!(server.path(), None);
    let until = EventNotifier::new().unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| server.serve(&until));
        for _ in 0..2 {
            let mut front = FrontEnd::connect(&path, &GuestRam::new());
            let mut queue = front.up();
            assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
        }
        until.notify().unwrap();
        eventually("the server to stop", || thread.is_finished());
        thread.join().unwrap().unwrap();
    });
    assert!(path.exists());
}

#[test]
fn inherited_connected_socket_is_served_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let mut front = FrontEnd::connect(&path, &GuestRam::new());
    let (accepted, _) = listener.accept().unwrap();
    let server = Server::inherited(OwnedFd::from(accepted), null_device(1 << 20)).unwrap();
    let until = EventNotifier::new().unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| server.serve(&until));
        let mut queue = front.up();
        assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
        drop(front);
        eventually("the server to return", || thread.is_finished());
        thread.join().unwrap().unwrap();
    });
}

#[test]
fn inherited_half_of_a_socket_pair_is_served() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = Server::inherited(OwnedFd::from(theirs), null_device(1 << 20)).unwrap();
    let until = EventNotifier::new().unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| server.serve(&until));
        let mut wire = Wire::over(ours);
        wire.negotiate(FEATURES);
        assert!(wire.is_alive());
        until.notify().unwrap();
        eventually("the server to stop", || thread.is_finished());
        thread.join().unwrap().unwrap();
        assert!(!wire.is_alive());
    });
}

#[test]
fn inherited_descriptor_that_is_no_unix_stream_socket_is_refused() {
    let file = fs::File::open("/dev/null").unwrap();
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (datagram, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let wrong: [OwnedFd; 4] = [file.into(), udp.into(), tcp.into(), datagram.into()];
    for fd in wrong {
        let refused = Server::inherited(fd, null_device(1 << 20));
        assert!(
            matches!(refused, Err(ServeError::NotASocket)),
            "{refused:?}"
        );
    }
}
