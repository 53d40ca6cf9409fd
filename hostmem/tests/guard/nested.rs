//! Faults where a handler is harder to write: in a forked process, inside other signals' handlers, with the
//! signal blocked, and with a handler that the program puts on top. Each in a process of its own.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use hostmem::{MemoryMap, SigbusGuard};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise};
use vm_memory::{Bytes, GuestAddress};

use crate::child::{assert_killed_by_sigbus, child, truncated_map};

/// What the handlers here touch.
static MAP: OnceLock<MemoryMap> = OnceLock::new();
static CALLS: AtomicUsize = AtomicUsize::new(0);

/// Touches the lost memory. Async-signal-safe: loads, and no allocation, as the read succeeds.
extern "C" fn touch(_: libc::c_int) {
    if let Some(map) = MAP.get()
        && map.read_obj::<u8>(GuestAddress(0)).is_ok()
    {
        CALLS.fetch_add(1, Ordering::Relaxed);
    }
}

fn lose_map() {
    assert!(MAP.set(truncated_map()).is_ok());
}

fn handler(flags: SaFlags) -> SigAction {
    SigAction::new(SigHandler::Handler(touch), flags, SigSet::empty())
}

#[test]
fn m24_forked_process_has_the_guard_and_losses_of_its_own() {
    let Some(status) = child("nested::m24_forked_process_has_the_guard_and_losses_of_its_own")
    else {
        SigbusGuard::install().unwrap();
        let map = truncated_map();
        let (read, losses) = in_fork(|| {
            let read = map.read_obj::<u8>(GuestAddress(0)).is_ok();
            let losses = SigbusGuard::losses();
            (read, u8::try_from(losses).unwrap_or(u8::MAX))
        });
        assert!(read, "the forked process lived");
        assert_eq!(losses, 1);
        // Here nothing was touched yet.
        assert_eq!(SigbusGuard::losses(), 0);
        map.read_obj::<u8>(GuestAddress(0)).unwrap();
        assert_eq!(SigbusGuard::losses(), 1);
        return;
    };
    assert!(status.success(), "{status}");
}

#[test]
fn m25_fault_inside_the_handler_of_another_signal_is_survived() {
    let Some(status) = child("nested::m25_fault_inside_the_handler_of_another_signal_is_survived")
    else {
        SigbusGuard::install().unwrap();
        lose_map();
        set_action(Signal::SIGUSR1, &handler(SaFlags::empty()));
        raise(Signal::SIGUSR1).unwrap();
        assert_eq!(CALLS.load(Ordering::Relaxed), 1);
        assert_eq!(SigbusGuard::losses(), 1);
        return;
    };
    assert!(status.success(), "{status}");
}

#[test]
fn m26_fault_with_the_signal_blocked_ends_the_process() {
    let Some(status) = child("nested::m26_fault_with_the_signal_blocked_ends_the_process") else {
        SigbusGuard::install().unwrap();
        let map = truncated_map();
        SigSet::from(Signal::SIGBUS).thread_block().unwrap();
        let read = map.read_obj::<u8>(GuestAddress(0));
        unreachable!("{read:?}");
    };
    assert_killed_by_sigbus(status);
}

/// A fault inside the guard's own handler: that of a previous handler it passes a signal on to. On the
/// stack that it asked for, which has room for both.
#[test]
fn m27_fault_inside_the_previous_handler_is_survived_if_that_asked_not_to_block_the_signal() {
    let Some(status) = child(
        "nested::m27_fault_inside_the_previous_handler_is_survived_if_that_asked_not_to_block_the_signal",
    ) else {
        set_action(Signal::SIGBUS, &handler(SaFlags::SA_NODEFER));
        SigbusGuard::install().unwrap();
        lose_map();
        raise(Signal::SIGBUS).unwrap();
        assert_eq!(CALLS.load(Ordering::Relaxed), 1);
        assert_eq!(SigbusGuard::losses(), 1);
        return;
    };
    assert!(status.success(), "{status}");
}

#[test]
fn m27_fault_inside_the_previous_handler_ends_the_process_if_that_had_the_signal_blocked() {
    let Some(status) = child(
        "nested::m27_fault_inside_the_previous_handler_ends_the_process_if_that_had_the_signal_blocked",
    ) else {
        set_action(Signal::SIGBUS, &handler(SaFlags::empty()));
        SigbusGuard::install().unwrap();
        lose_map();
        raise(Signal::SIGBUS).unwrap();
        unreachable!("alive");
    };
    assert_killed_by_sigbus(status);
}

#[test]
fn m28_handler_put_on_top_of_the_guard_that_calls_it_keeps_it_working() {
    let Some(status) =
        child("nested::m28_handler_put_on_top_of_the_guard_that_calls_it_keeps_it_working")
    else {
        SigbusGuard::install().unwrap();
        put_on_top();
        // Again does not put the guard on top of that, or the two would call each other for ever.
        SigbusGuard::install().unwrap();
        let map = truncated_map();
        map.read_obj::<u8>(GuestAddress(0)).unwrap();
        assert_eq!(on_top_calls(), 1);
        assert_eq!(SigbusGuard::losses(), 1);
        assert!(map.check_intact().is_err());
        return;
    };
    assert!(status.success(), "{status}");
}

/// The standard library's handler, which is there before in every program of Rust's, gives its place up for
/// good at a signal that means nothing to it.
#[test]
fn m29_previous_handler_that_gives_its_place_up_leaves_the_guard() {
    let Some(status) =
        child("nested::m29_previous_handler_that_gives_its_place_up_leaves_the_guard")
    else {
        SigbusGuard::install().unwrap();
        raise(Signal::SIGBUS).unwrap();
        let map = truncated_map();
        map.read_obj::<u8>(GuestAddress(0)).unwrap();
        assert!(map.check_intact().is_err());
        return;
    };
    assert!(status.success(), "{status}");
}

/// The place that was given up is the default action's: the next signal ends the process, as it would have.
#[test]
fn m29_previous_handler_that_gave_its_place_up_is_not_called_again() {
    let Some(status) =
        child("nested::m29_previous_handler_that_gave_its_place_up_is_not_called_again")
    else {
        SigbusGuard::install().unwrap();
        raise(Signal::SIGBUS).unwrap();
        raise(Signal::SIGBUS).unwrap();
        unreachable!("alive");
    };
    assert_killed_by_sigbus(status);
}

use unsafe_parts::{in_fork, on_top_calls, put_on_top, set_action};

// UNSAFETY: handlers of the tests' own, and a fork.
#[expect(unsafe_code, reason = "signal handlers of the tests' own, and a fork")]
mod unsafe_parts {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

    pub(super) fn set_action(signal: Signal, action: &SigAction) {
        // SAFETY: `touch` is async-signal-safe.
        unsafe { sigaction(signal, action) }.unwrap();
    }

    static DISPLACED: OnceLock<SigAction> = OnceLock::new();
    static ON_TOP: AtomicUsize = AtomicUsize::new(0);

    pub(super) fn on_top_calls() -> usize {
        ON_TOP.load(Ordering::Relaxed)
    }

    extern "C" fn on_top(
        signal: libc::c_int,
        info: *mut libc::siginfo_t,
        context: *mut libc::c_void,
    ) {
        ON_TOP.fetch_add(1, Ordering::Relaxed);
        if let Some(SigHandler::SigAction(displaced)) = DISPLACED.get().map(SigAction::handler) {
            displaced(signal, info, context);
        }
    }

    /// A handler that counts, and calls the one it displaces.
    pub(super) fn put_on_top() {
        let handler = SigHandler::SigAction(on_top);
        let action = SigAction::new(handler, SaFlags::SA_SIGINFO, SigSet::empty());
        // SAFETY: it is async-signal-safe: atomics, and the handler that was there.
        let displaced = unsafe { sigaction(Signal::SIGBUS, &action) }.unwrap();
        assert!(DISPLACED.set(displaced).is_ok());
    }

    /// What `work` returns in a forked process: whether, and a number below 128.
    pub(super) fn in_fork(work: impl FnOnce() -> (bool, u8)) -> (bool, u8) {
        // SAFETY: the new process does `work`, which does not allocate or lock, and ends.
        let process = unsafe { libc::fork() };
        assert!(process >= 0, "fork");
        if process == 0 {
            let (yes, number) = work();
            let code = libc::c_int::from(number & 0x7f) << 1 | libc::c_int::from(yes);
            // SAFETY: ends the process without running anything of the parent's.
            unsafe { libc::_exit(code) }
        }
        let mut status = 0;
        // SAFETY: the process is a child of this one, and `status` is writable.
        let waited = unsafe { libc::waitpid(process, &raw mut status, 0) };
        assert_eq!(waited, process);
        assert!(libc::WIFEXITED(status), "status {status:#x}");
        let code = u8::try_from(libc::WEXITSTATUS(status)).unwrap();
        (code & 1 == 1, code >> 1)
    }
}
