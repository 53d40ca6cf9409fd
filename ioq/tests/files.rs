//! The engines on real files: tmpfs and the build directory, buffered and `O_DIRECT`.

// UNSAFETY: `queue_readv` and `queue_writev` are unsafe, and so are the system calls that set the stage.
#![expect(unsafe_code)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use ioq::{
    AlignedBuf, Config, Durability, Engine, IoBuf, IoError, IoErrorKind, IoQueue, QueueError,
    SetupError,
};
use tempfile::NamedTempFile;

const CONFIG: Config = Config {
    depth: 64,
    max_segments: 8,
};

/// Those that do I/O. Where the host refuses one of them its tests fail: they are not skipped.
const ENGINES: [Engine; 2] = [Engine::LinuxAio, Engine::IoUring];

fn open<O>(engine: Engine, file: Arc<File>, config: &Config) -> Result<IoQueue<O>, SetupError> {
    let queue = IoQueue::open(file, engine, config)?;
    assert_eq!(queue.engine(), engine);
    Ok(queue)
}

/// The directories to test in: tmpfs, and whatever the build directory is on.
const DIRECTORIES: [&str; 2] = ["/dev/shm", env!("CARGO_TARGET_TMPDIR")];

fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| u8::try_from((i * 7 + i / 512) % 251).unwrap())
        .collect()
}

fn file_with(dir: &str, bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new_in(dir).unwrap();
    file.write_all(bytes).unwrap();
    file.as_file().sync_all().unwrap();
    file
}

/// The file opened buffered, and with `O_DIRECT` where the file system takes that.
fn openings(path: &Path) -> Vec<Arc<File>> {
    let mut files = Vec::new();
    for flags in [0, libc::O_DIRECT] {
        match File::options()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)
        {
            Ok(file) => files.push(Arc::new(file)),
            Err(error) => {
                // Only tmpfs before Linux 6.6 and its like may refuse, and only O_DIRECT.
                assert_eq!(
                    (flags, error.raw_os_error()),
                    (libc::O_DIRECT, Some(libc::EINVAL))
                );
                eprintln!("{}: no O_DIRECT here", path.display());
            }
        }
    }
    files
}

/// Sleeps on the completion eventfd, as an epoll loop would.
fn wait<O>(queue: &IoQueue<O>) {
    let fd = queue.completion_fd().unwrap().as_raw_fd();
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd that outlives the call.
    let rc = unsafe { libc::poll(&raw mut poll, 1, 30_000) };
    assert_eq!(rc, 1, "no completion within 30 s");
}

/// Reaps until idle, sleeping in between.
fn finish<O>(queue: &mut IoQueue<O>) -> Vec<(O, Result<u64, IoError>)> {
    let mut results = Vec::new();
    while !queue.is_idle() {
        wait(queue);
        queue.clear_completion_fd();
        queue.reap(|owner, result| results.push((owner, result)));
    }
    results
}

#[test]
fn vectors_move_the_bytes_they_name_on_every_file_system() {
    for engine in ENGINES {
        let bytes = pattern(1 << 20);
        for dir in DIRECTORIES {
            let named = file_with(dir, &bytes);
            for file in openings(named.path()) {
                let mut queue = open(engine, file, &CONFIG).unwrap();
                let mut memory: Vec<_> = (0..64)
                    .map(|_| AlignedBuf::new(16384, 4096).unwrap())
                    .collect();
                for (i, buf) in memory.iter_mut().enumerate() {
                    let base = buf.segment().iov_base;
                    // The second half first, with a hole between: a vector of two.
                    let half = |at: usize| libc::iovec {
                        iov_base: base.wrapping_byte_add(at),
                        iov_len: 4096,
                    };
                    // SAFETY: `memory` outlives the operations, which `finish` waits for.
                    unsafe { queue.queue_readv(i as u64 * 8192, [half(8192), half(0)], i) }
                        .unwrap();
                }
                assert_eq!(queue.submit().submitted, 64);
                let mut results = finish(&mut queue);
                results.sort_by_key(|(i, _)| *i);
                for (i, (owner, result)) in results.iter().enumerate() {
                    assert_eq!((*owner, *result), (i, Ok(8192)));
                    assert!(memory[i][8192..12288] == bytes[i * 8192..][..4096]);
                    assert!(memory[i][..4096] == bytes[i * 8192 + 4096..][..4096]);
                    assert!(memory[i][4096..8192].iter().all(|&byte| byte == 0));
                }
            }
        }
    }
}

#[test]
fn writes_of_either_durability_and_fdatasync_reach_the_file() {
    for engine in ENGINES {
        for dir in DIRECTORIES {
            let named = file_with(dir, &vec![0; 65536]);
            for file in openings(named.path()) {
                let mut queue = open(engine, file, &CONFIG).unwrap();
                for i in 0..16u8 {
                    let mut buf = AlignedBuf::new(4096, 4096).unwrap();
                    buf.fill(i + 1);
                    let durability = if i % 2 == 0 {
                        Durability::WriteBack
                    } else {
                        Durability::WriteThrough
                    };
                    queue.write(u64::from(i) * 4096, buf, durability).unwrap();
                }
                queue.submit();
                let results = finish(&mut queue);
                assert_eq!(results.len(), 16);
                assert!(results.iter().all(|(_, result)| *result == Ok(4096)));

                queue
                    .queue_fdatasync(AlignedBuf::new(1, 1).unwrap())
                    .unwrap();
                queue.submit();
                assert_eq!(finish(&mut queue)[0].1, Ok(0));

                let now = std::fs::read(named.path()).unwrap();
                for (i, block) in now.chunks(4096).enumerate() {
                    assert!(
                        block.iter().all(|&byte| usize::from(byte) == i + 1),
                        "{dir} block {i}"
                    );
                }
            }
        }
    }
}

#[test]
fn more_operations_than_slots_are_full_and_give_the_owner_back() {
    for engine in ENGINES {
        let named = file_with(DIRECTORIES[0], &pattern(4096));
        let file = Arc::new(named.reopen().unwrap());
        let mut queue = open(
            engine,
            file,
            &Config {
                depth: 2,
                max_segments: 1,
            },
        )
        .unwrap();
        queue.read(0, (vec![0; 8], 0)).unwrap();
        queue.read(0, (vec![0; 8], 1)).unwrap();
        let Err(QueueError::Full { owner }) = queue.read(0, (vec![0; 8], 2)) else {
            panic!("a third operation fitted into two slots");
        };
        assert_eq!(owner.1, 2);
        assert!(matches!(
            queue.queue_fdatasync(owner),
            Err(QueueError::Full { .. })
        ));
        assert_eq!(
            (queue.queued(), queue.in_flight(), queue.free_slots()),
            (2, 0, 0)
        );
        queue.submit();
        assert_eq!((queue.queued(), queue.in_flight()), (0, 2));
        assert_eq!(finish(&mut queue).len(), 2);
        assert_eq!(queue.free_slots(), queue.capacity());
    }
}

#[test]
fn i2_end_of_file_inside_a_read_is_an_error() {
    for engine in ENGINES {
        for dir in DIRECTORIES {
            let named = file_with(dir, &pattern(4096 + 1000));
            for file in openings(named.path()) {
                let mut queue = open(engine, file, &CONFIG).unwrap();
                for (offset, id) in [(0, 0), (4096, 1), (8192, 2)] {
                    queue
                        .read(offset, (AlignedBuf::new(4096, 4096).unwrap(), id))
                        .unwrap();
                }
                queue.submit();
                let mut results = finish(&mut queue);
                results.sort_by_key(|((_, id), _)| *id);
                assert_eq!(results[0].1, Ok(4096));
                assert_eq!(
                    results[1].1.unwrap_err().kind(),
                    IoErrorKind::UnexpectedEof,
                    "{dir}"
                );
                assert_eq!(
                    results[2].1.unwrap_err().kind(),
                    IoErrorKind::UnexpectedEof,
                    "{dir}"
                );
            }
        }
    }
}

#[test]
fn i7_file_truncated_meanwhile_ends_reads_with_an_error() {
    for engine in ENGINES {
        for dir in DIRECTORIES {
            let named = file_with(dir, &pattern(1 << 16));
            for file in openings(named.path()) {
                file.set_len(1 << 16).unwrap();
                let mut queue = open(engine, Arc::clone(&file), &CONFIG).unwrap();
                queue
                    .read(32768, AlignedBuf::new(8192, 4096).unwrap())
                    .unwrap();
                queue.submit();
                assert_eq!(finish(&mut queue)[0].1, Ok(8192));
                file.set_len(36864).unwrap();
                queue
                    .read(32768, AlignedBuf::new(8192, 4096).unwrap())
                    .unwrap();
                queue.submit();
                let error = finish(&mut queue)[0].1.unwrap_err();
                assert_eq!(error.kind(), IoErrorKind::UnexpectedEof, "{dir}");
            }
        }
    }
}

#[test]
fn i3_file_size_limit_fails_the_write_with_its_errno() {
    // A process of its own: the limit and the ignored signal are the process's.
    if std::env::var_os("IOQ_FILE_SIZE_LIMIT").is_none() {
        // Its output through a pipe: the limit holds for a log file as well.
        let output = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "i3_file_size_limit_fails_the_write_with_its_errno",
            ])
            .env("IOQ_FILE_SIZE_LIMIT", "1")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        return;
    }
    let limit = libc::rlimit {
        rlim_cur: 8192,
        rlim_max: 8192,
    };
    // SAFETY: `limit` outlives the call; no handler is installed.
    unsafe {
        assert_ne!(libc::signal(libc::SIGXFSZ, libc::SIG_IGN), libc::SIG_ERR);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit), 0);
    }
    for engine in ENGINES {
        let file = Arc::new(tempfile::tempfile_in(DIRECTORIES[0]).unwrap());
        let mut queue = open(engine, file, &CONFIG).unwrap();
        for (offset, id) in [(0, 0), (4096, 1), (8192, 2)] {
            queue
                .write(offset, (vec![1; 4096], id), Durability::WriteBack)
                .unwrap();
        }
        // Half fits: the kernel writes that, and the continuation meets the limit.
        queue
            .write(6144, (vec![1; 4096], 3), Durability::WriteBack)
            .unwrap();
        queue.submit();
        let mut results = finish(&mut queue);
        results.sort_by_key(|((_, id), _)| *id);
        let results: Vec<_> = results
            .iter()
            .map(|(_, r)| r.map_err(IoError::errno))
            .collect();
        let too_big = Err(Some(libc::EFBIG));
        assert_eq!(results, [Ok(4096), Ok(4096), too_big, too_big]);
    }
}

/// Runs on a tmpfs of 64 KiB in a mount namespace of its own.
fn fill_small_tmpfs(engine: Engine) {
    let dir = tempfile::tempdir().unwrap();
    let target = std::ffi::CString::new(dir.path().to_str().unwrap()).unwrap();
    // SAFETY: all strings are NUL-terminated and outlive the calls.
    unsafe {
        // This thread's own mounts, so that nobody else sees or has to undo this one.
        assert_eq!(
            libc::unshare(libc::CLONE_NEWNS),
            0,
            "{}",
            std::io::Error::last_os_error()
        );
        let private = libc::MS_REC | libc::MS_PRIVATE;
        let none = std::ptr::null();
        assert_eq!(
            libc::mount(none, c"/".as_ptr(), none, private, none.cast()),
            0
        );
        let rc = libc::mount(
            c"ioq".as_ptr(),
            target.as_ptr(),
            c"tmpfs".as_ptr(),
            0,
            c"size=64k".as_ptr().cast(),
        );
        assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
    }
    let path = dir.path().join("disk");
    let file = Arc::new(
        File::options()
            .write(true)
            .create_new(true)
            .open(path)
            .unwrap(),
    );
    let mut queue = open(engine, file, &CONFIG).unwrap();
    for i in 0..32u64 {
        queue
            .write(i * 4096, (vec![1; 4096], i), Durability::WriteBack)
            .unwrap();
    }
    queue.submit();
    let results = finish(&mut queue);
    let written = results
        .iter()
        .filter(|(_, result)| *result == Ok(4096))
        .count();
    let full = results
        .iter()
        .filter(|(_, result)| {
            result.is_err_and(|error| {
                error.kind() == IoErrorKind::NoSpace && error.errno() == Some(libc::ENOSPC)
            })
        })
        .count();
    assert_eq!((written, full), (16, 16));
    drop(queue);
    // SAFETY: as above. The file is closed, so the mount point is free to be removed.
    unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
}

#[test]
fn i3_full_file_system_fails_the_write_with_enospc() {
    // SAFETY: no pointer is passed.
    let root = unsafe { libc::geteuid() } == 0;
    if root {
        for engine in ENGINES {
            std::thread::spawn(move || fill_small_tmpfs(engine))
                .join()
                .unwrap();
        }
        return;
    }
    // As an ordinary user: root of a user namespace of its own, which must be single-threaded
    // when it is made, so in another process.
    let status = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "i3_full_file_system_fails_the_write_with_enospc"])
        .status()
        .expect("this test needs root or unshare(1)");
    assert!(status.success(), "this test needs root or user namespaces");
}

#[test]
fn i5_write_to_a_read_only_file_fails_alone() {
    for engine in ENGINES {
        let named = file_with(DIRECTORIES[0], &pattern(4096));
        let file = Arc::new(File::open(named.path()).unwrap());
        for bad in 0..5 {
            let mut queue = open(engine, Arc::clone(&file), &CONFIG).unwrap();
            for id in 0..5 {
                if id == bad {
                    queue
                        .write(0, (vec![0; 512], id), Durability::WriteBack)
                        .unwrap();
                } else {
                    queue.read(512, (vec![0; 512], id)).unwrap();
                }
            }
            let report = queue.submit();
            // To io_uring a refusal is a completion like any other.
            let refused = usize::from(engine == Engine::LinuxAio);
            assert_eq!(
                (report.submitted, report.refused, report.parked),
                (5 - refused, refused, 0)
            );
            for ((buf, id), result) in finish(&mut queue) {
                if id == bad {
                    let error = result.unwrap_err();
                    assert_eq!(error.errno(), Some(libc::EBADF));
                    assert_eq!(error.kind(), IoErrorKind::Invalid);
                } else {
                    assert_eq!(result, Ok(512));
                    assert!(buf == pattern(4096)[512..1024]);
                }
            }
        }
    }
}

#[test]
fn i5_unmapped_memory_fails_alone() {
    for engine in ENGINES {
        let named = file_with(DIRECTORIES[1], &pattern(4096));
        let mut queue = open(engine, Arc::new(named.reopen().unwrap()), &CONFIG).unwrap();
        let mut good = vec![0u8; 512];
        let bad = libc::iovec {
            // Kernel addresses: refused in io_submit, before anything touches them.
            iov_base: std::ptr::without_provenance_mut(usize::MAX - 0xffff),
            iov_len: 512,
        };
        // SAFETY: not valid memory, which is the test: the kernel checks it and answers EFAULT.
        unsafe { queue.queue_readv(0, [bad], 0) }.unwrap();
        // SAFETY: `good` outlives the operation, which `finish` waits for.
        unsafe { queue.queue_readv(0, [good.segment()], 1) }.unwrap();
        queue.submit();
        let mut results = finish(&mut queue);
        results.sort_by_key(|(id, _)| *id);
        assert_eq!(results[0].1.unwrap_err().errno(), Some(libc::EFAULT));
        assert_eq!(results[1].1, Ok(512));
        assert!(good == pattern(4096)[..512]);
    }
}

#[test]
fn unaligned_direct_read_keeps_its_errno() {
    for engine in ENGINES {
        let named = file_with(DIRECTORIES[1], &pattern(8192));
        let Some(file) = openings(named.path()).into_iter().nth(1) else {
            panic!("{} takes no O_DIRECT", DIRECTORIES[1]);
        };
        let mut queue = open(engine, file, &CONFIG).unwrap();
        queue.read(1, AlignedBuf::new(512, 4096).unwrap()).unwrap();
        queue.submit();
        assert_eq!(
            finish(&mut queue)[0].1.unwrap_err().errno(),
            Some(libc::EINVAL)
        );
    }
}

#[test]
fn fdatasync_a_file_does_not_have_comes_from_the_worker_as_it_is() {
    for engine in ENGINES {
        // /dev/null has no fsync: io_submit refuses with EINVAL, and so does fdatasync(2).
        let file = Arc::new(
            File::options()
                .read(true)
                .write(true)
                .open("/dev/null")
                .unwrap(),
        );
        let mut queue = open(engine, file, &CONFIG).unwrap();
        for round in 0..3 {
            for i in 0..5 {
                queue.queue_fdatasync(i).unwrap();
            }
            assert_eq!(queue.submit().submitted, 5, "round {round}");
            let results = finish(&mut queue);
            assert_eq!(results.len(), 5);
            for (_, result) in results {
                assert_eq!(result.unwrap_err().errno(), Some(libc::EINVAL));
            }
        }
    }
}

#[test]
fn i11_no_room_below_aio_max_nr_is_an_error_that_names_it() {
    let file = Arc::new(tempfile::tempfile().unwrap());
    let mut text = String::new();
    File::open("/proc/sys/fs/aio-max-nr")
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    let most: usize = text.trim().parse().unwrap();
    // One queue asks for 65,535; on a default host (65,536 for all) two slots held are enough to
    // leave no room, and nothing is taken from tests that run at the same time.
    let mut held = vec![
        IoQueue::<()>::linux_aio(
            Arc::clone(&file),
            &Config {
                depth: 2,
                max_segments: 1,
            },
        )
        .unwrap(),
    ];
    let config = Config {
        depth: u16::MAX,
        max_segments: 1,
    };
    let error = loop {
        match IoQueue::<()>::linux_aio(Arc::clone(&file), &config) {
            Ok(queue) => held.push(queue),
            Err(error) => break error,
        }
        assert!(
            held.len() <= most / usize::from(u16::MAX) + 1,
            "aio-max-nr is not enforced"
        );
    };
    assert!(error.to_string().contains("fs.aio-max-nr"), "{error}");
    held.clear();
    IoQueue::<()>::linux_aio(file, &CONFIG).expect("room again");
}

#[test]
fn append_mode_is_refused() {
    for engine in ENGINES {
        let named = file_with(DIRECTORIES[0], b"");
        let file = File::options().append(true).open(named.path()).unwrap();
        let error = open::<()>(engine, Arc::new(file), &CONFIG).unwrap_err();
        assert!(matches!(error, SetupError::AppendMode));
    }
}

#[test]
fn buffers_outlive_a_queue_dropped_with_operations_in_flight() {
    const LEN: usize = 16 << 20;
    const BLOCK: usize = 1 << 20;
    let named = file_with(DIRECTORIES[1], &pattern(LEN));
    let Some(file) = openings(named.path()).into_iter().nth(1) else {
        panic!("{} takes no O_DIRECT", DIRECTORIES[1]);
    };
    /// On drop, says whether all of its block had arrived.
    struct Checked {
        buf: AlignedBuf,
        offset: usize,
        seen: std::sync::mpsc::Sender<bool>,
    }
    impl Drop for Checked {
        fn drop(&mut self) {
            // Each page's last byte only: a thorough look would give late reads time to arrive.
            let arrived = (4095..BLOCK).step_by(4096).all(|at| {
                let i = self.offset + at;
                usize::from(self.buf[at]) == (i * 7 + i / 512) % 251
            });
            self.seen.send(arrived).unwrap();
        }
    }
    for _ in 0..3 {
        let (seen, results) = std::sync::mpsc::channel();
        let mut queue = IoQueue::linux_aio(Arc::clone(&file), &CONFIG).unwrap();
        for i in 0..64 {
            let mut buf = AlignedBuf::new(BLOCK, 4096).unwrap();
            // A byte no block holds at any page's end.
            buf.fill(255);
            let segment = buf.segment();
            let offset = i * BLOCK % LEN;
            let owner = Checked {
                buf,
                offset,
                seen: seen.clone(),
            };
            // SAFETY: the owner keeps the memory, which stays in place.
            unsafe { queue.queue_readv(offset as u64, [segment], owner) }.unwrap();
        }
        assert_eq!(queue.submit().submitted, 64);
        drop(queue);
        drop(seen);
        // The kernel had finished with each buffer before it was dropped: all data was there.
        assert_eq!(results.iter().filter(|&complete| complete).count(), 64);
    }
}

#[test]
fn owners_go_after_everything_in_flight_has_completed() {
    /// The first one dropped reads how many completions the kernel has signalled.
    struct Observer {
        completions: Arc<File>,
        seen: std::sync::mpsc::Sender<Option<u64>>,
    }
    impl Drop for Observer {
        fn drop(&mut self) {
            let mut count = [0; 8];
            let read = (&*self.completions).read_exact(&mut count);
            self.seen
                .send(read.ok().map(|()| u64::from_ne_bytes(count)))
                .unwrap();
        }
    }
    // Plenty of dirty pages, so that each fdatasync is still in flight when submit returns.
    let named = NamedTempFile::new_in(DIRECTORIES[1]).unwrap();
    named
        .as_file()
        .write_all_at(&pattern(1 << 24).repeat(4), 0)
        .unwrap();
    let mut queue = IoQueue::linux_aio(Arc::new(named.reopen().unwrap()), &CONFIG).unwrap();
    let descriptor = queue.completion_fd().unwrap().try_clone_to_owned().unwrap();
    let completions = Arc::new(File::from(descriptor));
    let (seen, results) = std::sync::mpsc::channel();
    for _ in 0..4 {
        let owner = Observer {
            completions: Arc::clone(&completions),
            seen: seen.clone(),
        };
        queue.queue_fdatasync(owner).unwrap();
    }
    assert_eq!(queue.submit().submitted, 4);
    drop(queue);
    assert_eq!(results.recv().unwrap(), Some(4));
}

#[test]
fn operations_never_submitted_are_dropped_without_being_run() {
    for engine in ENGINES {
        let named = file_with(DIRECTORIES[0], &[1; 512]);
        let mut queue = open(engine, Arc::new(named.reopen().unwrap()), &CONFIG).unwrap();
        queue.write(0, vec![2; 512], Durability::WriteBack).unwrap();
        drop(queue);
        let mut now = [0; 512];
        named.as_file().read_exact_at(&mut now, 0).unwrap();
        assert_eq!(now, [1; 512]);
    }
}
