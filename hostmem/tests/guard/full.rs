//! Memory that never was there: no huge page, or no room in the file system, at the first touch. The
//! machine is made to have just so much, which takes root; without, these tests fail and say so.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;

use hostmem::{MemoryMap, RegionConfig, SigbusGuard};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::memfd::MFdFlags;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::memfile::MemFile;

const PAGE: u64 = 0x1000;
const HUGE_PAGE: u64 = 0x20_0000;
const FRONTEND: u64 = 0x7f00_0000_0000;

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const POOL_FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
const POOL_OVERCOMMIT: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages";

fn number(path: &str) -> u64 {
    let text = fs::read_to_string(path)
        .unwrap_or_else(|error| panic!("{path}: {error} (a kernel with hugetlbfs is needed)"));
    text.trim().parse().unwrap()
}

/// The machine's pool of huge pages, with `free` of them to be had and no more; as it was when dropped.
struct Pool {
    before: u64,
    overcommit: u64,
    /// One test at a time, of all processes that run this one.
    _lock: Flock<File>,
}

impl Pool {
    fn with_free(free: u64) -> Self {
        let path = std::env::temp_dir().join("hostmem-test-hugepages.lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o666)
            .open(&path)
            .unwrap();
        let lock = Flock::lock(lock, FlockArg::LockExclusive).unwrap();
        let (before, overcommit) = (number(POOL), number(POOL_OVERCOMMIT));
        let pool = Self {
            before,
            overcommit,
            _lock: lock,
        };
        let set = |path: &str, value: u64| {
            fs::write(path, value.to_string()).unwrap_or_else(|error| {
                panic!("{path}: {error} (root is needed, to set the pool of huge pages)")
            });
        };
        set(POOL_OVERCOMMIT, 0);
        let in_use = before - number(POOL_FREE);
        set(POOL, in_use + free);
        assert_eq!(
            number(POOL_FREE),
            free,
            "the kernel finds no {free} huge pages: too little free memory in one piece"
        );
        pool
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = fs::write(POOL, self.before.to_string());
        let _ = fs::write(POOL_OVERCOMMIT, self.overcommit.to_string());
    }
}

fn huge_file(name: &str, pages: u64) -> MemFile {
    let flags = MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    MemFile::with_flags(name, pages * HUGE_PAGE, flags)
}

#[test]
fn m11_pool_of_huge_pages_that_runs_dry_is_an_error_and_not_the_end() {
    SigbusGuard::install().unwrap();
    let _pool = Pool::with_free(2);
    let file = huge_file("hm-m11", 4);
    let small = MemFile::new("hm-m11-small", PAGE);
    let map = MemoryMap::new(vec![
        file.region(0, 4 * HUGE_PAGE, FRONTEND, 0),
        small.region(1 << 32, PAGE, FRONTEND + 4 * HUGE_PAGE, 0),
    ])
    .unwrap();
    map.write_obj(1_u8, GuestAddress(0)).unwrap();
    map.write_obj(1_u8, GuestAddress(2 * HUGE_PAGE + 5))
        .unwrap();
    assert!(map.check_intact().is_ok());

    map.write_obj(1_u8, GuestAddress(HUGE_PAGE + 7)).unwrap();
    assert_eq!(map.check_intact().unwrap_err().size, 4 * HUGE_PAGE);
    assert!(map.read_obj::<u8>(GuestAddress(0)).is_err());
    map.write_obj(1_u8, GuestAddress(1 << 32)).unwrap();
    assert_eq!(file.mapped_bytes(), 0);
}

#[test]
fn m10_truncated_huge_pages_are_an_error_and_not_the_end() {
    SigbusGuard::install().unwrap();
    let _pool = Pool::with_free(2);
    let file = huge_file("hm-m10-huge", 2);
    // The region begins within a huge page, so that the mapping is larger than it on both sides.
    let map = MemoryMap::new(vec![file.region(0, HUGE_PAGE, FRONTEND, HUGE_PAGE / 2)]).unwrap();
    let last = GuestAddress(HUGE_PAGE - 1);
    map.write_obj(1_u8, GuestAddress(0)).unwrap();
    map.write_obj(2_u8, last).unwrap();
    file.file().set_len(HUGE_PAGE).unwrap();
    assert_eq!(map.read_obj::<u8>(GuestAddress(0)).unwrap(), 1);
    assert!(map.check_intact().is_ok());
    map.read_obj::<u8>(last).unwrap();
    assert!(map.check_intact().is_err());
    // Unmapped whole, though what is there now is not in huge pages.
    let host = map.regions().next().unwrap();
    assert!(host.is_lost());
    drop(map);
    assert_eq!(file.mapped_bytes(), 0);
}

#[test]
fn m11_hole_punched_into_huge_pages_is_an_error_if_the_pool_is_empty() {
    SigbusGuard::install().unwrap();
    let pool = Pool::with_free(1);
    let file = huge_file("hm-m11-hole", 1);
    let map = MemoryMap::new(vec![file.region(0, HUGE_PAGE, FRONTEND, 0)]).unwrap();
    map.write_obj(1_u8, GuestAddress(0)).unwrap();
    let flags = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
        | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let len = i64::try_from(HUGE_PAGE).unwrap();
    nix::fcntl::fallocate(file.file(), flags, 0, len).unwrap();
    // Somebody else takes the page.
    let thief = huge_file("hm-m11-thief", 1);
    let theirs = MemoryMap::new(vec![thief.region(0, HUGE_PAGE, FRONTEND, 0)]).unwrap();
    theirs.write_obj(1_u8, GuestAddress(0)).unwrap();

    map.read_obj::<u8>(GuestAddress(0)).unwrap();
    assert!(map.check_intact().is_err());
    assert!(theirs.check_intact().is_ok());
    drop((map, theirs, thief, file));
    drop(pool);
}

/// A sparse file in a file system without room for it: `fstat` says that it is long enough.
#[test]
fn m19_memory_file_on_a_full_file_system_is_an_error_and_not_the_end() {
    SigbusGuard::install().unwrap();
    let directory = tempfile::tempdir().unwrap();
    mount(
        Some("tmpfs"),
        directory.path(),
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=64k"),
    )
    .unwrap_or_else(|error| panic!("mount: {error} (root is needed, to mount a small tmpfs)"));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(directory.path().join("memory"));
    // The file keeps the file system.
    umount2(directory.path(), MntFlags::MNT_DETACH).unwrap();
    let file = file.unwrap();
    file.set_len(64 * PAGE).unwrap();
    let map = MemoryMap::new(vec![RegionConfig {
        guest_addr: GuestAddress(0),
        size: 64 * PAGE,
        frontend_addr: FRONTEND,
        file,
        mmap_offset: 0,
    }])
    .unwrap();
    let mut touched = 0;
    while map.check_intact().is_ok() {
        map.write_obj(1_u8, GuestAddress(touched * PAGE)).unwrap();
        touched += 1;
        assert!(touched <= 64, "64 pages in a file system of 16");
    }
    assert_eq!(touched, 17);
    assert!(map.get_slice(GuestAddress(0), 1).is_err());
}
