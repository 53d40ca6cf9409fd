//! What a user of libblkio does, through the real program.

use std::os::unix::fs::MetadataExt;

use nix::libc::{EIO, ENOTSUP};
use nix::sys::signal::Signal;

use crate::libblkio::{BUFFER, Client, Request, pattern};
use crate::running::{Running, program};

const SIZE: u64 = 16 << 20;

#[test]
fn libblkio_reads_what_it_has_written_on_every_queue() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut command = program(&directory);
    command.args(["--blk-file=disk.img", "--create=16M", "--num-queues=4"]);
    let (mut running, _) = Running::start(command);
    let mut client = Client::connect(&directory.path().join("disk.img.sock"), 4);
    assert_eq!(client.capacity(), SIZE);
    assert_eq!(client.blkio.get_i32("max-queues").unwrap(), 4);
    assert!(!client.blkio.get_bool("read-only").unwrap());
    // Deeper than one batch on each queue, of sizes from a sector up, and all queues at once.
    const DEPTH: usize = 32;
    let each = BUFFER / DEPTH;
    let part = |queue: usize, n: usize| u64::try_from(queue * BUFFER + n * each).unwrap();
    let len = |n: usize| 512 << (n % 7);
    for queue in 0..4 {
        for n in 0..DEPTH {
            let (at, buffer, len) = (part(queue, n), n * each, len(n));
            client.fill(queue, buffer, &pattern(at, len));
            client.add(queue, Request::Write { at, buffer, len }, n);
        }
    }
    for queue in 0..4 {
        let mut answers = 0;
        while answers < DEPTH {
            let some = client.wait(queue, 1);
            assert!(some.iter().all(|&(_, answer)| answer == 0), "{some:?}");
            answers += some.len();
        }
        assert_eq!(client.run(queue, Request::Flush), 0);
    }
    // By another queue than wrote it, and by the host.
    let content = std::fs::read(directory.path().join("disk.img")).unwrap();
    for queue in 0..4 {
        for n in 0..DEPTH {
            let at = part(queue, n);
            let expected = pattern(at, len(n));
            assert!(
                client.read(3 - queue, at, len(n)) == expected,
                "{queue} {n}"
            );
            let start = usize::try_from(at).unwrap();
            assert!(content[start..][..len(n)] == expected, "{queue} {n}");
        }
    }
    drop(client);
    running.signal(Signal::SIGTERM);
    assert!(running.wait().success());
}

#[test]
fn libblkio_discards_and_zeroes() {
    // On a tmpfs, which has holes whatever the disk below has.
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut command = program(&directory);
    command.args(["--blk-file=disk.img", "--create=16M", "--socket-path=s"]);
    let (_running, _) = Running::start(command);
    let mut client = Client::connect(&directory.path().join("s"), 1);
    let allocated = || {
        let metadata = directory.path().join("disk.img").metadata();
        metadata.unwrap().blocks() * 512
    };
    let mib = 1u64 << 20;
    for at in 0..4 {
        client.write(0, at * mib, &pattern(at, BUFFER));
    }
    assert_eq!(allocated(), 4 * mib);
    assert!(client.blkio.get_u64("max-discard-len").unwrap() >= mib);
    let discard = Request::Discard { at: 0, len: mib };
    assert_eq!(client.run(0, discard), 0);
    assert_eq!(allocated(), 3 * mib, "given back");
    let keep = Request::WriteZeroes {
        at: mib,
        len: mib,
        unmap: false,
    };
    assert_eq!(client.run(0, keep), 0);
    assert_eq!(allocated(), 3 * mib, "kept");
    let unmap = Request::WriteZeroes {
        at: 2 * mib,
        len: mib,
        unmap: true,
    };
    assert_eq!(client.run(0, unmap), 0);
    assert_eq!(allocated(), 2 * mib);
    for at in [mib, 2 * mib] {
        assert!(client.read(0, at, BUFFER).iter().all(|&byte| byte == 0));
    }
    assert!(
        client.read(0, 3 * mib, BUFFER) == pattern(3, BUFFER),
        "untouched"
    );
    // Beyond the end: the request fails and nothing else.
    let beyond = Request::Read {
        at: 16 * mib,
        buffer: 0,
        len: 512,
    };
    assert_eq!(client.run(0, beyond), -EIO);
    assert_eq!(client.run(0, Request::Flush), 0);
}

#[test]
fn libblkio_is_told_what_cannot_be() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("disk.img"), pattern(1, 1 << 20)).unwrap();
    let mut command = program(&directory);
    command.args(["--blk-file=disk.img", "--read-only", "--num-queues=2"]);
    let (_running, _) = Running::start(command);
    let path = directory.path().join("disk.img.sock");
    let refused = Client::try_connect(&path, 1, false).err().unwrap();
    assert!(refused.to_string().contains("read-only"), "{refused}");
    let refused = Client::try_connect(&path, 3, true).err().unwrap();
    assert!(refused.to_string().contains("queue"), "{refused}");
    // None of which has done any harm.
    let mut client = Client::try_connect(&path, 2, true).unwrap();
    assert!(client.read(1, 4096, 8192) == pattern(1, 1 << 20)[4096..12288]);
    let discard = Request::Discard { at: 0, len: 4096 };
    assert_eq!(client.run(0, discard), -ENOTSUP);
}
