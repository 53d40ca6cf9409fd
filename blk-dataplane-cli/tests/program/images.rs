//! Which images are taken, and by whom.

use nix::sys::signal::Signal;

use crate::running::{Running, failure, program};

#[test]
fn an_image_in_use_is_refused_by_name_of_its_user_unless_shared_by_force() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = program(&directory);
    command.args(["--blk-file", "disk.img", "--create", "1M"]);
    let (first, _) = Running::start(command);
    let second = ["--blk-file", "disk.img", "--socket-path", "second.sock"];
    for arguments in [&second[..], &[&second[..], &["--read-only"]].concat()] {
        let stderr = failure(&directory, arguments, 2);
        let holder = format!("in use by process {} (blk-dataplane)", first.child.id());
        for part in ["--blk-file", holder.as_str(), "--force-share"] {
            assert!(stderr.contains(part), "{part} is missing in:\n{stderr}");
        }
        assert!(!directory.path().join("second.sock").exists());
    }
    let mut command = program(&directory);
    command.args(second).arg("--force-share");
    let (_second, ready) = Running::start(command);
    assert!(ready.starts_with("ready "));
}

#[test]
fn readers_share_an_image_and_keep_writers_out() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("disk.img"), [0; 1 << 16]).unwrap();
    let mut readers = Vec::new();
    for socket in ["one.sock", "two.sock"] {
        let mut command = program(&directory);
        command.args([
            "--blk-file",
            "disk.img",
            "--read-only",
            "--socket-path",
            socket,
        ]);
        let (reader, ready) = Running::start(command);
        assert!(ready.starts_with("ready "));
        readers.push(reader);
    }
    failure(&directory, &["--blk-file", "disk.img"], 2);
    // SIGKILL leaves no lock behind.
    drop(readers);
    let mut command = program(&directory);
    command.args(["--blk-file", "disk.img"]);
    assert!(Running::start(command).1.starts_with("ready "));
}

#[test]
fn create_never_touches_an_image_that_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    let content: Vec<u8> = (0..4096u32)
        .map(|n| u8::try_from(n % 251).unwrap())
        .collect();
    std::fs::write(&image, &content).unwrap();
    let mut command = program(&directory);
    command.args(["--blk-file", "disk.img", "--create", "64M"]);
    let (mut running, ready) = Running::start(command);
    assert!(ready.starts_with("ready "));
    running.signal(Signal::SIGTERM);
    assert!(running.wait().success());
    assert_eq!(std::fs::read(&image).unwrap(), content);
}

#[test]
fn what_is_odd_about_an_image_is_said() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("disk.img"), vec![0; 4096 + 100]).unwrap();
    for (size, said_of_create) in [("8K", true), ("4196", false)] {
        let mut command = program(&directory);
        command.args(["--blk-file", "disk.img", "--create", size]);
        let (mut running, ready) = Running::start(command);
        assert!(ready.starts_with("ready "));
        running.signal(Signal::SIGTERM);
        assert!(running.wait().success());
        let said = running.stderr();
        assert!(said.contains("disk.img: its last 100 bytes"), "{said}");
        let create = "4196 bytes, where --create says 8192";
        assert_eq!(said.contains(create), said_of_create, "{said}");
    }
    assert_eq!(
        directory.path().join("disk.img").metadata().unwrap().len(),
        4196
    );
}

/// Bytes that are no UTF-8, as names on Linux may have them.
#[test]
fn paths_are_any_bytes() {
    use std::ffi::OsStr;
    use std::io::BufRead;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::UnixStream;

    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join(OsStr::from_bytes(b"d\xffsk\xfe"));
    std::fs::write(&image, vec![0; 4096]).unwrap();
    let mut command = program(&directory);
    command.arg("--blk-file").arg(&image);
    let mut running = Running::of(command.spawn().unwrap());
    let mut line = Vec::new();
    running.stdout.read_until(b'\n', &mut line).unwrap();
    let mut socket = image.into_os_string();
    socket.push(".sock");
    assert_eq!(line, [b"ready ", socket.as_bytes(), b"\n"].concat());
    UnixStream::connect(&socket).unwrap();
    running.signal(Signal::SIGTERM);
    assert!(running.wait().success());
    assert!(!std::path::Path::new(&socket).exists());
}

#[test]
fn a_bad_option_leaves_no_new_image_behind() {
    let directory = tempfile::tempdir().unwrap();
    failure(
        &directory,
        &["--blk-file", "new", "--create", "1M", "--num-threads", "17"],
        2,
    );
    assert!(!directory.path().join("new").exists());
}
