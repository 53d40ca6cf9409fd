//! Several devices in one program.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::Signal;

use crate::libblkio::{Client, Request, pattern};
use crate::running::{Running, program};

#[test]
fn devices_of_the_command_line_and_of_a_file_are_served_together() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    std::fs::write(
        at("disks.toml"),
        "[[device]]\nname = 'root'\nblk-file = 'root.img'\ncreate = '1M'\n\n\
         [[device]]\nnull = '1M'\nsocket-path = 'null,socket'\n",
    )
    .unwrap();
    let mut command = program(&directory);
    command.args([
        "--config=disks.toml",
        "--device=name=data,blk-file=data.img,create=2M,socket-path=data,,socket",
    ]);
    let (mut running, mut ready) = Running::start(command);
    for _ in 0..2 {
        running.stdout.read_line(&mut ready).unwrap();
    }
    let sockets = ["root.img.sock", "null,socket", "data,socket"].map(at);
    let expected: String = sockets
        .iter()
        .map(|path| format!("ready {}\n", path.display()))
        .collect();
    assert_eq!(ready, expected);
    let mut clients = sockets.each_ref().map(|path| Client::connect(path, 1));
    assert_eq!(
        clients.each_ref().map(Client::capacity),
        [1 << 20, 1 << 20, 2 << 20]
    );
    clients[0].write(0, 0, &pattern(0, 4096));
    clients[2].write(0, 0, &pattern(2, 4096));
    assert!(clients[0].read(0, 0, 4096) == pattern(0, 4096));
    assert!(clients[2].read(0, 0, 4096) == pattern(2, 4096));

    let mut said = BufReader::new(running.child.stderr.take().unwrap()).lines();
    let mut wait_for = |line: &str| {
        let found = said.any(|each| each.unwrap().starts_with(line));
        assert!(found, "{line}");
    };
    running.signal(Signal::SIGUSR1);
    wait_for("blk-dataplane: root: device: requests=2 ");
    wait_for("blk-dataplane: root: queue 0: reads=1 writes=1 ");
    wait_for("blk-dataplane: blk1: device: requests=0 ");
    wait_for("blk-dataplane: data: device: requests=2 ");
    for (name, size) in [("root.img", 3 << 20), ("data.img", 4 << 20)] {
        let image = std::fs::File::options().write(true).open(at(name)).unwrap();
        image.set_len(size).unwrap();
    }
    running.signal(Signal::SIGHUP);
    wait_for("blk-dataplane: root: 3145728 bytes; it was 1048576");
    wait_for("blk-dataplane: blk1: 1048576 bytes; it was 1048576");
    wait_for("blk-dataplane: data: 4194304 bytes; it was 2097152");
    assert_eq!(clients[0].capacity(), 3 << 20);

    running.signal(Signal::SIGTERM);
    assert_eq!(running.wait().code(), Some(0));
    for socket in sockets {
        assert!(!socket.exists(), "{}", socket.display());
    }
    let image = std::fs::read(at("data.img")).unwrap();
    assert!(image[..4096] == pattern(2, 4096));
}

#[test]
fn one_device_that_cannot_be_leaves_none_behind() {
    let directory = tempfile::tempdir().unwrap();
    let said = crate::running::failure(
        &directory,
        &[
            "--device=null=1M,socket-path=one",
            "--device=null=1M,socket-path=no/where",
        ],
        1,
    );
    for part in ["--device number 2", "--socket-path", "no/where"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!directory.path().join("one").exists());
}

/// Sends bytes in a way that no front-end does, and hangs up or waits to be hung up on.
fn misbehave(path: &PathBuf, round: usize) {
    let Ok(stream) = UnixStream::connect(path) else {
        return;
    };
    // Whatever it is answered, and whether at all, is its own affair.
    let stream = &stream;
    let send = |bytes: &[u8]| { stream }.write_all(bytes).is_ok();
    match round % 5 {
        0 => {
            send(&pattern(u64::try_from(round).unwrap(), 4096));
        }
        // Half a header.
        1 => {
            send(&[1, 0, 0, 0, 1]);
        }
        // GET_FEATURES over and over, the answers unread until the socket is full.
        2 => {
            stream.set_nonblocking(true).unwrap();
            let question = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
            while { stream }.write(&question).is_ok() {}
        }
        // A message of 4 GiB.
        3 => {
            send(&[5, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
            send(&[0; 8192]);
        }
        // A good start, then nonsense.
        _ => {
            send(&[3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
            send(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
            let _ = { stream }.read(&mut [0; 20]);
            send(&[99; 64]);
        }
    }
}

#[test]
fn z3_a_log_that_nobody_reads_holds_up_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = program(&directory);
    command.args([
        "--device=null=1M,read-zeroes=on,socket-path=good",
        "--device=null=1M,read-zeroes=on,socket-path=bad",
    ]);
    let (mut running, _) = Running::start(command);
    // A small pipe, filled with a line or more each.
    let stderr = running.child.stderr.as_ref().unwrap();
    fcntl(stderr, FcntlArg::F_SETPIPE_SZ(16384)).unwrap();
    for _ in 0..400 {
        misbehave(&directory.path().join("bad"), 0);
    }
    running.signal(Signal::SIGUSR1);
    for name in ["good", "bad"] {
        let mut client = Client::connect(&directory.path().join(name), 1);
        assert!(client.read(0, 0, 4096).iter().all(|&byte| byte == 0));
    }
    running.signal(Signal::SIGTERM);
    assert_eq!(running.wait().code(), Some(0));
    let said = running.stderr();
    assert!((8192..=16384).contains(&said.len()), "full: {}", said.len());
}

#[test]
fn a_front_end_that_misbehaves_disturbs_no_other_device() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut command = program(&directory);
    command.args([
        "--device=blk-file=good.img,create=8M,socket-path=good,num-queues=2",
        "--device=blk-file=bad.img,create=8M,socket-path=bad",
        "--device=null=1M,socket-path=stalled",
    ]);
    let (mut running, _) = Running::start(command);
    // Its log is long, and nobody may be held up by it either.
    let stderr = running.child.stderr.take().unwrap();
    let log = std::thread::spawn(move || BufReader::new(stderr).lines().count());
    let at = |name: &str| directory.path().join(name);
    let mut stalled = UnixStream::connect(at("stalled")).unwrap();
    stalled.write_all(&[1, 0, 0]).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let bad = at("bad");
        let over = &over;
        let attacks = scope.spawn(move || {
            let mut rounds = 0;
            while !over.load(Ordering::Relaxed) || rounds < 50 {
                misbehave(&bad, rounds);
                rounds += 1;
            }
            rounds
        });
        let mut client = Client::connect(&at("good"), 2);
        for round in 0..300u64 {
            let queue = usize::try_from(round % 2).unwrap();
            let sector = round * 7 % 1024;
            client.write(queue, sector * 4096, &pattern(round, 4096));
            assert!(client.read(1 - queue, sector * 4096, 4096) == pattern(round, 4096));
        }
        assert_eq!(client.run(0, Request::Flush), 0);
        over.store(true, Ordering::Relaxed);
        assert!(attacks.join().unwrap() >= 50);
    });
    // And its own next front-end is served.
    let mut client = Client::connect(&at("bad"), 1);
    client.write(0, 0, &pattern(0, 512));
    assert!(client.read(0, 0, 512) == pattern(0, 512));
    running.signal(Signal::SIGTERM);
    assert_eq!(running.wait().code(), Some(0));
    log.join().unwrap();
}
