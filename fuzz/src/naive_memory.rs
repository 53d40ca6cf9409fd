//! Guest memory as plain bytes: what the models read and write.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Bytes compared at once.
const CHUNK: usize = 256;

/// A copy of guest memory that is kept up to date by hand, and compared with the real one.
#[derive(Clone, Debug)]
pub(crate) struct NaiveMemory {
    regions: Vec<(u64, Vec<u8>)>,
    scratch: Vec<u8>,
}

impl NaiveMemory {
    /// All zero. `ranges` are start and length.
    pub(crate) fn new(ranges: &[(u64, usize)]) -> Self {
        Self {
            regions: ranges.iter().map(|&(at, len)| (at, vec![0; len])).collect(),
            scratch: Vec::new(),
        }
    }

    /// Zeroes the copy and the real memory.
    pub(crate) fn reset(&mut self, real: &impl GuestMemoryBackend) {
        for (at, bytes) in &mut self.regions {
            bytes.fill(0);
            real.write_slice(bytes, GuestAddress(*at)).unwrap();
        }
    }

    /// Takes over what the guest wrote.
    pub(crate) fn refresh(&mut self, real: &impl GuestMemoryBackend) {
        for (at, bytes) in &mut self.regions {
            real.read_slice(bytes, GuestAddress(*at)).unwrap();
        }
    }

    /// Panics at the first byte of the real memory that differs, except where `may_differ`.
    pub(crate) fn compare(
        &mut self,
        real: &impl GuestMemoryBackend,
        may_differ: impl Fn(u64) -> bool,
    ) {
        let Self { regions, scratch } = self;
        for (at, expected) in regions {
            scratch.resize(expected.len(), 0);
            real.read_slice(scratch, GuestAddress(*at)).unwrap();
            // Byte by byte only where something differs: an instrumented loop is slow.
            let chunks = expected.chunks(CHUNK).zip(scratch.chunks(CHUNK));
            for (at, (expected, found)) in (*at..).step_by(CHUNK).zip(chunks) {
                if expected == found {
                    continue;
                }
                for ((address, expected), found) in (at..).zip(expected).zip(found) {
                    assert!(
                        expected == found || may_differ(address),
                        "byte at {address:#x} is {found:#x} and should be {expected:#x}"
                    );
                }
            }
        }
    }

    fn locate(&self, address: u64) -> Option<(usize, usize)> {
        self.regions.iter().enumerate().find_map(|(index, region)| {
            let offset = usize::try_from(address.checked_sub(region.0)?).ok()?;
            (offset < region.1.len()).then_some((index, offset))
        })
    }

    /// Start and length of each region.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        self.regions
            .iter()
            .map(|(at, bytes)| (*at, bytes.len() as u64))
    }

    /// Whether `[address, address + len)` is all in one region.
    pub(crate) fn in_one_region(&self, address: u64, len: u64) -> bool {
        let end = u128::from(address) + u128::from(len);
        self.ranges()
            .any(|(at, size)| at <= address && end <= u128::from(at) + u128::from(size))
    }

    /// Whether `[address, address + len)` is all memory, in however many regions.
    pub(crate) fn is_mapped(&self, address: u64, len: u64) -> bool {
        let end = u128::from(address) + u128::from(len);
        let mut at = u128::from(address);
        while at < end {
            let next = self.ranges().find_map(|(start, size)| {
                let region_end = u128::from(start) + u128::from(size);
                (u128::from(start) <= at && at < region_end).then_some(region_end)
            });
            match next {
                Some(next) => at = next,
                None => return false,
            }
        }
        true
    }

    pub(crate) fn byte(&self, address: u64) -> Option<u8> {
        let (region, offset) = self.locate(address)?;
        Some(self.regions[region].1[offset])
    }

    /// Byte by byte, so that it may cross regions.
    pub(crate) fn read<const N: usize>(&self, address: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        for (offset, byte) in (0u64..).zip(&mut bytes) {
            *byte = self.byte(address.checked_add(offset)?)?;
        }
        Some(bytes)
    }

    /// `len` bytes, if all of them are memory.
    pub(crate) fn range(&self, address: u64, len: u64) -> Option<Vec<u8>> {
        if !self.is_mapped(address, len) {
            return None;
        }
        let len = usize::try_from(len).ok()?;
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let (region, offset) = self.locate(address + bytes.len() as u64)?;
            let there = &self.regions[region].1[offset..];
            bytes.extend_from_slice(&there[..there.len().min(len - bytes.len())]);
        }
        Some(bytes)
    }

    /// A 16-bit word that is known to be there.
    pub(crate) fn word(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.read(address).expect("the area is mapped"))
    }

    /// Writes bytes that are known to have a place.
    pub(crate) fn write(&mut self, address: u64, bytes: &[u8]) {
        let (mut address, mut rest) = (address, bytes);
        while !rest.is_empty() {
            let (region, offset) = self.locate(address).expect("the place is mapped");
            let room = &mut self.regions[region].1[offset..];
            let (now, later) = rest.split_at(rest.len().min(room.len()));
            room[..now.len()].copy_from_slice(now);
            address += now.len() as u64;
            rest = later;
        }
    }
}
