//! Mistakes of operators: each is refused by the option it is in, with what to do about it.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::running::{failure, program};

/// Arguments, exit code, and what must be said.
type Mistake<'a> = (&'a [&'a str], i32, &'a [&'a str]);

fn directory() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::write(at("disk"), vec![0; 4096]).unwrap();
    fs::write(at("tiny"), b"x").unwrap();
    fs::write(at("empty"), b"").unwrap();
    fs::write(at("small"), vec![0; 1024]).unwrap();
    fs::create_dir(at("dir")).unwrap();
    nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    drop(UnixListener::bind(at("socket")).unwrap());
    symlink("nowhere", at("dangling")).unwrap();
    symlink("circle", at("circle")).unwrap();
    directory
}

#[track_caller]
fn assert_refused(directory: &TempDir, mistakes: &[Mistake<'_>]) -> Vec<String> {
    let mut said = Vec::new();
    for (arguments, code, parts) in mistakes {
        let stderr = failure(directory, arguments, *code);
        for part in *parts {
            assert!(
                stderr.contains(part),
                "{arguments:?}: {part:?} is missing in: {stderr}"
            );
        }
        said.push(stderr);
    }
    let disk = fs::read(directory.path().join("disk")).unwrap();
    assert_eq!(disk, vec![0; 4096]);
    said
}

#[test]
fn failures_name_the_option_the_file_and_the_remedy() {
    let directory = directory();
    let long = "x".repeat(120);
    let endless = "x".repeat(300);
    let mistakes: &[Mistake<'_>] = &[
        (
            &["--blk-file", "none"],
            2,
            &["--blk-file", "none", "--create"],
        ),
        (
            &["--blk-file", "."],
            2,
            &["--blk-file", ".", "raw disk image"],
        ),
        (
            &["--blk-file", "dir", "--create", "1M"],
            2,
            &["--blk-file", "dir", "raw disk image"],
        ),
        (
            &["--blk-file", "tiny"],
            2,
            &["--blk-file", "tiny", "truncate"],
        ),
        (
            &["--blk-file", "empty"],
            2,
            &["--blk-file", "empty", "0 bytes", "truncate"],
        ),
        (
            &["--blk-file", "fifo"],
            2,
            &["--blk-file", "fifo", "raw disk image"],
        ),
        (
            &["--blk-file", "/dev/null"],
            2,
            &["--blk-file", "/dev/null", "raw disk image"],
        ),
        (
            &["--blk-file", "socket"],
            2,
            &["--blk-file", "socket", "raw disk image"],
        ),
        (
            &["--blk-file", &endless],
            2,
            &["--blk-file", "too long", "another path"],
        ),
        (
            &["--blk-file", "disk/x"],
            2,
            &["--blk-file", "disk/x", "no directory"],
        ),
        (
            &["--blk-file", "circle"],
            2,
            &["--blk-file", "circle", "another path"],
        ),
        (
            &["--blk-file", "dangling"],
            2,
            &["--blk-file", "dangling", "symbolic link"],
        ),
        // Nor is one created where it leads.
        (
            &["--blk-file", "dangling", "--create", "1M"],
            2,
            &["dangling", "symbolic link"],
        ),
        (
            &["--blk-file", "small", "--block-size", "4096"],
            2,
            &["--blk-file", "small", "enlarge"],
        ),
        (
            &["--blk-file", "no/dir", "--create", "1M"],
            1,
            &["--create", "no/dir", "directory first"],
        ),
        (
            &["--blk-file", "disk/x", "--create", "1M"],
            1,
            &["--create", "disk/x", "no directory"],
        ),
        (
            &["--null", "512", "--block-size", "4096"],
            2,
            &["--null", "larger SIZE"],
        ),
        (
            &["--blk-file", "disk", "--serial", &long],
            2,
            &["--serial", "120 bytes", "at most 20"],
        ),
        (
            &["--blk-file", "disk", "--queue-size", "100"],
            2,
            &["--queue-size", "100", "power of two"],
        ),
        (
            &["--null", "1M", "--num-threads", "17"],
            2,
            &["--num-threads", "17", "per queue (16)"],
        ),
        (
            &["--null", "1M", "--queue-threads", "0,1000"],
            2,
            &["--queue-threads", "1000"],
        ),
        (
            &["--null", "1M", "--cpu-affinity", "1024"],
            2,
            &["--cpu-affinity", "1024", "0 to 1023"],
        ),
        // A number that there could be, and not the first.
        (
            &[
                "--null",
                "1M",
                "--num-threads",
                "2",
                "--cpu-affinity",
                "0,1023",
            ],
            2,
            &["--cpu-affinity", "CPU 1023", "taskset"],
        ),
        (
            &["--null", "1M", "--block-size", "1024"],
            2,
            &["--block-size", "1024", "512 and 4096"],
        ),
        (
            &["--null", "1M", "--poll-max-us", "99999999"],
            2,
            &["--poll-max-us", "at most 10ms"],
        ),
        (
            &["--blk-file", "disk", "--fd", "-1"],
            2,
            &["--fd", "-1", "from 0"],
        ),
        (
            &["--blk-file", "disk", "--fd", "1"],
            2,
            &["--fd", "1", "socket"],
        ),
        (
            &["--blk-file", "disk", "--fd", "77"],
            2,
            &["--fd", "77", "socket"],
        ),
        (
            &["--null", "1M", "--socket-path", &long],
            2,
            &["--socket-path", "too long", "shorter"],
        ),
        (
            &["--null", "1M", "--socket-path", "no/s"],
            1,
            &["--socket-path", "no/s", "directory"],
        ),
        (
            &["--null", "1M", "--socket-path", "disk"],
            2,
            &["--socket-path", "disk", "another"],
        ),
        (
            &["--null", "1M", "--socket-path", "dir"],
            2,
            &["--socket-path", "dir", "another"],
        ),
    ];
    for said in assert_refused(&directory, mistakes) {
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    assert!(!directory.path().join("nowhere").exists());
}

/// These the command line's parser refuses, which adds a hint of its own.
#[test]
fn values_that_cannot_be_are_refused_with_those_that_can() {
    let mistakes: &[Mistake<'_>] = &[
        (&[], 2, &["--blk-file"]),
        (&["disk"], 2, &["disk", "--help"]),
        (
            &["--blk-file", "disk", "--null", "1M"],
            2,
            &["--blk-file", "--null"],
        ),
        (
            &["--blk-file", "disk", "--create", "0"],
            2,
            &["--create", "one sector"],
        ),
        (
            &["--blk-file", "disk", "--create", "1Q"],
            2,
            &["--create", "1Q", "512M"],
        ),
        (
            &["--null", "99999999T"],
            2,
            &["--null", "more than a file can hold"],
        ),
        (
            &["--null", "1M", "--num-queues", "0"],
            2,
            &["--num-queues", "1..=256"],
        ),
        (
            &["--null", "1M", "--num-queues", "65536"],
            2,
            &["--num-queues", "65536", "1..=256"],
        ),
        (
            &["--null", "1M", "--num-queues", "-1"],
            2,
            &["--num-queues", "-1", "1..=256"],
        ),
        (
            &["--null", "1M", "--num-threads", "0"],
            2,
            &["--num-threads", "1..=64"],
        ),
        (
            &["--null", "1M", "--queue-size", "65536"],
            2,
            &["--queue-size", "2..=32768"],
        ),
        (
            &["--null", "1M", "--cpu-affinity", "5-1"],
            2,
            &["--cpu-affinity", "5-1", "0,2,4-7"],
        ),
        (&["--null", "1M", "--fd", "three"], 2, &["--fd", "three"]),
    ];
    assert_refused(&directory(), mistakes);
}

#[test]
fn mistakes_about_one_of_several_devices_are_told_by_their_place() {
    let directory = directory();
    let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
    write("unknown.toml", "[[device]]\nnull = '1M'\n\nserail = 'x'\n");
    write(
        "image.toml",
        "[[device]]\nname = 'a'\n\nblk-file = 'none'\n",
    );
    write(
        "serial.toml",
        &format!("[[device]]\nnull = '1M'\nserial = '{}'\n", "x".repeat(120)),
    );
    write("empty.toml", "");
    write("broken.toml", "[[device]]\nnull = \n");
    write("flat.toml", "blk-file = 'disk'\n");
    fs::write(directory.path().join("binary.toml"), [0xff; 64]).unwrap();
    let one = "null=1M,socket-path=one";
    let mistakes: &[Mistake<'_>] = &[
        (
            &["--device", "blk-fil=disk"],
            2,
            &["--device number 1", "blk-fil", "blk-file"],
        ),
        (
            &["--device", one, "--device", "blk-file=none"],
            2,
            &["--device number 2", "none", "--create"],
        ),
        (
            &["--device", "blk-file=disk,socket-path=a,b"],
            2,
            &["--device number 1", "b", "comma", "twice"],
        ),
        (
            &["--device", "null=1M,num-queues=0"],
            2,
            &["--device number 1", "num-queues", "1..=256"],
        ),
        (
            &["--device", "name=a"],
            2,
            &["--device number 1", "--blk-file", "--null"],
        ),
        (&["--device", ""], 2, &["--device number 1", "key=value"]),
        (
            &["--device", one, "--device", one],
            2,
            &["--device number 2", "--socket-path", "one"],
        ),
        (
            &[
                "--device",
                "null=1M,name=a",
                "--device",
                "null=2M,name=a,socket-path=b",
            ],
            2,
            &["--device number 2", "--name", "a"],
        ),
        (
            &[
                "--device=blk-file=disk",
                "--device=blk-file=disk,socket-path=x",
            ],
            2,
            &["--device number 2", "disk", "another device here"],
        ),
        (
            &["--device=null=1M,fd=77", "--device", one],
            2,
            &["--device number 1", "--fd=77"],
        ),
        (
            &["--device", one, "--null=1M"],
            2,
            &["--null", "--device", "--config"],
        ),
        (
            &["--config", "none.toml"],
            2,
            &["--config", "none.toml", "TOML"],
        ),
        (&["--config", "dir"], 2, &["--config", "dir", "TOML"]),
        (
            &["--config", "binary.toml"],
            2,
            &["--config", "binary.toml", "UTF-8"],
        ),
        (
            &["--config", "unknown.toml"],
            2,
            &["--config", "unknown.toml:4", "serail", "serial"],
        ),
        (
            &["--config", "image.toml"],
            2,
            &["--config", "image.toml:4", "none", "--create"],
        ),
        (
            &["--config", "serial.toml"],
            2,
            &["--config", "serial.toml:3", "at most 20"],
        ),
        (
            &["--config", "empty.toml"],
            2,
            &["--config", "empty.toml:1", "[[device]]"],
        ),
        (
            &["--config", "broken.toml"],
            2,
            &["--config", "broken.toml:2", "no TOML"],
        ),
        (
            &["--config", "flat.toml"],
            2,
            &["--config", "flat.toml:1", "blk-file", "[[device]]"],
        ),
    ];
    for said in assert_refused(&directory, mistakes) {
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn what_this_user_may_not_touch_is_said_with_what_to_check() {
    let directory = directory();
    let mode = |name: &str, mode| {
        let path = directory.path().join(name);
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    mode("disk", 0o444);
    mode("dir", 0o555);
    // Root may do anything, so the program runs as another user then, who must reach it.
    let copy = directory.path().join("program");
    fs::copy(program(&directory).get_program(), &copy).unwrap();
    mode("", 0o755);
    for (arguments, parts) in [
        (["--blk-file", "disk"], ["--blk-file", "--read-only"]),
        (
            ["--blk-file=dir/new", "--create=1M"],
            ["--create", "directory's permissions"],
        ),
        (
            ["--null=1M", "--socket-path=dir/s"],
            ["--socket-path", "may be written to"],
        ),
    ] {
        let mut command = Command::new(&copy);
        command
            .args(arguments)
            .current_dir(directory.path())
            .stdin(Stdio::null());
        if nix::unistd::geteuid().is_root() {
            command.uid(65534).gid(65534);
        }
        let output = command.output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        for part in parts.iter().chain(&["Permission denied"]) {
            assert!(
                said.contains(part),
                "{arguments:?}: {part:?} is missing in: {said}"
            );
        }
    }
    // So that it can be removed.
    mode("dir", 0o755);
}

#[test]
fn too_few_descriptors_are_said_before_it_is_ready() {
    let directory = directory();
    let program = program(&directory);
    let output = Command::new("sh")
        .args(["-c", "ulimit -n 5; exec \"$0\" --null 1M --socket-path s"])
        .arg(program.get_program())
        .current_dir(directory.path())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("ulimit -n"), "{said}");
    assert!(output.stdout.is_empty());
}

#[test]
fn limit_on_file_sizes_is_an_error_and_not_the_end() {
    let directory = directory();
    let output = Command::new("sh")
        .args(["-c", "ulimit -f 64; exec \"$0\" --blk-file new --create 1G"])
        .arg(program(&directory).get_program())
        .current_dir(directory.path())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{:?} {said}", output.status);
    for part in ["--create", "new", "ulimit -f"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!directory.path().join("new").exists());
}

#[test]
fn other_image_formats_are_warned_of_and_served_as_they_are() {
    use std::io::Read;
    let directory = directory();
    let mut image = b"QFI\xfb".to_vec();
    image.resize(1 << 16, 0);
    fs::write(directory.path().join("disk.qcow2"), &image).unwrap();
    let mut command = program(&directory);
    command.args(["--blk-file", "disk.qcow2"]);
    let (mut running, ready) = crate::running::Running::start(command);
    assert!(ready.starts_with("ready "));
    running.signal(nix::sys::signal::Signal::SIGTERM);
    let mut said = String::new();
    running
        .child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert!(running.wait().success());
    for part in ["disk.qcow2", "QCOW2", "qemu-img convert"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(
        fs::read(directory.path().join("disk.qcow2")).unwrap(),
        image
    );
}
