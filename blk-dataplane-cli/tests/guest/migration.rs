//! A guest that moves to another QEMU and another process of the program, over one image, under load.

use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::backend::Backend;
use crate::lab::{Lab, text};
use crate::machine::{GUEST_DEADLINE, Guest};
use crate::monitor::Monitor;

/// fio jobs one after the other, of which the migration falls into the second.
const JOBS: usize = 4;

#[test]
fn guest_fio_verifies_while_the_guest_migrates_to_another_process() {
    let lab = Lab::enter();
    let image = lab.path("disk.img");
    let source_backend = Backend::start(
        &lab,
        "source",
        ["--blk-file", text(&image), "--create", "64M"],
    );
    let mut script = String::new();
    for job in 0..JOBS {
        script += &format!(
            r"
            cat >/tmp/job <<END
            [global]
            filename=/dev/vda
            direct=1
            ioengine=libaio
            iodepth=32
            rw=randwrite
            bssplit=512/20:4k/50:64k/30
            fsync=64
            verify=crc32c
            verify_fatal=1
            do_verify=1
            thread=1
            size=12m
            [first]
            cpus_allowed=0
            [second]
            cpus_allowed=1
            offset=32m
END
            show started{job} yes
            check fio{job} fio /tmp/job
            ",
        );
    }
    script += "show errors $(dmesg | grep -c \"I/O error\\|blk_update_request\")\n";
    let mut source = Guest::new(&lab, "from")
        .disk(source_backend.socket())
        .with_fio()
        .monitored()
        .start(&script);
    source.wait_for("started1");

    // The image is still locked by the other.
    let target_backend = Backend::start(&lab, "target", ["--blk-file", text(&image), "--incoming"]);
    let stream = lab.path("migration");
    let target = Guest::new(&lab, "to")
        .disk(target_backend.socket())
        .with_fio()
        .incoming(&stream)
        .start(&script);
    let deadline = Instant::now() + GUEST_DEADLINE;
    while !stream.exists() {
        assert!(Instant::now() < deadline, "the other QEMU does not listen");
        thread::sleep(Duration::from_millis(20));
    }
    let mut monitor = Monitor::connect(&lab.path("from.monitor"));
    // As fast as it gets: the test is for what is written meanwhile, not for how long that goes on.
    monitor.command("migrate_set_parameter max-bandwidth 10g");
    monitor.command(&format!("migrate -d unix:{}", stream.display()));
    loop {
        let status = monitor.command("info migrate");
        if status.contains("Migration status: completed") {
            break;
        }
        assert!(!status.contains("failed"), "{status}");
        assert!(Instant::now() < deadline, "{status}");
        thread::sleep(Duration::from_millis(100));
    }
    source.kill();
    source_backend.stop(Signal::SIGTERM);

    let results = target.finish();
    // The rest of the jobs, and what the first ones have written, read by the last ones' own verification.
    for job in 2..JOBS {
        results.assert_checked(&[&format!("fio{job}")]);
    }
    assert_eq!(results.number("errors"), 0);
    target_backend.stop(Signal::SIGTERM);
}
