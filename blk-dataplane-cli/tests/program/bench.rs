//! `blk-dataplane bench`: the load generator as its users start it, on this program and on qemu-storage-daemon.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::running::{Running, failure, output, program};

/// How long anything may take before it counts as hung.
const DEADLINE: Duration = Duration::from_secs(60);

fn directory() -> TempDir {
    // A tmpfs: what is tested is the client.
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// This program with these options, at the socket `s`.
fn serve(directory: &TempDir, options: &[&str]) -> Running {
    let mut command = program(directory);
    command.args(options).arg("--socket-path=s");
    let (running, ready) = Running::start(command);
    assert!(ready.starts_with("ready "), "{ready}");
    running
}

fn bench(directory: &TempDir, options: &[&str]) -> Output {
    let standard = ["bench", "--socket-path=s"];
    output(directory, &[&standard[..], options].concat())
}

#[track_caller]
fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// What it printed, of one that succeeded and said nothing else.
#[track_caller]
fn measured(directory: &TempDir, options: &[&str]) -> String {
    let output = bench(directory, options);
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(
        output.status.code(),
        Some(0),
        "{options:?}: {stdout}{stderr}"
    );
    assert_eq!(stderr, "", "{options:?}");
    stdout
}

#[track_caller]
fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn table_and_json_tell_what_was_asked_and_measured() {
    let directory = directory();
    let running = serve(&directory, &["--null=64M", "--num-queues=2"]);
    let pid = format!("--backend-pid={}", running.child.id());
    let options = [
        "--number-ios=500",
        "--rw=randrw",
        "--numjobs=2",
        "--bs=8k",
        &pid,
    ];
    let table = measured(&directory, &options);
    for part in [
        "randrw: bs=8k, iodepth=32, numjobs=2",
        "device s: 64.0MiB",
        "  read: IOPS=",
        "  write: IOPS=",
        "99.9%=",
        "1000 requests in",
        "0 errors",
        "back-end ",
    ] {
        assert!(table.contains(part), "{part:?} is missing in:\n{table}");
    }
    let report = json(&measured(
        &directory,
        &[&options[..], &["--output-format=json"]].concat(),
    ));
    assert_eq!(report["total_ios"], 1000);
    assert_eq!(report["backend"]["capacity_bytes"], 64 << 20);
    assert_eq!(report["options"]["bs"], 8192);
    assert!(report["backend_cpu_ns_per_io"].as_f64().unwrap() > 0.0);
}

#[test]
fn report_and_plot_go_into_the_files_named() {
    let directory = directory();
    let _running = serve(&directory, &["--null=64M"]);
    let options = [
        "--number-ios=100",
        "--output-format=json",
        "--output=report.json",
        "--plot=plot.svg",
    ];
    assert_eq!(measured(&directory, &options), "");
    let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
    assert_eq!(json(&read("report.json"))["total_ios"], 100);
    let plot = read("plot.svg");
    assert!(plot.starts_with("<svg") && plot.contains("read: median"));
}

#[test]
fn progress_is_told_when_asked_for_and_not_into_a_file() {
    let directory = directory();
    let _running = serve(&directory, &["--null=64M"]);
    assert!(!measured(&directory, &["--runtime=1.2"]).is_empty());
    let output = bench(
        &directory,
        &["--runtime=1.5", "--ramp-time=0.5", "--eta=always"],
    );
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("/2 s: ") && said.contains("requests/s"),
        "{said}"
    );
}

#[test]
fn blocks_are_verified_and_what_corrupts_them_is_found() {
    let directory = directory();
    let _running = serve(&directory, &["--blk-file=disk.img", "--create=4M"]);
    let all = ["--number-ios=1024", "--verify"];
    let written = measured(&directory, &[&["--rw=write"], &all[..]].concat());
    assert!(
        written.contains("1024 blocks checked, 0 wrong"),
        "{written}"
    );
    measured(&directory, &[&["--rw=read", "--packed"], &all[..]].concat());

    let image = directory.path().join("disk.img");
    let mut content = fs::read(&image).unwrap();
    content[2_000_000] ^= 0x10;
    fs::write(&image, content).unwrap();
    let output = bench(&directory, &[&["--rw=read"], &all[..]].concat());
    assert_eq!(output.status.code(), Some(1));
    // The table is there all the same.
    assert!(text(&output.stdout).contains("1024 blocks checked, 1 wrong"));
    let said = text(&output.stderr);
    assert!(said.contains("the sector at 1999872 is corrupt"), "{said}");
    assert!(said.contains("blocks that were wrong: 1"), "{said}");
}

#[test]
fn backend_that_is_killed_ends_the_load_in_time() {
    for client in [&[][..], &["--poll"], &["--rate-iops=1000"]] {
        let directory = directory();
        let mut running = serve(&directory, &["--null=64M"]);
        let mut command = program(&directory);
        command.args(["bench", "--socket-path=s", "--runtime=3600", "--eta=always"]);
        let mut client = Running::of(command.args(client).spawn().unwrap());
        // It is under load when it says how that goes.
        let mut line = String::new();
        let mut stderr = std::io::BufReader::new(client.child.stderr.take().unwrap());
        std::io::BufRead::read_line(&mut stderr, &mut line).unwrap();
        assert!(line.contains("requests/s"), "{line}");
        running.signal(Signal::SIGKILL);
        running.wait();
        assert_eq!(client.wait().code(), Some(1));
        let mut rest = String::new();
        std::io::Read::read_to_string(&mut stderr, &mut rest).unwrap();
        assert!(rest.contains("closed the connection under load"), "{rest}");
        assert_eq!(client.rest_of_stdout(), "");
    }
}

#[test]
fn signal_ends_the_measuring_and_prints_the_report() {
    let directory = directory();
    let _running = serve(&directory, &["--null=64M"]);
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut command = program(&directory);
        command.args(["bench", "--socket-path=s", "--runtime=3600", "--eta=always"]);
        let mut client = Running::of(command.spawn().unwrap());
        let mut line = String::new();
        let mut stderr = std::io::BufReader::new(client.child.stderr.take().unwrap());
        std::io::BufRead::read_line(&mut stderr, &mut line).unwrap();
        client.signal(signal);
        assert_eq!(client.wait().code(), Some(0));
        assert!(client.rest_of_stdout().contains("requests in"));
    }
}

#[test]
fn mistakes_name_the_option_and_the_remedy() {
    let directory = directory();
    let _running = serve(&directory, &["--null=64M", "--num-queues=1"]);
    let mistakes: &[(&[&str], i32, &[&str])] = &[
        (&["bench"], 2, &["--socket-path"]),
        (
            &["bench", "--socket-path=none"],
            2,
            &["--socket-path", "none", "start a back-end"],
        ),
        (
            &["bench", "--socket-path=s", "--rw=trim"],
            2,
            &["--rw", "randread"],
        ),
        (
            &["bench", "--socket-path=s", "--bs=1000"],
            2,
            &["--bs", "512"],
        ),
        (&["bench", "--socket-path=s", "--bs=0"], 2, &["--bs"]),
        (
            &["bench", "--socket-path=s", "--bs=1G"],
            2,
            &["--bs", "33554432"],
        ),
        (
            &["bench", "--socket-path=s", "--iodepth=0"],
            2,
            &["--iodepth", "8192"],
        ),
        (
            &["bench", "--socket-path=s", "--numjobs=0"],
            2,
            &["--numjobs", "256"],
        ),
        (
            &["bench", "--socket-path=s", "--numjobs=2"],
            2,
            &["--numjobs", "has 1"],
        ),
        (
            &["bench", "--socket-path=s", "--size=1G"],
            2,
            &["--size", "67108864"],
        ),
        (
            &["bench", "--socket-path=s", "--offset=1G"],
            2,
            &["--offset", "give less"],
        ),
        (
            &["bench", "--socket-path=s", "--rwmixread=101"],
            2,
            &["--rwmixread"],
        ),
        (
            &["bench", "--socket-path=s", "--runtime=0"],
            2,
            &["--runtime"],
        ),
        (
            &["bench", "--socket-path=s", "--runtime=-1"],
            2,
            &["--runtime"],
        ),
        (
            &["bench", "--socket-path=s", "--runtime=forever"],
            2,
            &["--runtime", "0.5"],
        ),
        (
            &["bench", "--socket-path=s", "--number-ios=0"],
            2,
            &["--number-ios"],
        ),
        (
            &["bench", "--socket-path=s", "--rate-iops=0"],
            2,
            &["--rate-iops"],
        ),
        (
            &["bench", "--socket-path=s", "--io-timeout=0"],
            2,
            &["--io-timeout"],
        ),
        (
            &["bench", "--socket-path=s", "--queue-size=100"],
            2,
            &["--queue-size", "128"],
        ),
        (
            &["bench", "--socket-path=s", "--queue-size=4096"],
            2,
            &["--queue-size", "smaller"],
        ),
        (
            &[
                "bench",
                "--socket-path=s",
                "--queue-size=16",
                "--iodepth=32",
            ],
            2,
            &["--iodepth", "--queue-size"],
        ),
        (
            &["bench", "--socket-path=s", "--memory-regions=510"],
            2,
            &["509"],
        ),
        (
            &["bench", "--socket-path=s", "--cpus=4095"],
            2,
            &["--cpus", "CPU 4095"],
        ),
        (
            &["bench", "--socket-path=s", "--cpus=many"],
            2,
            &["--cpus", "0,2,4-7"],
        ),
        (
            &["bench", "--socket-path=s", "--backend-pid=4194305"],
            2,
            &["--backend-pid", "4194305"],
        ),
        (
            &["bench", "--socket-path=s", "--rw=flush", "--verify"],
            2,
            &["--verify"],
        ),
        (&["bench", "--socket-path=s", "--null=1M"], 2, &["--null"]),
        (&["--null=1M", "bench", "--socket-path=s"], 2, &["bench"]),
    ];
    for (arguments, code, parts) in mistakes {
        let said = failure(&directory, arguments, *code);
        for part in *parts {
            assert!(
                said.contains(part),
                "{arguments:?}: {part:?} is missing in: {said}"
            );
        }
    }
    // These come to light when all is measured, which is not lost.
    for option in ["--output=no/file", "--plot=no/file"] {
        let output = bench(
            &directory,
            &["--number-ios=10", "--queue-size=64", "--iodepth=8", option],
        );
        assert_eq!(output.status.code(), Some(1));
        let said = text(&output.stderr);
        assert!(
            said.contains("no/file") && said.contains("another path"),
            "{said}"
        );
    }
}

/// qemu-storage-daemon, a back-end that is not ours, killed with the test.
struct StorageDaemon(Child);

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl StorageDaemon {
    /// Exports the node `n` of `blockdev` at the socket `s`.
    fn start(directory: &TempDir, blockdev: &str) -> Self {
        let child = Command::new("qemu-storage-daemon")
            .current_dir(directory.path())
            .args(["--object", "iothread,id=t", "--blockdev", blockdev, "--export"])
            .arg(
                "type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=s,writable=on,num-queues=4,iothread=t",
            )
            .stdin(Stdio::null())
            .spawn();
        let daemon =
            Self(child.expect("qemu-storage-daemon is installed (ci/install-test-deps.sh)"));
        let began = Instant::now();
        while !Path::exists(&directory.path().join("s")) {
            assert!(
                began.elapsed() < DEADLINE,
                "qemu-storage-daemon does not listen"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        daemon
    }
}

#[test]
fn storage_daemon_of_qemu_is_measured_as_well() {
    let directory = directory();
    fs::write(directory.path().join("disk.img"), vec![0; 4 << 20]).unwrap();
    let daemon = StorageDaemon::start(&directory, "driver=file,filename=disk.img,node-name=n");
    let pid = format!("--backend-pid={}", daemon.0.id());
    let each: [&[&str]; 10] = [
        &["--rw=read"],
        &["--rw=randread", "--poll"],
        &["--rw=write", "--bs=64k", "--iodepth=4"],
        &["--rw=randrw", "--verify"],
        &[
            "--rw=randrw",
            "--verify",
            "--numjobs=4",
            "--indirect",
            "--fsync=5",
        ],
        &["--rw=randwrite", "--no-event-idx"],
        &["--rw=flush"],
        &["--rw=randread", "--memory-regions=8"],
        // More than SET_MEM_TABLE carries.
        &["--rw=randread", "--memory-regions=20"],
        &["--rw=randread", "--rate-iops=2000"],
    ];
    for options in each {
        let standard = ["--number-ios=200", "--output-format=json", &pid];
        let report = json(&measured(&directory, &[&standard[..], options].concat()));
        let jobs = report["options"]["numjobs"].as_u64().unwrap();
        assert_eq!(report["total_ios"], 200 * jobs, "{options:?}");
        assert_eq!(report["errors"], 0, "{options:?}");
        assert!(report["backend_cpu_ns_per_io"].as_f64().unwrap() > 0.0);
    }
    let said = failure(&directory, &["bench", "--socket-path=s", "--packed"], 2);
    assert!(said.contains("--packed"), "{said}");
}

#[test]
fn errors_of_a_real_disk_below_another_backend_are_counted() {
    let directory = directory();
    let broken = "driver=blkdebug,node-name=n,image.driver=null-co,image.size=16777216,\
                  inject-error.0.event=none,inject-error.0.errno=5";
    let _daemon = StorageDaemon::start(&directory, broken);
    let output = bench(&directory, &["--number-ios=100", "--output-format=json"]);
    assert_eq!(output.status.code(), Some(1));
    let report = json(&text(&output.stdout));
    assert_eq!(
        (&report["errors"], &report["total_ios"]),
        (&100.into(), &0.into())
    );
    assert!(text(&output.stderr).contains("requests that failed: 100"));
}
