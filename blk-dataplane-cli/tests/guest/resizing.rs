//! An image that grows and shrinks under a running guest.

use std::fs::File;

use nix::sys::signal::Signal;

use crate::backend::Backend;
use crate::lab::{Lab, text};
use crate::machine::Guest;
use crate::pattern::pattern;

#[test]
fn guest_sees_the_image_grow_and_shrink() {
    // MiB: at first, grown, shrunk.
    const SIZES: [u64; 3] = [32, 64, 16];
    let sectors = SIZES.map(|mib| (mib << 20) / 512);
    let lab = Lab::enter();
    let image = lab.path("disk.img");
    let backend = Backend::start(
        &lab,
        "disk",
        ["--blk-file", text(&image), "--create", "32M"],
    );
    let mut guest = Guest::new(&lab, "guest").disk(backend.socket()).start(
        r#"
        pattern new 4096 >/tmp/new
        pattern last 32 >/tmp/last
        sectors() { cat /sys/block/vda/size; }
        # Waits until the size is another one, but not for good.
        await() {
            for i in $(seq 1 600); do
                [ "$(sectors)" != "$1" ] && break
                sleep 0.1
            done
            sectors
        }
        refuse beyond gdd if=/tmp/new of=/dev/vda bs=64k seek=768 oflag=direct conv=notrunc
        show first $(sectors)

        show grown $(await 65536)
        # The same place as before, and the new end.
        check write gdd if=/tmp/new of=/dev/vda bs=64k seek=768 oflag=direct conv=notrunc,fsync
        check write_last gdd if=/tmp/last of=/dev/vda bs=512 seek=131071 oflag=direct conv=notrunc,fsync
        check read gdd if=/dev/vda of=/tmp/found bs=64k skip=768 count=1 iflag=direct
        check same cmp /tmp/new /tmp/found
        refuse beyond_grown gdd if=/tmp/last of=/dev/vda bs=512 seek=131072 oflag=direct conv=notrunc
        show written $(sectors)

        show shrunk $(await 131072)
        refuse beyond_shrunk gdd if=/tmp/new of=/dev/vda bs=64k seek=768 oflag=direct conv=notrunc
        show read_beyond $(gdd if=/dev/vda bs=512 skip=32768 iflag=direct | wc -c)
        check read_last gdd if=/dev/vda of=/tmp/found bs=512 skip=32767 iflag=direct
        show last_bytes $(wc -c </tmp/found)
        check write_shrunk_last gdd if=/tmp/last of=/dev/vda bs=512 seek=32767 oflag=direct conv=notrunc,fsync
        "#,
    );
    let file = File::options().read(true).write(true).open(&image).unwrap();
    assert_eq!(guest.wait_for("first"), sectors[0].to_string());
    file.set_len(SIZES[1] << 20).unwrap();
    backend.signal(Signal::SIGHUP);
    backend.wait_to_say(&format!(
        "{} bytes; it was {}",
        SIZES[1] << 20,
        SIZES[0] << 20
    ));
    assert_eq!(guest.wait_for("grown"), sectors[1].to_string());
    guest.wait_for("written");
    let contents = std::fs::read(&image).unwrap();
    let at = |offset: usize, wanted: &[u8]| contents[offset..].starts_with(wanted);
    assert!(at(48 << 20, &pattern("new", 4096)), "beyond the old end");
    assert!(at((64 << 20) - 512, &pattern("last", 32)), "at the new end");

    file.set_len(SIZES[2] << 20).unwrap();
    backend.signal(Signal::SIGHUP);
    backend.wait_to_say(&format!(
        "{} bytes; it was {}",
        SIZES[2] << 20,
        SIZES[1] << 20
    ));
    let results = guest.finish();
    assert_eq!(results.number("shrunk"), sectors[2]);
    assert_eq!(results.number("read_beyond"), 0);
    assert_eq!(results.number("last_bytes"), 512);
    results.assert_checked(&["beyond", "beyond_grown", "beyond_shrunk"]);
    results.assert_checked(&[
        "write",
        "write_last",
        "same",
        "read_last",
        "write_shrunk_last",
    ]);
    backend.stop(Signal::SIGTERM);
    // No write after the shrinking has made the file longer again.
    assert_eq!(file.metadata().unwrap().len(), SIZES[2] << 20);
}
