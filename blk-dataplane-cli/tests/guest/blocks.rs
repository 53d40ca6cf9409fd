//! Disks whose blocks are not 512 bytes.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;

use crate::backend::Backend;
use crate::lab::{Lab, run_script};
use crate::machine::Guest;

/// A loop device over a file, detached when dropped. Needs root and loop devices.
#[derive(Debug)]
struct Loop(String);

impl Loop {
    fn of(file: &Path, block_size: u32) -> Self {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &block_size.to_string()])
            .arg(file)
            .output()
            .expect("this test runs losetup (Debian: mount)");
        assert!(
            output.status.success(),
            "this test makes a loop device with losetup, which needs root and /dev/loop-control; run it as root, \
             or leave it out with --skip guest_sees_4096: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Self(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }

    fn path(&self) -> &str {
        &self.0
    }

    /// Has the kernel read the file's size anew.
    fn read_size(&self) {
        run_script(Command::new("losetup").args(["--set-capacity", &self.0]));
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn guest_sees_4096_byte_blocks_of_a_block_device_and_its_new_size() {
    let lab = Lab::enter();
    let image = lab.path("disk.img");
    let file = File::create(&image).unwrap();
    file.set_len(64 << 20).unwrap();
    let disk = Loop::of(&image, 4096);
    let backend = Backend::start(&lab, "disk", ["--blk-file", disk.path()]);
    assert!(
        !backend.stderr().contains("page cache"),
        "direct I/O is what the block size matters to: {}",
        backend.stderr()
    );
    let mut guest = Guest::new(&lab, "guest")
        .disk(backend.socket())
        .with_fio()
        .start(
            r#"
            cd /sys/block/vda
            show logical $(cat queue/logical_block_size)
            show physical $(cat queue/physical_block_size)
            show minimum $(cat queue/minimum_io_size)
            # In 512-byte sectors whatever the block size.
            show sectors $(cat size)
            pattern sect 32 >/tmp/sector
            refuse half_a_block gdd if=/tmp/sector of=/dev/vda bs=512 seek=1 oflag=direct conv=notrunc
            # Through the page cache the guest reads the block around it first.
            check sector gdd if=/tmp/sector of=/dev/vda bs=512 seek=100001 conv=notrunc,fsync
            cat >/tmp/job <<END
            [global]
            filename=/dev/vda
            direct=1
            ioengine=libaio
            iodepth=16
            rw=randwrite
            bssplit=4k/60:12k/20:64k/20
            verify=crc32c
            verify_fatal=1
            do_verify=1
            thread=1
            size=8m
            [first]
            cpus_allowed=0
            [second]
            cpus_allowed=1
            offset=24m
END
            check fio fio /tmp/job
            check discard /usr/bin/blkdiscard -o $((16 << 20)) -l $((1 << 20)) /dev/vda
            check zero /usr/bin/blkdiscard -z -o $((18 << 20)) -l 4096 /dev/vda
            show ready now
            for i in $(seq 1 600); do
                [ "$(cat size)" != 131072 ] && break
                sleep 0.1
            done
            show grown $(cat size)
            check new_end gdd if=/tmp/sector of=/dev/vda bs=512 seek=196607 conv=notrunc,fsync
            "#,
        );
    guest.wait_for("ready");
    file.set_len(96 << 20).unwrap();
    disk.read_size();
    backend.signal(Signal::SIGHUP);
    let results = guest.finish();
    for name in ["logical", "physical", "minimum"] {
        assert_eq!(results.number(name), 4096, "{name}");
    }
    assert_eq!(results.number("sectors"), (64 << 20) / 512);
    assert_eq!(results.number("grown"), (96 << 20) / 512);
    results.assert_checked(&[
        "half_a_block",
        "sector",
        "fio",
        "discard",
        "zero",
        "new_end",
    ]);
    backend.stop(Signal::SIGTERM);
    drop(disk);
    let contents = fs::read(&image).unwrap();
    let sector = crate::pattern::pattern("sect", 32);
    for place in [100_001, 196_607] {
        assert_eq!(contents[place * 512..][..512], sector, "sector {place}");
    }
}
