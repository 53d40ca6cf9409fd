//! Getting from the program to a guest with its disk, as the program and `ci/demo.sh` say.

use std::fs::{self, File};
use std::process::Command;

use nix::sys::signal::Signal;

use crate::backend::{self, Backend};
use crate::deadline::Deadline;
use crate::lab::{self, Lab, text};
use crate::machine::{GUEST_DEADLINE, Guest};
use crate::pattern::{assert_same_bytes, pattern};

#[test]
fn guest_printed_arguments_attach_the_disk() {
    let lab = Lab::enter();
    let image = lab.path("disk.img");
    let backend = Backend::start(
        &lab,
        "disk",
        ["--blk-file", text(&image), "--create", "32M"],
    );
    let stderr = backend.stderr();
    let printed: Vec<&str> = stderr
        .lines()
        .filter(|line| line.starts_with("  -"))
        .collect();
    assert!(!printed.is_empty(), "no arguments for QEMU in: {stderr}");
    let results = Guest::new(&lab, "guest")
        .start_with_arguments(
            &printed.join("\n"),
            r#"
            show sectors $(cat /sys/block/vda/size)
            pattern here 4096 >/tmp/here
            check write gdd if=/tmp/here of=/dev/vda bs=64k oflag=direct conv=notrunc,fsync
            "#,
        )
        .finish();
    assert_eq!(results.number("sectors"), (32 << 20) / 512);
    results.assert_checked(&["write"]);
    backend.stop(Signal::SIGTERM);
    let found = fs::read(&image).unwrap();
    assert_same_bytes(&found[..65536], &pattern("here", 4096), "image");
}

#[test]
fn guest_demo_runs_the_commands_it_is_given() {
    let lab = Lab::enter();
    let commands = lab.path("commands");
    fs::write(
        &commands,
        "echo size is $(cat /sys/block/vda/size) && mkfs.ext4 -q /dev/vda && echo made\n",
    )
    .unwrap();
    let output = lab.path("output");
    let mut demo = Command::new(lab::repository().join("ci/demo.sh"))
        .env("PROGRAM", backend::PROGRAM)
        .env("DEMO_DIRECTORY", lab.path("demo"))
        .env("CARGO_TARGET_DIR", lab::target_directory())
        .stdin(File::open(commands).unwrap())
        .stdout(File::create(&output).unwrap())
        .spawn()
        .unwrap();
    let status = Deadline::after(GUEST_DEADLINE).wait(&mut demo);
    // Reaps it, and does nothing if it has ended.
    let _ = demo.kill();
    let output = String::from_utf8_lossy(&fs::read(&output).unwrap()).into_owned();
    assert!(
        status.is_some_and(|status| status.success()),
        "{status:?}: {output}"
    );
    assert!(output.contains("size is 2097152"), "{output}");
    assert!(output.contains("made"), "{output}");
    assert!(
        !lab.path("demo/disk.sock").exists(),
        "socket file left behind"
    );
}
