//! Back-ends that lie, stall and die: each ends the load with an error that says so, in time, and nothing else.

use std::net::Shutdown;
use std::time::{Duration, Instant};

use blk_dataplane::load::{During, LoadError, LoadOptions, RingFault};
use vm_memory::{Address, Bytes, GuestAddress};
use vring::{Chain, Queue};

use crate::fake::{Fake, Manners, Ring};
use crate::support::DEADLINE;
use crate::support::queue::{FEATURES, RING_PACKED};
use crate::support::wire::*;
use crate::{endless, options, run};

/// Each way a client can wait. It makes nothing again before it has taken all completions: what is given back twice
/// is then surely not in flight again.
fn clients() -> [LoadOptions; 3] {
    let sleeps = LoadOptions {
        iodepth_batch: 32,
        ..endless()
    };
    let polls = LoadOptions {
        poll: true,
        ..sleeps.clone()
    };
    let paced = LoadOptions {
        rate_iops: Some(100_000),
        ..sleeps.clone()
    };
    [sleeps, polls, paced]
}

fn failure(manners: Manners, options: &LoadOptions) -> LoadError {
    let fake = Fake::new(manners);
    let began = Instant::now();
    let error = run(&fake.path, options).expect_err("the back-end is wrong");
    assert!(began.elapsed() < DEADLINE, "{error}");
    error
}

/// What each client fails with.
fn failures(serve: fn(Ring)) -> Vec<LoadError> {
    clients()
        .iter()
        .map(|options| {
            let manners = Manners {
                serve,
                ..Manners::default()
            };
            failure(manners, options)
        })
        .collect()
}

#[test]
fn backend_that_closes_under_load_ends_it() {
    for error in failures(|ring| {
        assert!(ring.wait());
        ring.stream.shutdown(Shutdown::Both).unwrap();
    }) {
        assert!(
            matches!(
                error,
                LoadError::Closed {
                    during: During::Load,
                    ..
                }
            ),
            "{error}"
        );
    }
}

#[test]
fn backend_that_completes_nothing_ends_it_after_the_time_given() {
    for client in clients() {
        let options = LoadOptions {
            io_timeout: Duration::from_millis(200),
            ..client
        };
        let error = failure(Manners::default(), &options);
        let LoadError::Stalled {
            queue, in_flight, ..
        } = error
        else {
            panic!("{error}");
        };
        assert_eq!((queue, in_flight), (0, 32));
        assert!(error.to_string().contains("--io-timeout"), "{error}");
    }
}

#[test]
fn backend_that_gives_a_ring_up_ends_it() {
    for error in failures(|ring| {
        assert!(ring.wait());
        nix::unistd::write(&ring.err, &1u64.to_ne_bytes()).unwrap();
    }) {
        assert!(
            matches!(error, LoadError::RingGivenUp { queue: 0, .. }),
            "{error}"
        );
    }
}

/// Makes used elements available to the driver, whatever they are.
fn write_used(ring: &Ring, elements: &[(u32, u32)], index: u16) {
    let used = ring.config.addresses.device_area;
    for (place, (id, len)) in elements.iter().enumerate() {
        let at = used.unchecked_add(4 + 8 * u64::try_from(place).unwrap());
        ring.memory.write_obj(*id, at).unwrap();
        ring.memory.write_obj(*len, at.unchecked_add(4)).unwrap();
    }
    ring.memory
        .store(
            index,
            used.unchecked_add(2),
            std::sync::atomic::Ordering::Release,
        )
        .unwrap();
    ring.interrupt();
}

#[track_caller]
fn assert_unknown(error: &LoadError, expected: u32) {
    match error {
        LoadError::Ring {
            queue: 0,
            fault: RingFault::UnknownId { id },
            ..
        } => assert_eq!(*id, expected, "{error}"),
        _ => panic!("{error}"),
    }
}

#[test]
fn used_ids_that_no_request_has_end_it() {
    // Beyond the ring, beyond 16 bits, and in the middle of a chain.
    for (serve, id) in [
        ((|ring| used_id(&ring, 128)) as fn(Ring), 128),
        (|ring| used_id(&ring, u32::MAX), u32::MAX),
        (|ring| used_id(&ring, 0x10000), 0x10000),
        (|ring| used_id(&ring, 1), 1),
    ] {
        for error in failures(serve) {
            assert_unknown(&error, id);
        }
    }
}

fn used_id(ring: &Ring, id: u32) {
    assert!(ring.wait());
    write_used(ring, &[(id, 0)], 1);
}

#[test]
fn request_that_is_given_back_twice_ends_it() {
    let serve: fn(Ring) = |ring| {
        assert!(ring.wait());
        write_used(&ring, &[(3, 0), (3, 0)], 2);
    };
    for error in failures(serve) {
        assert_unknown(&error, 3);
    }
}

#[test]
fn used_index_that_jumps_ends_it() {
    let serve: fn(Ring) = |ring| {
        assert!(ring.wait());
        write_used(&ring, &[], 0x8000);
    };
    for error in failures(serve) {
        // All elements are zeroes: the first request, and then the same once more.
        assert_unknown(&error, 0);
    }
}

#[test]
fn packed_ids_that_no_request_has_end_it() {
    let serve: fn(Ring) = |ring| {
        assert!(ring.wait());
        // The first descriptor, used in the first pass: both wrap bits set (virtio 1.3 §2.8.1).
        let first: GuestAddress = ring.config.addresses.descriptor_area;
        ring.memory
            .write_obj(60_000u16, first.unchecked_add(12))
            .unwrap();
        let flags = first.unchecked_add(14);
        ring.memory
            .store(
                1u16 << 7 | 1 << 15,
                flags,
                std::sync::atomic::Ordering::Release,
            )
            .unwrap();
        ring.interrupt();
    };
    for client in clients() {
        let manners = Manners {
            features: FEATURES | RING_PACKED | PROTOCOL_FEATURES,
            serve,
            ..Manners::default()
        };
        let options = LoadOptions {
            packed: true,
            ..client
        };
        assert_unknown(&failure(manners, &options), 60_000);
    }
}

/// Gives each request back with what `status` writes, if anything.
fn answer_all(ring: &Ring, status: Option<u8>) {
    let mut queue = Queue::start(ring.memory.clone(), &ring.config).unwrap();
    let mut chain = Chain::for_queue(ring.config.size);
    loop {
        while let Some(head) = queue.pop(&mut chain).unwrap() {
            let last = chain.writable().last().unwrap();
            if let Some(status) = status {
                ring.memory.write_obj(status, last.addr).unwrap();
            }
            queue.push(head, 1);
        }
        queue.publish();
        ring.interrupt();
        if queue.enable_notification() && !ring.wait() {
            return;
        }
    }
}

#[test]
fn failed_requests_are_counted_and_are_no_successes() {
    let ways: [(fn(Ring), u64); 4] = [
        (|ring| answer_all(&ring, Some(0)), 0),
        (|ring| answer_all(&ring, Some(1)), 300),
        (|ring| answer_all(&ring, Some(2)), 300),
        // Given back, and nothing written: no status is what was there before.
        (|ring| answer_all(&ring, None), 300),
    ];
    for (serve, errors) in ways {
        let fake = Fake::new(Manners {
            serve,
            ..Manners::default()
        });
        // One request of each batch has the other's turn, so that a status that stays would show.
        let report = run(&fake.path, &options()).unwrap();
        let read = report.read.unwrap();
        assert_eq!((read.errors, report.errors), (errors, errors));
        assert_eq!(
            (read.total_ios, report.total_ios),
            (300 - errors, 300 - errors)
        );
        assert_eq!(read.lat_ns.max == 0, errors == 300, "{}", read.lat_ns.max);
    }
}

/// An answer to `code` that is not what it should be.
fn instead(code: u32, bytes: Option<Vec<u8>>) -> LoadError {
    let manners = Manners {
        instead: Some((code, bytes)),
        ..Manners::default()
    };
    failure(manners, &options())
}

#[test]
fn answers_that_are_none_end_it_whichever_message_they_are_for() {
    let number = 0u64.to_le_bytes();
    for code in [
        GET_FEATURES,
        GET_PROTOCOL_FEATURES,
        GET_QUEUE_NUM,
        GET_CONFIG,
        SET_OWNER,
        SET_FEATURES,
        SET_MEM_TABLE,
        SET_VRING_NUM,
        SET_VRING_ADDR,
        SET_VRING_KICK,
        SET_VRING_ENABLE,
    ] {
        for bytes in [
            // To another message; no reply; another version; bits that there are not; endless; too short.
            message(code + 1, V1 | REPLY, &number),
            message(code, V1, &number),
            message(code, 2 | REPLY, &number),
            message(code, V1 | REPLY | 1 << 20, &number),
            header(code, V1 | REPLY, u32::MAX),
            header(code, V1 | REPLY, 5000),
            message(code, V1 | REPLY, &number[..7]),
        ] {
            let error = instead(code, Some(bytes.clone()));
            assert!(
                matches!(error, LoadError::Protocol { .. }),
                "{code} {bytes:x?}: {error}"
            );
        }
        let error = instead(code, None);
        assert!(
            matches!(
                error,
                LoadError::Closed {
                    during: During::Message(_),
                    ..
                }
            ),
            "{code}: {error}"
        );
    }
}

#[test]
fn refused_message_is_named() {
    for (code, name) in [
        (SET_OWNER, "SET_OWNER"),
        (SET_MEM_TABLE, "SET_MEM_TABLE"),
        (SET_VRING_ENABLE, "SET_VRING_ENABLE"),
    ] {
        let no = message(code, V1 | REPLY, &1u64.to_le_bytes());
        let error = instead(code, Some(no));
        assert!(
            matches!(error, LoadError::Refused { answer: 1, .. }),
            "{error}"
        );
        assert!(error.to_string().contains(name), "{error}");
    }
    let no = message(SET_VRING_NUM, V1 | REPLY, &1u64.to_le_bytes());
    let error = instead(SET_VRING_NUM, Some(no));
    assert!(error.to_string().starts_with("--queue-size"), "{error}");
}

#[test]
fn silent_backend_ends_it_after_the_time_given() {
    let manners = Manners {
        instead: Some((GET_FEATURES, Some(Vec::new()))),
        ..Manners::default()
    };
    let options = LoadOptions {
        io_timeout: Duration::from_millis(100),
        ..options()
    };
    let error = failure(manners, &options);
    assert!(matches!(error, LoadError::Silent { .. }), "{error}");
    assert!(error.to_string().contains("GET_FEATURES"), "{error}");
}

/// A configuration space with some bytes that a test chose.
fn config(at: usize, bytes: &[u8]) -> Manners {
    let mut manners = Manners::default();
    manners.config[at..at + bytes.len()].copy_from_slice(bytes);
    manners
}

#[test]
fn absurd_configurations_are_refused_or_survived() {
    // No capacity, and less than a block.
    for sectors in [0u64, 1, 7] {
        let error = failure(config(0, &sectors.to_le_bytes()), &options());
        assert!(
            matches!(error, LoadError::Option { option: "--bs", .. }),
            "{error}"
        );
    }
    // A block size that is none, or larger than what is asked for.
    for size in [u32::MAX, 3, 8192] {
        let mut manners = config(20, &size.to_le_bytes());
        manners.features |= 1 << 6;
        let error = failure(manners, &options());
        assert!(
            matches!(error, LoadError::Option { option: "--bs", .. }),
            "{error}"
        );
    }
    // More than there can be: served as far as a number of bytes goes.
    let mut manners = config(0, &u64::MAX.to_le_bytes());
    manners.serve = |ring| answer_all(&ring, Some(0));
    let fake = Fake::new(manners);
    let report = run(&fake.path, &options()).unwrap();
    assert_eq!(report.backend.capacity_bytes, u64::MAX);
    assert_eq!(report.errors, 0);
    drop(fake);
    // Segments of a byte: a request would have more descriptors than any ring.
    let mut manners = config(8, &1u32.to_le_bytes());
    manners.features |= 1 << 1;
    let error = failure(manners, &options());
    assert!(matches!(error, LoadError::Option { .. }), "{error}");
    // Of 2048: two descriptors of data.
    let mut manners = config(8, &2048u32.to_le_bytes());
    manners.features |= 1 << 1;
    manners.serve = |ring| answer_all(&ring, Some(0));
    let fake = Fake::new(manners);
    let report = run(&fake.path, &options()).unwrap();
    assert_eq!((report.total_ios, report.errors), (300, 0));
}

#[test]
fn backend_that_tells_its_configuration_in_one_size_alone_is_understood() {
    for len in [8, 60, 64, 96] {
        let mut manners = Manners::default();
        manners.config.resize(len, 0);
        manners.serve = |ring| answer_all(&ring, Some(0));
        let fake = Fake::new(manners);
        let report = run(&fake.path, &options()).unwrap();
        assert_eq!(report.backend.capacity_bytes, 2048 * 512, "{len}");
    }
    let mut manners = Manners::default();
    manners.config.resize(61, 0);
    let error = failure(manners, &options());
    assert!(matches!(error, LoadError::Protocol { .. }), "{error}");
}

#[test]
fn features_that_are_needed_are_asked_for() {
    let without = |features: u64, protocol_features: u64| {
        let mut manners = Manners::default();
        manners.features &= !features;
        manners.protocol_features &= !protocol_features;
        manners
    };
    for (manners, name) in [
        (without(PROTOCOL_FEATURES, 0), "PROTOCOL_FEATURES"),
        (without(1 << 32, 0), "VERSION_1"),
        (without(0, P_CONFIG), "PROTOCOL_F_CONFIG"),
    ] {
        let error = failure(manners, &options());
        assert!(matches!(error, LoadError::Feature { .. }), "{error}");
        assert!(error.to_string().contains(name), "{error}");
    }
    let with = |change: fn(&mut LoadOptions)| {
        let mut options = options();
        change(&mut options);
        options
    };
    for (manners, options, option) in [
        (without(0, 0), with(|o| o.packed = true), "--packed"),
        (
            without(1 << 28, 0),
            with(|o| o.indirect = true),
            "--indirect",
        ),
        (without(0, 0), with(|o| o.inflight = true), "--inflight"),
        (without(0, 0), with(|o| o.numjobs = 2), "--numjobs"),
        (
            without(0, 0),
            with(|o| o.memory_regions = 33),
            "--memory-regions",
        ),
        (
            without(0, P_CONFIGURE_MEM_SLOTS),
            with(|o| o.memory_regions = 9),
            "--memory-regions",
        ),
        (without(0, 0), with(|o| o.size = Some(2 << 20)), "--size"),
        (without(0, 0), with(|o| o.offset = 2 << 20), "--offset"),
        (without(1 << 28, 0), with(|o| o.iodepth = 512), "--iodepth"),
    ] {
        let error = failure(manners, &options);
        let LoadError::Option { option: found, .. } = error else {
            panic!("{option}: {error}");
        };
        assert_eq!(found, option, "{error}");
    }
    // A flush needs what flushes.
    for change in [(|o| o.fsync = 1) as fn(&mut LoadOptions), |o| {
        o.rw = blk_dataplane::load::Pattern::Flush
    }] {
        let error = failure(without(1 << 9, 0), &with(change));
        assert!(error.to_string().contains("FLUSH"), "{error}");
    }
    let mut read_only = Manners::default();
    read_only.features |= 1 << 5;
    let writes = with(|o| o.rw = blk_dataplane::load::Pattern::RandRw);
    let error = failure(read_only, &writes);
    assert!(error.to_string().contains("read-only"), "{error}");
}

#[test]
fn backend_without_acknowledgements_and_event_idx_is_driven_as_well() {
    let manners = Manners {
        features: 1 << 32 | PROTOCOL_FEATURES,
        protocol_features: P_CONFIG,
        serve: |ring| answer_all(&ring, Some(0)),
        ..Manners::default()
    };
    let fake = Fake::new(manners);
    let report = run(&fake.path, &options()).unwrap();
    assert_eq!((report.total_ios, report.errors), (300, 0));
}
