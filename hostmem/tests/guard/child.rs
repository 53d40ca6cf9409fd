//! What happens to a whole process. Each test runs itself again as a child, which does the thing.

use std::env;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicUsize, Ordering};

use hostmem::{MemoryMap, SigbusGuard};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use crate::memfile::MemFile;

const PAGE: u64 = 0x1000;
const FRONTEND: u64 = 0x7f00_0000_0000;

/// Set in a child.
const IN_CHILD: &str = "HOSTMEM_GUARD_CHILD";

/// Runs `test`, which is the caller, in a process of its own. `None` in that process.
pub(crate) fn child(test: &str) -> Option<ExitStatus> {
    if env::var_os(IN_CHILD).is_some() {
        // A core dump of each would fill the disk.
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0).unwrap();
        return None;
    }
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(IN_CHILD, "1")
        .output()
        .unwrap();
    eprintln!("{}", String::from_utf8_lossy(&output.stderr));
    // Or a name that has changed would pass for a child that went well.
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(stdout.contains("running 1 test"), "{stdout}");
    Some(output.status)
}

pub(crate) fn assert_killed_by_sigbus(status: ExitStatus) {
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
}

/// A file that lost its page after it was mapped by somebody else than hostmem.
fn foreign_memory() -> GuestMemoryMmap {
    let file = MemFile::new("hm-foreign", PAGE);
    let mapped = FileOffset::new(file.file().try_clone().unwrap(), 0);
    let ranges = [(GuestAddress(0), 0x1000, Some(mapped))];
    let memory = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
    file.file().set_len(0).unwrap();
    memory
}

pub(crate) fn truncated_map() -> MemoryMap {
    let file = MemFile::new("hm-gone", PAGE);
    let map = MemoryMap::new(vec![file.region(0, PAGE, FRONTEND, 0)]).unwrap();
    file.file().set_len(0).unwrap();
    map
}

/// That the tests of this file show anything: this is what the guard is for.
#[test]
fn m10_without_the_guard_lost_memory_ends_the_process() {
    let Some(status) = child("child::m10_without_the_guard_lost_memory_ends_the_process") else {
        let read = truncated_map().read_obj::<u8>(GuestAddress(0));
        unreachable!("{read:?}");
    };
    assert_killed_by_sigbus(status);
}

#[test]
fn m10_with_the_guard_the_process_lives() {
    let Some(status) = child("child::m10_with_the_guard_the_process_lives") else {
        let map = truncated_map();
        assert!(!SigbusGuard::is_installed());
        SigbusGuard::install().unwrap();
        SigbusGuard::install().unwrap();
        assert!(SigbusGuard::is_installed());
        assert!(map.check_intact().is_ok());
        assert_eq!(SigbusGuard::losses(), 0);
        map.read_obj::<u8>(GuestAddress(0)).unwrap();
        assert_eq!(SigbusGuard::losses(), 1);
        assert!(map.check_intact().is_err());
        return;
    };
    assert!(status.success(), "{status}");
}

#[test]
fn fault_outside_any_map_ends_the_process_all_the_same() {
    let Some(status) = child("child::fault_outside_any_map_ends_the_process_all_the_same") else {
        SigbusGuard::install().unwrap();
        // A map that is fine, and one that is lost, do not make it theirs.
        let file = MemFile::new("hm-fine", PAGE);
        let _fine = MemoryMap::new(vec![file.region(0, PAGE, FRONTEND, 0)]).unwrap();
        let lost = truncated_map();
        lost.read_obj::<u8>(GuestAddress(0)).unwrap();
        let read = foreign_memory().read_obj::<u8>(GuestAddress(0));
        unreachable!("{read:?}");
    };
    assert_killed_by_sigbus(status);
}

#[test]
fn fault_in_memory_unmapped_and_mapped_by_somebody_else_is_not_ours() {
    let Some(status) =
        child("child::fault_in_memory_unmapped_and_mapped_by_somebody_else_is_not_ours")
    else {
        SigbusGuard::install().unwrap();
        drop(truncated_map());
        // Most likely at the very same address.
        let read = foreign_memory().read_obj::<u8>(GuestAddress(0));
        unreachable!("{read:?}");
    };
    assert_killed_by_sigbus(status);
}

#[test]
fn signal_sent_by_a_process_ends_it_as_before() {
    let Some(status) = child("child::signal_sent_by_a_process_ends_it_as_before") else {
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        set_action(&default);
        SigbusGuard::install().unwrap();
        raise(Signal::SIGBUS).unwrap();
        unreachable!("alive");
    };
    assert_killed_by_sigbus(status);
}

#[test]
fn signal_sent_by_a_process_is_ignored_if_it_was_before() {
    let Some(status) = child("child::signal_sent_by_a_process_is_ignored_if_it_was_before") else {
        let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
        set_action(&ignore);
        SigbusGuard::install().unwrap();
        raise(Signal::SIGBUS).unwrap();
        return;
    };
    assert!(status.success(), "{status}");
}

#[test]
fn fault_that_was_to_be_ignored_ends_the_process_and_does_not_spin() {
    let Some(status) =
        child("child::fault_that_was_to_be_ignored_ends_the_process_and_does_not_spin")
    else {
        let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
        set_action(&ignore);
        SigbusGuard::install().unwrap();
        let read = foreign_memory().read_obj::<u8>(GuestAddress(0));
        unreachable!("{read:?}");
    };
    assert_killed_by_sigbus(status);
}

static CALLS: AtomicUsize = AtomicUsize::new(0);

/// Exit code of a child whose own handler was called for a fault.
const HANDLED: i32 = 42;

extern "C" fn with_info(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    assert_eq!(signal, libc::SIGBUS);
    assert!(!info.is_null() && !context.is_null());
    leave();
}

extern "C" fn without_info(signal: libc::c_int) {
    assert_eq!(signal, libc::SIGBUS);
    CALLS.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn fault_outside_any_map_goes_to_the_previous_handler() {
    let Some(status) = child("child::fault_outside_any_map_goes_to_the_previous_handler") else {
        let handler = SigHandler::SigAction(with_info);
        set_action(&SigAction::new(
            handler,
            SaFlags::SA_SIGINFO,
            SigSet::empty(),
        ));
        SigbusGuard::install().unwrap();
        // Ours, so not passed on.
        truncated_map().read_obj::<u8>(GuestAddress(0)).unwrap();
        let read = foreign_memory().read_obj::<u8>(GuestAddress(0));
        unreachable!("{read:?}");
    };
    assert_eq!(status.code(), Some(HANDLED), "{status}");
}

#[test]
fn previous_handler_of_the_old_kind_is_called_each_time() {
    let Some(status) = child("child::previous_handler_of_the_old_kind_is_called_each_time") else {
        let handler = SigHandler::Handler(without_info);
        set_action(&SigAction::new(handler, SaFlags::empty(), SigSet::empty()));
        SigbusGuard::install().unwrap();
        for calls in 1..4 {
            raise(Signal::SIGBUS).unwrap();
            assert_eq!(CALLS.load(Ordering::Relaxed), calls);
        }
        return;
    };
    assert!(status.success(), "{status}");
}

#[test]
fn previous_handler_for_once_is_called_once() {
    let Some(status) = child("child::previous_handler_for_once_is_called_once") else {
        let handler = SigHandler::Handler(without_info);
        set_action(&SigAction::new(
            handler,
            SaFlags::SA_RESETHAND,
            SigSet::empty(),
        ));
        SigbusGuard::install().unwrap();
        raise(Signal::SIGBUS).unwrap();
        assert_eq!(CALLS.load(Ordering::Relaxed), 1);
        raise(Signal::SIGBUS).unwrap();
        unreachable!("alive");
    };
    assert_killed_by_sigbus(status);
}

use unsafe_parts::{leave, set_action};

// UNSAFETY: handlers of the test's own, and a way out of one.
#[expect(unsafe_code, reason = "signal handlers of the tests' own")]
mod unsafe_parts {
    use super::{HANDLED, SigAction, Signal, sigaction};

    pub(super) fn set_action(action: &SigAction) {
        // SAFETY: the handlers above exit, or add to an atomic.
        unsafe { sigaction(Signal::SIGBUS, action) }.unwrap();
    }

    pub(super) fn leave() -> ! {
        // SAFETY: async-signal-safe, and ends the process.
        unsafe { libc::_exit(HANDLED) }
    }
}
