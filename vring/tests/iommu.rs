//! Rings in memory behind an IOMMU (`vm_memory::IommuMemory`): a ring's addresses, and those in its
//! descriptors, are I/O virtual ones.

mod rig;

use std::ops::Deref;
use std::sync::{Arc, RwLock, RwLockReadGuard};

use rig::{both, ends, segment, size};
use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap};
use vm_memory::iommu::{Error, IotlbIterator, IovaRange};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Iommu, IommuMemory, Iotlb, Permissions};
use vring::driver::{Driver, F_INDIRECT, Layout, RawDescriptor};
use vring::{
    Chain, ChainFault, PopError, Queue, QueueConfig, RingAddresses, RingArea, RingBase, RingFault,
    RingFeatures, StartError,
};

const PAGE: u64 = 0x1000;
/// The ring, which the device knows at `IOVA` more.
const RING: u64 = 0x1000;
/// Bytes of it.
const RING_LEN: u64 = 0x1000;
const IOVA: u64 = 1 << 32;
/// Two pages that follow one another for the device only: where each is.
const TABLE: u64 = (1 << 33) + 0x1000;
const TABLE_PAGES: [u64; 2] = [0x8000, 0x4000];
/// Where nothing is mapped.
const HOLE: u64 = 1 << 34;
const ENTRIES: u32 = 8;

/// Mappings, and nobody to ask for those that are missing.
#[derive(Debug, Default)]
struct Mappings(RwLock<Iotlb>);

/// A reference to an `Iotlb`, as the trait wants it.
struct Guard<'a>(RwLockReadGuard<'a, Iotlb>);

impl Deref for Guard<'_> {
    type Target = Iotlb;

    fn deref(&self) -> &Iotlb {
        &self.0
    }
}

impl Iommu for Mappings {
    type IotlbGuard<'a> = Guard<'a>;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Guard<'_>>, Error> {
        Iotlb::lookup(Guard(self.0.read().unwrap()), iova, length, access).map_err(|_| {
            Error::CannotResolve {
                iova_range: IovaRange { base: iova, length },
                reason: "not mapped".into(),
            }
        })
    }
}

type Physical = GuestMemoryMmap<AtomicBitmap>;
type Memory = IommuMemory<Physical, Mappings>;

fn map(memory: &Memory, iova: u64, to: u64, len: u64, access: Permissions) {
    let mut iotlb = memory.iommu().0.write().unwrap();
    let len = usize::try_from(len).unwrap();
    iotlb
        .set_mapping(GuestAddress(iova), GuestAddress(to), len, access)
        .unwrap();
}

fn unmap(memory: &Memory, iova: u64, len: u64) {
    let mut iotlb = memory.iommu().0.write().unwrap();
    iotlb.invalidate_mapping(GuestAddress(iova), usize::try_from(len).unwrap());
}

struct Ring {
    physical: Physical,
    memory: Arc<Memory>,
    /// Beside the IOMMU, as a guest's driver is.
    guest: Driver<Physical>,
    config: QueueConfig,
}

/// The ring's addresses, `shift` further on.
fn shifted(addresses: RingAddresses, shift: u64) -> RingAddresses {
    let RingAddresses {
        descriptor_area,
        driver_area,
        device_area,
    } = addresses;
    let shifted = |address: GuestAddress| GuestAddress(address.0 + shift);
    RingAddresses {
        descriptor_area: shifted(descriptor_area),
        driver_area: shifted(driver_area),
        device_area: shifted(device_area),
    }
}

impl Ring {
    fn new(features: RingFeatures) -> Self {
        let len = 0x10000;
        let physical = Physical::from_ranges(&[(GuestAddress(0), len)]).unwrap();
        let size = size(ENTRIES);
        let layout = Layout::new(GuestAddress(RING), size, features).unwrap();
        let addresses = layout.addresses();
        let guest = Driver::new(Arc::new(physical.clone()), addresses, size, features).unwrap();
        // Of I/O virtual addresses, so as long as the last of them asks for.
        let bitmap = AtomicBitmap::with_len(usize::try_from(IOVA + RING + RING_LEN).unwrap());
        let memory = Memory::new(physical.clone(), Mappings::default(), true, bitmap);
        map(&memory, IOVA + RING, RING, RING_LEN, Permissions::ReadWrite);
        for (at, page) in (TABLE..).step_by(0x1000).zip(TABLE_PAGES) {
            map(&memory, at, page, PAGE, Permissions::Read);
        }
        Self {
            physical,
            memory: Arc::new(memory),
            guest,
            config: QueueConfig {
                size,
                addresses: shifted(addresses, IOVA),
                features,
                base: RingBase::fresh(features),
            },
        }
    }

    fn start(&self) -> Result<Queue<Memory>, StartError> {
        Queue::start(Arc::clone(&self.memory), &self.config)
    }

    /// Offers an indirect table of `count` entries at `table`.
    fn offer_table(&mut self, table: u64, count: u32) {
        let descriptor = RawDescriptor {
            address: table,
            len: 16 * count,
            flags: F_INDIRECT,
        };
        self.guest.add_raw(&[descriptor]).unwrap();
        self.guest.publish();
    }
}

fn features() -> [RingFeatures; 2] {
    both(RingFeatures {
        indirect_desc: true,
        event_idx: true,
        ..rig::PLAIN
    })
}

#[test]
fn chains_and_tables_are_found_at_io_virtual_addresses() {
    for features in features() {
        let mut ring = Ring::new(features);
        let mut queue = ring.start().unwrap();
        let mut chain = Chain::for_queue(ring.config.size);

        let buffer = [segment(TABLE + PAGE - 2, 4)];
        ring.guest.add_chain(&buffer, &[]).unwrap();
        ring.guest.publish();
        ring.physical
            .write_slice(&[1, 2], GuestAddress(TABLE_PAGES[0] + PAGE - 2))
            .unwrap();
        ring.physical
            .write_slice(&[3, 4], GuestAddress(TABLE_PAGES[1]))
            .unwrap();
        let head = queue.pop(&mut chain).unwrap().unwrap();
        assert_eq!(chain.readable(), buffer);
        let mut read = [0; 4];
        assert_eq!(chain.copy_from_readable(&*ring.memory, 0, &mut read), Ok(4));
        assert_eq!(read, [1, 2, 3, 4]);
        queue.push(head, 0);

        // Two entries, on either side of the seam; each 16 bytes with flags and next or id of 0.
        let entry = |addr: u64| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&addr.to_le_bytes());
            bytes[8] = 8;
            bytes
        };
        let mut first = entry(0x10);
        if !features.packed {
            (first[12], first[14]) = (1, 1); // NEXT, to entry 1
        }
        ring.physical
            .write_slice(&first, GuestAddress(TABLE_PAGES[0] + PAGE - 16))
            .unwrap();
        ring.physical
            .write_slice(&entry(0x20), GuestAddress(TABLE_PAGES[1]))
            .unwrap();
        ring.offer_table(TABLE + PAGE - 16, 2);
        let head = queue.pop(&mut chain).unwrap().unwrap();
        assert_eq!(chain.readable(), [segment(0x10, 8), segment(0x20, 8)]);
        queue.push(head, 0);

        assert_eq!(queue.publish(), 2);
        assert_eq!(std::iter::from_fn(|| ring.guest.poll_used()).count(), 2);
    }
}

#[test]
fn d15_a_table_the_device_may_not_read_returns_the_chain() {
    for features in features() {
        // At the end of all addresses: a sum of its address and its length would not fit.
        for table in [HOLE, TABLE + 2 * PAGE - 16, u64::MAX - 31, u64::MAX - 15] {
            let fault = ends(move || {
                let mut ring = Ring::new(features);
                let mut queue = ring.start().unwrap();
                ring.offer_table(table, 2);
                match queue.pop(&mut Chain::for_queue(ring.config.size)) {
                    Err(PopError::Chain { fault, .. }) => fault,
                    other => panic!("{other:?}"),
                }
            });
            let (address, len) = (table, 32);
            let expected = ChainFault::IndirectTableUnmapped { address, len };
            assert_eq!(fault, expected);
        }
    }
}

#[test]
fn r5_an_area_that_is_unmapped_or_in_two_pieces_or_of_the_wrong_access_is_refused() {
    use Permissions::{No, Read, ReadWrite, Write};
    for features in features() {
        let packed = features.packed;
        for (area, access, starts) in [
            (RingArea::DescriptorArea, Read, !packed),
            (RingArea::DescriptorArea, Write, false),
            (RingArea::DescriptorArea, No, false),
            (RingArea::DriverArea, Read, true),
            (RingArea::DriverArea, Write, false),
            (RingArea::DeviceArea, Read, false),
            // A split ring's has the index that a predecessor stopped at.
            (RingArea::DeviceArea, Write, packed),
            (RingArea::DeviceArea, ReadWrite, true),
        ] {
            let ring = Ring::new(features);
            let addresses = &ring.config.addresses;
            let (start, len) = match (area, packed) {
                (RingArea::DescriptorArea, _) => (addresses.descriptor_area.0, 128),
                (RingArea::DriverArea, false) => (addresses.driver_area.0, 6 + 2 * 8),
                (RingArea::DeviceArea, false) => (addresses.device_area.0, 6 + 8 * 8),
                (RingArea::DriverArea, true) => (addresses.driver_area.0, 4),
                (RingArea::DeviceArea, true) => (addresses.device_area.0, 4),
            };
            map(&ring.memory, start, start - IOVA, len, access);
            let refused = ring.start().map(drop);
            assert_eq!(refused.is_ok(), starts, "{packed} {area:?} {access:?}");
            if let Err(error) = refused {
                let named =
                    matches!(error, StartError::NotMapped { area: named, .. } if named == area);
                assert!(named, "{error:?}");
            }
        }
        // A second piece elsewhere in the host.
        let ring = Ring::new(features);
        let start = ring.config.addresses.descriptor_area.0;
        map(&ring.memory, start + 64, 0xc000, 64, ReadWrite);
        let refused = ring.start().map(drop);
        assert!(
            matches!(
                refused,
                Err(StartError::NotMapped {
                    area: RingArea::DescriptorArea,
                    len: 128,
                    ..
                })
            ),
            "{refused:?}"
        );
    }
}

#[test]
fn m17_a_mapping_of_the_ring_that_is_revoked_stops_it_when_it_is_translated_again() {
    for features in features() {
        let mut ring = Ring::new(features);
        let mut queue = ring.start().unwrap();
        let mut chain = Chain::for_queue(ring.config.size);
        ring.guest.add_chain(&[segment(TABLE, 1)], &[]).unwrap();
        ring.guest.publish();
        let head = queue.pop(&mut chain).unwrap().unwrap();

        // Somewhere else with the same contents: found anew.
        let mut bytes = vec![0; usize::try_from(RING_LEN).unwrap()];
        let (old, new) = (GuestAddress(RING), GuestAddress(0xa000));
        ring.physical.read_slice(&mut bytes, old).unwrap();
        ring.physical.write_slice(&bytes, new).unwrap();
        map(
            &ring.memory,
            IOVA + RING,
            new.0,
            RING_LEN,
            Permissions::ReadWrite,
        );
        queue
            .set_memory(Arc::clone(&ring.memory), ring.config.addresses)
            .unwrap();
        queue.push(head, 0);
        assert_eq!(queue.publish(), 1);
        assert_eq!(ring.guest.poll_used(), None, "the old place is left alone");

        unmap(&ring.memory, IOVA + RING, RING_LEN);
        queue
            .set_memory(Arc::clone(&ring.memory), ring.config.addresses)
            .unwrap_err();
        assert_eq!(queue.fault(), Some(RingFault::MemoryLost));
    }
}

#[test]
fn what_the_ring_writes_is_marked_at_its_io_virtual_address() {
    for features in features() {
        let mut ring = Ring::new(features);
        let marked = |ring: &Ring| {
            let marks = ring.memory.bitmap();
            let found = marks.dirty_at(usize::try_from(IOVA + RING).unwrap());
            marks.reset();
            found
        };
        let mut queue = ring.start().unwrap();
        assert!(marked(&ring));
        ring.guest.add_chain(&[segment(TABLE, 1)], &[]).unwrap();
        ring.guest.publish();
        let head = queue.pop(&mut Chain::for_queue(ring.config.size));
        let head = head.unwrap().unwrap();
        assert!(!marked(&ring));
        queue.push(head, 0);
        queue.publish();
        assert!(marked(&ring));
        queue.enable_notification();
        assert!(marked(&ring));
    }
}

#[test]
fn with_the_iommu_off_it_is_memory_like_any_other() {
    for features in features() {
        let mut ring = Ring::new(features);
        let bitmap = AtomicBitmap::with_len(1);
        let memory = Memory::new(ring.physical.clone(), Mappings::default(), false, bitmap);
        ring.config.addresses = Layout::new(GuestAddress(RING), ring.config.size, features)
            .unwrap()
            .addresses();
        ring.memory = Arc::new(memory);
        let mut queue = ring.start().unwrap();
        ring.guest.add_chain(&[segment(0x8000, 1)], &[]).unwrap();
        ring.guest.publish();
        let mut chain = Chain::for_queue(ring.config.size);
        let head = queue.pop(&mut chain).unwrap().unwrap();
        queue.push(head, 0);
        queue.publish();
        assert!(ring.guest.poll_used().is_some());
    }
}
