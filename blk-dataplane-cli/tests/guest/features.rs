//! What the guest is told of the device: exactly what the program says, and what the image is like.

use std::fs;
use std::os::unix::fs::MetadataExt;

use nix::sys::signal::Signal;

use crate::backend::Backend;
use crate::lab::{Lab, text};
use crate::machine::Guest;

/// The device's own bits (virtio 1.3 §2.2); the rest concerns the transport, and QEMU has a say in it.
const DEVICE_BITS: u64 = (1 << 24) - 1;

const RO: u64 = 1 << 5;
const CONFIG_WCE: u64 = 1 << 11;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

/// What the program says with -v that it offers.
#[track_caller]
fn offered(backend: &Backend) -> u64 {
    let stderr = backend.stderr();
    let features = stderr
        .lines()
        .find_map(|line| line.strip_prefix("blk-dataplane: features 0x"))
        .unwrap_or_else(|| panic!("no features in: {stderr}"));
    let (number, _) = features.split_once(':').unwrap();
    u64::from_str_radix(number, 16).unwrap()
}

/// What the guest's driver has accepted: a digit per bit, the lowest first.
fn accepted(bits: &str) -> u64 {
    assert_eq!(bits.len(), 64, "{bits:?}");
    let ones = bits.bytes().enumerate().filter(|&(_, digit)| digit == b'1');
    ones.fold(0, |features, (bit, _)| features | 1 << bit)
}

#[test]
fn guest_is_told_what_the_program_offers_and_what_the_image_is_like() {
    let lab = Lab::enter();
    let mut backends = Vec::new();
    let all: [(&str, &[&str]); 3] = [
        ("a", &["--serial", "FIRST-DISK-20-BYTES!"]),
        ("b", &["--serial", "read-only", "--read-only"]),
        ("c", &["--no-discard", "--block-size", "4096", "-vv"]),
    ];
    let mut guest = Guest::new(&lab, "guest");
    for (name, options) in all {
        let image = lab.path(&format!("{name}.img"));
        fs::write(&image, vec![0x5a; 1 << 20]).unwrap();
        let arguments = [&["--blk-file", text(&image), "-v"], options].concat();
        let backend = Backend::start(&lab, name, arguments);
        guest = guest.disk(backend.socket());
        backends.push(backend);
    }
    let results = guest
        .start(
            r#"
            for name in a b c; do
                disk=/sys/block/vd$name
                show features_$name $(cat $disk/device/features)
                show serial_$name $(cat $disk/serial)
                for attribute in logical_block_size physical_block_size minimum_io_size optimal_io_size \
                    max_segments discard_max_bytes discard_granularity write_zeroes_max_bytes; do
                    show ${attribute}_$name $(cat $disk/queue/$attribute)
                done
                show alignment_$name $(cat $disk/alignment_offset)
                show lsblk_$name $(/usr/bin/lsblk --bytes --noheadings --nodeps \
                    -o LOG-SEC,PHY-SEC,MIN-IO,OPT-IO,ALIGNMENT,RO,SIZE /dev/vd$name)
                show read_only_$name $(cat $disk/ro)
            done
            refuse cache_b sh -c 'echo "write through" >/sys/block/vdb/cache_type'
            refuse discard_b /usr/bin/blkdiscard /dev/vdb
            refuse zero_b /usr/bin/blkdiscard -z /dev/vdb
            refuse discard_c /usr/bin/blkdiscard /dev/vdc
            check zero_c /usr/bin/blkdiscard -z -l 4096 /dev/vdc
            "#,
        )
        .finish();
    let features = ["a", "b", "c"].map(|name| accepted(results.value(&format!("features_{name}"))));
    for (backend, accepted) in backends.iter().zip(features) {
        assert_eq!(
            accepted & DEVICE_BITS,
            offered(backend) & DEVICE_BITS,
            "{accepted:#x}"
        );
    }
    let writing = CONFIG_WCE | DISCARD | WRITE_ZEROES;
    assert_eq!(features[0] & (RO | writing), writing, "writable");
    assert_eq!(features[1] & (RO | writing), RO, "read-only");
    assert_eq!(
        features[2] & (RO | writing),
        CONFIG_WCE | WRITE_ZEROES,
        "--no-discard"
    );
    results.assert_checked(&["cache_b", "discard_b", "zero_b", "discard_c", "zero_c"]);

    // Twenty bytes: all that there is room for, and no zero behind them.
    assert_eq!(results.value("serial_a"), "FIRST-DISK-20-BYTES!");
    assert_eq!(results.value("serial_b"), "read-only");
    assert_eq!(results.value("serial_c"), "");
    for (name, logical) in [("a", 512), ("b", 512), ("c", 4096)] {
        let number = |attribute: &str| results.number(&format!("{attribute}_{name}"));
        let preferred = fs::metadata(lab.path(&format!("{name}.img")))
            .unwrap()
            .blksize();
        // No larger than a guest's page.
        let physical = preferred.clamp(logical, 4096);
        assert_eq!(number("logical_block_size"), logical, "{name}");
        assert_eq!(number("physical_block_size"), physical, "{name}");
        assert_eq!(number("minimum_io_size"), preferred, "{name}");
        assert_eq!(number("optimal_io_size"), preferred, "{name}");
        assert_eq!(number("alignment"), 0, "{name}");
        assert_eq!(number("max_segments"), 126, "{name}");
        let read_only = u8::from(name == "b");
        let lsblk = results.value(&format!("lsblk_{name}"));
        let columns: Vec<&str> = lsblk.split_whitespace().collect();
        let wanted = format!("{logical} {physical} {preferred} {preferred} 0 {read_only} 1048576");
        assert_eq!(columns.join(" "), wanted, "lsblk on {name}");
        assert_eq!(number("read_only"), u64::from(read_only), "{name}");
        assert_eq!(number("discard_max_bytes") > 0, name == "a", "{name}");
        assert_eq!(number("write_zeroes_max_bytes") > 0, name != "b", "{name}");
    }
    assert_eq!(
        results.number("discard_granularity_a"),
        fs::metadata(lab.path("a.img")).unwrap().blksize()
    );
    // The trace points of the original, as an operator sees them: with -v given three times, and not with one.
    let traced = |backend: &Backend| {
        let stderr = backend.stderr();
        ["start", "process_request", "complete_request"].map(|point| {
            stderr
                .lines()
                .any(|line| line.contains("blk_dataplane::trace") && line.contains(point))
        })
    };
    assert_eq!(traced(&backends[0]), [false; 3]);
    assert_eq!(traced(&backends[2]), [true; 3], "{}", backends[2].stderr());
    for backend in backends {
        backend.stop(Signal::SIGTERM);
    }
    assert_eq!(fs::read(lab.path("b.img")).unwrap(), vec![0x5a; 1 << 20]);
}
