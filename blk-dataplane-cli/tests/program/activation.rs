//! Sockets passed by a service manager, and what it is told.

use std::io::ErrorKind;
use std::os::fd::{AsRawFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::libblkio::{Client, pattern};
use crate::running::{Running, program};

/// A program with `listeners` as descriptors 3 and up and the variables of socket activation, which say for which
/// process they are meant: known only once there is one.
fn activated(
    directory: &TempDir,
    listeners: &[&UnixListener],
    names: Option<&str>,
    arguments: &[&str],
) -> Command {
    let inner = program(directory);
    let mut command = Command::new("sh");
    command
        .args(["-c", "LISTEN_PID=$$ exec \"$0\" \"$@\""])
        .arg(inner.get_program())
        .args(arguments)
        .current_dir(directory.path())
        .env("LISTEN_FDS", listeners.len().to_string())
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    if let Some(names) = names {
        command.env("LISTEN_FDNAMES", names);
    }
    let from: Vec<RawFd> = listeners.iter().map(|each| each.as_raw_fd()).collect();
    #[expect(
        unsafe_code,
        reason = "pre_exec is the one way to pass a numbered descriptor"
    )]
    // SAFETY: the closure runs in the child alone; fcntl and dup2 are async-signal-safe and allocate nothing.
    unsafe {
        command.pre_exec(move || {
            // Out of each other's way first.
            let mut high = [0; 8];
            for (high, from) in high.iter_mut().zip(&from) {
                *high = nix::libc::fcntl(*from, nix::libc::F_DUPFD_CLOEXEC, 100);
            }
            for (to, high) in (3..).zip(high.iter().take(from.len())) {
                if *high < 0 || nix::libc::dup2(*high, to) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    command
}

fn listen(directory: &TempDir, name: &str) -> UnixListener {
    UnixListener::bind(directory.path().join(name)).unwrap()
}

fn capacity(path: &Path) -> u64 {
    Client::connect(path, 1).capacity()
}

#[test]
fn a_socket_that_is_passed_is_served_and_stays() {
    let directory = tempfile::tempdir().unwrap();
    let listener = listen(&directory, "s");
    // Before anybody serves it, as when a guest starts first.
    let waiting = UnixStream::connect(directory.path().join("s")).unwrap();
    drop(waiting);
    let arguments = ["--blk-file=disk.img", "--create=1M"];
    let command = activated(&directory, &[&listener], Some("blk.socket"), &arguments);
    let (mut running, ready) = Running::start(command);
    assert_eq!(ready, "ready\n");
    assert!(!directory.path().join("disk.img.sock").exists());
    let mut client = Client::connect(&directory.path().join("s"), 1);
    client.write(0, 0, &pattern(1, 512));
    assert!(client.read(0, 0, 512) == pattern(1, 512));
    drop(client);
    running.signal(Signal::SIGTERM);
    assert_eq!(running.wait().code(), Some(0));
    assert!(directory.path().join("s").exists(), "the manager's");
}

#[test]
fn sockets_with_names_find_the_devices_of_these_names() {
    let directory = tempfile::tempdir().unwrap();
    let (one, two) = (listen(&directory, "one"), listen(&directory, "two"));
    let arguments = [
        "--device=name=a,null=1M",
        "--device=null=4M,socket-path=own",
        "--device=name=b,null=2M",
    ];
    let sizes = |names: &str| {
        let command = activated(&directory, &[&one, &two], Some(names), &arguments);
        let (mut running, _) = Running::start(command);
        let at = |name: &str| capacity(&directory.path().join(name));
        let sizes = [at("one"), at("two"), at("own")];
        running.signal(Signal::SIGTERM);
        assert_eq!(running.wait().code(), Some(0));
        sizes
    };
    assert_eq!(sizes("a:b"), [1 << 20, 2 << 20, 4 << 20]);
    assert_eq!(sizes("b:a"), [2 << 20, 1 << 20, 4 << 20]);
    // All of one unit: in the order of its lines.
    assert_eq!(sizes("s.socket:s.socket"), [1 << 20, 2 << 20, 4 << 20]);
}

#[test]
fn sockets_that_cannot_be_told_apart_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (one, two) = (listen(&directory, "one"), listen(&directory, "two"));
    let refused = |listeners: &[&UnixListener], names, arguments: &[&str]| {
        let output = activated(&directory, listeners, names, arguments)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    let two_devices = ["--device=name=a,null=1M", "--device=name=b,null=1M"];
    let said = refused(&[&one, &two], Some("a:c"), &two_devices);
    for part in ["--name", "b", "c", "FileDescriptorName="] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let said = refused(&[&one, &two], None, &["--null=1M"]);
    for part in ["LISTEN_FDS", "2 sockets", "1 device"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let said = refused(&[&one], None, &["--null=1M", "--socket-path=own"]);
    assert!(said.contains("LISTEN_FDS"), "{said}");
    let said = refused(&[&one], None, &["--null=1M", "--socket-group=0"]);
    for part in ["--socket-group", "SocketGroup="] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn variables_meant_for_another_process_are_none_of_ours() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = program(&directory);
    command.args(["--null=1M", "--socket-path=s"]);
    command.envs([("LISTEN_PID", "1"), ("LISTEN_FDS", "2")]);
    let (_running, ready) = Running::start(command);
    assert!(ready.ends_with("/s\n"), "{ready}");
}

/// What the manager is told next.
fn told(manager: &UnixDatagram) -> String {
    let mut message = [0; 512];
    let len = manager.recv(&mut message).unwrap();
    String::from_utf8(message[..len].to_vec()).unwrap()
}

#[test]
fn the_service_manager_is_told_of_start_reload_and_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let name = format!("blk-dataplane-test-{}", std::process::id());
    let by_path = UnixDatagram::bind(&path).unwrap();
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let by_name = UnixDatagram::bind_addr(&address).unwrap();
    for (manager, variable) in [
        (by_path, path.to_str().unwrap().to_owned()),
        (by_name, format!("@{name}")),
    ] {
        manager
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let mut command = program(&directory);
        command.args([
            "--device=null=1M,socket-path=a",
            "--device=null=1M,socket-path=b",
        ]);
        command.env("NOTIFY_SOCKET", variable);
        let (mut running, ready) = Running::start(command);
        assert!(ready.starts_with("ready "));
        assert_eq!(told(&manager), "READY=1\nSTATUS=Serving 2 devices");
        running.signal(Signal::SIGHUP);
        let reloading = told(&manager);
        let micros = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=");
        assert!(micros.unwrap().parse::<u64>().unwrap() > 0, "{reloading}");
        assert_eq!(told(&manager), "READY=1\nSTATUS=Serving 2 devices");
        running.signal(Signal::SIGTERM);
        assert!(told(&manager).starts_with("STOPPING=1\n"));
        assert_eq!(running.wait().code(), Some(0));
        manager.set_nonblocking(true).unwrap();
        let more = manager.recv(&mut [0; 16]).unwrap_err();
        assert_eq!(more.kind(), ErrorKind::WouldBlock, "told once each");
    }
}

#[test]
fn a_program_that_cannot_start_tells_nobody_that_it_is_ready() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_nonblocking(true).unwrap();
    let mut command = program(&directory);
    command
        .args(["--blk-file=none"])
        .env("NOTIFY_SOCKET", &path);
    assert_eq!(command.output().unwrap().status.code(), Some(2));
    assert!(manager.recv(&mut [0; 16]).is_err());
}

#[test]
fn a_manager_that_is_not_there_is_no_reason_to_fail() {
    let directory = tempfile::tempdir().unwrap();
    for variable in ["/none/there", "@blk-dataplane-nobody", "vsock:2:1"] {
        let mut command = program(&directory);
        command.args(["--null=1M", "--socket-path=s"]);
        command.env("NOTIFY_SOCKET", variable);
        let (mut running, ready) = Running::start(command);
        assert!(ready.starts_with("ready "), "{variable}");
        running.signal(Signal::SIGTERM);
        assert_eq!(running.wait().code(), Some(0));
        let said = running.stderr();
        assert!(said.contains("NOTIFY_SOCKET"), "{variable}: {said}");
    }
}
