//! What goes in and what comes out.

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Moves data from the disk.
    Read,
    /// Moves data to the disk.
    Write,
    /// Makes earlier writes stable (`VIRTIO_BLK_T_FLUSH`). Keeps its place, as all that follow here
    /// do: nothing moves across it and it is never merged; its offset and length are passed through.
    Flush,
    /// Gives up a range (`VIRTIO_BLK_T_DISCARD`). Keeps its place.
    Discard,
    /// Zeroes a range without moving data (`VIRTIO_BLK_T_WRITE_ZEROES`). Keeps its place.
    WriteZeroes,
    /// Anything else that has to keep its place.
    Barrier,
}

impl Op {
    /// Whether it transfers data, and so may be merged. What does not keeps its place: nothing
    /// moves across it.
    ///
    /// A discard or a write-zeroes would only have to order what overlaps it. That it orders the
    /// rest of its batch as well costs little, for they are rare, and its ranges, of which one
    /// request may have several (virtio 1.3 5.2.6), need not be known here.
    #[must_use]
    pub const fn moves_data(self) -> bool {
        matches!(self, Self::Read | Self::Write)
    }
}

/// Bounds on a merged request, those of the engine below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most memory segments in one request: the length of the iovec array, at most `IOV_MAX` (1024)
    /// on Linux.
    pub max_segments: u32,
    /// Most bytes in one request. The kernel cuts a transfer at 2 GiB less a page, and a smaller
    /// limit spreads a long run over more of the disk's queue.
    pub max_bytes: u64,
}

/// A request as it came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What it does.
    pub op: Op,
    /// First byte on the disk.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// Memory segments it is made of.
    pub segments: u32,
    /// The caller's name for it, handed back in [`Part::tag`]. Not looked at.
    pub tag: u32,
}

impl Request {
    /// One past its last byte, if it may be merged at all: it moves data, is not empty, and this
    /// value exists.
    pub(crate) fn mergeable_end(&self) -> Option<u64> {
        match self.op {
            op if op.moves_data() && self.len > 0 => self.offset.checked_add(self.len),
            _ => None,
        }
    }

    /// Its last byte, cut at the end of the address space, or `None` if it touches no byte.
    pub(crate) fn last(&self) -> Option<u64> {
        self.len
            .checked_sub(1)
            .map(|more| self.offset.saturating_add(more))
    }
}

/// One of the requests that a merged request is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// [`Request::tag`].
    pub tag: u32,
    /// Its memory segments.
    pub segments: u32,
    /// Its first byte on the disk.
    pub offset: u64,
    /// Its own length in bytes.
    pub len: u64,
}

impl From<&Request> for Part {
    fn from(request: &Request) -> Self {
        Self {
            tag: request.tag,
            segments: request.segments,
            offset: request.offset,
            len: request.len,
        }
    }
}

/// A request to submit: one or more [`Part`]s, each beginning where the one before it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merged<'a> {
    /// What it does, and each part of it.
    pub op: Op,
    /// First byte on the disk.
    pub offset: u64,
    /// Length in bytes, the sum of the parts'.
    pub len: u64,
    /// Memory segments, the sum of the parts'.
    pub segments: u32,
    /// In the order of their offsets; at least one.
    pub parts: &'a [Part],
}
