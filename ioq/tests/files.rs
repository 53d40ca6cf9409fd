//! The engines on real files: tmpfs and the build directory, buffered and `O_DIRECT`.

// UNSAFETY: `queue_readv` and `queue_writev` are unsafe, and so are the system calls that set the stage.
#![expect(unsafe_code)]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
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
fn append_mode_is_refused() {
    for engine in ENGINES {
        let named = file_with(DIRECTORIES[0], b"");
        let file = File::options().append(true).open(named.path()).unwrap();
        let error = open::<()>(engine, Arc::new(file), &CONFIG).unwrap_err();
        assert!(matches!(error, SetupError::AppendMode));
    }
}
