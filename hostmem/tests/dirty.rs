//! The dirty log: what is marked, where, and when.

mod memfile;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use hostmem::{DirtyLog, LogError, MapError, MemoryMap};
use proptest::prelude::*;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use memfile::MemFile;

const PAGE: u64 = 0x1000;
const FRONTEND: u64 = 0x7f00_0000_0000;
/// Bytes of memory to a byte of the log.
const PER_BYTE: u64 = 8 * PAGE;

fn map(file: &MemFile, guest: u64, size: u64) -> MemoryMap {
    MemoryMap::new(vec![file.region(guest, size, FRONTEND, 0)]).unwrap()
}

fn private(map: &MemoryMap) -> Arc<DirtyLog> {
    let log = Arc::new(DirtyLog::private(map.last_addr()).unwrap());
    map.start_log(Arc::clone(&log)).unwrap();
    log
}

/// No pages.
const NONE: [u64; 0] = [];

/// The pages that are marked in all of the guest's memory, which are not any more then.
fn harvest(log: &DirtyLog) -> Vec<u64> {
    let mut pages = Vec::new();
    log.harvest(
        GuestAddress(0)..GuestAddress(log.size() * PER_BYTE),
        |run| {
            assert!(run.start < run.end);
            pages.extend(
                (run.start.0..run.end.0)
                    .step_by(0x1000)
                    .map(|addr| addr / PAGE),
            );
        },
    );
    pages
}

#[test]
fn write_of_every_kind_marks_its_pages() {
    let file = MemFile::new("hm-dirty-kinds", 64 * PAGE);
    let map = map(&file, 0x10_0000, 64 * PAGE);
    let log = private(&map);
    let at = |page: u64| GuestAddress(0x10_0000 + page * PAGE);
    let expect = |pages: &[u64]| {
        let expected: Vec<_> = pages.iter().map(|page| page + 0x100).collect();
        assert_eq!(harvest(&log), expected);
        assert_eq!(harvest(&log), NONE, "harvested twice");
    };

    map.write_obj(1_u8, at(1)).unwrap();
    expect(&[1]);
    map.write_slice(&[1; 0x1001], at(2)).unwrap();
    expect(&[2, 3]);
    map.store(1_u32, at(4), Ordering::Relaxed).unwrap();
    expect(&[4]);
    map.get_slice(at(5), 0x3000)
        .unwrap()
        .write_slice(&[1; 2], 0xFFF)
        .unwrap();
    expect(&[5, 6]);
    let mut source: &[u8] = &[1; 0x800];
    map.read_exact_volatile_from(at(9), &mut source, 0x800)
        .unwrap();
    expect(&[9]);
    let region = map.find_region(at(0)).unwrap();
    region.bitmap().mark_dirty(0x1_FFFF, 2);
    expect(&[31, 32]);
    map.mark_dirty(at(62), 0x2000);
    expect(&[62, 63]);

    // What only reads, and what fails, leaves no mark.
    map.read_obj::<u64>(at(1)).unwrap();
    map.get_host_address(at(1)).unwrap();
    map.get_slice(at(1), 4).unwrap();
    assert!(map.write_obj(1_u8, GuestAddress(0)).is_err());
    map.mark_dirty(at(1), 0);
    expect(&[]);
}

#[test]
fn bits_lie_where_vhost_has_them() {
    let file = MemFile::new("hm-dirty-layout", 64 * PAGE);
    let map = map(&file, 0, 64 * PAGE);
    let log_file = MemFile::new("hm-dirty-layout-log", 0x4000);
    // At an offset that is no multiple of anything, and longer than need be.
    let log = DirtyLog::shared(log_file.file().try_clone().unwrap(), 0x1003, 0x100).unwrap();
    map.start_log(Arc::new(log)).unwrap();
    for page in [0, 7, 8, 17, 63] {
        map.write_obj(1_u8, GuestAddress(page * PAGE + 5)).unwrap();
    }
    map.write_slice(&[1; 0x1_4000], GuestAddress(26 * PAGE))
        .unwrap();
    let mut bits = [0; 0x4000];
    log_file.file().read_exact_at(&mut bits, 0).unwrap();
    let mut expected = [0; 0x4000];
    expected[0x1003..0x100B].copy_from_slice(&[0x81, 0x01, 0x02, 0xFC, 0xFF, 0x3F, 0x00, 0x80]);
    assert_eq!(bits, expected);
}

#[test]
fn region_that_does_not_start_on_a_page_marks_by_guest_address() {
    let file = MemFile::new("hm-dirty-odd", 8 * PAGE);
    // Its first page is the guest's page 0, of which the region has only the end; the mapping starts
    // below guest address 0.
    let map = MemoryMap::new(vec![file.region(0x230, 2 * PAGE, FRONTEND, PAGE + 0x830)]).unwrap();
    let log = private(&map);
    map.write_obj(1_u8, GuestAddress(0x230)).unwrap();
    assert_eq!(harvest(&log), [0]);
    map.write_slice(&[1; 2], GuestAddress(0xFFF)).unwrap();
    assert_eq!(harvest(&log), [0, 1]);
    map.write_obj(1_u8, GuestAddress(2 * PAGE + 0x22F)).unwrap();
    assert_eq!(harvest(&log), [2]);
}

#[test]
fn log_off_records_nothing_and_on_again_starts_where_it_was_left() {
    let file = MemFile::new("hm-dirty-off", 8 * PAGE);
    let map = map(&file, 0, 8 * PAGE);
    map.write_obj(1_u8, GuestAddress(0)).unwrap();
    assert!(map.log().is_none());
    assert!(map.stop_log().is_none());

    let log = private(&map);
    assert_eq!(harvest(&log), NONE);
    map.write_obj(1_u8, GuestAddress(PAGE)).unwrap();
    assert!(log.is_dirty(GuestAddress(PAGE)));
    let stopped = map.stop_log().unwrap();
    assert!(Arc::ptr_eq(&stopped, &log));
    map.write_obj(1_u8, GuestAddress(2 * PAGE)).unwrap();
    assert_eq!(Arc::strong_count(&log), 2, "the map has let go of it");

    assert!(map.start_log(stopped).unwrap().is_none());
    map.write_obj(1_u8, GuestAddress(3 * PAGE)).unwrap();
    assert_eq!(harvest(&log), [1, 3]);
}

#[test]
fn log_is_replaced_by_another_without_a_gap() {
    let file = MemFile::new("hm-dirty-repl", 8 * PAGE);
    let map = map(&file, 0, 8 * PAGE);
    let first = private(&map);
    map.write_obj(1_u8, GuestAddress(0)).unwrap();
    let second = Arc::new(DirtyLog::private(map.last_addr()).unwrap());
    let replaced = map.start_log(Arc::clone(&second)).unwrap().unwrap();
    assert!(Arc::ptr_eq(&replaced, &first));
    map.write_obj(1_u8, GuestAddress(PAGE)).unwrap();
    assert_eq!((harvest(&first), harvest(&second)), (vec![0], vec![1]));
}

#[test]
fn maps_made_from_one_another_have_one_log() {
    let file = MemFile::new("hm-dirty-maps", 8 * PAGE);
    let old = map(&file, 0, 2 * PAGE);
    let more = old
        .with_region(file.region(4 * PAGE, PAGE, FRONTEND + 4 * PAGE, 0))
        .unwrap();
    let log = private(&more);
    let anew = more
        .with_regions(vec![file.region(3 * PAGE, PAGE, FRONTEND, 0)])
        .unwrap();
    let fewer = more
        .without_region(GuestAddress(0), 2 * PAGE, FRONTEND)
        .unwrap();
    old.write_obj(1_u8, GuestAddress(0)).unwrap();
    more.write_obj(1_u8, GuestAddress(PAGE)).unwrap();
    anew.write_obj(1_u8, GuestAddress(3 * PAGE)).unwrap();
    fewer.write_obj(1_u8, GuestAddress(4 * PAGE)).unwrap();
    assert_eq!(harvest(&log), [0, 1, 3, 4]);
    old.stop_log().unwrap();
    assert!(anew.log().is_none());
}

#[test]
fn c18_log_too_small_for_the_memory_is_refused_and_the_old_one_stays() {
    let file = MemFile::new("hm-c18", PAGE);
    let log_file = MemFile::new("hm-c18-log", PAGE);
    let log = |size| {
        let file = log_file.file().try_clone().unwrap();
        Arc::new(DirtyLog::shared(file, 0, size).unwrap())
    };
    // The last page is the first of byte 4.
    let map = map(&file, 4 * PER_BYTE, PAGE);
    map.start_log(log(5)).unwrap();
    let error = map.start_log(log(4)).unwrap_err();
    assert!(
        matches!(error, LogError::TooSmall { size: 4, last } if last == map.last_addr()),
        "{error}"
    );
    assert_eq!(map.log().unwrap().size(), 5);
    assert_eq!(log_file.mapped_bytes(), PAGE, "the refused one is unmapped");

    // An empty map has nothing that must be covered.
    MemoryMap::empty().start_log(log(1)).unwrap();
}

#[test]
fn c18_memory_beyond_the_log_in_force_is_refused() {
    let file = MemFile::new("hm-c18-add", 2 * PER_BYTE);
    let map = map(&file, 0, PAGE);
    let log = Arc::new(DirtyLog::private(GuestAddress(PER_BYTE - 1)).unwrap());
    assert_eq!(log.size(), 1);
    map.start_log(log).unwrap();
    let inside = file.region(PER_BYTE - PAGE, PAGE, FRONTEND + PER_BYTE, 0);
    map.with_region(inside).unwrap();
    let outside = || file.region(PER_BYTE - PAGE, PAGE + 16, FRONTEND + PER_BYTE, 0);
    for refused in [
        map.with_region(outside()),
        map.with_regions(vec![outside()]),
    ] {
        assert!(matches!(
            refused,
            Err(MapError::BeyondLog { index: 0, last }) if last == GuestAddress(PER_BYTE + 15)
        ));
    }
    assert_eq!(file.other_descriptors(), 1);
    // Without a log, or a larger one first, it is welcome.
    let larger = DirtyLog::private(GuestAddress(2 * PER_BYTE)).unwrap();
    map.start_log(Arc::new(larger)).unwrap();
    map.with_region(outside()).unwrap();
}

#[test]
fn c18_log_whose_numbers_or_file_are_no_good_is_refused() {
    let file = MemFile::new("hm-c18-file", 2 * PAGE);
    let shared = |offset, size| DirtyLog::shared(file.file().try_clone().unwrap(), offset, size);
    assert!(matches!(shared(0, 0), Err(LogError::ZeroSize)));
    for (offset, size) in [(u64::MAX, 1), (1, u64::MAX), (PAGE, u64::MAX - 1)] {
        assert!(matches!(
            shared(offset, size),
            Err(LogError::Overflow { .. })
        ));
    }
    for (offset, size) in [
        (0, 2 * PAGE + 1),
        (2 * PAGE, 1),
        (PAGE, PAGE + 1),
        (1 << 40, 1),
    ] {
        assert!(matches!(
            shared(offset, size),
            Err(LogError::FileTooShort { file_size, .. }) if file_size == 2 * PAGE
        ));
    }
    assert!(shared(0, 2 * PAGE).is_ok());

    let named = tempfile::NamedTempFile::new().unwrap();
    named.as_file().set_len(PAGE).unwrap();
    let read_only = File::open(&named).unwrap();
    assert!(matches!(
        DirtyLog::shared(read_only, 0, PAGE),
        Err(LogError::FileAccess { .. })
    ));
    let directory = File::open(tempfile::tempdir().unwrap().path()).unwrap();
    assert!(matches!(
        DirtyLog::shared(directory, 0, PAGE),
        Err(LogError::FileType { .. })
    ));
    assert_eq!(file.mapped_bytes(), 0);
    assert_eq!(file.other_descriptors(), 0);
}

#[test]
fn c18_log_for_memory_at_the_end_of_the_address_space_is_refused_not_wrapped() {
    // 2^49 bytes: more than a process can map.
    let error = DirtyLog::private(GuestAddress(u64::MAX)).unwrap_err();
    assert!(
        matches!(error, LogError::Mmap { size, .. } if size == 1 << 49),
        "{error}"
    );
}

/// Bits of the log are then bytes of the guest's memory: the guest garbles its log and nothing else.
#[test]
fn m21_log_in_the_guests_own_memory_is_harmless() {
    let file = MemFile::new("hm-m21", 64 * PAGE);
    let map = map(&file, 0, 64 * PAGE);
    let log = DirtyLog::shared(file.file().try_clone().unwrap(), 0, 8).unwrap();
    let log = Arc::new(log);
    map.start_log(Arc::clone(&log)).unwrap();
    map.write_slice(&[0; 64], GuestAddress(0)).unwrap();
    // The mark comes after the write.
    assert_eq!(map.read_obj::<u8>(GuestAddress(0)).unwrap(), 1);
    assert_eq!(harvest(&log), [0]);
    map.write_slice(&[0xFF; 8], GuestAddress(0)).unwrap();
    assert_eq!(harvest(&log).len(), 64);
}

/// A front-end may send a new log again and again, while requests go on.
#[test]
fn m22_logs_without_end_leave_nothing_behind() {
    let file = MemFile::new("hm-m22", 8 * PAGE);
    let log_file = MemFile::new("hm-m22-log", PAGE);
    let map = map(&file, 0, 8 * PAGE);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                map.write_slice(&[1; 0x8000], GuestAddress(0)).unwrap();
            }
        });
        for _ in 0..2000 {
            let log = DirtyLog::shared(log_file.file().try_clone().unwrap(), 0, 8).unwrap();
            drop(map.start_log(Arc::new(log)).unwrap());
            assert!(log_file.mapped_bytes() <= 2 * PAGE);
            assert!(log_file.other_descriptors() <= 2);
        }
        stop.store(true, Ordering::Relaxed);
    });
    drop(map);
    assert_eq!(log_file.mapped_bytes(), 0);
    assert_eq!(log_file.other_descriptors(), 0);
}

#[test]
fn marks_beyond_the_log_are_left_out() {
    let file = MemFile::new("hm-dirty-beyond", 4 * PAGE);
    let map = map(&file, 0, 4 * PAGE);
    let log_file = MemFile::new("hm-dirty-beyond-log", PAGE);
    let log = DirtyLog::shared(log_file.file().try_clone().unwrap(), 0, 2).unwrap();
    let log = Arc::new(log);
    map.start_log(Arc::clone(&log)).unwrap();
    for addr in [2 * PER_BYTE, u64::MAX, u64::MAX - PAGE] {
        map.mark_dirty(GuestAddress(addr), usize::MAX);
        assert!(!log.is_dirty(GuestAddress(addr)));
    }
    map.mark_dirty(GuestAddress(2 * PER_BYTE - 1), usize::MAX);
    assert_eq!(harvest(&log), [15]);
    // Nor read, where there is nothing to read.
    log.harvest(GuestAddress(0)..GuestAddress(u64::MAX), |run| {
        panic!("{run:?}")
    });
    let mut rest = [0; 0xFFE];
    log_file.file().read_exact_at(&mut rest, 2).unwrap();
    assert_eq!(rest, [0; 0xFFE]);
}

#[test]
fn harvest_of_a_range_leaves_other_pages_marked() {
    let file = MemFile::new("hm-dirty-range", 32 * PAGE);
    let map = map(&file, 0, 32 * PAGE);
    let log = private(&map);
    map.mark_dirty(GuestAddress(0), 0x2_0000);
    let mut runs = Vec::new();
    log.harvest(
        GuestAddress(5 * PAGE + 1)..GuestAddress(18 * PAGE + 1),
        |run| runs.push(run),
    );
    assert_eq!(runs, [GuestAddress(5 * PAGE)..GuestAddress(19 * PAGE)]);
    let left: Vec<_> = (0..5).chain(19..32).collect();
    assert_eq!(harvest(&log), left);
}

/// A memory file of 64 GiB has a log of 2 MiB, of which only what is marked takes memory.
#[test]
fn log_of_a_large_guest_is_sparse() {
    let size = 64 << 30;
    let file = MemFile::new("hm-dirty-large", size);
    let map = map(&file, 0, size);
    let log = private(&map);
    assert_eq!(log.size(), 2 << 20);
    map.mark_dirty(GuestAddress(size - 1), 1);
    map.mark_dirty(GuestAddress(0), 1);
    assert_eq!(harvest(&log), [0, size / PAGE - 1]);
}

proptest! {
    /// Any marks, and any harvests between them, against a set of pages.
    #[test]
    fn log_agrees_with_a_set_of_pages(
        steps in prop::collection::vec(
            (any::<bool>(), 0..40 * PAGE, 0..10 * PAGE),
            1..40,
        ),
    ) {
        let file = MemFile::new("hm-dirty-model", 64 * PAGE);
        let map = map(&file, 0, 64 * PAGE);
        let log = private(&map);
        let mut model = BTreeSet::new();
        for (is_mark, addr, len) in steps {
            let pages = addr / PAGE..(addr + len).div_ceil(PAGE);
            if is_mark {
                map.mark_dirty(GuestAddress(addr), usize::try_from(len).unwrap());
                if len > 0 {
                    model.extend(pages);
                }
                continue;
            }
            let mut found = Vec::new();
            let mut last_end = None;
            log.harvest(GuestAddress(addr)..GuestAddress(addr + len), |run| {
                assert!(last_end < Some(run.start), "runs that touch, or not in order");
                last_end = Some(run.end);
                found.extend(run.start.0 / PAGE..run.end.0 / PAGE);
            });
            let (taken, left) = model.iter().partition(|page| pages.contains(page));
            let taken: BTreeSet<u64> = taken;
            model = left;
            prop_assert_eq!(found, Vec::from_iter(taken));
        }
        prop_assert_eq!(harvest(&log), Vec::from_iter(model));
    }
}

const RULE_PAGES: usize = 24;

fn rule_word(page: u64) -> GuestAddress {
    GuestAddress(page * PAGE + 8)
}

fn copy_dirty(map: &MemoryMap, log: &DirtyLog, copy: &mut [u32]) {
    for page in harvest(log) {
        copy[usize::try_from(page).unwrap()] = map.read_obj(rule_word(page)).unwrap();
    }
}

/// The rule of migration: what the guest was told is complete is in the copy. A device writes pages,
/// and tells of each; a migration copies what was dirty, again and again, and last with the device
/// stopped. Logs are replaced all the while.
#[test]
fn what_was_told_to_the_guest_is_in_the_copy() {
    const ROUNDS: u32 = 400;
    let file = MemFile::new("hm-dirty-rule", RULE_PAGES as u64 * PAGE);
    let map = map(&file, 0, RULE_PAGES as u64 * PAGE);
    let stop = AtomicBool::new(false);
    let told = [const { AtomicU32::new(0) }; RULE_PAGES];
    let mut copy = [0; RULE_PAGES];

    std::thread::scope(|scope| {
        for device in 0..2 {
            let (map, told, stop) = (&map, &told, &stop);
            scope.spawn(move || {
                let mut value = 0;
                while !stop.load(Ordering::Acquire) {
                    value += 1;
                    for (page, told) in (0..).zip(told).skip(device).step_by(2) {
                        map.write_obj(value, rule_word(page)).unwrap();
                        told.store(value, Ordering::Release);
                    }
                }
            });
        }
        let mut log = private(&map);
        // From here on everything is in the copy or in the log.
        for (page, copy) in (0..).zip(&mut copy) {
            *copy = map.read_obj(rule_word(page)).unwrap();
        }
        for round in 0..ROUNDS {
            let told = told.each_ref().map(|told| told.load(Ordering::Acquire));
            if round % 4 == 3 {
                let new = Arc::new(DirtyLog::private(map.last_addr()).unwrap());
                let old = map.start_log(Arc::clone(&new)).unwrap().unwrap();
                copy_dirty(&map, &old, &mut copy);
                assert_eq!(harvest(&old), NONE, "marked after it was taken away");
                log = new;
            }
            copy_dirty(&map, &log, &mut copy);
            for (copy, told) in copy.iter().zip(told) {
                assert!(*copy >= told, "{copy} where the guest was told of {told}");
            }
        }
        stop.store(true, Ordering::Release);
    });
    let last = map.stop_log().unwrap();
    copy_dirty(&map, &last, &mut copy);
    for (page, copy) in (0..).zip(copy) {
        assert_eq!(copy, map.read_obj::<u32>(rule_word(page)).unwrap());
    }
}
