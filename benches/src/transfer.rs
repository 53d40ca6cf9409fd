//! What a bare loop does over and over.

use ioq::AlignedBuf;

use crate::Error;

/// Alignment that `O_DIRECT` takes anywhere.
const ALIGNMENT: usize = 4096;

/// One block, read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Transfer {
    /// Bytes.
    pub(crate) len: usize,
    pub(crate) write: bool,
}

impl Transfer {
    /// A buffer for each slot.
    pub(crate) fn buffers(self, depth: usize) -> Result<Box<[AlignedBuf]>, Error> {
        let buffers: Option<Box<[AlignedBuf]>> = (0..depth)
            .map(|_| AlignedBuf::new(self.len, ALIGNMENT))
            .collect();
        buffers.ok_or_else(|| "no memory for buffers".into())
    }
}
