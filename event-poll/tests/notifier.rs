//! The notifier: own and received descriptors, of the right and of the wrong kind.

mod asleep;
mod deadline;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use asleep::until_asleep;
use deadline::within_deadline;
use event_poll::{Error, EventNotifier};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// The most `eventfd(2)` lets a write reach.
const COUNTER_MAX: u64 = u64::MAX - 1;

fn received(flags: EfdFlags) -> (EventNotifier, EventFd) {
    let far_end = EventFd::from_flags(flags).unwrap();
    let fd = far_end.as_fd().try_clone_to_owned().unwrap();
    (EventNotifier::from_fd(fd).unwrap(), far_end)
}

fn status_flags(fd: impl AsFd) -> OFlag {
    OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL).unwrap())
}

fn descriptor_flags(fd: impl AsFd) -> FdFlag {
    FdFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFD).unwrap())
}

#[test]
fn a_new_notifier_is_clear_nonblocking_and_close_on_exec() {
    let notifier = EventNotifier::new().unwrap();
    assert!(!notifier.test_and_clear().unwrap());
    assert!(status_flags(&notifier).contains(OFlag::O_NONBLOCK));
    assert!(descriptor_flags(&notifier).contains(FdFlag::FD_CLOEXEC));
}

#[test]
fn a_clone_shares_the_counter_and_is_close_on_exec() {
    let notifier = EventNotifier::new().unwrap();
    let clone = notifier.try_clone().unwrap();
    clone.notify().unwrap();
    assert!(notifier.test_and_clear().unwrap());
    assert!(!clone.test_and_clear().unwrap());
    assert!(descriptor_flags(&clone).contains(FdFlag::FD_CLOEXEC));
}

#[test]
fn n1_spurious_kick_reads_as_not_set() {
    for flags in [EfdFlags::EFD_NONBLOCK, EfdFlags::empty()] {
        let (kick, far_end) = received(flags);
        far_end.write(1).unwrap();
        let reads = within_deadline(move || [(); 3].map(|()| kick.test_and_clear().unwrap()));
        assert_eq!(reads, [true, false, false]);
    }
}

#[test]
fn n2_one_read_clears_a_saturated_kick_counter() {
    for flags in [EfdFlags::EFD_NONBLOCK, EfdFlags::empty()] {
        let (kick, far_end) = received(flags);
        far_end.write(COUNTER_MAX).unwrap();
        let reads = within_deadline(move || [(); 2].map(|()| kick.test_and_clear().unwrap()));
        assert_eq!(reads, [true, false]);
    }
}

#[test]
fn n2_a_semaphore_that_one_read_would_not_clear_is_refused() {
    let fd = EventFd::from_value_and_flags(2, EfdFlags::EFD_SEMAPHORE).unwrap();
    let shown = {
        use std::os::fd::AsRawFd;
        std::fs::read_to_string(format!("/proc/thread-self/fdinfo/{}", fd.as_raw_fd())).unwrap()
    };
    // The kernel tells since Linux 6.5.
    let told = shown.contains("eventfd-semaphore: 1");
    let result = EventNotifier::from_fd(fd.into());
    assert_eq!(matches!(result, Err(Error::Semaphore)), told, "{result:?}");
}

#[test]
fn n3_notify_of_a_full_counter_returns_and_succeeds() {
    let own = EventNotifier::new().unwrap();
    let far_end = own.try_clone().unwrap();
    nix::unistd::write(&far_end, &COUNTER_MAX.to_ne_bytes()).unwrap();
    within_deadline(move || own.notify()).unwrap();
    assert!(far_end.test_and_clear().unwrap());

    for flags in [EfdFlags::EFD_NONBLOCK, EfdFlags::empty()] {
        let (call, far_end) = received(flags);
        far_end.write(COUNTER_MAX).unwrap();
        within_deadline(move || call.notify()).unwrap();
        assert_eq!(far_end.read().unwrap(), COUNTER_MAX, "{flags:?}");
    }
}

#[test]
fn n3_notify_reaches_the_last_free_count() {
    for flags in [EfdFlags::EFD_NONBLOCK, EfdFlags::empty()] {
        let (call, far_end) = received(flags);
        far_end.write(COUNTER_MAX - 1).unwrap();
        let call = within_deadline(move || call.notify().map(|()| call)).unwrap();
        within_deadline(move || call.notify()).unwrap();
        assert_eq!(far_end.read().unwrap(), COUNTER_MAX);
    }
}

#[test]
fn n3_a_clone_releases_a_notify_made_to_sleep() {
    // The one way to put it to sleep: the far end clears O_NONBLOCK behind our back.
    let (call, far_end) = received(EfdFlags::EFD_NONBLOCK);
    far_end.write(COUNTER_MAX).unwrap();
    fcntl(&far_end, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    drop(far_end);
    let releaser = call.try_clone().unwrap();
    within_deadline(move || {
        let (sender, tid) = std::sync::mpsc::channel();
        let sleeper = std::thread::spawn(move || {
            sender.send(nix::unistd::gettid()).unwrap();
            call.notify()
        });
        until_asleep(tid.recv().unwrap());
        assert!(releaser.test_and_clear().unwrap());
        sleeper.join().unwrap()
    })
    .unwrap();
}

#[test]
fn n4_notify_after_the_far_end_closed_succeeds() {
    for flags in [EfdFlags::EFD_NONBLOCK, EfdFlags::empty()] {
        let (call, far_end) = received(flags);
        drop(far_end);
        call.notify().unwrap();
        call.notify().unwrap();
    }
}

#[test]
fn n9_f6_what_is_no_eventfd_is_refused_by_name() {
    let (pipe_reader, _pipe_writer) = nix::unistd::pipe().unwrap();
    let (socket, _peer) = UnixStream::pair().unwrap();
    let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
    let wrong: [(OwnedFd, &str); 5] = [
        (File::open("/proc/self/exe").unwrap().into(), "/"),
        (File::open("/dev/zero").unwrap().into(), "/dev/zero"),
        (pipe_reader, "pipe:["),
        (socket.into(), "socket:["),
        (epoll.0, "anon_inode:[eventpoll]"),
    ];
    for (fd, kind) in wrong {
        match EventNotifier::from_fd(fd) {
            Err(Error::NotEventFd { found }) => assert!(found.starts_with(kind), "{found}"),
            other => panic!("{kind}: {other:?}"),
        }
    }
}

#[test]
fn f8_a_refused_descriptor_is_closed() {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    assert!(EventNotifier::from_fd(writer).is_err());
    let end = within_deadline(move || File::from(reader).read(&mut [0; 1]));
    assert_eq!(end.unwrap(), 0);
}

#[test]
fn f9_a_received_descriptor_becomes_close_on_exec_and_keeps_its_blocking_mode() {
    for flags in [EfdFlags::EFD_NONBLOCK, EfdFlags::empty()] {
        let far_end = EventFd::from_flags(flags).unwrap();
        let fd = nix::unistd::dup(&far_end).unwrap();
        assert!(!descriptor_flags(&fd).contains(FdFlag::FD_CLOEXEC));

        let notifier = EventNotifier::from_fd(fd).unwrap();
        notifier.notify().unwrap();
        assert!(notifier.test_and_clear().unwrap());
        assert!(!notifier.test_and_clear().unwrap());

        assert!(descriptor_flags(&notifier).contains(FdFlag::FD_CLOEXEC));
        assert_eq!(
            status_flags(&far_end).contains(OFlag::O_NONBLOCK),
            flags.contains(EfdFlags::EFD_NONBLOCK)
        );
    }
}

#[test]
fn f9_two_readers_of_a_blocking_descriptor_do_not_sleep() {
    let (kick, far_end) = received(EfdFlags::empty());
    let rival = kick.try_clone().unwrap();
    let kicks = 1000;
    within_deadline(move || {
        let take = |notifier: EventNotifier| {
            std::thread::spawn(move || {
                for _ in 0..kicks {
                    notifier.test_and_clear().unwrap();
                }
            })
        };
        let takers = [take(kick), take(rival)];
        for _ in 0..kicks {
            far_end.write(1).unwrap();
        }
        for taker in takers {
            taker.join().unwrap();
        }
    });
}
