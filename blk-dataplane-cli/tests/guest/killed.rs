//! The program is killed under a guest's load, and started again while QEMU waits for it.

use std::thread;
use std::time::{Duration, SystemTime};

use nix::sys::signal::Signal;

use crate::backend::Backend;
use crate::lab::{Lab, text};
use crate::machine::Guest;

#[test]
fn guest_fio_verifies_while_the_program_is_killed_again_and_again() {
    run(false, 5);
    run(true, 3);
}

/// Kills it so many times, each in the middle of a fio job of its own.
fn run(packed: bool, rounds: usize) {
    let lab = Lab::enter();
    let image = lab.path("disk.img");
    let start = || {
        Backend::start(
            &lab,
            "disk",
            ["--blk-file", text(&image), "--create", "64M"],
        )
    };
    let mut backend = start();
    let mut script = String::new();
    for round in 0..rounds {
        // Writes on both queues, flushes among them, and everything read back.
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
            size=10m
            [first]
            cpus_allowed=0
            [second]
            cpus_allowed=1
            offset=32m
END
            show started{round} yes
            check fio{round} fio /tmp/job
            ",
        );
    }
    script += "show errors $(dmesg | grep -c \"I/O error\\|blk_update_request\")\n";
    let guest = Guest::new(&lab, if packed { "packed" } else { "split" }).reconnecting();
    let guest = if packed { guest.packed() } else { guest };
    let mut guest = guest.disk(backend.socket()).with_fio().start(&script);
    for round in 0..rounds {
        guest.wait_for(&format!("started{round}"));
        // Anywhere in the job, of which the writes alone take longer.
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap();
        thread::sleep(Duration::from_millis(u64::from(now.subsec_micros()) % 900));
        backend.kill();
        backend = start();
    }
    let results = guest.finish();
    for round in 0..rounds {
        results.assert_checked(&[&format!("fio{round}")]);
    }
    assert_eq!(results.number("errors"), 0);
    backend.stop(Signal::SIGTERM);
}
