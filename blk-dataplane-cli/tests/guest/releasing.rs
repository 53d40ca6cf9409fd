//! Discarding and zeroing: what it does to the content, and to the storage behind it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::signal::Signal;

use crate::backend::Backend;
use crate::lab::{Lab, text};
use crate::machine::Guest;
use crate::pattern::{RECORD, assert_same_bytes, pattern};

const MIB: usize = 1 << 20;

/// Storage a file has, in bytes.
fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// A file in which every byte is written, and is on the disk, so that its storage is all there.
fn full_image(path: &Path, size: usize) -> Vec<u8> {
    let contents = pattern("full", size / RECORD);
    fs::write(path, &contents).unwrap();
    fs::File::open(path).unwrap().sync_all().unwrap();
    assert!(
        allocated(path) >= size as u64,
        "the image has holes from the start"
    );
    contents
}

#[test]
fn guest_discards_and_zeroes_and_the_storage_goes_or_stays_as_it_asked() {
    const SIZE: usize = 16 * MIB;
    // What the script below does, in bytes.
    const DISCARDED: (usize, usize) = (2 * MIB, 4 * MIB);
    const ZEROED: (usize, usize) = (8 * MIB, 2 * MIB);
    const PUNCHED: (usize, usize) = (12 * MIB, 2 * MIB);
    // Neither end is where a block of the host's file system ends.
    const ODD: (usize, usize) = (15 * MIB + 512, 3 * 4096 - 1024);
    let lab = Lab::enter();
    let image = lab.path("disk.img");
    let kept = lab.path("kept.img");
    let vast = lab.path("vast.img");
    let mut wanted = full_image(&image, SIZE);
    full_image(&kept, SIZE);
    let before = (allocated(&image), allocated(&kept));
    let backend = Backend::start(&lab, "disk", ["--blk-file", text(&image)]);
    let keeping = Backend::start(&lab, "kept", ["--blk-file", text(&kept), "--no-discard"]);
    // More than the guest discards in one request.
    let whole = Backend::start(&lab, "vast", ["--blk-file", text(&vast), "--create", "8G"]);
    let results = Guest::new(&lab, "guest")
        .disk(backend.socket())
        .disk(keeping.socket())
        .disk(whole.socket())
        .start(
            r#"
            # By path: busybox has programs of the same names that do less.
            discard=/usr/bin/blkdiscard
            fallocate=/usr/bin/fallocate
            # other_than_zero DISK MIB COUNT
            other_than_zero() { gdd if=$1 bs=1M skip=$2 count=$3 iflag=direct | tr -d '\000' | wc -c; }

            check discard $discard -o $((2 << 20)) -l $((4 << 20)) /dev/vda
            refuse kept_discard $discard -o $((2 << 20)) -l $((4 << 20)) /dev/vdb
            for disk in a b; do
                # The first asks for zeroes that stay allocated, the second for zeroes as cheap as can be.
                check zero_$disk $discard -z -o $((8 << 20)) -l $((2 << 20)) /dev/vd$disk
                check punch_$disk $fallocate -p -o $((12 << 20)) -l $((2 << 20)) /dev/vd$disk
                check odd_$disk $discard -z -o $(((15 << 20) + 512)) -l $((3 * 4096 - 1024)) /dev/vd$disk
                show zeroed_$disk $(other_than_zero /dev/vd$disk 8 2)
                show punched_$disk $(other_than_zero /dev/vd$disk 12 2)
            done
            show discarded $(other_than_zero /dev/vda 2 4)
            show kept $(other_than_zero /dev/vdb 2 4)

            pattern vast 65536 >/tmp/vast
            for mib in 0 4000 8191; do
                check vast_$mib gdd if=/tmp/vast of=/dev/vdc bs=1M seek=$mib oflag=direct conv=notrunc,fsync
            done
            show largest_discard $(cat /sys/block/vdc/queue/discard_max_bytes)
            check vast_discard $discard /dev/vdc
            for mib in 0 4000 8191; do show vast_left_$mib $(other_than_zero /dev/vdc $mib 1); done
            "#,
        )
        .finish();
    for name in [
        "discarded",
        "zeroed_a",
        "punched_a",
        "zeroed_b",
        "punched_b",
    ] {
        assert_eq!(results.number(name), 0, "{name}: {results:?}");
    }
    assert_eq!(
        results.number("kept"),
        4 * MIB as u64,
        "what was not discarded"
    );
    results.assert_checked(&["discard", "kept_discard", "odd_a", "odd_b", "vast_discard"]);
    for name in ["vast_left_0", "vast_left_4000", "vast_left_8191"] {
        assert_eq!(results.number(name), 0, "{name}: {results:?}");
    }
    let largest = results.number("largest_discard");
    assert!(
        (1..8 << 30).contains(&largest),
        "one request would do: {largest}"
    );
    for backend in [backend, keeping, whole] {
        backend.stop(Signal::SIGTERM);
    }

    for (offset, len) in [DISCARDED, ZEROED, PUNCHED, ODD] {
        wanted[offset..][..len].fill(0);
    }
    assert_same_bytes(&fs::read(&image).unwrap(), &wanted, "image");
    // A block or two more or less is the file system's own affair: what describes the extents.
    let slack = 64 << 10;
    let given_back = before.0 - allocated(&image);
    let asked = (DISCARDED.1 + PUNCHED.1) as u64;
    assert!(
        given_back.abs_diff(asked) <= slack,
        "{given_back} bytes of storage given back, {asked} asked"
    );
    let given_back = before.1.saturating_sub(allocated(&kept));
    assert!(
        given_back <= slack,
        "--no-discard gave back {given_back} bytes"
    );
    assert!(
        allocated(&vast) <= slack,
        "left: {} bytes",
        allocated(&vast)
    );
}
