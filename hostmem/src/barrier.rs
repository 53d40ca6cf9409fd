//! A barrier between two threads of which one must not pay for it.
//!
//! Both threads store one word and then load the other's; at least one must see the other's store.
//! That takes a full barrier between store and load on both sides. Where one side does it for each
//! request and the other once in the life of a guest, the kernel can give the barrier of the one
//! to the other: [`heavy`] makes every running thread of the process pass through one, so that
//! [`light`] need only keep the compiler in order.

// UNSAFETY: membarrier(2) has no safe wrapper.
#![expect(unsafe_code)]

use std::io;
use std::sync::atomic::{Ordering, compiler_fence};

/// Between the store and the load of the thread that does it often. Pairs with [`heavy`].
#[inline(always)]
pub(crate) fn light() {
    compiler_fence(Ordering::SeqCst);
}

/// Between the store and the load of the thread that does it seldom. Pairs with [`light`].
///
/// # Errors
///
/// The kernel has no expedited membarrier (before Linux 4.14), or a seccomp filter forbids it.
pub(crate) fn heavy() -> io::Result<()> {
    // Registering again is cheap, and there is no saying whether a fork has come between.
    membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)?;
    membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED)
}

fn membarrier(command: libc::c_int) -> io::Result<()> {
    // SAFETY: takes three integers and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn kernel_gives_the_barrier() {
        super::heavy().unwrap();
    }
}
