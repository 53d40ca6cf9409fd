//! Rows R, as far as they reach a ring: what it is started from.

mod rig;

use std::sync::Arc;

use rig::{END, EVENT_IDX, PLAIN, RING, Rig, SEAM, addresses, ends, memory, size};
use vm_memory::{Bytes, GuestAddress};
use vring::{
    ConfigError, PopError, QueueConfig, QueueSize, RingAddresses, RingArea, RingBase, RingFault,
    SplitQueue, StartError,
};

/// Starts a queue of 8 at `addresses` in a memory of its own, which must stay untouched.
fn refused(addresses: RingAddresses) -> StartError {
    let memory = memory();
    let config = QueueConfig {
        size: size(8),
        addresses,
        features: PLAIN,
        base: RingBase::Split { next_avail: 0 },
    };
    // Anything start would write before its last check.
    let len = usize::try_from(END).unwrap();
    let pattern = vec![0x5a; len];
    memory.write_slice(&pattern, GuestAddress(0)).unwrap();
    let error = SplitQueue::start(Arc::clone(&memory), &config).unwrap_err();
    let mut after = vec![0; len];
    memory.read_slice(&mut after, GuestAddress(0)).unwrap();
    assert!(after == pattern, "a refused start wrote to memory");
    error
}

#[test]
fn r1_size_zero_is_refused() {
    assert_eq!(QueueSize::new(0), Err(ConfigError::SizeZero));
}

#[test]
fn r2_size_not_a_power_of_two_is_refused() {
    for size in [3, 5, 100, 255, 32767] {
        assert_eq!(
            QueueSize::new(size),
            Err(ConfigError::SizeNotPowerOfTwo { size })
        );
    }
}

#[test]
fn r3_size_beyond_32768_is_refused_without_truncation() {
    for size in [32769, 65535, 65536, 65536 + 256, u32::MAX] {
        assert_eq!(
            QueueSize::new(size),
            Err(ConfigError::SizeTooLarge { size })
        );
    }
    for shift in 0..=15 {
        assert_eq!(
            u32::from(QueueSize::new(1 << shift).unwrap().get()),
            1 << shift
        );
    }
}

#[test]
fn r4_misaligned_area_is_refused() {
    let good = addresses(8);
    let misaligned = |area, address, alignment| StartError::Misaligned {
        area,
        address,
        alignment,
    };
    for offset in [1, 2, 4, 8, 15] {
        let address = RING + offset;
        let bad = RingAddresses {
            descriptor_area: GuestAddress(address),
            ..good
        };
        assert_eq!(
            refused(bad),
            misaligned(RingArea::DescriptorArea, address, 16)
        );
    }
    let address = good.driver_area.0 + 1;
    let bad = RingAddresses {
        driver_area: GuestAddress(address),
        ..good
    };
    assert_eq!(refused(bad), misaligned(RingArea::DriverArea, address, 2));
    for offset in [1, 2, 3] {
        let address = good.device_area.0 + offset;
        let bad = RingAddresses {
            device_area: GuestAddress(address),
            ..good
        };
        assert_eq!(refused(bad), misaligned(RingArea::DeviceArea, address, 4));
    }
}

#[test]
fn r5_area_outside_memory_or_over_a_region_end_is_refused() {
    let good = addresses(8);
    // In a hole, one word past the end, and over the seam of two regions that touch.
    for address in [END, END - 16, SEAM - 16] {
        let bad = [
            (
                RingArea::DescriptorArea,
                128,
                RingAddresses {
                    descriptor_area: GuestAddress(address),
                    ..good
                },
            ),
            (
                RingArea::DriverArea,
                22,
                RingAddresses {
                    driver_area: GuestAddress(address),
                    ..good
                },
            ),
            (
                RingArea::DeviceArea,
                70,
                RingAddresses {
                    device_area: GuestAddress(address),
                    ..good
                },
            ),
        ];
        for (area, len, addresses) in bad {
            assert_eq!(
                refused(addresses),
                StartError::NotMapped { area, address, len }
            );
        }
    }
}

#[test]
fn r5_areas_in_different_regions_are_fine() {
    let memory = memory();
    let config = QueueConfig {
        size: size(8),
        addresses: RingAddresses {
            device_area: GuestAddress(SEAM),
            driver_area: GuestAddress(END - 22),
            ..addresses(8)
        },
        features: PLAIN,
        base: RingBase::Split { next_avail: 0 },
    };
    assert!(SplitQueue::start(memory, &config).is_ok());
}

#[test]
fn r6_area_that_wraps_the_address_space_is_refused() {
    let good = addresses(8);
    let address = u64::MAX - 15;
    let wraps = |area, len| StartError::AddressOverflow { area, address, len };
    let bad = RingAddresses {
        descriptor_area: GuestAddress(address),
        ..good
    };
    assert_eq!(refused(bad), wraps(RingArea::DescriptorArea, 128));
    let bad = RingAddresses {
        driver_area: GuestAddress(address),
        ..good
    };
    assert_eq!(refused(bad), wraps(RingArea::DriverArea, 22));
    let bad = RingAddresses {
        device_area: GuestAddress(address),
        ..good
    };
    assert_eq!(refused(bad), wraps(RingArea::DeviceArea, 70));
}

#[test]
fn r7_overlapping_areas_garble_only_the_ring() {
    let memory = memory();
    let everywhere = GuestAddress(RING);
    let config = QueueConfig {
        size: size(8),
        addresses: RingAddresses {
            descriptor_area: everywhere,
            driver_area: everywhere,
            device_area: everywhere,
        },
        features: EVENT_IDX,
        base: RingBase::Split { next_avail: 0 },
    };
    let len = usize::try_from(END).unwrap();
    let pattern = vec![0x01; len];
    memory.write_slice(&pattern, GuestAddress(0)).unwrap();
    let queue = SplitQueue::start(Arc::clone(&memory), &config).unwrap();
    let size = config.size;
    ends(move || {
        let mut queue = queue;
        let mut chain = vring::Chain::for_queue(size);
        for _ in 0..100 {
            queue.disable_notification();
            match queue.pop(&mut chain) {
                Ok(Some(head)) | Err(PopError::Chain { head, .. }) => queue.push(head, 7),
                Ok(None) | Err(_) => {}
            }
            queue.publish();
            queue.should_notify();
            queue.enable_notification();
        }
    });
    let mut after = vec![0; len];
    memory.read_slice(&mut after, GuestAddress(0)).unwrap();
    let start = usize::try_from(RING).unwrap();
    assert!(after[..start] == pattern[..start]);
    assert!(after[start + 70..] == pattern[start + 70..]);
}

#[test]
fn r14_base_ahead_of_the_guest_is_a_ring_fault() {
    let rig = Rig::new(8, PLAIN);
    let config = QueueConfig {
        base: RingBase::Split { next_avail: 5 },
        ..rig.config
    };
    let mut rig = Rig {
        queue: SplitQueue::start(Arc::clone(&rig.memory), &config).unwrap(),
        ..rig
    };
    assert_eq!(
        rig.ring_fault(),
        RingFault::AvailIndexJump {
            avail_idx: 0,
            next_avail: 5,
            size: 8
        }
    );
}

#[test]
fn r14_stale_base_within_the_ring_fetches_the_old_entries_again() {
    // A successor of a back-end that crashed is told an older index and re-does the rest.
    let mut rig = Rig::new(8, PLAIN);
    rig.offer_buffer();
    rig.offer_buffer();
    rig.guest.write_used_entry(0, 0, 0);
    rig.guest.set_used_idx(1);
    rig.queue = SplitQueue::start(Arc::clone(&rig.memory), &rig.config).unwrap();
    let first = rig.pop_head();
    let second = rig.pop_head();
    rig.queue.push(first, 0);
    rig.queue.push(second, 0);
    rig.queue.publish();
    assert_eq!(rig.guest.used_idx(), 3, "goes on from the ring's index");
}
