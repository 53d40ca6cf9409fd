//! Random writes from several CPUs at depth, verified by fio.

use nix::sys::signal::Signal;

use crate::backend::Backend;
use crate::lab::{Lab, text};
use crate::machine::Guest;

#[test]
fn guest_fio_verifies_random_writes_at_depth_32_on_both_queues() {
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
fn guest_fio_verifies_random_writes_over_packed_rings() {
    let lab = Lab::enter();
    let image = lab.path("disk.img");
    let backend = Backend::start(
        &lab,
        "disk",
        ["--blk-file", text(&image), "--create", "64M"],
    );
    let results = Guest::new(&lab, "packed")
        .packed()
        .disk(backend.socket())
        .with_fio()
        .start(
            r"
            # Bit 34, counted from 0.
            show packed $(cut -c35 /sys/block/vda/device/features)
            for cpu in 0 1; do
                fio --name=job$cpu --filename=/dev/vda --offset=$((cpu * 32))m --size=12m --direct=1 --thread=1                     --ioengine=libaio --iodepth=32 --rw=randwrite --bssplit=512/20:4k/50:64k/30 --fsync=64                     --cpus_allowed=$cpu --verify=crc32c --verify_fatal=1 >/tmp/fio$cpu 2>&1 &
                eval pid$cpu=$!
            done
            check first wait $pid0
            check second wait $pid1
            ",
        )
        .finish();
    assert_eq!(results.number("packed"), 1);
    results.assert_checked(&["first", "second"]);
    backend.stop(Signal::SIGTERM);
}

/// The processors this process may run on, first and last, as the kernel lists them.
fn two_processors() -> [String; 2] {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let list = allowed_in(&status);
    let mut numbers = list.split([',', '-']);
    let first = numbers.next().unwrap();
    [first, numbers.next_back().unwrap_or(first)].map(str::to_owned)
}

/// The `Cpus_allowed_list` of a thread's or a process's status.
fn allowed_in(status: &str) -> &str {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    line.unwrap().trim()
}

/// The processors that each thread whose name begins as those of data threads do may run on, by name.
fn data_threads(pid: u32) -> Vec<(String, String)> {
    let mut threads: Vec<_> = std::fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .map(|thread| thread.unwrap().path())
        .map(|thread| {
            let read = |name| std::fs::read_to_string(thread.join(name)).unwrap();
            (
                read("comm").trim().to_owned(),
                allowed_in(&read("status")).to_owned(),
            )
        })
        .filter(|(name, _)| name.starts_with("blk-data-"))
        .collect();
    threads.sort();
    threads
}

#[test]
fn guest_of_4_cpus_verifies_on_4_queues_served_by_2_bound_threads() {
    let lab = Lab::enter();
    let image = lab.path("disk.img");
    let [first, last] = two_processors();
    let affinity = format!("{first},{last}");
    let backend = Backend::start(
        &lab,
        "disk",
        [
            "--blk-file",
            text(&image),
            "--create",
            "128M",
            "--num-queues",
            "4",
            "--num-threads",
            "2",
            "--cpu-affinity",
            &affinity,
            "--latencies",
        ],
    );
    let mut guest = Guest::new(&lab, "guest")
        .cpus(4)
        .disk(backend.socket())
        .with_fio()
        .start(
            r#"
            show queues $(ls /sys/block/vda/mq | wc -l)
            cat >/tmp/job <<END
            [global]
            filename=/dev/vda
            direct=1
            ioengine=libaio
            iodepth=16
            rw=randwrite
            bssplit=512/10:4k/60:16k/20:64k/10
            verify=crc32c
            verify_fatal=1
            do_verify=1
            thread=1
            size=10m
            fsync=64
            [cpu0]
            cpus_allowed=0
            [cpu1]
            cpus_allowed=1
            offset=32m
            [cpu2]
            cpus_allowed=2
            offset=64m
            [cpu3]
            cpus_allowed=3
            offset=96m
END
            check fio fio /tmp/job
            for queue in 0 1 2 3; do
                show queue$queue $(awk -v queue="virtio0-req.$queue" \
                    '$NF == queue { print $2 + $3 + $4 + $5 }' /proc/interrupts)
            done
            show verified yes
            "#,
        );
    assert_eq!(guest.wait_for("queues"), "4");
    // The guest's driver runs, so the threads of all its queues do.
    assert_eq!(
        data_threads(backend.pid()),
        [
            ("blk-data-0".to_owned(), first),
            ("blk-data-1".to_owned(), last)
        ]
    );
    let results = guest.finish();
    results.assert_checked(&["fio", "verified"]);
    for queue in ["queue0", "queue1", "queue2", "queue3"] {
        // An idle queue has next to none.
        assert!(results.number(queue) > 50, "{queue}: {results:?}");
    }
    // What an operator is told, though the guest has gone.
    backend.signal(Signal::SIGUSR1);
    backend.wait_to_say("queue 3 others:");
    let said = backend.stderr();
    for queue in 0..4 {
        let line = |of: &str| {
            let start = format!("blk-dataplane: queue {queue}{of}: ");
            let line = said.lines().find_map(|line| line.strip_prefix(&start));
            line.unwrap_or_else(|| panic!("no line of queue {queue}{of} in: {said}"))
        };
        let counters = line("");
        let counter = |name: &str| -> u64 {
            let mut values = counters.split(' ').filter_map(|each| each.split_once('='));
            let (_, value) = values.find(|(key, _)| *key == name).unwrap();
            value.parse().unwrap()
        };
        // Each job's 10 MiB, written and verified through the queue of its CPU.
        assert!(counter("bytes_written") >= 10 << 20, "{counters}");
        assert!(counter("bytes_read") >= 10 << 20, "{counters}");
        assert!(counter("flushes") > 0, "{counters}");
        assert_eq!(
            counter("failed") + counter("refused") + counter("bad_chains"),
            0,
            "{counters}"
        );
        assert!(
            line(" writes").starts_with(&format!("{} timed, ", counter("writes"))),
            "{said}"
        );
    }
    backend.stop(Signal::SIGTERM);
}
