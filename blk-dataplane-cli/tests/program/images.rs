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
fn a_bad_option_leaves_no_new_image_behind() {
    let directory = tempfile::tempdir().unwrap();
    failure(
        &directory,
        &["--blk-file", "new", "--create", "1M", "--num-threads", "17"],
        2,
    );
    assert!(!directory.path().join("new").exists());
}
