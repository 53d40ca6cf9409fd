//! The other floor: a loop over io_uring with nothing around it. One registered file, one buffer per
//! slot, no retries, no owners; any error ends it.

// UNSAFETY: entries hold addresses of buffers that the kernel will write to.
#![expect(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, types};
use ioq::AlignedBuf;

use crate::Error;
use crate::transfer::Transfer;

pub(crate) struct BareUring {
    // Before the buffers: dropped first.
    ring: IoUring,
    /// Free slots.
    free: Vec<usize>,
    buffers: Box<[AlignedBuf]>,
    in_flight: usize,
    transfer: Transfer,
    _file: File,
}

impl std::fmt::Debug for BareUring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BareUring").finish_non_exhaustive()
    }
}

impl BareUring {
    pub(crate) fn new(file: File, transfer: Transfer, depth: u16) -> Result<Self, Error> {
        let ring = IoUring::builder()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .build(u32::from(depth))?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        let depth = usize::from(depth);
        let buffers = transfer.buffers(depth)?;
        Ok(Self {
            ring,
            free: (0..depth).collect(),
            buffers,
            in_flight: 0,
            transfer,
            _file: file,
        })
    }

    /// Puts the transfer of block `number` into the batch, and returns its slot. None: no slot is free.
    #[inline]
    pub(crate) fn queue(&mut self, number: u64) -> Option<usize> {
        let slot = self.free.pop()?;
        let buffer = self.buffers[slot].as_mut_ptr();
        let len = u32::try_from(self.transfer.len).unwrap_or(0);
        let (file, offset) = (types::Fixed(0), number * self.transfer.len as u64);
        let entry = if self.transfer.write {
            opcode::Write::new(file, buffer, len).offset(offset).build()
        } else {
            opcode::Read::new(file, buffer, len).offset(offset).build()
        };
        let entry = entry.user_data(slot as u64);
        // SAFETY: the buffer stays where it is until the ring is quiet; each slot is used once at a
        // time.
        unsafe { self.ring.submission().push(&entry) }.ok()?;
        Some(slot)
    }

    /// Sleeps until something has completed.
    pub(crate) fn wait(&mut self) -> Result<(), Error> {
        self.ring.submit_and_wait(1)?;
        Ok(())
    }

    /// Submits the batch.
    #[inline]
    pub(crate) fn submit(&mut self) -> Result<(), Error> {
        let count = self.ring.submission().len();
        let taken = self.ring.submit()?;
        self.in_flight += taken;
        if taken == count {
            Ok(())
        } else {
            Err(format!("the ring took {taken} of {count}").into())
        }
    }

    /// Hands out what has completed: the slot and the first word of each block.
    #[inline]
    pub(crate) fn reap(&mut self, mut complete: impl FnMut(usize, u64)) -> Result<usize, Error> {
        if self.ring.submission().taskrun() {
            self.ring.submit()?;
        }
        let mut count = 0;
        for entry in self.ring.completion() {
            if usize::try_from(entry.result()) != Ok(self.transfer.len) {
                return Err(format!("a transfer gave {}", entry.result()).into());
            }
            let slot = usize::try_from(entry.user_data())?;
            let mut word = [0; 8];
            word.copy_from_slice(&self.buffers[slot][..8]);
            complete(slot, u64::from_le_bytes(word));
            self.free.push(slot);
            count += 1;
        }
        self.in_flight -= count;
        Ok(count)
    }
}

impl Drop for BareUring {
    fn drop(&mut self) {
        // Closing a ring does not wait for what is in flight.
        while self.in_flight > 0 && self.ring.submit_and_wait(1).is_ok() {
            self.in_flight -= self.ring.completion().count().min(self.in_flight);
        }
    }
}
