//! What a host may refuse: an engine, a system call, memory that is there no more.

// UNSAFETY: seccomp filters; memory that is taken away on purpose.
#![expect(unsafe_code)]

mod seccomp;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ioq::{
    AlignedBuf, Config, Durability, Engine, IoBuf, IoError, IoErrorKind, IoQueue, SetupError, Unmap,
};
use libc::iovec;
use tempfile::NamedTempFile;

use seccomp::{on_a_thread_of_its_own, refuse};

const ENGINES: [Engine; 2] = [Engine::LinuxAio, Engine::IoUring];
const DIRECTORIES: [&str; 2] = ["/dev/shm", env!("CARGO_TARGET_TMPDIR")];

const SMALL: Config = Config {
    depth: 2,
    max_segments: 1,
};
const LARGE: Config = Config {
    depth: u16::MAX,
    max_segments: 1,
};

fn named(dir: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new_in(dir).unwrap();
    file.write_all(&[7; 65536]).unwrap();
    file.as_file().sync_all().unwrap();
    file
}

/// A file whose engine is io_uring if it is to be had.
fn suits_io_uring() -> Arc<File> {
    let named = named(DIRECTORIES[1]);
    let file = File::open(named.path()).unwrap();
    let queue = IoQueue::<()>::open(
        Arc::new(file.try_clone().unwrap()),
        Engine::Auto,
        &Config::default(),
    );
    let engine = queue.unwrap().engine();
    assert_eq!(
        engine,
        Engine::IoUring,
        "these tests want a build directory on a disk's file system and a kernel that allows io_uring"
    );
    Arc::new(file)
}

/// A file whose engine is Linux AIO.
fn suits_aio() -> Arc<File> {
    Arc::new(named(DIRECTORIES[0]).reopen().unwrap())
}

fn finish<O>(queue: &mut IoQueue<O>) -> Vec<(O, Result<u64, IoError>)> {
    let mut results = Vec::new();
    let started = Instant::now();
    while !queue.is_idle() {
        queue.reap(|owner, result| results.push((owner, result)));
        assert!(started.elapsed() < Duration::from_secs(60), "stuck");
    }
    results
}

fn reads(queue: &mut IoQueue<Vec<u8>>) {
    queue.read(4096, vec![0; 512]).unwrap();
    queue.submit();
    let results = finish(queue);
    assert_eq!(results[0].1, Ok(512));
    assert_eq!(results[0].0, [7; 512]);
}

#[test]
fn a_seccomp_profile_without_io_uring_falls_back_to_aio_and_says_so_in_a_line() {
    for call in [
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_register,
        // Some profiles allow setting up and forbid the rest: found before the first request.
        libc::SYS_io_uring_enter,
    ] {
        on_a_thread_of_its_own(move || {
            let file = suits_io_uring();
            refuse(&[call], libc::EPERM);
            let config = Config::default();
            let mut queue = IoQueue::open(Arc::clone(&file), Engine::Auto, &config).unwrap();
            assert_eq!(queue.engine(), Engine::LinuxAio);
            let fallback = queue.fallback().unwrap();
            assert_eq!(
                (fallback.wanted, fallback.used),
                (Engine::IoUring, Engine::LinuxAio)
            );
            let line = fallback.to_string();
            assert_eq!(
                line,
                "using aio instead of io_uring: io_uring is not usable here: \
                 Operation not permitted (os error 1)"
            );
            reads(&mut queue);

            // Who asks for it by name is told, and gets nothing else.
            let error = IoQueue::<()>::open(file, Engine::IoUring, &config).unwrap_err();
            assert!(
                matches!(error, SetupError::IoUringUnavailable(_)),
                "{error}"
            );
        });
    }
}

/// Holds so many of the host's AIO operations that [`LARGE`] finds no room.
///
/// `LARGE` is 65,535: on a default host (65,536 for all) two slots held leave no room for it, and nothing is taken
/// from tests that run at the same time.
fn exhaust_aio(file: &Arc<File>) -> (Vec<IoQueue<()>>, SetupError) {
    let most = std::fs::read_to_string("/proc/sys/fs/aio-max-nr").unwrap();
    let most: usize = most.trim().parse().unwrap();
    let mut held = vec![IoQueue::linux_aio(Arc::clone(file), &SMALL).unwrap()];
    loop {
        match IoQueue::linux_aio(Arc::clone(file), &LARGE) {
            Ok(queue) => held.push(queue),
            Err(error) => return (held, error),
        }
        assert!(
            held.len() <= most / usize::from(u16::MAX) + 1,
            "aio-max-nr is not enforced"
        );
    }
}

#[test]
fn i11_no_room_below_aio_max_nr_is_an_error_that_names_it() {
    let file = suits_aio();
    let (held, error) = exhaust_aio(&file);
    assert!(error.to_string().contains("fs.aio-max-nr"), "{error}");
    drop(held);
    IoQueue::<()>::linux_aio(file, &SMALL).expect("room again");
}

#[test]
fn i11_without_room_below_aio_max_nr_io_uring_serves_and_the_line_names_the_sysctl() {
    let file = suits_aio();
    let (held, _) = exhaust_aio(&file);
    let mut queue = IoQueue::open(Arc::clone(&file), Engine::Auto, &LARGE).unwrap();
    assert_eq!(queue.engine(), Engine::IoUring);
    let line = queue.fallback().unwrap().to_string();
    assert!(
        line.starts_with("using io_uring instead of aio: ") && line.contains("fs.aio-max-nr"),
        "{line}"
    );
    assert!(!line.contains('\n'));
    reads(&mut queue);
    drop(held);
    let queue = IoQueue::<()>::open(file, Engine::Auto, &SMALL).unwrap();
    assert_eq!(queue.engine(), Engine::LinuxAio);
    assert!(queue.fallback().is_none());
}

/// Runs `test` where the process may have no more threads. Needs root, which is exempt: other tests go on.
fn without_room_for_a_thread(test: impl FnOnce() + Send + 'static) {
    on_a_thread_of_its_own(|| {
        const NOBODY: libc::uid_t = 65534;
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: numbers, and limits that outlive the calls. The call itself changes the user of this thread alone,
        // unlike libc's function.
        unsafe {
            assert_eq!(libc::geteuid(), 0, "this test wants root");
            assert_eq!(libc::getrlimit(libc::RLIMIT_NPROC, &raw mut limit), 0);
            limit.rlim_cur = 0;
            assert_eq!(libc::setrlimit(libc::RLIMIT_NPROC, &raw const limit), 0);
            let rc = libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY);
            assert_eq!(rc, 0);
        }
        let refused = std::thread::Builder::new().spawn(|| ());
        assert_eq!(
            refused.unwrap_err().raw_os_error(),
            Some(libc::EAGAIN),
            "the limit holds"
        );
        test();
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: a limit that outlives the call.
        let rc = unsafe { libc::setrlimit(libc::RLIMIT_NPROC, &raw const limit) };
        assert_eq!(rc, 0);
    });
}

#[test]
fn without_room_for_a_thread_of_the_kernels_aio_serves_and_flushes_and_the_line_says_why() {
    let named = named(DIRECTORIES[1]);
    let mut direct = File::options();
    direct.read(true).write(true).custom_flags(libc::O_DIRECT);
    let file = Arc::new(direct.open(named.path()).unwrap());
    without_room_for_a_thread(move || {
        let mut queue = IoQueue::open(file, Engine::Auto, &Config::default()).unwrap();
        let line = queue.fallback().map(ToString::to_string);
        assert_eq!(queue.engine(), Engine::LinuxAio);
        assert_eq!(
            line.unwrap(),
            "using aio instead of io_uring: io_uring is not usable here: the kernel can start no thread for it"
        );
        queue.queue_fdatasync(()).unwrap();
        queue.submit();
        assert_eq!(finish(&mut queue), [((), Ok(0))]);
    });
}

#[test]
fn a_host_that_refuses_both_is_an_error_with_both_reasons() {
    on_a_thread_of_its_own(|| {
        let files = [suits_aio(), suits_io_uring()];
        refuse(
            &[libc::SYS_io_uring_setup, libc::SYS_io_setup],
            libc::ENOSYS,
        );
        for file in files {
            let error = IoQueue::<()>::open(file, Engine::Auto, &Config::default()).unwrap_err();
            let SetupError::NoEngine {
                linux_aio,
                io_uring,
            } = error
            else {
                panic!("{error}");
            };
            assert!(matches!(*linux_aio, SetupError::AioUnavailable(_)));
            assert!(matches!(*io_uring, SetupError::IoUringUnavailable(_)));
        }
    });
}

#[test]
fn a_file_no_engine_can_serve_is_not_tried_with_the_other() {
    let named = named(DIRECTORIES[1]);
    let file = File::options().append(true).open(named.path()).unwrap();
    let error = IoQueue::<()>::open(Arc::new(file), Engine::Auto, &Config::default()).unwrap_err();
    assert!(matches!(error, SetupError::AppendMode));
}

#[test]
fn completions_that_are_there_are_reaped_without_a_system_call() {
    // Read from the page cache, where io_uring too completes a read inside its submit call.
    for engine in ENGINES {
        on_a_thread_of_its_own(move || {
            let file = suits_io_uring();
            let mut queue = IoQueue::open(file, engine, &Config::default()).unwrap();
            for block in 0..16u64 {
                queue.read(block * 4096, vec![0; 4096]).unwrap();
            }
            assert_eq!(queue.submit().submitted, 16);
            let calls = [
                libc::SYS_io_getevents,
                libc::SYS_io_submit,
                libc::SYS_io_uring_enter,
                libc::SYS_read,
                libc::SYS_epoll_wait,
                libc::SYS_poll,
            ];
            refuse(&calls, libc::EPERM);
            assert!(queue.completions_pending());
            let count = queue.reap(|buf, result| {
                assert_eq!(result, Ok(4096));
                assert_eq!(buf, [7; 4096]);
            });
            assert_eq!(count, 16, "{engine}");
            assert!(!queue.completions_pending());
        });
    }
}

#[test]
fn a_ring_whose_system_call_is_forbidden_later_fails_what_it_cannot_hand_over() {
    on_a_thread_of_its_own(|| {
        let file = suits_io_uring();
        let mut queue = IoQueue::io_uring(file, &Config::default()).unwrap();
        reads(&mut queue);
        refuse(&[libc::SYS_io_uring_enter], libc::EPERM);
        for round in 0..3 {
            for _ in 0..5 {
                queue.read(0, vec![0; 512]).unwrap();
            }
            queue.submit();
            let results = finish(&mut queue);
            assert_eq!(results.len(), 5, "round {round}");
            for (_, result) in results {
                assert_eq!(result.unwrap_err().errno(), Some(libc::EPERM));
            }
        }
    });
}

#[test]
fn write_through_zeroes_are_not_done_before_they_are_stable() {
    for engine in ENGINES {
        on_a_thread_of_its_own(move || {
            let file = suits_aio();
            let mut queue = IoQueue::open(file, engine, &Config::default()).unwrap();
            // Of the worker threads, which are started by this one.
            refuse(&[libc::SYS_fdatasync], libc::EIO);
            for (durability, expected) in [
                (Durability::WriteBack, Ok(4096)),
                (Durability::WriteThrough, Err(Some(libc::EIO))),
            ] {
                queue
                    .queue_write_zeroes(0, 4096, Unmap::Allowed, durability, ())
                    .unwrap();
                queue.submit();
                let result = finish(&mut queue)[0].1.map_err(IoError::errno);
                assert_eq!(result, expected);
            }
        });
    }
}

/// Two pages of a memory file mapped shared, as a guest's memory is.
struct Mapping {
    file: File,
    base: *mut libc::c_void,
}

impl Mapping {
    fn new() -> Self {
        // SAFETY: the name is NUL-terminated; the mapping replaces nothing.
        unsafe {
            let fd = libc::memfd_create(c"ioq".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0);
            let file = File::from_raw_fd(fd);
            file.set_len(8192).unwrap();
            let base = libc::mmap(
                std::ptr::null_mut(),
                8192,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            );
            assert_ne!(base, libc::MAP_FAILED);
            Self { file, base }
        }
    }

    fn segment(&self, at: usize, len: usize) -> iovec {
        iovec {
            iov_base: self.base.wrapping_byte_add(at),
            iov_len: len,
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; if a test has unmapped it, nothing else has been mapped there by
        // a test that holds on to it.
        unsafe { libc::munmap(self.base, 8192) };
    }
}

/// A read into, and a write from, memory that is gone, among good ones; buffered and direct.
fn with_memory_gone(take_away: impl Fn(&Mapping), gone: &[iovec; 2], mapping: &Mapping) {
    take_away(mapping);
    for dir in DIRECTORIES {
        for engine in ENGINES {
            for flags in [0, libc::O_DIRECT] {
                let named = named(dir);
                let file = File::options()
                    .read(true)
                    .write(true)
                    .custom_flags(flags)
                    .open(named.path())
                    .unwrap();
                let mut queue = IoQueue::open(Arc::new(file), engine, &Config::default()).unwrap();
                let mut good: Vec<_> = (0..3)
                    .map(|_| AlignedBuf::new(4096, 4096).unwrap())
                    .collect();
                for (i, segment) in good.iter_mut().map(IoBuf::segment).enumerate() {
                    // SAFETY: outlives the operations, which `finish` waits for.
                    unsafe { queue.queue_readv(0, [segment], i) }.unwrap();
                    // SAFETY: memory that is not there is the test: the kernel answers EFAULT, and
                    // nothing here touches it.
                    unsafe {
                        match i {
                            0 => queue.queue_readv(4096, [gone[0]], 10),
                            1 => queue.queue_writev(8192, [gone[0]], Durability::WriteBack, 11),
                            _ => queue.queue_readv(4096, *gone, 12),
                        }
                    }
                    .unwrap();
                }
                queue.submit();
                let results = finish(&mut queue);
                assert_eq!(results.len(), 6);
                for (id, result) in results {
                    if id < 3 {
                        assert_eq!(result, Ok(4096), "{dir} {engine} {flags:#x}");
                    } else {
                        let error = result.unwrap_err();
                        assert_eq!(error.errno(), Some(libc::EFAULT), "{dir} {engine} {id}");
                        assert_eq!(error.kind(), IoErrorKind::Invalid);
                    }
                }
                assert!(good.iter().all(|buf| buf[..] == [7; 4096]));
                drop(queue);
                let now = std::fs::read(named.path()).unwrap();
                assert!(now.iter().all(|&byte| byte == 7), "nothing was written");
            }
        }
    }
}

#[test]
fn m10_memory_truncated_away_fails_its_operation_alone() {
    let mapping = Mapping::new();
    let gone = [mapping.segment(0, 4096), mapping.segment(4096, 4096)];
    with_memory_gone(|mapping| mapping.file.set_len(0).unwrap(), &gone, &mapping);
}

#[test]
fn m10_memory_truncated_away_behind_its_first_page_fails_the_operation_it_lies_in() {
    let mapping = Mapping::new();
    // The second page is gone; so is the whole of what lies in it.
    let gone = [mapping.segment(4096, 4096), mapping.segment(0, 4096)];
    with_memory_gone(
        |mapping| mapping.file.set_len(4096).unwrap(),
        &gone,
        &mapping,
    );
}

#[test]
fn m10_unmapped_memory_fails_its_operation_alone() {
    let mapping = Mapping::new();
    let gone = [mapping.segment(0, 4096), mapping.segment(4096, 4096)];
    with_memory_gone(
        |mapping| {
            // Mapped without access instead, so that no other thread's memory comes to lie there.
            // SAFETY: replaces the mapping that `mapping` owns.
            let again = unsafe {
                libc::mmap(
                    mapping.base,
                    8192,
                    libc::PROT_NONE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                    -1,
                    0,
                )
            };
            assert_eq!(again, mapping.base);
        },
        &gone,
        &mapping,
    );
}
