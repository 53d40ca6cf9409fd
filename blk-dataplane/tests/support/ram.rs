//! Guest memory: three regions in memfds, two of them adjacent for the guest but not in the host,
//! and a hole below 4 GiB as on a PC.

use std::fs::File;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

pub(crate) type Memory = GuestMemoryMmap<()>;

const MIB: u64 = 1 << 20;

/// Rings lie from here on, one each [`RING_SPACING`].
const RINGS: u64 = 0x1_0000;
/// Holds the largest ring, of 32768 entries.
const RING_SPACING: u64 = 2 * MIB;
/// Where the second region follows the first without a gap.
pub(crate) const SEAM: u64 = 16 * MIB;
/// In no region.
pub(crate) const HOLE: u64 = 0x8000_0000;
/// First byte after the second region.
pub(crate) const LOW_END: u64 = 32 * MIB;
/// Start of the third region, where buffers are.
pub(crate) const HIGH: u64 = 1 << 32;
/// End of the third region.
pub(crate) const HIGH_END: u64 = HIGH + 4 * BUFFER_SPACING;
/// Buffers of one queue.
const BUFFER_SPACING: u64 = 16 * MIB;

#[derive(Debug)]
pub(crate) struct RamRegion {
    pub(crate) guest: u64,
    pub(crate) size: u64,
    /// Where it starts in the file.
    pub(crate) offset: u64,
    pub(crate) file: Arc<File>,
}

#[derive(Debug)]
pub(crate) struct GuestRam {
    pub(crate) memory: Arc<Memory>,
    pub(crate) regions: Vec<RamRegion>,
}

#[cfg(feature = "vhost-user")]
impl RamRegion {
    /// The front-end's address of it: unlike both the guest's and this process's, and in another
    /// order.
    pub(crate) fn user(&self) -> u64 {
        0x5500_0000_0000 - 16 * self.guest
    }
}

fn map(regions: &[RamRegion]) -> Memory {
    let ranges = regions.iter().map(|region| {
        let file = FileOffset::from_arc(Arc::clone(&region.file), region.offset);
        let size = usize::try_from(region.size).unwrap();
        (GuestAddress(region.guest), size, Some(file))
    });
    Memory::from_ranges_with_files(ranges.collect::<Vec<_>>()).unwrap()
}

impl GuestRam {
    pub(crate) fn new() -> Arc<Self> {
        let layout = [
            (0, SEAM, 0),
            (SEAM, LOW_END - SEAM, 0x3000),
            (HIGH, HIGH_END - HIGH, 0),
        ];
        let regions: Vec<RamRegion> = layout
            .into_iter()
            .map(|(guest, size, offset)| {
                let file = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap());
                file.set_len(offset + size).unwrap();
                RamRegion {
                    guest,
                    size,
                    offset,
                    file: Arc::new(file),
                }
            })
            .collect();
        let memory = Arc::new(map(&regions));
        let host = |addr| memory.get_host_address(GuestAddress(addr)).unwrap().addr();
        assert_ne!(
            host(SEAM - 1) + 1,
            host(SEAM),
            "the seam must not be contiguous in the host"
        );
        Arc::new(Self { memory, regions })
    }

    /// The same memory at other addresses of this process.
    pub(crate) fn map_again(&self) -> Arc<Memory> {
        Arc::new(map(&self.regions))
    }

    /// The front-end's address of a guest-physical one.
    #[cfg(feature = "vhost-user")]
    pub(crate) fn user(&self, addr: GuestAddress) -> u64 {
        let region = self
            .regions
            .iter()
            .find(|region| (region.guest..region.guest + region.size).contains(&addr.0))
            .unwrap();
        region.user() + (addr.0 - region.guest)
    }

    pub(crate) fn write(&self, addr: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub(crate) fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(addr))
            .unwrap();
        bytes
    }

    pub(crate) fn ring_base(queue: u16) -> GuestAddress {
        let addr = RINGS + u64::from(queue) * RING_SPACING;
        assert!(addr + RING_SPACING <= SEAM);
        GuestAddress(addr)
    }

    pub(crate) fn arena(queue: u16) -> Arena {
        let start = HIGH + u64::from(queue) * BUFFER_SPACING;
        assert!(start + BUFFER_SPACING <= HIGH_END);
        Arena {
            start,
            next: start,
            end: start + BUFFER_SPACING,
        }
    }
}

/// Hands out memory for buffers, one after the other.
#[derive(Debug)]
pub(crate) struct Arena {
    start: u64,
    next: u64,
    end: u64,
}

impl Arena {
    pub(crate) fn take(&mut self, len: usize, alignment: u64, skew: u64) -> u64 {
        let addr = self.next.next_multiple_of(alignment) + skew;
        self.next = addr + u64::try_from(len).unwrap();
        assert!(self.next <= self.end, "the test's arena is full");
        addr
    }

    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// Everything may be handed out anew.
    pub(crate) fn reset(&mut self) {
        self.next = self.start;
    }
}
