//! End to end: the program serves a disk, a stock Linux kernel in QEMU uses it, and both sides are asked
//! what they have seen.
//!
//! The guest is a Debian cloud kernel with an initramfs that `ci/guest-assets.sh` makes; what that and the
//! tests need is installed by `ci/install-test-deps.sh`, or named where it may not. `GUEST_ACCEL=kvm`
//! chooses KVM in place of QEMU's own translator.

mod backend;
mod cpio;
mod deadline;
mod lab;
mod machine;
mod pattern;

use std::fmt::Write;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::backend::Backend;
use crate::deadline::Deadline;
use crate::lab::{Lab, run_script};
use crate::machine::{GUEST_DEADLINE, Guest};
use crate::pattern::{RECORD, assert_same_bytes, pattern};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn guest_sees_the_device_that_was_configured() {
    // One sector more than a round number: neither a page nor a file system block ends where it does.
    const SECTORS: usize = 131_073;
    let lab = Lab::enter();
    let image = lab.path("disk.img");
    let size = (SECTORS * 512).to_string();
    let backend = Backend::start(
        &lab,
        "disk",
        [
            "--blk-file",
            text(&image),
            "--create",
            &size,
            "--serial",
            "E2E-0042",
        ],
    );
    let guest = Guest::new(&lab, "guest").disk(backend.socket()).start(
        r#"
        cd /sys/block/vda
        show sectors $(cat size)
        show serial $(cat serial)
        show logical_block_size $(cat queue/logical_block_size)
        show queues $(ls mq | wc -l)
        show write_cache $(cat queue/write_cache)
        show read_only $(cat ro)
        show removable $(cat removable)

        pattern last 32 >/tmp/last
        check last_sector_written gdd if=/tmp/last of=/dev/vda bs=512 seek=131072 oflag=direct conv=notrunc,fsync
        refuse beyond_the_end gdd if=/tmp/last of=/dev/vda bs=512 seek=131073 oflag=direct conv=notrunc,fsync
        check last_sector_read gdd if=/dev/vda of=/tmp/read bs=512 skip=131072 iflag=direct
        check last_sector_same cmp /tmp/last /tmp/read
        "#,
    );
    let results = guest.finish();
    assert_eq!(results.value("sectors"), SECTORS.to_string());
    assert_eq!(results.value("serial"), "E2E-0042");
    assert_eq!(results.value("logical_block_size"), "512");
    assert_eq!(results.value("queues"), "2");
    assert_eq!(results.value("write_cache"), "write back");
    assert_eq!(results.value("read_only"), "0");
    assert_eq!(results.value("removable"), "0");
    results.assert_checked(&[
        "last_sector_written",
        "beyond_the_end",
        "last_sector_read",
        "last_sector_same",
    ]);
    backend.stop(Signal::SIGTERM);

    let mut wanted = vec![0; SECTORS * 512];
    wanted[(SECTORS - 1) * 512..].copy_from_slice(&pattern("last", 32));
    assert_same_bytes(&fs::read(&image).unwrap(), &wanted, "image");
}

#[test]
fn fio_verifies_random_writes_at_depth_32_on_both_queues() {
    // 24 MiB each, in sectors.
    const BOTH_JOBS: u64 = 2 * (24 << 20) / 512;
    let lab = Lab::enter();
    let image = lab.path("disk.img");
    let backend = Backend::start(
        &lab,
        "disk",
        ["--blk-file", text(&image), "--create", "128M"],
    );
    // One job per CPU, hence per queue; sizes from one sector to more than a segment.
    let script = |mode: &str, flushes: bool| {
        let mut script = format!(
            r#"
            cat >/tmp/job <<END
            [global]
            filename=/dev/vda
            direct=1
            ioengine=libaio
            iodepth=32
            rw=randwrite
            bssplit=512/15:1k/10:4k/40:8k/10:16k/10:64k/15
            verify=crc32c
            verify_fatal=1
            thread=1
            {mode}
            [first]
            cpus_allowed=0
            size=24m
            [second]
            cpus_allowed=1
            offset=64m
            size=24m
END
            # In 512-byte sectors, the kernel's own count.
            sectors() {{ awk -v column="$1" '$3 == "vda" {{ print $column }}' /proc/diskstats; }}
            interrupts() {{ awk -v queue="virtio0-req.$1" '$NF == queue {{ print $2 + $3 }}' /proc/interrupts; }}
            check fio fio /tmp/job
            show sectors_read $(sectors 6)
            show sectors_written $(sectors 10)
            show first_queue $(interrupts 0)
            show second_queue $(interrupts 1)
            "#
        );
        if flushes {
            script += r"
            check fio_with_flushes fio --name=third --filename=/dev/vda --offset=32m --size=8m --direct=1 \
                --ioengine=libaio --iodepth=32 --rw=randrw --bs=4k --fsync=16 --verify=crc32c --verify_fatal=1
            ";
        }
        script
    };
    // More memory than fits below the PCI hole: the backend gets it in two pieces.
    let writer = Guest::new(&lab, "writer")
        .disk(backend.socket())
        .memory("3G")
        .with_fio()
        .start(&script("do_verify=1", true));
    let results = writer.finish();
    results.assert_checked(&["fio", "fio_with_flushes"]);
    assert!(results.number("sectors_written") >= BOTH_JOBS);
    assert!(results.number("sectors_read") >= BOTH_JOBS);
    // A batch may share an interrupt, so there are fewer of them than requests; an idle queue has next to none.
    for queue in ["first_queue", "second_queue"] {
        assert!(results.number(queue) > 50, "{queue}: {results:?}");
    }

    let reader = Guest::new(&lab, "reader")
        .disk(backend.socket())
        .with_fio()
        .start(&script("verify_only=1", false));
    let results = reader.finish();
    results.assert_checked(&["fio"]);
    assert_eq!(
        results.number("sectors_written"),
        0,
        "verifies what is there"
    );
    assert!(results.number("sectors_read") >= BOTH_JOBS);
    backend.stop(Signal::SIGTERM);
}

#[test]
fn ext4_survives_remount_reboot_and_a_second_front_end() {
    let lab = Lab::enter();
    let image = lab.path("disk.img");
    let backend = Backend::start(
        &lab,
        "disk",
        ["--blk-file", text(&image), "--create", "96M"],
    );
    // Runs twice, the disk telling which time it is.
    let first = Guest::new(&lab, "first")
        .disk(backend.socket())
        .may_reboot()
        .start(
            r#"
            sums() { (cd /mnt && find . -type f ! -name SUMS | sort | xargs sha256sum); }
            compare() { (cd /mnt && sha256sum -c SUMS); }
            drop_caches() { echo 3 >/proc/sys/vm/drop_caches; }

            if ! mount -t ext4 /dev/vda /mnt; then
                check mkfs mkfs.ext4 -q /dev/vda
                check mount mount -t ext4 /dev/vda /mnt
                mkdir -p /mnt/some/directory
                for i in $(seq 1 40); do
                    pattern "f$i" $((i * 97)) >"/mnt/some/directory/$i"
                done
                check copy cp -r /lib /mnt/copy
                check delete rm /mnt/some/directory/7 /mnt/some/directory/21
                sums >/tmp/SUMS
                check keep_sums cp /tmp/SUMS /mnt/SUMS
                show files $(wc -l </mnt/SUMS)
                check sync sync
                check umount umount /mnt
                drop_caches
                check remount mount -t ext4 /dev/vda /mnt
                check same_sums cmp /tmp/SUMS /mnt/SUMS
                check after_remount compare
                check umount_again umount /mnt
                reboot -f
            fi
            check after_reboot compare
            echo 'the second boot was here' >/mnt/second
            check umount_after_reboot umount /mnt
            drop_caches
            show disk $(sha256sum </dev/vda)
            "#,
        );
    let results = first.finish();
    assert!(
        results.number("files") > 38,
        "38 patterns and the copies: {results:?}"
    );
    results.assert_checked(&[
        "after_remount",
        "umount_again",
        "after_reboot",
        "umount_after_reboot",
    ]);
    let disk = |results: &machine::Results| {
        results
            .value("disk")
            .split_whitespace()
            .next()
            .unwrap()
            .to_owned()
    };
    assert_eq!(
        sha256(&image),
        disk(&results),
        "image after the first guest"
    );

    let second = Guest::new(&lab, "second").disk(backend.socket()).start(
        r#"
        compare() { (cd /mnt && sha256sum -c SUMS); }
        check mount mount -t ext4 /dev/vda /mnt
        check compare compare
        show second $(cat /mnt/second)
        check delete rm -r /mnt/copy
        check umount umount /mnt
        echo 3 >/proc/sys/vm/drop_caches
        show disk $(sha256sum </dev/vda)
        "#,
    );
    let results = second.finish();
    results.assert_checked(&["mount", "compare", "delete", "umount"]);
    assert_eq!(results.value("second"), "the second boot was here");
    assert_eq!(
        sha256(&image),
        disk(&results),
        "image after the second guest"
    );
    backend.stop(Signal::SIGTERM);

    assert_eq!(sha256(&image), disk(&results), "image after the program");
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
    run_script(
        Command::new("e2fsck")
            .args(["-f", "-n"])
            .arg(&image)
            .env("PATH", path),
    );
}

fn sha256(path: &Path) -> String {
    let output = run_script(Command::new("sha256sum").arg(path));
    output.split_whitespace().next().unwrap().to_owned()
}

#[test]
fn image_is_byte_for_byte_what_the_guest_wrote() {
    const SIZE: usize = 48 << 20;
    /// Bytes per request when the guest goes past its page cache, `None` when it goes through it.
    type Direct = Option<usize>;
    let all: [(u8, &str, usize, usize, Direct); 6] = [
        // CPU, tag, records, offset
        (0, "strt", 65536, 0, Some(4096)),
        // Starts and ends inside a page.
        (1, "sect", 32 * 77, 8_195 * 512, Some(512)),
        // Requests as large as the guest makes them, to a place no page boundary helps.
        (0, "huge", 65536, (16 << 20) + 512, Some(1 << 20)),
        // Bytes inside sectors: the guest reads what is around them first.
        (1, "byte", 1000, 20_000_003, None),
        // Over what is there already.
        (1, "over", 32 * 200, 100 * 512, Some(4096)),
        (0, "end", 65536, SIZE - (1 << 20), Some(65536)),
    ];
    let lab = Lab::enter();
    let image = lab.path("disk.img");
    // Write requests completed, the kernel's own count.
    let mut script =
        String::from("requests() { awk '$3 == \"vda\" { print $8 }' /proc/diskstats; }\n");
    let mut wanted = vec![0; SIZE];
    for (cpu, tag, records, offset, direct) in all {
        let block = direct.unwrap_or(4096);
        let flag = if direct.is_some() { ",direct" } else { "" };
        writeln!(
            script,
            "pattern {tag} {records} >/tmp/{tag}
            before=$(requests)
            check write_{tag} taskset -c {cpu} gdd if=/tmp/{tag} of=/dev/vda bs={block} \
                seek={offset} oflag=seek_bytes{flag} conv=notrunc,fsync
            show requests_{tag} $(($(requests) - before))"
        )
        .unwrap();
        wanted[offset..][..records * RECORD].copy_from_slice(&pattern(tag, records));
    }
    script += "echo 3 >/proc/sys/vm/drop_caches\nshow disk $(sha256sum </dev/vda)\n";

    let backend = Backend::start(
        &lab,
        "disk",
        ["--blk-file", text(&image), "--create", "48M"],
    );
    let results = Guest::new(&lab, "guest")
        .disk(backend.socket())
        .start(&script)
        .finish();
    for (_, tag, records, _, direct) in all {
        results.assert_checked(&[&format!("write_{tag}")]);
        // Through the page cache they would arrive as whole pages, joined.
        let least = direct.map_or(1, |block| records * RECORD / block);
        let requests = results.number(&format!("requests_{tag}"));
        assert!(requests >= least as u64, "{tag}: {requests} requests");
    }
    backend.stop(Signal::SIGTERM);

    assert_same_bytes(&fs::read(&image).unwrap(), &wanted, "image");
    assert!(
        results.value("disk").starts_with(&sha256(&image)),
        "what the guest reads back"
    );
}

#[test]
fn flush_reaches_the_file_before_the_guest_is_told() {
    const ROUNDS: usize = 8;
    let lab = Lab::enter();
    let image = lab.path("disk.img");
    let trace = lab.path("trace");
    let backend = Backend::start_traced(
        &lab,
        "disk",
        "fdatasync,fsync,io_submit",
        &trace,
        ["--blk-file", text(&image), "--create", "16M"],
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
fn read_only_disk_refuses_writes_and_stays_as_it_is() {
    let lab = Lab::enter();
    let image = lab.path("disk.img");
    let mut contents = pattern("keep", 65536);
    contents.resize(8 << 20, 0);
    fs::write(&image, &contents).unwrap();
    let backend = Backend::start(&lab, "disk", ["--blk-file", text(&image), "--read-only"]);
    let results = Guest::new(&lab, "guest")
        .disk(backend.socket())
        .start(
            r#"
            show read_only $(cat /sys/block/vda/ro)
            pattern keep 65536 >/tmp/wanted
            pattern bad 65536 >/tmp/bad
            check read gdd if=/dev/vda of=/tmp/found bs=64k count=16 iflag=direct
            check same cmp /tmp/wanted /tmp/found
            refuse write gdd if=/tmp/bad of=/dev/vda bs=64k conv=notrunc,fsync
            refuse write_direct gdd if=/tmp/bad of=/dev/vda bs=64k oflag=direct conv=notrunc
            # However root insists.
            blockdev --setrw /dev/vda
            refuse write_after_setrw gdd if=/tmp/bad of=/dev/vda bs=64k oflag=direct conv=notrunc
            check read_again gdd if=/dev/vda of=/tmp/found bs=64k count=16 iflag=direct
            check same_again cmp /tmp/wanted /tmp/found
            "#,
        )
        .finish();
    assert_eq!(results.value("read_only"), "1");
    results.assert_checked(&["read", "same", "write", "write_direct"]);
    results.assert_checked(&["write_after_setrw", "read_again", "same_again"]);
    backend.stop(Signal::SIGTERM);
    assert_same_bytes(&fs::read(&image).unwrap(), &contents, "image");
}

#[test]
fn printed_arguments_attach_the_disk() {
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
fn null_disk_takes_every_write_and_reads_as_zeroes() {
    let lab = Lab::enter();
    let backend = Backend::start(&lab, "null", ["--null", "1G"]);
    let results = Guest::new(&lab, "guest")
        .disk(backend.socket())
        .start(
            r#"
            show sectors $(cat /sys/block/vda/size)
            pattern gone 65536 >/tmp/gone
            check write gdd if=/tmp/gone of=/dev/vda bs=64k oflag=direct conv=notrunc,fsync
            show other_than_zero $(gdd if=/dev/vda bs=1M count=8 iflag=direct | tr -d '\000' | wc -c)
            "#,
        )
        .finish();
    assert_eq!(results.number("sectors"), (1 << 30) / 512);
    results.assert_checked(&["write"]);
    assert_eq!(results.number("other_than_zero"), 0);
    backend.stop(Signal::SIGTERM);
}

#[test]
fn demo_runs_the_commands_it_is_given() {
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
