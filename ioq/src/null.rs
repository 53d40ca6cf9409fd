//! The engine that does nothing, at once.

// UNSAFETY: a read fills the caller's segments through raw pointers.
#![expect(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;

use crate::backend::{Backend, BlockingFile, Completion, Submission};
use crate::engine::Engine;
use crate::notifier::Notifier;
use crate::op::{Opcode, Table};

/// Completes everything while it is submitted: a write goes nowhere, a read leaves its memory as it is or
/// gives zeroes.
#[derive(Debug)]
pub(crate) struct Null {
    read_zeroes: bool,
    // Never longer than the queue's depth, its capacity.
    completed: VecDeque<Completion>,
}

impl Null {
    pub(crate) fn new(depth: u16, read_zeroes: bool) -> Self {
        Self {
            read_zeroes,
            completed: VecDeque::with_capacity(usize::from(depth)),
        }
    }
}

impl Backend for Null {
    fn engine(&self) -> Engine {
        Engine::Null
    }

    fn submit(&mut self, slots: &[u16], table: &Table) -> Submission {
        for &slot in slots {
            let (op, segments) = table.parts(slot);
            if self.read_zeroes && op.opcode == Opcode::Read {
                for segment in segments {
                    // SAFETY: the queue's caller promised that the segments of a read are valid
                    // for writes until its owner came back.
                    unsafe { zero(segment.iov_base.cast(), segment.iov_len) };
                }
            }
            // `remaining` is below 2⁶³ (`Table::prepare_transfer`).
            let result = i64::try_from(op.remaining).unwrap_or(i64::MAX);
            self.completed.push_back(Completion { slot, result });
        }
        Submission::Accepted {
            taken: slots.len(),
            backlog: 0,
        }
    }

    fn reap(&mut self, out: &mut [Completion]) -> usize {
        let count = out.len().min(self.completed.len());
        for (to, from) in out.iter_mut().zip(self.completed.drain(..count)) {
            *to = from;
        }
        count
    }

    fn completions_pending(&self) -> bool {
        !self.completed.is_empty()
    }

    fn completes_on_submit(&self) -> bool {
        true
    }

    fn notifier(&self) -> Option<&Arc<Notifier>> {
        None
    }

    fn blocking(&self) -> Option<Arc<dyn BlockingFile>> {
        None
    }

    fn quiesce(&mut self) -> bool {
        true
    }
}

/// Zeroes memory that a guest may be reading and writing at the same time.
///
/// Not `ptr::write_bytes`: for the compiler that is a write nobody else can see or race with.
/// An `asm!` block is opaque to it, like a system call, and `rep stosb` is as fast as memset from a few hundred
/// bytes on.
///
/// # Safety
/// - `to` is valid for writes of `len` bytes.
#[cfg(all(target_arch = "x86_64", not(miri)))]
unsafe fn zero(to: *mut u8, len: usize) {
    debug_assert!(!to.is_null() || len == 0);
    // SAFETY: stores `len` zero bytes at `to`, valid by contract; the direction flag is clear on
    // entry to an asm block, and flags are left alone.
    unsafe {
        std::arch::asm!(
            "rep stosb",
            inout("rcx") len => _,
            inout("rdi") to => _,
            in("al") 0u8,
            options(nostack, preserves_flags),
        );
    }
}

/// Zeroes memory that a guest may be reading and writing at the same time, by volatile
/// stores: the compiler neither drops nor joins them.
///
/// # Safety
/// - `to` is valid for writes of `len` bytes.
#[cfg(any(not(target_arch = "x86_64"), miri))]
unsafe fn zero(to: *mut u8, len: usize) {
    debug_assert!(!to.is_null() || len == 0);
    let head = to.align_offset(align_of::<u64>()).min(len);
    let words = (len - head) / size_of::<u64>();
    for i in 0..head {
        // SAFETY: i < len.
        unsafe { to.add(i).write_volatile(0) };
    }
    for i in 0..words {
        // SAFETY: `head` aligns the pointer (or `words` is 0), and the words end within `len`.
        unsafe { to.add(head).cast::<u64>().add(i).write_volatile(0) };
    }
    for i in head + words * size_of::<u64>()..len {
        // SAFETY: i < len.
        unsafe { to.add(i).write_volatile(0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_writes_its_range_and_nothing_else() {
        for start in 0..10 {
            for len in 0..40 {
                let mut bytes = [0xa5u8; 64];
                // SAFETY: at most 50 of 64 bytes.
                unsafe { zero(bytes.as_mut_ptr().add(start), len) };
                for (i, &byte) in bytes.iter().enumerate() {
                    let expected = if (start..start + len).contains(&i) {
                        0
                    } else {
                        0xa5
                    };
                    assert_eq!(byte, expected, "byte {i} of {start}+{len}");
                }
            }
        }
    }
}
