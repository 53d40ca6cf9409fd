//! Loads with `verify`: right on a right device, and a device that is wrong is found out.

use blk_dataplane::load::{LoadOptions, Pattern};

use crate::support::front_end::Served;
use crate::support::scratch::{KINDS, Kind, Scratch, null_device};
use crate::{options, run};

const SIZE: usize = 1 << 20;
const BLOCKS: u64 = 256;

fn verifying(rw: Pattern) -> LoadOptions {
    LoadOptions {
        rw,
        verify: true,
        ..options()
    }
}

#[test]
fn blocks_are_right_on_a_right_device() {
    for kind in KINDS {
        let scratch = Scratch::zeroed(kind, SIZE);
        let served = Served::new(scratch.device());
        for (rw, packed) in [
            (Pattern::RandRw, false),
            (Pattern::Rw, true),
            (Pattern::RandWrite, false),
            (Pattern::Write, true),
        ] {
            let options = LoadOptions {
                packed,
                numjobs: 2,
                fsync: 7,
                number_ios: Some(1000),
                ..verifying(rw)
            };
            let report = run(&served.path, &options).unwrap();
            assert_eq!(
                (report.errors, report.verify_errors),
                (0, 0),
                "{kind:?} {rw}"
            );
            // What was written is read back at the end, all of it.
            assert!(
                report.verified_blocks >= BLOCKS / 2,
                "{}",
                report.verified_blocks
            );
        }
    }
}

#[test]
fn more_requests_than_blocks_wait_for_one_another() {
    let scratch = Scratch::zeroed(Kind::Shm, SIZE);
    let served = Served::new(scratch.device());
    for poll in [false, true] {
        let options = LoadOptions {
            size: Some(16 << 10),
            iodepth: 64,
            poll,
            ..verifying(Pattern::RandRw)
        };
        let report = run(&served.path, &options).unwrap();
        assert_eq!((report.total_ios, report.verify_errors), (300, 0));
    }
}

/// Writes the whole device with verifiable blocks.
fn written() -> (Scratch, Served) {
    let scratch = Scratch::zeroed(Kind::Shm, SIZE);
    let served = Served::new(scratch.device());
    let options = LoadOptions {
        number_ios: Some(BLOCKS),
        ..verifying(Pattern::Write)
    };
    let report = run(&served.path, &options).unwrap();
    assert_eq!((report.total_ios, report.verify_errors), (BLOCKS, 0));
    assert_eq!(report.verified_blocks, BLOCKS);
    (scratch, served)
}

fn read_back() -> LoadOptions {
    LoadOptions {
        number_ios: Some(BLOCKS),
        ..verifying(Pattern::Read)
    }
}

/// Changes the image below the device, which reads it anew each time.
fn corrupt(scratch: &Scratch, change: impl FnOnce(&mut Vec<u8>)) {
    let mut content = scratch.content();
    change(&mut content);
    std::fs::write(&scratch.path, content).unwrap();
}

#[test]
fn later_load_reads_what_an_earlier_one_wrote() {
    let (_scratch, served) = written();
    let report = run(&served.path, &read_back()).unwrap();
    assert_eq!((report.verified_blocks, report.verify_errors), (BLOCKS, 0));
    let random = LoadOptions {
        rw: Pattern::RandRead,
        numjobs: 4,
        ..read_back()
    };
    let report = run(&served.path, &random).unwrap();
    assert_eq!(
        (report.verified_blocks, report.verify_errors),
        (4 * BLOCKS, 0)
    );
}

#[test]
fn corrupted_byte_is_found_and_its_sector_named() {
    let (scratch, served) = written();
    corrupt(&scratch, |content| content[123_456] ^= 1);
    let report = run(&served.path, &read_back()).unwrap();
    assert_eq!(report.verify_errors, 1);
    let sector = 123_456 / 512 * 512;
    assert!(
        report.notes[0].contains(&sector.to_string()),
        "{:?}",
        report.notes
    );
}

#[test]
fn block_in_the_wrong_place_is_found() {
    let (scratch, served) = written();
    corrupt(&scratch, |content| content.copy_within(0..4096, 8192));
    let report = run(&served.path, &read_back()).unwrap();
    assert_eq!(report.verify_errors, 1);
    assert!(
        report.notes[0].contains("written at 0"),
        "{:?}",
        report.notes
    );
}

#[test]
fn lost_write_is_found() {
    // The earlier content comes back, whole and in its place.
    let (scratch, served) = written();
    let before = scratch.content();
    let again = LoadOptions {
        rw: Pattern::Write,
        number_ios: Some(2 * BLOCKS),
        ..read_back()
    };
    run(&served.path, &again).unwrap();
    corrupt(&scratch, |content| {
        content[4096..4608].copy_from_slice(&before[4096..4608])
    });
    let report = run(&served.path, &read_back()).unwrap();
    // Half of a block is of another write than the rest.
    assert_eq!(report.verify_errors, 1, "{:?}", report.notes);
}

#[test]
fn device_that_stores_nothing_is_found_out_at_the_end_of_the_same_load() {
    let served = Served::new(null_device(SIZE as u64));
    for rw in [Pattern::Write, Pattern::RandRw] {
        let report = run(&served.path, &verifying(rw)).unwrap();
        assert!(report.verify_errors > 0, "{rw}");
        assert_eq!(report.errors, 0);
    }
}

#[test]
fn blocks_of_another_seed_are_not_taken_for_right() {
    let (_scratch, served) = written();
    let options = LoadOptions {
        randseed: 2,
        ..read_back()
    };
    let report = run(&served.path, &options).unwrap();
    assert_eq!(report.verify_errors, BLOCKS);
}
