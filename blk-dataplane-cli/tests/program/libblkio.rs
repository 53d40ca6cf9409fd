//! A front-end made of libblkio, as its users use it.

// UNSAFETY: libblkio hands out the memory that a device may access as an address.
#![expect(unsafe_code)]

use std::mem::MaybeUninit;
use std::path::Path;
use std::time::Duration;

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};

/// How long anything may take before it counts as hung.
const DEADLINE: Duration = Duration::from_secs(60);

/// Bytes of memory for each queue's buffers.
pub(crate) const BUFFER: usize = 1 << 20;

/// One request, whose data is at the beginning of its queue's buffer or wherever said.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Request {
    Read { at: u64, buffer: usize, len: usize },
    Write { at: u64, buffer: usize, len: usize },
    Flush,
    Discard { at: u64, len: u64 },
    WriteZeroes { at: u64, len: u64, unmap: bool },
}

/// A connected front-end with its queues.
pub(crate) struct Client {
    // Before what their rings lie in.
    queues: Vec<Blkioq>,
    pub(crate) blkio: Blkio,
    region: MemoryRegion,
}

impl Client {
    pub(crate) fn connect(path: &Path, num_queues: usize) -> Self {
        Self::try_connect(path, num_queues, false).unwrap()
    }

    pub(crate) fn try_connect(
        path: &Path,
        num_queues: usize,
        read_only: bool,
    ) -> blkio::Result<Self> {
        let mut blkio = Blkio::new("virtio-blk-vhost-user")?;
        blkio.set_str("path", path.to_str().unwrap())?;
        blkio.set_bool("read-only", read_only)?;
        blkio.connect()?;
        blkio.set_i32("num-queues", i32::try_from(num_queues).unwrap())?;
        let queues = blkio.start()?.queues;
        assert_eq!(queues.len(), num_queues);
        let region = blkio.alloc_mem_region(BUFFER * num_queues.max(1))?;
        blkio.map_mem_region(&region)?;
        Ok(Self {
            queues,
            blkio,
            region,
        })
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.blkio.get_u64("capacity").unwrap()
    }

    fn at(&self, queue: usize, offset: usize, len: usize) -> *mut u8 {
        assert!(queue < self.queues.len() && offset + len <= BUFFER);
        let address = self.region.addr + queue * BUFFER + offset;
        std::ptr::with_exposed_provenance_mut(address)
    }

    /// Copies into a queue's buffer. Nothing in flight may use that part of it.
    pub(crate) fn fill(&mut self, queue: usize, offset: usize, bytes: &[u8]) {
        let to = self.at(queue, offset, bytes.len());
        // SAFETY: within the region, which lives as long as `blkio`; the device does not use it now.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    pub(crate) fn bytes(&self, queue: usize, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let from = self.at(queue, offset, len);
        // SAFETY: as above.
        unsafe { bytes.as_mut_ptr().copy_from_nonoverlapping(from, len) };
        bytes
    }

    /// Adds a request, which [`wait`](Self::wait) submits.
    pub(crate) fn add(&mut self, queue: usize, request: Request, id: usize) {
        let none = ReqFlags::empty();
        match request {
            Request::Read { at, buffer, len } => {
                let buffer = self.at(queue, buffer, len);
                self.queues[queue].read(at, buffer, len, id, none);
            }
            Request::Write { at, buffer, len } => {
                let buffer = self.at(queue, buffer, len);
                self.queues[queue].write(at, buffer, len, id, none);
            }
            Request::Flush => self.queues[queue].flush(id, none),
            Request::Discard { at, len } => self.queues[queue].discard(at, len, id, none),
            Request::WriteZeroes { at, len, unmap } => {
                let flags = if unmap { none } else { ReqFlags::NO_UNMAP };
                self.queues[queue].write_zeroes(at, len, id, flags);
            }
        }
    }

    /// Submits what has been added and waits for at least `min` answers: who, and 0 or a negative error number.
    /// `None` if the device does not answer for `patience`.
    pub(crate) fn wait_for(
        &mut self,
        queue: usize,
        min: usize,
        mut patience: Duration,
    ) -> Option<Vec<(usize, i32)>> {
        let mut completions: [MaybeUninit<Completion>; 64] = [const { MaybeUninit::uninit() }; 64];
        match self.queues[queue].do_io(&mut completions, min, Some(&mut patience), None) {
            Ok(number) => {
                let filled = &completions[..number];
                // SAFETY: libblkio has written so many.
                let filled = filled.iter().map(|each| unsafe { each.assume_init_ref() });
                Some(filled.map(|each| (each.user_data, each.ret)).collect())
            }
            Err(_) => None,
        }
    }

    pub(crate) fn wait(&mut self, queue: usize, min: usize) -> Vec<(usize, i32)> {
        self.wait_for(queue, min, DEADLINE)
            .expect("the device answers")
    }

    /// One request from start to end: 0 or a negative error number.
    pub(crate) fn run(&mut self, queue: usize, request: Request) -> i32 {
        self.add(queue, request, 7);
        let answers = self.wait(queue, 1);
        assert_eq!((answers.len(), answers[0].0), (1, 7));
        answers[0].1
    }

    pub(crate) fn write(&mut self, queue: usize, at: u64, bytes: &[u8]) {
        self.fill(queue, 0, bytes);
        let len = bytes.len();
        assert_eq!(self.run(queue, Request::Write { at, buffer: 0, len }), 0);
    }

    pub(crate) fn read(&mut self, queue: usize, at: u64, len: usize) -> Vec<u8> {
        self.fill(queue, 0, &vec![0xa5; len]);
        assert_eq!(self.run(queue, Request::Read { at, buffer: 0, len }), 0);
        self.bytes(queue, 0, len)
    }
}

/// Bytes that differ by `seed` and by position.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        // xorshift64.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
