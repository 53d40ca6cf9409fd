//! What the guest was told is safe is in the file. With Linux AIO: what goes to the kernel through io_uring,
//! strace does not see.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::backend::Backend;
use crate::lab::{Lab, text};
use crate::machine::Guest;
use crate::pattern::{assert_same_bytes, pattern};

#[test]
fn guest_flush_reaches_the_file_before_the_guest_is_told() {
    const ROUNDS: usize = 8;
    let lab = Lab::enter();
    let image = lab.path("disk.img");
    let trace = lab.path("trace");
    let backend = Backend::start_traced(
        &lab,
        "disk",
        "fdatasync,fsync,io_submit",
        &trace,
        [
            "--blk-file",
            text(&image),
            "--create",
            "16M",
            "--engine=aio",
        ],
    );
    // What the program flushes on its own must not count: an image just made, and its end later on.
    let at_start = flushes_in(&fs::read_to_string(&trace).unwrap());
    let mut guest = Guest::new(&lab, "writer").disk(backend.socket()).start(
        r#"
        # Flush requests completed: the sixteenth number of the kernel's Documentation/admin-guide/iostats.
        flushes() { awk '$3 == "vda" { print $19 }' /proc/diskstats; }
        before=$(flushes)
        for round in 0 1 2 3 4 5 6 7; do
            pattern "r$round" 4096 >/tmp/round
            check "round$round" gdd if=/tmp/round of=/dev/vda bs=64k seek=$round conv=notrunc,fsync
        done
        show flushes $(($(flushes) - before))
        # Until the plug is pulled.
        sleep 1000
        "#,
    );
    let flushes: usize = guest.wait_for("flushes").parse().unwrap();
    assert!(flushes >= ROUNDS, "one flush per fsync, got {flushes}");
    // The guest still runs and has closed nothing: all it has is the word that its data is safe.
    let mut wanted = Vec::new();
    for round in 0..ROUNDS {
        wanted.extend(pattern(&format!("r{round}"), 4096));
    }
    let found = fs::read(&image).unwrap();
    assert_same_bytes(
        &found[..wanted.len()],
        &wanted,
        "image while the guest runs",
    );
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let flushed = flushes_in(&fs::read_to_string(&trace).unwrap()) - at_start;
        if flushed >= flushes {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "{flushes} flushes completed, but the file was flushed {flushed} times"
        );
        // strace runs beside the program and may be late to write.
        thread::sleep(Duration::from_millis(10));
    }
    guest.kill();

    let reader = Guest::new(&lab, "reader").disk(backend.socket()).start(
        r#"
        for round in 0 1 2 3 4 5 6 7; do pattern "r$round" 4096; done >/tmp/wanted
        check read gdd if=/dev/vda of=/tmp/found bs=64k count=8
        check same cmp /tmp/wanted /tmp/found
        "#,
    );
    reader.finish().assert_checked(&["read", "same"]);
    backend.stop(Signal::SIGINT);
}

/// System calls in a trace of strace that put a file on stable storage, and succeeded if they are of the
/// kind that says so at once.
fn flushes_in(trace: &str) -> usize {
    let synchronous = trace
        .lines()
        // "PID fdatasync(7) = 0", or in two parts when another thread came between.
        .filter(|line| line.contains("sync(") || line.contains("sync resumed>"))
        .filter(|line| line.ends_with("= 0"))
        .count();
    synchronous + trace.matches("IOCB_CMD_FDSYNC").count() + trace.matches("IOCB_CMD_FSYNC").count()
}

#[test]
fn guest_turns_the_write_cache_off_and_each_write_is_then_flushed() {
    const WRITES: usize = 32;
    let lab = Lab::enter();
    let image = lab.path("disk.img");
    let trace = lab.path("trace");
    let backend = Backend::start_traced(
        &lab,
        "disk",
        "fdatasync,fsync,io_submit",
        &trace,
        [
            "--blk-file",
            text(&image),
            "--create",
            "16M",
            "--engine=aio",
        ],
    );
    let mut guest = Guest::new(&lab, "guest").disk(backend.socket()).start(
        r#"
        cd /sys/block/vda
        pattern data 8192 >/tmp/data
        # Flush requests completed.
        flushes() { awk '$3 == "vda" { print $19 }' /proc/diskstats; }
        # 32 writes one after another, none followed by a flush, to a place of their own.
        writes() { check writes_$1 gdd if=/tmp/data of=/dev/vda bs=4k seek=$2 oflag=direct conv=notrunc; }
        # The guest's tidying at a file's closing would be counted as ours.
        exec 4<>/dev/vda
        show first $(cat cache_type)
        writes back 0
        show flushes_back $(flushes)

        check off sh -c 'echo "write through" >cache_type'
        show through $(cat cache_type)
        show queue_through $(cat queue/write_cache)
        before=$(flushes)
        writes through 64
        # An fsync has nothing to ask of a disk without a cache.
        check fsync gdd if=/tmp/data of=/dev/vda bs=4k seek=128 count=1 oflag=direct conv=notrunc,fsync
        show flushes_through $(($(flushes) - before))

        check on sh -c 'echo "write back" >cache_type'
        show back_again $(cat cache_type)
        writes again 192
        before=$(flushes)
        check fsync_again gdd if=/tmp/data of=/dev/vda bs=4k seek=256 count=1 oflag=direct conv=notrunc,fsync
        show flushes_again $(($(flushes) - before))
        # Until the plug is pulled: nothing is flushed at a shutdown.
        sleep 1000
        "#,
    );
    guest.wait_for("flushes_again");
    let value = |guest: &mut crate::machine::Running, name| guest.wait_for(name).to_owned();
    assert_eq!(value(&mut guest, "first"), "write back");
    assert_eq!(value(&mut guest, "through"), "write through");
    assert_eq!(value(&mut guest, "queue_through"), "write through");
    assert_eq!(value(&mut guest, "back_again"), "write back");
    assert_eq!(value(&mut guest, "flushes_through"), "0");
    let mut asked: usize = value(&mut guest, "flushes_back").parse().unwrap();
    asked += value(&mut guest, "flushes_again").parse::<usize>().unwrap();
    let trace = || fs::read_to_string(&trace).unwrap();
    // strace runs beside the program and may be late to write: the writes of all three rounds come first.
    wait_until("all writes are in the trace", || {
        trace().matches("IOCB_CMD_PWRITE").count() >= 3 * WRITES + 2
    });
    let order = writes_and_flushes(&trace());
    // One 4 KiB write by itself each time: the guest waits for one before it sends the next.
    let followed = |first: u64| {
        let writes = (0..WRITES as u64).map(|n| (first + n) * 4096);
        writes
            .filter(|&offset| order.windows(2).any(|pair| pair == [Some(offset), None]))
            .count()
    };
    assert_eq!(followed(64), WRITES, "writes through: {order:?}");
    // The last of a round may meet a flush that the guest has asked for.
    assert!(
        followed(0) <= 1 && followed(192) <= 1,
        "{asked} flushes asked: {order:?}"
    );
    guest.kill();
    backend.stop(Signal::SIGTERM);
}

/// Offsets of the writes in a trace of strace, in the order they were submitted; `None` for a flush.
fn writes_and_flushes(trace: &str) -> Vec<Option<u64>> {
    let offset = |part: &str| {
        let (_, after) = part.split_once("aio_offset=")?;
        let digits = after.find(|c: char| !c.is_ascii_digit())?;
        after[..digits].parse().ok()
    };
    let mut order = Vec::new();
    for line in trace.lines() {
        if line.contains("io_submit(") {
            // One operation each.
            for part in line.split("aio_lio_opcode=").skip(1) {
                if part.starts_with("IOCB_CMD_PWRITE") {
                    order.push(offset(part));
                } else if part.starts_with("IOCB_CMD_F") {
                    order.push(None);
                }
            }
        } else if line.contains("fdatasync(") || line.contains("fsync(") {
            order.push(None);
        }
    }
    order
}

/// Waits for what comes soon by itself.
#[track_caller]
fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}
