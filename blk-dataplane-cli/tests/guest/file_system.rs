//! A file system on the disk.

use std::process::Command;

use nix::sys::signal::Signal;

use crate::backend::Backend;
use crate::lab::{Lab, run_script, sha256, text};
use crate::machine::{Guest, Results};

#[test]
fn guest_ext4_survives_remount_reboot_and_a_second_front_end() {
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
    let disk = |results: &Results| {
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
