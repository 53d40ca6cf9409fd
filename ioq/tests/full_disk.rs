//! Writes that find no room: a file size limit, a full file system.

// UNSAFETY: the system calls that set the stage.
#![expect(unsafe_code)]

use std::fs::File;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ioq::{Config, Durability, Engine, IoError, IoErrorKind, IoQueue};

const ENGINES: [Engine; 2] = [Engine::LinuxAio, Engine::IoUring];

fn finish<O>(queue: &mut IoQueue<O>) -> Vec<(O, Result<u64, IoError>)> {
    let mut results = Vec::new();
    let started = Instant::now();
    while !queue.is_idle() {
        queue.reap(|owner, result| results.push((owner, result)));
        assert!(started.elapsed() < Duration::from_secs(60), "stuck");
    }
    results
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
        let file = Arc::new(tempfile::tempfile_in("/dev/shm").unwrap());
        let mut queue = IoQueue::open(file, engine, &Config::default()).unwrap();
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
    let mut queue = IoQueue::open(file, engine, &Config::default()).unwrap();
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
