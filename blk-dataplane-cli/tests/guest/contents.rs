//! What the guest writes is what the image holds, and what it reads.

use std::fmt::Write;
use std::fs;

use nix::sys::signal::Signal;

use crate::backend::Backend;
use crate::lab::{Lab, sha256, text};
use crate::machine::Guest;
use crate::pattern::{RECORD, assert_same_bytes, pattern};

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
fn guest_image_is_byte_for_byte_what_the_guest_wrote() {
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
fn guest_null_disk_takes_every_write_and_reads_as_zeroes() {
    let lab = Lab::enter();
    let backend = Backend::start(&lab, "null", ["--null", "1G", "--read-zeroes"]);
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
fn guest_read_only_disk_refuses_writes_and_stays_as_it_is() {
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
