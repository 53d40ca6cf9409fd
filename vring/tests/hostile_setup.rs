//! Rows R, as far as they reach a ring: what it is started from.

mod rig;

use std::sync::Arc;

use rig::{
    END, EVENT_IDX, PLAIN, RING, Rig, SEAM, addresses, base_after, both, ends, memory, packed, size,
};
use vm_memory::{Bytes, GuestAddress};
use vring::{
    ConfigError, PackedPosition, PopError, Queue, QueueConfig, QueueSize, RingAddresses, RingArea,
    RingBase, RingFault, RingFeatures, StartError,
};

/// Starts a queue of 8 at `addresses` in a memory of its own, which must stay untouched.
fn refused(addresses: RingAddresses, features: RingFeatures) -> StartError {
    refused_base(addresses, features, RingBase::fresh(features))
}

fn refused_base(addresses: RingAddresses, features: RingFeatures, base: RingBase) -> StartError {
    let memory = memory();
    let config = QueueConfig {
        size: size(8),
        addresses,
        features,
        base,
    };
    // Anything start would write before its last check.
    let len = usize::try_from(END).unwrap();
    let pattern = vec![0x5a; len];
    memory.write_slice(&pattern, GuestAddress(0)).unwrap();
    let error = Queue::start(Arc::clone(&memory), &config).unwrap_err();
    let mut after = vec![0; len];
    memory.read_slice(&mut after, GuestAddress(0)).unwrap();
    assert!(after == pattern, "a refused start wrote to memory");
    error
}

/// The three areas of a ring of 8, each with its length and alignment in bytes, and the addresses
/// of a good ring with that area elsewhere.
type Elsewhere = fn(RingAddresses, GuestAddress) -> RingAddresses;

fn areas(features: RingFeatures) -> [(RingArea, usize, usize, Elsewhere); 3] {
    let lens = if features.packed {
        [(128, 16), (4, 4), (4, 4)]
    } else {
        [(128, 16), (22, 2), (70, 4)]
    };
    let [descriptor, driver, device] = lens;
    [
        (
            RingArea::DescriptorArea,
            descriptor.0,
            descriptor.1,
            |good, at| RingAddresses {
                descriptor_area: at,
                ..good
            },
        ),
        (RingArea::DriverArea, driver.0, driver.1, |good, at| {
            RingAddresses {
                driver_area: at,
                ..good
            }
        }),
        (RingArea::DeviceArea, device.0, device.1, |good, at| {
            RingAddresses {
                device_area: at,
                ..good
            }
        }),
    ]
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
    for features in both(PLAIN) {
        let good = addresses(8, features);
        for (area, _, alignment, elsewhere) in areas(features) {
            for offset in 1..u64::try_from(alignment).unwrap() {
                let address = RING + offset;
                let bad = elsewhere(good, GuestAddress(address));
                let expected = StartError::Misaligned {
                    area,
                    address,
                    alignment,
                };
                assert_eq!(refused(bad, features), expected);
            }
        }
    }
}

#[test]
fn r5_area_outside_memory_or_over_a_region_end_is_refused() {
    for features in both(PLAIN) {
        let good = addresses(8, features);
        for (area, len, alignment, elsewhere) in areas(features) {
            // In a hole, one step past the end, and over the seam of two regions that touch.
            let step = u64::try_from(alignment).unwrap();
            let over = u64::try_from(len).unwrap().next_multiple_of(step) - step;
            for address in [END, END + step, END - over, SEAM - over] {
                if over == 0 && address < END {
                    continue; // one aligned word is never over an end
                }
                let bad = elsewhere(good, GuestAddress(address));
                let expected = StartError::NotMapped { area, address, len };
                assert_eq!(refused(bad, features), expected);
            }
        }
    }
}

#[test]
fn r5_areas_in_different_regions_are_fine() {
    for features in both(PLAIN) {
        let config = QueueConfig {
            size: size(8),
            addresses: RingAddresses {
                device_area: GuestAddress(SEAM),
                driver_area: GuestAddress(END - if features.packed { 4 } else { 22 }),
                ..addresses(8, features)
            },
            features,
            base: RingBase::fresh(features),
        };
        assert!(Queue::start(memory(), &config).is_ok());
    }
}

#[test]
fn r6_area_that_wraps_the_address_space_is_refused() {
    for features in both(PLAIN) {
        let good = addresses(8, features);
        for (area, len, alignment, elsewhere) in areas(features) {
            // The last aligned place there is: all but the descriptors' would fit a word there, and
            // end exactly at 2^64, which is too far too.
            let address = u64::MAX - (u64::try_from(alignment).unwrap() - 1);
            let bad = elsewhere(good, GuestAddress(address));
            let expected = StartError::AddressOverflow { area, address, len };
            assert_eq!(refused(bad, features), expected);
        }
    }
}

#[test]
fn r7_overlapping_areas_garble_only_the_ring() {
    for features in both(EVENT_IDX) {
        for fill in [0x00, 0x01, 0x80, 0xff] {
            let memory = memory();
            let everywhere = GuestAddress(RING);
            let config = QueueConfig {
                size: size(8),
                addresses: RingAddresses {
                    descriptor_area: everywhere,
                    driver_area: everywhere,
                    device_area: everywhere,
                },
                features,
                base: RingBase::fresh(features),
            };
            let len = usize::try_from(END).unwrap();
            let pattern = vec![fill; len];
            memory.write_slice(&pattern, GuestAddress(0)).unwrap();
            let queue = Queue::start(Arc::clone(&memory), &config).unwrap();
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
            assert!(after[start + 128..] == pattern[start + 128..]);
        }
    }
}

fn packed_base(avail: u16, used: u16) -> RingBase {
    RingBase::Packed {
        avail: PackedPosition::from_bits(avail),
        used: PackedPosition::from_bits(used),
    }
}

#[test]
fn r10_base_that_is_not_in_the_ring_is_refused() {
    // Nothing of 32 bits is cut off; a packed position must be below the queue size.
    let too_large = ConfigError::BaseTooLarge { base: 0x1_0000 };
    let parsed = RingBase::from_vhost_user(0x1_0000, PLAIN);
    assert_eq!(parsed, Err(too_large));
    let features = packed(PLAIN);
    let at = addresses(8, features);
    for (avail, used, index) in [(8, 0, 8), (0x8000, 0x8008, 8), (0x7fff, 0, 0x7fff)] {
        let expected = StartError::BaseOutOfRange { index, size: 8 };
        let base = packed_base(avail, used);
        assert_eq!(refused_base(at, features, base), expected);
    }
}

#[test]
fn r14_packed_base_with_more_outstanding_than_the_ring_has_is_refused() {
    let features = packed(PLAIN);
    let at = addresses(8, features);
    // The available position behind the used one, and one too many ahead of it.
    for (avail, used, outstanding) in [(0x8000, 0x8001, 15), (0x0001, 0x8000, 9)] {
        let expected = StartError::BaseTooFarAhead {
            outstanding,
            size: 8,
        };
        let base = packed_base(avail, used);
        assert_eq!(refused_base(at, features, base), expected);
    }
    // A whole ring outstanding is fine: its chains were popped by a predecessor.
    let config = QueueConfig {
        size: size(8),
        addresses: at,
        features,
        base: packed_base(0x0000, 0x8000),
    };
    let queue = Queue::start(memory(), &config).unwrap();
    assert_eq!((queue.base(), queue.in_flight()), (config.base, 0));
}

#[test]
fn r14_base_of_the_other_format_is_refused() {
    for features in both(PLAIN) {
        let other = RingFeatures {
            packed: !features.packed,
            ..features
        };
        let error = refused_base(addresses(8, features), features, RingBase::fresh(other));
        assert_eq!(error, StartError::FormatMismatch);
    }
}

#[test]
fn r14_split_base_ahead_of_the_guest_is_a_ring_fault() {
    let mut rig = Rig::new(8, PLAIN);
    rig.restart(RingBase::Split { next_avail: 5 });
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
fn r14_packed_base_ahead_of_the_guest_waits_for_it() {
    let features = packed(PLAIN);
    let mut rig = Rig::new(8, features);
    rig.offer_buffer();
    rig.restart(base_after(3, 8, features));
    assert_eq!(rig.pop(), Ok(None));
    rig.offer_buffer();
    rig.offer_buffer();
    assert_eq!(rig.pop(), Ok(None));
    rig.offer_buffer();
    let head = rig.pop_head();
    rig.complete(head, 0);
}

#[test]
fn r14_packed_base_with_the_other_wrap_counter_finds_nothing_and_breaks_nothing() {
    let features = packed(PLAIN);
    let mut rig = Rig::new(8, features);
    rig.offer_buffer();
    // Descriptors available in one pass are not in the other, and used ones in neither.
    rig.restart(base_after(8, 8, features));
    assert_eq!((rig.pop(), rig.queue.fault()), (Ok(None), None));
    rig.restart(rig.config.base);
    let head = rig.pop_head();
    rig.complete(head, 0);
    assert!(rig.guest.poll_used().unwrap().expected);
}

#[test]
fn r14_stale_split_base_within_the_ring_fetches_the_old_entries_again() {
    // A successor of a back-end that crashed is told an older index and re-does the rest.
    let mut rig = Rig::new(8, PLAIN);
    rig.offer_buffer();
    rig.offer_buffer();
    rig.split().write_used_entry(0, 0, 0);
    rig.split().set_used_idx(1);
    rig.restart(rig.config.base);
    for head in rig.pop_all() {
        rig.queue.push(head, 0);
    }
    assert_eq!(rig.queue.publish(), 2);
    assert_eq!(rig.split().used_idx(), 3, "goes on from the ring's index");
}

#[test]
fn r14_stale_packed_base_fetches_what_is_still_available_again() {
    let mut rig = Rig::new(8, packed(PLAIN));
    let ids = [rig.offer_buffer(), rig.offer_buffer()];
    drop(rig.pop_all());
    rig.restart(rig.config.base);
    for head in rig.pop_all() {
        rig.queue.push(head, 0);
    }
    assert_eq!(rig.queue.publish(), 2);
    for id in ids {
        let used = rig.guest.poll_used().unwrap();
        assert_eq!((used.id, used.expected), (u32::from(id), true));
    }
}
