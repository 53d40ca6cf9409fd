//! Block requests, and how they are cut into descriptors.

/// Request types (virtio 1.3 §5.2.6), written out here: the tests are an oracle of their own.
pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const GET_ID: u32 = 8;
pub(crate) const GET_LIFETIME: u32 = 10;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const WRITE_ZEROES: u32 = 13;
pub(crate) const SECURE_ERASE: u32 = 14;

/// Status bytes.
pub(crate) const OK: u8 = 0;
pub(crate) const IOERR: u8 = 1;
pub(crate) const UNSUPP: u8 = 2;

/// What a status byte holds before the device writes it; no status has this value.
pub(crate) const POISON: u8 = 0xee;

/// A request as the byte strings it consists of, not yet cut.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// Header and data for the device.
    pub(crate) readable: Vec<u8>,
    /// Room for data and status.
    pub(crate) writable: usize,
}

impl Request {
    pub(crate) fn new(kind: u32, sector: u64, data: &[u8], writable_data: usize) -> Self {
        let mut readable = Vec::with_capacity(16 + data.len());
        readable.extend_from_slice(&kind.to_le_bytes());
        // ioprio: garbage on purpose (B25).
        readable.extend_from_slice(&0xdead_beefu32.to_le_bytes());
        readable.extend_from_slice(&sector.to_le_bytes());
        readable.extend_from_slice(data);
        Self {
            readable,
            writable: writable_data + 1,
        }
    }

    pub(crate) fn read(sector: u64, len: usize) -> Self {
        Self::new(IN, sector, &[], len)
    }

    pub(crate) fn write(sector: u64, data: &[u8]) -> Self {
        Self::new(OUT, sector, data, 0)
    }

    pub(crate) fn flush() -> Self {
        Self::new(FLUSH, 0, &[], 0)
    }

    /// A discard, write-zeroes or secure erase of segments: sector, sectors, flags.
    pub(crate) fn ranges(kind: u32, segments: &[(u64, u32, u32)]) -> Self {
        let mut data = Vec::new();
        for (sector, sectors, flags) in segments {
            data.extend_from_slice(&sector.to_le_bytes());
            data.extend_from_slice(&sectors.to_le_bytes());
            data.extend_from_slice(&flags.to_le_bytes());
        }
        // A sector of the request itself means nothing.
        Self::new(kind, 77, &data, 0)
    }

    pub(crate) fn get_id(len: usize) -> Self {
        Self::new(GET_ID, 0, &[], len)
    }
}

/// Where a chain's descriptors are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Table {
    Direct,
    Indirect,
    /// So many direct ones, then one that points to a table with the rest. The chain must be the
    /// only one outstanding.
    Mixed(usize),
}

/// How a request is cut. Lengths in bytes; what they leave over is one more buffer.
#[derive(Clone, Debug)]
pub(crate) struct Framing {
    pub(crate) readable: Vec<usize>,
    pub(crate) writable: Vec<usize>,
    pub(crate) table: Table,
    /// Bytes each buffer is off a multiple of 512.
    pub(crate) skew: u64,
}

impl Framing {
    /// Header, data and status apart, as Linux does it.
    pub(crate) fn classic(request: &Request) -> Self {
        match request.writable {
            0 | 1 => Self::cut(&[16], &[]),
            writable => Self::cut(&[16], &[writable - 1]),
        }
    }

    /// One buffer per direction.
    pub(crate) fn joined() -> Self {
        Self {
            readable: Vec::new(),
            writable: Vec::new(),
            table: Table::Direct,
            skew: 0,
        }
    }

    pub(crate) fn cut(readable: &[usize], writable: &[usize]) -> Self {
        Self {
            readable: readable.to_vec(),
            writable: writable.to_vec(),
            table: Table::Direct,
            skew: 0,
        }
    }

    pub(crate) fn table(self, table: Table) -> Self {
        Self { table, ..self }
    }

    pub(crate) fn skew(self, skew: u64) -> Self {
        Self { skew, ..self }
    }
}

/// `total` bytes cut at `parts`.
pub(crate) fn cut(total: usize, parts: &[usize]) -> Vec<usize> {
    let mut left = total;
    let mut lens: Vec<usize> = Vec::new();
    for &part in parts {
        if left == 0 {
            break;
        }
        let len = part.min(left);
        lens.push(len);
        left -= len;
    }
    if left > 0 {
        lens.push(left);
    }
    lens
}
