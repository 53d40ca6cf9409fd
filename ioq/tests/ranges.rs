//! Discards and zeroes: on tmpfs, the build directory's file system, one that can do neither, and a block
//! device.

// UNSAFETY: mounts in a namespace of this thread's own.
#![expect(unsafe_code)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ioq::{Config, Durability, Engine, IoError, IoErrorKind, IoQueue, QueueError, Unmap};
use tempfile::NamedTempFile;

const ENGINES: [Engine; 2] = [Engine::LinuxAio, Engine::IoUring];
const DIRECTORIES: [&str; 2] = ["/dev/shm", env!("CARGO_TARGET_TMPDIR")];
const KIB: u64 = 1024;
const SIZE: u64 = 1024 * KIB;

fn ones(dir: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new_in(dir).unwrap();
    file.write_all(&[1; 1 << 20]).unwrap();
    file.as_file().sync_all().unwrap();
    file
}

fn writable(path: &Path) -> Arc<File> {
    Arc::new(File::options().read(true).write(true).open(path).unwrap())
}

/// Bytes of storage the file has.
fn stored(file: &File) -> u64 {
    file.sync_all().unwrap();
    file.metadata().unwrap().blocks() * 512
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(SIZE).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Zero in `offset..offset + len`, one elsewhere.
fn holed(offset: u64, len: u64) -> Vec<u8> {
    (0..SIZE)
        .map(|at| u8::from(!(offset..offset + len).contains(&at)))
        .collect()
}

fn run(
    file: &Arc<File>,
    engine: Engine,
    queue_it: impl FnOnce(&mut IoQueue<()>) -> Result<(), QueueError<()>>,
) -> Result<u64, IoError> {
    let mut queue = IoQueue::open(Arc::clone(file), engine, &Config::default()).unwrap();
    queue_it(&mut queue).unwrap();
    queue.submit();
    let mut results = Vec::new();
    let started = Instant::now();
    while !queue.is_idle() {
        queue.reap(|(), result| results.push(result));
        assert!(started.elapsed() < Duration::from_secs(60), "stuck");
    }
    assert_eq!(results.len(), 1);
    results[0]
}

#[test]
fn discard_gives_a_files_storage_back_and_keeps_its_size() {
    for dir in DIRECTORIES {
        for engine in ENGINES {
            let named = ones(dir);
            let file = writable(named.path());
            let before = stored(&file);
            let result = run(&file, engine, |queue| {
                queue.queue_discard(256 * KIB, 512 * KIB, ())
            });
            assert_eq!(result, Ok(512 * KIB));
            assert!(stored(&file) <= before - 512 * KIB, "{dir} {engine}");
            assert_eq!(file.metadata().unwrap().len(), SIZE);
            assert!(content(&file) == holed(256 * KIB, 512 * KIB));
        }
    }
}

#[test]
fn nobody_promises_the_secure_erasure_of_a_file() {
    for dir in DIRECTORIES {
        for engine in ENGINES {
            let named = ones(dir);
            let file = writable(named.path());
            let result = run(&file, engine, |queue| queue.queue_secure_erase(0, SIZE, ()));
            assert_eq!(result.unwrap_err().kind(), IoErrorKind::Unsupported);
            assert!(content(&file).iter().all(|&byte| byte == 1), "{dir}");
        }
    }
}

#[test]
fn b23_zeroes_read_back_whether_storage_is_kept_or_not() {
    for dir in DIRECTORIES {
        for engine in ENGINES {
            for (unmap, durability) in [
                (Unmap::Allowed, Durability::WriteBack),
                (Unmap::Forbidden, Durability::WriteBack),
                (Unmap::Allowed, Durability::WriteThrough),
                (Unmap::Forbidden, Durability::WriteThrough),
            ] {
                let named = ones(dir);
                let file = writable(named.path());
                let before = stored(&file);
                // Neither end on a page.
                let (offset, len) = (100 * KIB + 512, 600 * KIB + 512);
                let result = run(&file, engine, |queue| {
                    queue.queue_write_zeroes(offset, len, unmap, durability, ())
                });
                assert_eq!(result, Ok(len));
                assert!(content(&file) == holed(offset, len), "{dir} {unmap:?}");
                assert_eq!(file.metadata().unwrap().len(), SIZE);
                if unmap == Unmap::Allowed {
                    assert!(stored(&file) <= before - 596 * KIB, "{dir} {engine}");
                } else {
                    assert!(stored(&file) >= SIZE, "{dir} {engine}");
                }
            }
        }
    }
}

#[test]
fn zeroes_fill_a_hole_that_shall_have_storage() {
    for dir in DIRECTORIES {
        let file = Arc::new(tempfile::tempfile_in(dir).unwrap());
        file.set_len(SIZE).unwrap();
        assert_eq!(stored(&file), 0);
        let result = run(&file, Engine::LinuxAio, |queue| {
            queue.queue_write_zeroes(0, SIZE, Unmap::Forbidden, Durability::WriteBack, ())
        });
        assert_eq!(result, Ok(SIZE));
        assert!(stored(&file) >= SIZE, "{dir}");
    }
}

#[test]
fn a_file_never_grows_by_a_range_beyond_its_end() {
    for dir in DIRECTORIES {
        for unmap in [Unmap::Allowed, Unmap::Forbidden] {
            let named = ones(dir);
            let file = writable(named.path());
            let before = stored(&file);
            for (offset, len) in [(SIZE - 512, 4096), (SIZE, 4096), (2 * SIZE, 1)] {
                let result = run(&file, Engine::LinuxAio, |queue| {
                    queue.queue_write_zeroes(offset, len, unmap, Durability::WriteBack, ())
                });
                assert_eq!(result, Ok(len), "{dir}");
                let result = run(&file, Engine::LinuxAio, |queue| {
                    queue.queue_discard(offset, len, ())
                });
                assert_eq!(result, Ok(len), "{dir}");
            }
            assert_eq!(file.metadata().unwrap().len(), SIZE);
            assert!(stored(&file) <= before, "{dir}");
            assert!(content(&file) == holed(SIZE - 512, 512), "{dir}");
        }
    }
}

#[test]
fn ranges_of_nothing_succeed_and_impossible_ones_are_refused() {
    let named = ones(DIRECTORIES[0]);
    let file = writable(named.path());
    assert_eq!(
        run(&file, Engine::IoUring, |queue| queue.queue_discard(
            0,
            0,
            ()
        )),
        Ok(0)
    );
    let mut queue = IoQueue::linux_aio(file, &Config::default()).unwrap();
    for (offset, len) in [(u64::MAX, 1), (1, u64::MAX), (i64::MAX.unsigned_abs(), 1)] {
        assert!(matches!(
            queue.queue_discard(offset, len, ()),
            Err(QueueError::OffsetTooLarge { .. })
        ));
        assert!(matches!(
            queue.queue_write_zeroes(offset, len, Unmap::Allowed, Durability::WriteBack, ()),
            Err(QueueError::OffsetTooLarge { .. })
        ));
    }
    assert!(queue.is_idle());
}

#[test]
fn i3_a_range_of_a_file_open_for_reading_fails() {
    let named = ones(DIRECTORIES[0]);
    let file = Arc::new(File::open(named.path()).unwrap());
    for engine in ENGINES {
        let discard = run(&file, engine, |queue| queue.queue_discard(0, 4096, ()));
        assert_eq!(discard.unwrap_err().errno(), Some(libc::EBADF));
        let zeroes = run(&file, engine, |queue| {
            queue.queue_write_zeroes(0, 4096, Unmap::Forbidden, Durability::WriteBack, ())
        });
        assert_eq!(zeroes.unwrap_err().errno(), Some(libc::EBADF));
    }
}

#[test]
fn more_ranges_than_threads_all_complete_beside_reads() {
    let named = ones(DIRECTORIES[1]);
    for engine in ENGINES {
        let config = Config {
            depth: 64,
            max_segments: 1,
        };
        let mut queue = IoQueue::open(writable(named.path()), engine, &config).unwrap();
        for i in 0..64u64 {
            match i % 3 {
                0 => queue.queue_discard(i * 16 * KIB, 16 * KIB, (vec![], i)),
                1 => queue.queue_write_zeroes(
                    i * 16 * KIB,
                    16 * KIB,
                    Unmap::Forbidden,
                    Durability::WriteBack,
                    (vec![], i),
                ),
                _ => queue.read(i * 16 * KIB, (vec![9u8; 4096], i)),
            }
            .unwrap();
        }
        assert_eq!(queue.submit().submitted, 64);
        let mut seen = [false; 64];
        while !queue.is_idle() {
            queue.reap(|(_, i), result| {
                let len = if i % 3 == 2 { 4096 } else { 16 * KIB };
                assert_eq!(result, Ok(len));
                assert!(!std::mem::replace(
                    &mut seen[usize::try_from(i).unwrap()],
                    true
                ));
            });
        }
        assert_eq!(seen, [true; 64]);
    }
}

/// Runs on a thread with mounts of its own: a ramfs, which has neither holes nor `ZERO_RANGE`.
fn ranges_on_ramfs() {
    let dir = tempfile::tempdir().unwrap();
    let target = std::ffi::CString::new(dir.path().to_str().unwrap()).unwrap();
    let none = std::ptr::null();
    // SAFETY: all strings are NUL-terminated and outlive the calls.
    unsafe {
        assert_eq!(libc::unshare(libc::CLONE_NEWNS), 0);
        let private = libc::MS_REC | libc::MS_PRIVATE;
        assert_eq!(
            libc::mount(none, c"/".as_ptr(), none, private, none.cast()),
            0
        );
        let (name, kind) = (c"ioq".as_ptr(), c"ramfs".as_ptr());
        assert_eq!(libc::mount(name, target.as_ptr(), kind, 0, none.cast()), 0);
    }
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![1; 1 << 20]).unwrap();
    let file = writable(&path);
    for engine in ENGINES {
        file.write_all_at(&vec![1; 1 << 20], 0).unwrap();
        let error = run(&file, engine, |queue| queue.queue_discard(0, 4096, ())).unwrap_err();
        assert_eq!(error.kind(), IoErrorKind::Unsupported);
        for unmap in [Unmap::Allowed, Unmap::Forbidden] {
            let result = run(&file, engine, |queue| {
                queue.queue_write_zeroes(512, 900 * KIB, unmap, Durability::WriteThrough, ())
            });
            assert_eq!(result, Ok(900 * KIB));
            assert!(content(&file) == holed(512, 900 * KIB));
        }
    }
    // SAFETY: as above.
    unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
}

/// These two need root, as CI's tests of block devices do: they fail without it.
#[test]
fn where_nothing_else_can_be_had_zeroes_are_written_and_discards_are_unsupported() {
    std::thread::spawn(ranges_on_ramfs).join().unwrap();
}

/// A loop device over a file, detached when dropped.
struct Loop(String);

impl Loop {
    fn over(path: &Path) -> Self {
        let output = Command::new("losetup")
            .args(["--show", "-f"])
            .arg(path)
            .output()
            .expect("this test needs losetup");
        assert!(output.status.success(), "{output:?}");
        Self(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn block_devices_discard_and_zero_with_and_without_unmapping() {
    for engine in ENGINES {
        let named = ones(DIRECTORIES[1]);
        let device = Loop::over(named.path());
        let file = writable(Path::new(&device.0));
        let full = stored(named.as_file());

        let result = run(&file, engine, |queue| {
            queue.queue_write_zeroes(0, 256 * KIB, Unmap::Forbidden, Durability::WriteThrough, ())
        });
        assert_eq!(result, Ok(256 * KIB));
        assert!(content(&file) == holed(0, 256 * KIB));
        assert!(stored(named.as_file()) >= full, "storage was to be kept");

        let result = run(&file, engine, |queue| {
            queue.queue_write_zeroes(0, 512 * KIB, Unmap::Allowed, Durability::WriteBack, ())
        });
        assert_eq!(result, Ok(512 * KIB));
        assert!(content(&file) == holed(0, 512 * KIB));
        assert!(stored(named.as_file()) <= full - 512 * KIB);

        let result = run(&file, engine, |queue| {
            queue.queue_discard(512 * KIB, 512 * KIB, ())
        });
        assert_eq!(result, Ok(512 * KIB));
        assert_eq!(stored(named.as_file()), 0);

        // The loop driver has no secure erasure, and nothing less stands in for it.
        let filled = content(&file);
        let error = run(&file, engine, |queue| {
            queue.queue_secure_erase(0, 512 * KIB, ())
        })
        .unwrap_err();
        assert_eq!(error.errno(), Some(libc::EOPNOTSUPP));
        assert!(content(&file) == filled);

        // A device is told in whole blocks only.
        let error = run(&file, engine, |queue| queue.queue_discard(1, 512, ())).unwrap_err();
        assert_eq!(error.errno(), Some(libc::EINVAL));
        drop(file);
        drop(device);
        let mut now = Vec::new();
        named.reopen().unwrap().read_to_end(&mut now).unwrap();
        assert!(now.iter().all(|&byte| byte == 0));
    }
}
