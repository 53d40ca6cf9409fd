//! Sockets by path and by descriptor.

use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::Signal;

use crate::libblkio::{Client, pattern};
use crate::running::{Running, failure, program};

#[test]
fn s12_a_socket_path_that_is_no_socket_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("precious");
    std::fs::write(&path, "data").unwrap();
    failure(
        &directory,
        &["--null", "1M", "--socket-path", "precious"],
        2,
    );
    assert_eq!(std::fs::read(&path).unwrap(), b"data");
}

#[test]
fn a_socket_nobody_listens_on_is_replaced_and_a_live_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    assert!(
        path.symlink_metadata().unwrap().file_type().is_socket(),
        "stale"
    );
    let mut command = program(&directory);
    command.args(["--null", "1M", "--socket-path", "s"]);
    let (mut first, ready) = Running::start(command);
    assert!(ready.starts_with("ready "));
    let mode = path.symlink_metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o660, "{mode:o}");

    let said = failure(&directory, &["--null", "1M", "--socket-path", "s"], 2);
    assert!(said.contains("in use"), "{said}");
    UnixStream::connect(&path).unwrap();
    first.signal(Signal::SIGTERM);
    assert!(first.wait().success());
    assert!(!path.exists());
}

#[test]
fn the_umask_takes_nothing_from_the_group_and_gives_nothing_to_others() {
    for umask in ["077", "022", "000"] {
        let directory = tempfile::tempdir().unwrap();
        let inner = program(&directory);
        let mut command = Command::new("sh");
        command
            .args(["-c", "umask \"$1\"; exec \"$0\" --null 1M --socket-path s"])
            .arg(inner.get_program())
            .arg(umask)
            .current_dir(directory.path())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped());
        let (_running, ready) = Running::start(command);
        assert!(ready.starts_with("ready "));
        let metadata = directory.path().join("s").symlink_metadata().unwrap();
        let mode = metadata.permissions().mode() & 0o7777;
        assert_eq!(mode, 0o660, "umask {umask}: {mode:o}");
    }
}

#[test]
fn socket_group_gives_the_socket_to_a_group_by_name_or_number() {
    // A group that this user may give files to: any for root, else one that it is in.
    let group = match nix::unistd::geteuid().is_root() {
        true => nix::unistd::Group::from_name("daemon").unwrap().unwrap(),
        false => nix::unistd::Group::from_gid(nix::unistd::getegid())
            .unwrap()
            .unwrap(),
    };
    for given in [group.name.clone(), group.gid.to_string()] {
        let directory = tempfile::tempdir().unwrap();
        let mut command = program(&directory);
        command.args(["--null=1M", "--socket-path=s", "--socket-group", &given]);
        let (_running, ready) = Running::start(command);
        assert!(ready.starts_with("ready "), "{given}");
        let metadata = directory.path().join("s").symlink_metadata().unwrap();
        let mode = metadata.permissions().mode() & 0o7777;
        assert_eq!((metadata.gid(), mode), (group.gid.as_raw(), 0o660));
    }
    let directory = tempfile::tempdir().unwrap();
    let arguments = [
        "--null=1M",
        "--socket-path=s",
        "--socket-group=no-such-group",
    ];
    let said = failure(&directory, &arguments, 2);
    for part in ["--socket-group", "no-such-group", "getent"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!directory.path().join("s").exists());
}

#[test]
fn exit_on_disconnect_serves_one_front_end_and_succeeds() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = program(&directory);
    command.args(["--blk-file=disk.img", "--create=1M", "--exit-on-disconnect"]);
    let (mut running, _) = Running::start(command);
    let path = directory.path().join("disk.img.sock");
    // Whoever looks whether somebody is there is not the one.
    drop(UnixStream::connect(&path).unwrap());
    failure(&directory, &["--null=1M", "--socket-path=disk.img.sock"], 2);
    let mut client = Client::connect(&path, 1);
    client.write(0, 4096, &pattern(3, 4096));
    assert!(!path.exists(), "nobody else can connect");
    drop(client);
    assert_eq!(running.wait().code(), Some(0));
    let image = std::fs::read(directory.path().join("disk.img")).unwrap();
    assert!(image[4096..8192] == pattern(3, 4096));
}

/// Lets the child inherit `fd` as descriptor 3.
fn with_fd_3(command: &mut Command, fd: &impl AsRawFd) {
    let fd = fd.as_raw_fd();
    #[expect(
        unsafe_code,
        reason = "pre_exec is the one way to pass a numbered descriptor"
    )]
    // SAFETY: the closure runs in the child alone; dup2 is async-signal-safe and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            // dup2 onto itself would keep CLOEXEC.
            assert_ne!(fd, 3);
            if nix::libc::dup2(fd, 3) < 0 {
                Err(std::io::Error::last_os_error())
            } else {
                Ok(())
            }
        });
    }
}

#[test]
fn fd_takes_a_listening_socket_and_leaves_its_file_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ours");
    let listener = UnixListener::bind(&path).unwrap();
    // A high number, so that it is not 3 already.
    let listener = nix::fcntl::fcntl(&listener, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(100))
        .map(OwnedNumber)
        .unwrap();
    let mut command = program(&directory);
    command.args(["--null", "1M", "--fd", "3"]);
    with_fd_3(&mut command, &listener);
    let (mut running, ready) = Running::start(command);
    assert_eq!(ready, "ready\n");
    drop(UnixStream::connect(&path).unwrap());
    drop(UnixStream::connect(&path).unwrap());
    running.signal(Signal::SIGTERM);
    assert!(running.wait().success());
    assert!(path.exists(), "somebody else's socket file");
}

#[test]
fn fd_takes_a_connected_socket_and_ends_with_it() {
    let directory = tempfile::tempdir().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let high = nix::fcntl::fcntl(&theirs, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(100)).unwrap();
    drop(theirs);
    let mut command = program(&directory);
    command.args(["--null", "1M", "--fd", "3"]);
    let high = OwnedNumber(high);
    with_fd_3(&mut command, &high);
    let (mut running, ready) = Running::start(command);
    drop(high);
    assert_eq!(ready, "ready\n");
    drop(ours);
    assert!(running.wait().success());
}

#[test]
fn fd_that_is_no_socket_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = std::fs::File::open(directory.path()).unwrap();
    let high = nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(100)).unwrap();
    let mut command = program(&directory);
    command.args(["--null", "1M", "--fd", "3"]);
    let high = OwnedNumber(high);
    with_fd_3(&mut command, &high);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("socket"));
}

/// A descriptor number that a fcntl made, closed when dropped.
struct OwnedNumber(i32);

impl AsRawFd for OwnedNumber {
    fn as_raw_fd(&self) -> i32 {
        self.0
    }
}

impl Drop for OwnedNumber {
    fn drop(&mut self) {
        let _ = nix::unistd::close(self.0);
    }
}
