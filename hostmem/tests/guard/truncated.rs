//! Files that are cut short under a map. Every test here has the guard, which stays for the process.

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Barrier};

use hostmem::{DirtyLog, MemoryMap, SigbusGuard};
use nix::errno::Errno;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, ReadVolatile,
    VolatileMemory,
};

use crate::memfile::MemFile;

const PAGE: u64 = 0x1000;
const FRONTEND: u64 = 0x7f00_0000_0000;

/// Two regions of four pages, each in a file of its own.
struct Guest {
    files: [MemFile; 2],
    map: MemoryMap,
}

const SECOND: GuestAddress = GuestAddress(0x10_0000);

impl Guest {
    fn new(name: &str) -> Self {
        SigbusGuard::install().unwrap();
        let files = ["a", "b"].map(|which| MemFile::new(&format!("hm-{name}-{which}"), 4 * PAGE));
        let map = MemoryMap::new(vec![
            files[0].region(0, 4 * PAGE, FRONTEND, 0),
            files[1].region(SECOND.0, 4 * PAGE, FRONTEND + 4 * PAGE, 0),
        ])
        .unwrap();
        Self { files, map }
    }

    fn truncate_first(&self, size: u64) {
        self.files[0].file().set_len(size).unwrap();
    }

    /// The first region is lost, as a whole, and the second is as it was.
    fn assert_first_is_lost_alone(&self) {
        let lost = self.map.check_intact().unwrap_err();
        assert_eq!((lost.guest_addr, lost.size), (GuestAddress(0), 4 * PAGE));
        let flags: Vec<_> = self.map.regions().map(|region| region.is_lost()).collect();
        assert_eq!(flags, [true, false]);

        for addr in [0, PAGE, 4 * PAGE - 1] {
            let addr = GuestAddress(addr);
            let is_efault = |error: &GuestMemoryError| {
                matches!(error, GuestMemoryError::IOError(e)
                    if e.raw_os_error() == Some(libc::EFAULT))
            };
            assert!(is_efault(&self.map.read_obj::<u8>(addr).unwrap_err()));
            assert!(is_efault(&self.map.write_obj(1_u8, addr).unwrap_err()));
            assert!(is_efault(&self.map.get_slice(addr, 1).unwrap_err()));
            assert!(is_efault(&self.map.get_host_address(addr).unwrap_err()));
            assert!(self.map.get_slices(addr, 1).any(|slice| slice.is_err()));
        }
        self.map.write_obj(0x600d_u16, SECOND).unwrap();
        assert_eq!(self.map.read_obj::<u16>(SECOND).unwrap(), 0x600d);
        let host = self.map.get_host_address(SECOND).unwrap();
        assert!(!SigbusGuard::is_lost(host, 0x4000));
    }
}

#[test]
fn m10_read_of_truncated_memory_is_an_error_and_not_the_end() {
    let guest = Guest::new("m10-read");
    guest.map.write_obj(7_u8, GuestAddress(PAGE)).unwrap();
    guest.truncate_first(0);
    assert!(guest.map.check_intact().is_ok(), "not touched yet");
    let before = SigbusGuard::losses();
    let mut bytes = [0xAA; 0x2000];
    // The access itself cannot tell; it reads zeroes.
    guest
        .map
        .read_slice(&mut bytes, GuestAddress(PAGE))
        .unwrap();
    assert_eq!(bytes, [0; 0x2000]);
    assert_ne!(SigbusGuard::losses(), before);
    guest.assert_first_is_lost_alone();
}

#[test]
fn m10_write_to_truncated_memory_is_an_error_and_not_the_end() {
    let guest = Guest::new("m10-write");
    guest.truncate_first(0);
    guest
        .map
        .write_slice(&[1; 0x3000], GuestAddress(0))
        .unwrap();
    guest.assert_first_is_lost_alone();
    // It went nowhere: the file is still empty.
    assert_eq!(guest.files[0].file().metadata().unwrap().len(), 0);
}

#[test]
fn m10_slice_and_host_address_held_across_the_truncation() {
    let guest = Guest::new("m10-held");
    let slice = guest.map.get_slice(GuestAddress(0), 0x2000).unwrap();
    let flag = slice.get_atomic_ref::<AtomicU8>(0x1000).unwrap();
    let host = guest.map.get_host_address(GuestAddress(8)).unwrap();
    assert!(!SigbusGuard::is_lost(host, 1));
    guest.truncate_first(0);
    flag.store(1, Ordering::Relaxed);
    assert_eq!(flag.load(Ordering::Relaxed), 1);
    slice.write_obj(5_u32, 0).unwrap();
    assert!(SigbusGuard::is_lost(host, 1));
    guest.assert_first_is_lost_alone();
}

/// What is before the cut is still there, but what the guest sees of the region is not the whole.
#[test]
fn m10_partial_truncation_is_noticed_at_the_first_page_that_is_gone() {
    let guest = Guest::new("m10-part");
    guest.map.write_obj(7_u8, GuestAddress(0)).unwrap();
    guest.truncate_first(2 * PAGE);
    assert_eq!(guest.map.read_obj::<u8>(GuestAddress(0)).unwrap(), 7);
    guest
        .map
        .read_obj::<u8>(GuestAddress(2 * PAGE - 1))
        .unwrap();
    assert!(guest.map.check_intact().is_ok());
    guest.map.read_obj::<u8>(GuestAddress(2 * PAGE)).unwrap();
    guest.assert_first_is_lost_alone();
}

#[test]
fn m10_file_grown_again_does_not_bring_the_region_back() {
    let guest = Guest::new("m10-grown");
    guest.truncate_first(0);
    guest.map.read_obj::<u8>(GuestAddress(0)).unwrap();
    guest.truncate_first(4 * PAGE);
    guest.assert_first_is_lost_alone();

    // Mapped anew it is memory like any other.
    let map = guest
        .map
        .without_region(GuestAddress(0), 4 * PAGE, FRONTEND)
        .unwrap()
        .with_region(guest.files[0].region(0, 4 * PAGE, FRONTEND, 0))
        .unwrap();
    map.write_obj(9_u8, GuestAddress(0)).unwrap();
    assert!(map.check_intact().is_ok());
    guest.assert_first_is_lost_alone();
}

#[test]
fn m10_kernel_is_refused_and_nobody_dies() {
    let guest = Guest::new("m10-kernel");
    let mut source = File::open("/proc/self/exe").unwrap();
    let slice = guest.map.get_slice(GuestAddress(0), 0x1000).unwrap();
    guest.truncate_first(0);
    let error = source
        .read_volatile(&mut slice.offset(0).unwrap())
        .unwrap_err();
    assert!(error.to_string().contains(Errno::EFAULT.desc()), "{error}");
    // The kernel sends no signal, so that nothing is lost but the request.
    assert!(guest.map.check_intact().is_ok());
}

#[test]
fn m10_region_at_an_unaligned_offset_is_lost_whole() {
    SigbusGuard::install().unwrap();
    let file = MemFile::new("hm-m10-off", 4 * PAGE);
    let map = MemoryMap::new(vec![file.region(0x230, 2 * PAGE, FRONTEND, PAGE + 0x230)]).unwrap();
    file.file().set_len(PAGE).unwrap();
    map.write_obj(1_u8, GuestAddress(0x230 + PAGE)).unwrap();
    assert!(map.check_intact().is_err());
    // Nothing of the file is mapped any more: one mapping has taken the place of all three pages.
    assert_eq!(file.mapped_bytes(), 0);
    drop(map);
}

/// What is unmapped is the memory that took the place, and nothing is left behind.
#[test]
fn m10_lost_region_is_unmapped_like_any_other() {
    let guest = Guest::new("m10-drop");
    guest.truncate_first(0);
    let host = guest.map.get_host_address(GuestAddress(0)).unwrap();
    guest.map.write_obj(1_u8, GuestAddress(0)).unwrap();
    let at = format!("{:x}-", host.addr());
    let is_mapped = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().any(|line| line.starts_with(&at))
    };
    assert!(is_mapped());
    assert!(SigbusGuard::is_lost(host, 1));
    let files = guest.files;
    drop(guest.map);
    assert!(!SigbusGuard::is_lost(host, 1));
    assert_eq!(files[0].other_descriptors(), 0);
}

/// Threads that touch different pages of the same region in the same moment, often.
#[test]
fn m10_threads_that_fault_at_the_same_time_all_go_on() {
    for _ in 0..50 {
        let guest = Guest::new("m10-race");
        let (ready, start) = (Barrier::new(4), Barrier::new(4));
        std::thread::scope(|scope| {
            for page in 0..3 {
                let (guest, ready, start) = (&guest, &ready, &start);
                scope.spawn(move || {
                    let slice = guest.map.get_slice(GuestAddress(page * PAGE), 0x1000);
                    let slice = slice.unwrap();
                    ready.wait();
                    start.wait();
                    for _ in 0..100 {
                        slice.write_obj(1_u8, 0).unwrap();
                    }
                    assert!(guest.map.check_intact().is_err());
                });
            }
            ready.wait();
            guest.truncate_first(0);
            start.wait();
        });
        guest.assert_first_is_lost_alone();
    }
}

/// Other maps come and go, so that slots of the table are filled and emptied while faults are looked
/// up in it.
#[test]
fn m10_faults_are_told_apart_while_maps_come_and_go() {
    SigbusGuard::install().unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let churn = {
        let done = Arc::clone(&done);
        std::thread::spawn(move || {
            let file = MemFile::new("hm-m10-churn", 8 * PAGE);
            let mut rounds = 0;
            while !done.load(Ordering::Relaxed) {
                let regions = (0..8).map(|i| file.region(i * PAGE, PAGE, FRONTEND + i * PAGE, 0));
                let map = MemoryMap::new(regions.collect()).unwrap();
                map.write_slice(&[1; 0x8000], GuestAddress(0)).unwrap();
                assert!(map.check_intact().is_ok());
                rounds += 1;
            }
            rounds
        })
    };
    for _ in 0..200 {
        let guest = Guest::new("m10-told");
        guest.truncate_first(0);
        guest.map.read_obj::<u8>(GuestAddress(0)).unwrap();
        guest.assert_first_is_lost_alone();
    }
    done.store(true, Ordering::Relaxed);
    assert!(churn.join().unwrap() > 0);
}

#[test]
fn m20_truncated_log_takes_marks_that_go_nowhere() {
    let guest = Guest::new("m20");
    let file = MemFile::new("hm-m20-log", PAGE);
    let log = DirtyLog::shared(file.file().try_clone().unwrap(), 0, PAGE).unwrap();
    let log = Arc::new(log);
    guest.map.start_log(Arc::clone(&log)).unwrap();
    file.file().set_len(0).unwrap();
    assert!(!log.is_lost());
    guest.map.write_obj(1_u8, GuestAddress(0)).unwrap();
    assert!(log.is_lost());
    // The memory is there, and so it is for the device.
    assert!(guest.map.check_intact().is_ok());
    assert_eq!(guest.map.read_obj::<u8>(GuestAddress(0)).unwrap(), 1);
    guest.map.write_slice(&[2; 0x4000], SECOND).unwrap();
    guest.map.stop_log().unwrap();
}

/// The region that is lost belongs to an old map as well as to the new one.
#[test]
fn m10_region_shared_by_two_maps_is_lost_in_both() {
    let guest = Guest::new("m10-shared");
    let fewer = guest
        .map
        .without_region(SECOND, 4 * PAGE, FRONTEND + 4 * PAGE)
        .unwrap();
    guest.truncate_first(0);
    fewer.read_obj::<u8>(GuestAddress(0)).unwrap();
    assert!(fewer.check_intact().is_err());
    guest.assert_first_is_lost_alone();
    assert!(fewer.regions().next().unwrap().start_addr() == GuestAddress(0));
}
