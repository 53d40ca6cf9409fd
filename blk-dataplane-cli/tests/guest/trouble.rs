//! What befalls the host while a guest runs: a full disk, an image deleted, the program stopped under load.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use nix::sys::signal::Signal;

use crate::backend::Backend;
use crate::lab::{Lab, run_script, text};
use crate::machine::Guest;
use crate::pattern::{assert_same_bytes, pattern};

/// A file system of so many MiB, unmounted when dropped. Needs root.
#[derive(Debug)]
struct Small(PathBuf);

impl Small {
    fn mount(lab: &Lab, mib: u32) -> Self {
        let place = lab.path("small");
        fs::create_dir(&place).unwrap();
        let output = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "none"])
            .arg(&place)
            .output()
            .expect("this test runs mount (Debian: mount)");
        assert!(
            output.status.success(),
            "this test mounts a small tmpfs, which needs root; run it as root, or leave it out with \
             --skip guest_is_told_of_a_full_disk: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Self(place)
    }

    fn enlarge(&self, mib: u32) {
        let options = format!("remount,size={mib}m");
        run_script(Command::new("mount").args(["-o", &options]).arg(&self.0));
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn guest_is_told_of_a_full_disk_and_goes_on_when_there_is_room() {
    const MIB: usize = 1 << 20;
    let lab = Lab::enter();
    let small = Small::mount(&lab, 16);
    let image = small.0.join("disk.img");
    let backend = Backend::start(
        &lab,
        "disk",
        ["--blk-file", text(&image), "--create", "64M"],
    );
    let mut guest = Guest::new(&lab, "guest").disk(backend.socket()).start(
        r#"
        pattern kept 65536 >/tmp/kept
        pattern late 65536 >/tmp/late
        check kept gdd if=/tmp/kept of=/dev/vda bs=1M oflag=direct conv=notrunc,fsync
        refuse fill gdd if=/dev/zero of=/dev/vda bs=1M seek=1 count=40 oflag=direct conv=notrunc
        # What has its storage can be written, full or not, and all can be read.
        check again gdd if=/tmp/kept of=/dev/vda bs=1M oflag=direct conv=notrunc,fsync
        check read gdd if=/dev/vda of=/tmp/found bs=1M count=1 skip=63 iflag=direct
        show full yes
        late() { gdd if=/tmp/late of=/dev/vda bs=1M seek=50 oflag=direct conv=notrunc,fsync; }
        for i in $(seq 1 600); do
            late 2>/dev/null && break
            sleep 0.1
        done
        check late late
        "#,
    );
    guest.wait_for("full");
    backend.wait_to_say("make room");
    backend.signal(Signal::SIGUSR1);
    backend.wait_to_say("failed_no_space=");
    let said = backend.stderr();
    let warning = said.lines().find(|line| line.contains("make room"));
    assert!(warning.unwrap().contains(text(&image)), "{said}");
    assert!(!said.contains("failed_no_space=0 "), "{said}");
    assert!(said.contains("failed_otherwise=0 "), "{said}");
    small.enlarge(128);
    let results = guest.finish();
    results.assert_checked(&["kept", "fill", "again", "read", "late"]);
    // Thousands of failures, and a handful of lines.
    let lines = said.matches("make room").count();
    assert!(lines <= 4, "{lines} lines: {said}");
    backend.stop(Signal::SIGTERM);
    let found = fs::read(&image).unwrap();
    assert_eq!(found.len(), 64 * MIB);
    assert_same_bytes(&found[..MIB], &pattern("kept", 65536), "before");
    assert_same_bytes(&found[50 * MIB..][..MIB], &pattern("late", 65536), "after");
}

#[test]
fn guest_finds_what_it_was_told_is_written_in_an_image_deleted_and_a_program_stopped_under_load() {
    const STEP: usize = 64 << 10;
    let lab = Lab::enter();
    let image = lab.path("disk.img");
    let backend = Backend::start(
        &lab,
        "disk",
        ["--blk-file", text(&image), "--create", "64M"],
    );
    let file = fs::File::open(&image).unwrap();
    let mut guest = Guest::new(&lab, "guest")
        .disk(backend.socket())
        .with_fio()
        .start(
            r#"
            # Load on every queue, behind what is counted.
            fio --name=load --filename=/dev/vda --offset=32m --size=32m --direct=1 --ioengine=libaio \
                --iodepth=32 --numjobs=2 --rw=randwrite --bssplit=512/20:4k/40:64k/40 --fsync=32 --time_based \
                --runtime=1000 >/dev/null 2>&1 &
            pattern here 4096 >/tmp/here
            for i in $(seq 0 400); do
                gdd if=/tmp/here of=/dev/vda bs=64k seek=$i oflag=direct conv=notrunc 2>/dev/null &&
                    show written$i yes
                [ $i = 5 ] && show six yes
            done
            "#,
        );
    guest.wait_for("six");
    fs::remove_file(&image).unwrap();
    guest.wait_for("written11");
    // Nobody can start a second one on what is no longer there; this one goes on, and ends as it should.
    backend.stop(Signal::SIGTERM);
    guest.kill();
    let mut found = vec![0; 12 * STEP];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut found, 0).unwrap();
    let wanted = pattern("here", 4096);
    for (step, found) in found.chunks(STEP).enumerate() {
        assert_same_bytes(found, &wanted, &format!("step {step}"));
    }
}
