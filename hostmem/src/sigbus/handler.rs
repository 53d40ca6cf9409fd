//! The signal handler, and what it asks of the kernel.
//!
//! Everything it calls is async-signal-safe: loads and stores of atomics that are lock-free, and
//! system calls. `mmap` is not on POSIX's list, but on Linux it is a system call and no more; it is
//! made without the C library's wrapper, which sanitizers replace by one that takes locks.

// UNSAFETY: signal handlers, and memory mapped over memory that is in use.
#![expect(unsafe_code)]

use std::ffi::c_int;
use std::io;
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use libc::{c_void, siginfo_t};

use super::slot::{Extent, Slot};
use super::{count_loss, table};

/// The handler that was there before: its address or `SIG_DFL` or `SIG_IGN`, and its flags.
static PREVIOUS: AtomicUsize = AtomicUsize::new(libc::SIG_DFL);
static PREVIOUS_FLAGS: AtomicI32 = AtomicI32::new(0);

static INSTALLED: AtomicBool = AtomicBool::new(false);
static INSTALLING: Mutex<()> = Mutex::new(());

pub(super) fn is_installed() -> bool {
    INSTALLED.load(Ordering::Acquire)
}

pub(super) fn install() -> io::Result<()> {
    let _one_at_a_time = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
    if is_installed() {
        return Ok(());
    }
    // What is there is known before ours is in its place: a signal may come at once.
    let previous = sigaction(None)?;
    remember(&previous);
    let mut ours = previous;
    ours.sa_sigaction = on_sigbus as *const () as usize;
    // The signals blocked are those that the previous handler asked for, and so is whether SIGBUS
    // itself is among them, whether system calls go on, and which stack: it may be called from ours,
    // and the alternate stack may be too small for it.
    let kept = libc::SA_NODEFER | libc::SA_RESTART | libc::SA_ONSTACK;
    ours.sa_flags = libc::SA_SIGINFO | (previous.sa_flags & kept);
    if matches!(previous.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN) {
        // Ours alone runs on the alternate stack, where there is one: threads whose ordinary stack is
        // tiny, such as those of other languages, have one.
        ours.sa_flags |= libc::SA_ONSTACK;
    }
    let replaced = sigaction(Some(&ours))?;
    // The same, unless another thread was quicker.
    remember(&replaced);
    INSTALLED.store(true, Ordering::Release);
    Ok(())
}

fn remember(previous: &libc::sigaction) {
    PREVIOUS_FLAGS.store(previous.sa_flags, Ordering::Relaxed);
    // Release: pairs with the load in `pass_on`, which comes from a handler on another thread.
    PREVIOUS.store(previous.sa_sigaction, Ordering::Release);
}

/// Sets the action for SIGBUS, if there is a new one, and returns the old.
fn sigaction(new: Option<&libc::sigaction>) -> io::Result<libc::sigaction> {
    let mut old = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: both point to a sigaction or are null; what is installed is `on_sigbus`, which is made
    // for it, or the default.
    let result = unsafe {
        libc::sigaction(
            libc::SIGBUS,
            new.map_or(null(), |new| new),
            old.as_mut_ptr(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all zeroes is a valid sigaction, and the kernel has written over it.
    Ok(unsafe { old.assume_init() })
}

/// # Safety
///
/// - Called by the kernel for SIGBUS, with `info` of that signal.
unsafe extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the address of this thread's errno, which lives as long as the thread.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above. What was interrupted may be about to read it.
    let saved = unsafe { *errno };
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid pointer.
    let code = unsafe { (*info).si_code };
    let rescued = code == libc::BUS_ADRERR && {
        // SAFETY: as above; SIGBUS from the kernel carries an address.
        let addr = unsafe { (*info).si_addr() }.addr();
        table::table()
            .find(addr)
            .is_some_and(|(slot, extent)| rescue(slot, extent, addr))
    };
    if !rescued {
        // SAFETY: these are what the kernel gave us.
        unsafe { pass_on(signal, code, info, context) };
    }
    // SAFETY: as above.
    unsafe { *errno = saved };
}

/// Puts zeroed memory in the place of a mapping that has lost the page at `addr`.
fn rescue(slot: &Slot, extent: Extent, addr: usize) -> bool {
    // Before the memory is there: whoever sees it sees that it is not what it was.
    if slot.lose() {
        count_loss();
    }
    // The whole mapping, so that it happens once and takes one mapping of the kernel's count. Another
    // thread that faults at the same time does it again, and what was written in between is gone:
    // nobody was to see it. If there is no room for the whole (strict overcommit), the page will do.
    let page = Extent {
        start: addr & !(extent.page_size - 1),
        len: extent.page_size,
        ..extent
    };
    map_zeroes(extent) || map_zeroes(page)
}

/// Async-signal-safe. `extent` must be in the table: it is mapped, by us, and whoever could unmap it
/// waits for the borrow under which it is being touched.
fn map_zeroes(extent: Extent) -> bool {
    let Extent { start, len, .. } = extent;
    // SAFETY: replaces a mapping of ours of which everybody knows that others change its contents
    // at any time: guest memory is accessed volatile or atomically only. It stays mapped,
    // readable and writable throughout, as the kernel replaces it in one step, and is unmapped like
    // the original. Start and length are multiples of the mapping's page size, huge or not.
    let mapped = unsafe {
        libc::syscall(
            libc::SYS_mmap,
            start,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    usize::try_from(mapped) == Ok(start)
}

/// Does what would have happened without us.
///
/// # Safety
///
/// - The arguments are those that the kernel gave to the handler, and the signal's code.
unsafe fn pass_on(signal: c_int, code: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let flags = PREVIOUS_FLAGS.load(Ordering::Relaxed);
    let handler = PREVIOUS.load(Ordering::Acquire);
    // Sent by a process, or a notice of memory that nobody has touched yet: it does not come again
    // when we return. Any other is from an instruction that is tried again.
    let is_notice = code <= 0 || code == libc::BUS_MCEERR_AO;
    match handler {
        libc::SIG_IGN if is_notice => {}
        // The kernel does not let a process ignore what it cannot go on from.
        libc::SIG_DFL | libc::SIG_IGN => end_by_default(is_notice),
        _ => {
            if flags & libc::SA_RESETHAND != 0 {
                PREVIOUS.store(libc::SIG_DFL, Ordering::Relaxed);
            }
            if flags & libc::SA_SIGINFO != 0 {
                // SAFETY: it was installed with SA_SIGINFO, so this is its type; the signals it
                // asked for are blocked, since ours asked for the same.
                unsafe {
                    let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                        std::mem::transmute(handler as *const ());
                    handler(signal, info, context);
                }
            } else {
                // SAFETY: it was installed without SA_SIGINFO, so this is its type.
                unsafe {
                    let handler: extern "C" fn(c_int) = std::mem::transmute(handler as *const ());
                    handler(signal);
                }
            }
            if is_notice {
                stay();
            }
        }
    }
}

/// Takes the handler's place again, if the previous handler has given it up to the default action, as the
/// standard library's does at a signal that means nothing to it. The process lives on, since the signal
/// does not come again by itself, and is not to lose the guard; the next such signal ends it, as it would
/// have without us.
fn stay() {
    let mut now = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: async-signal-safe; asks, and writes to `now`.
    if unsafe { libc::sigaction(libc::SIGBUS, null(), now.as_mut_ptr()) } < 0 {
        return;
    }
    // SAFETY: all zeroes is a valid sigaction, and the kernel has written over it.
    let mut action = unsafe { now.assume_init() };
    if action.sa_sigaction != libc::SIG_DFL {
        return;
    }
    PREVIOUS.store(libc::SIG_DFL, Ordering::Release);
    action.sa_sigaction = on_sigbus as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: async-signal-safe; what is installed is `on_sigbus`, which is made for it.
    unsafe { libc::sigaction(libc::SIGBUS, &raw const action, null_mut()) };
}

/// Sees to it that the signal does what it does by default: end the process, with a core dump.
fn end_by_default(is_notice: bool) {
    // SAFETY: all zeroes is a valid sigaction: SIG_DFL, no flags, no signals blocked.
    let default: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: async-signal-safe, and the default action needs no code of ours.
    unsafe {
        libc::sigaction(libc::SIGBUS, &raw const default, null_mut());
        if is_notice {
            // Blocked while the handler runs: it takes effect on return.
            libc::raise(libc::SIGBUS);
        }
    }
}
