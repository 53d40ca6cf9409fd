//! M10: the front-end truncates the guest's memory while the device runs. The guest's end of these tests
//! has the same memory mapped without a guard, so that it must not touch what is gone.

use blk_dataplane::SigbusGuard;
use vm_memory::GuestAddress;
use vring::Segment;

use crate::support::front_end::{FrontEnd, Served};
use crate::support::queue::GuestQueue;
use crate::support::ram::{GuestRam, HIGH, SEAM};
use crate::support::request::{IOERR, OK, POISON, Request};
use crate::support::scratch::{KINDS, Kind, Scratch, null_device};
use crate::support::{eventually, pattern};

/// Region 1 keeps its memory, region 2 loses it. Region 0 has the rings.
const KEPT: u64 = SEAM + 0x10_0000;
const LOST: u64 = HIGH;

const DISK: usize = 1 << 20;

struct Guest {
    front: FrontEnd,
    queue: GuestQueue,
    requests: u64,
}

/// Where the parts of a request are.
#[derive(Clone, Copy, Debug)]
struct Place {
    header: u64,
    data: u64,
    status: u64,
}

const ALL_KEPT: Place = Place {
    header: KEPT,
    data: KEPT,
    status: KEPT,
};

impl Guest {
    fn new(served: &Served) -> Self {
        SigbusGuard::install().unwrap();
        let ram = GuestRam::new();
        let mut front = served.connect(&ram);
        let queue = front.up();
        Self {
            front,
            queue,
            requests: 0,
        }
    }

    fn truncate(&self, region: usize, len: u64) {
        let region = &self.front.ram.regions[region];
        region.file.set_len(region.offset + len).unwrap();
    }

    /// Stages a request of 4 KiB, and returns where its status will be. What is in memory that is lost
    /// is staged before it is.
    fn stage(&mut self, request: &Request, place: Place, skew: u64) -> u64 {
        // 16 KiB each.
        let at = (self.requests % 512) * 0x4000;
        self.requests += 1;
        let segment = |addr: u64, len: u32| Segment {
            addr: GuestAddress(addr + at),
            len,
        };
        let (header, data) = request.readable.split_at(16);
        let ram = &self.front.ram;
        let header_segment = segment(place.header, 16);
        if place.header == KEPT {
            ram.write(header_segment.addr.0, header);
        }
        let data_segment = segment(place.data + 0x1000 + skew, 4096);
        if place.data == KEPT && !data.is_empty() {
            ram.write(data_segment.addr.0, data);
        }
        let status = segment(place.status + 0x3000, 1);
        if place.status == KEPT {
            ram.write(status.addr.0, &[POISON]);
        }
        let driver = &mut self.queue.driver;
        if data.is_empty() {
            driver.add_chain(&[header_segment], &[data_segment, status])
        } else {
            driver.add_chain(&[header_segment, data_segment], &[status])
        }
        .unwrap();
        status.addr.0
    }

    fn used_len(&mut self) -> u32 {
        let mut len = None;
        eventually("a completion", || {
            len = self.queue.driver.poll_used().map(|used| used.len);
            len.is_some()
        });
        len.unwrap()
    }

    fn status(&self, addr: u64) -> u8 {
        self.front.ram.read(addr, 1)[0]
    }

    /// Status and used length.
    fn run(&mut self, request: &Request, place: Place) -> (u8, u32) {
        let status = self.stage(request, place, 0);
        self.queue.publish();
        let len = self.used_len();
        (self.status(status), len)
    }

    fn assert_goes_on(&mut self) {
        for request in [Request::read(0, 4096), Request::write(8, &[1; 4096])] {
            assert_eq!(self.run(&request, ALL_KEPT).0, OK);
        }
    }
}

/// The server goes on with the next front-end, whose memory is whole.
fn assert_serves(served: &Served) {
    Guest::new(served).assert_goes_on();
}

const DATA_LOST: Place = Place {
    data: LOST,
    ..ALL_KEPT
};

/// What is in the image of these tests, and stays there.
fn content() -> Vec<u8> {
    pattern(1, DISK)
}

#[test]
fn m10_data_in_truncated_memory_fails_the_request_alone() {
    for kind in KINDS {
        let scratch = Scratch::new(kind, &content());
        let served = Served::new(scratch.device());
        let mut guest = Guest::new(&served);
        guest.truncate(2, 0);
        for _ in 0..3 {
            assert_eq!(
                guest.run(&Request::read(16, 4096), DATA_LOST),
                (IOERR, 0),
                "{kind:?}"
            );
            let write = Request::write(16, &[7; 4096]);
            assert_eq!(guest.run(&write, DATA_LOST).0, IOERR, "{kind:?}");
            guest.assert_goes_on();
        }
        drop(guest);
        assert_serves(&served);
        drop(served);
        assert!(scratch.content()[8192..] == content()[8192..], "{kind:?}");
    }
}

/// The null device fills buffers itself, where the kernel would have answered with an error.
#[test]
fn m10_data_that_the_device_itself_writes_fails_the_request_alone() {
    let served = Served::new(null_device(DISK as u64));
    let mut guest = Guest::new(&served);
    guest.truncate(2, 0);
    for _ in 0..3 {
        assert_eq!(guest.run(&Request::read(16, 4096), DATA_LOST), (IOERR, 0));
        guest.assert_goes_on();
    }
}

/// Direct I/O does not take the buffer as it lies, so that the device copies it.
#[test]
fn m10_data_that_is_bounced_fails_the_request_alone() {
    let scratch = Scratch::new(Kind::Disk, &content());
    assert!(scratch.image().memory_alignment() > 1);
    let served = Served::new(scratch.device());
    for request in [Request::read(16, 4096), Request::write(16, &[7; 4096])] {
        let mut guest = Guest::new(&served);
        guest.truncate(2, 0);
        for _ in 0..3 {
            let status = guest.stage(&request, DATA_LOST, 3);
            guest.queue.publish();
            let len = guest.used_len();
            assert_eq!(guest.status(status), IOERR);
            assert!(len <= 1, "{len}");
            guest.assert_goes_on();
        }
    }
    drop(served);
    assert!(scratch.content()[8192..] == content()[8192..]);
}

/// What a header reads as, once it is gone, is a read of sector 0.
#[test]
fn m10_header_in_truncated_memory_fails_the_request_alone() {
    let scratch = Scratch::new(Kind::Shm, &content());
    let served = Served::new(scratch.device());
    let mut guest = Guest::new(&served);
    guest.truncate(2, 0);
    let place = Place {
        header: LOST,
        ..ALL_KEPT
    };
    for _ in 0..3 {
        let at = KEPT + (guest.requests % 512) * 0x4000 + 0x1000;
        guest.front.ram.write(at, &[POISON; 4096]);
        assert_eq!(guest.run(&Request::read(0, 4096), place), (IOERR, 0));
        assert_eq!(guest.front.ram.read(at, 4096), [POISON; 4096]);
        guest.assert_goes_on();
    }
}

#[test]
fn m10_status_in_truncated_memory_costs_the_chain() {
    let scratch = Scratch::new(Kind::Shm, &content());
    let served = Served::new(scratch.device());
    let mut guest = Guest::new(&served);
    guest.truncate(2, 0);
    let place = Place {
        status: LOST,
        ..ALL_KEPT
    };
    for round in 0..3 {
        guest.stage(&Request::read(16, 4096), place, 0);
        guest.queue.publish();
        let len = guest.used_len();
        // The first finds out when it has been served; from then on there is nothing to answer in.
        assert!(round == 0 || len == 0, "{len}");
        guest.assert_goes_on();
    }
}

#[test]
fn m10_ring_in_truncated_memory_stops_and_the_device_lives() {
    let served = Served::new(null_device(DISK as u64));
    let mut guest = Guest::new(&served);
    guest.assert_goes_on();
    guest.truncate(0, 0);
    // From here on the guest cannot look at its rings either.
    guest.queue.kick.notify().unwrap();
    eventually("the err notifier", || {
        guest.queue.err.test_and_clear().unwrap()
    });
    for _ in 0..10 {
        guest.queue.kick.notify().unwrap();
    }
    // The front-end is answered.
    let base = guest.front.stop(&guest.queue);
    assert_eq!(base, 2);
    assert!(
        !guest.queue.err.test_and_clear().unwrap(),
        "reported more than once"
    );

    // With memory that is whole it goes on, over the same connection.
    let whole = GuestRam::new();
    let mut front = guest.front.over(&whole);
    front.set_memory(&[0, 1, 2]);
    let queue = front.queue(0, 128);
    let mut guest = Guest {
        front,
        queue,
        requests: 0,
    };
    guest.assert_goes_on();
}

/// An idle ring: nobody kicks, and nothing is lost before somebody looks.
#[test]
fn m10_device_with_truncated_memory_can_be_left() {
    let served = Served::new(null_device(DISK as u64));
    let guest = Guest::new(&served);
    for region in 0..3 {
        guest.truncate(region, 0);
    }
    drop(guest);
    assert_serves(&served);
    served.stop().unwrap();
}

/// Requests are under way, in all stages, when the memory of half of them goes.
#[test]
fn m10_truncation_under_load_is_answered_for_every_request() {
    for round in 0..20 {
        let scratch = Scratch::new(KINDS[round % KINDS.len()], &content());
        let served = Served::new(scratch.device());
        let mut guest = Guest::new(&served);
        let mut statuses = Vec::new();
        for batch in 0..4_u64 {
            // Of three descriptors each: the ring has room for all batches.
            for i in 0..10 {
                let sector = 64 + (batch * 10 + i) * 16;
                let place = if i % 2 == 0 { DATA_LOST } else { ALL_KEPT };
                let request = Request::read(sector, 4096);
                statuses.push((guest.stage(&request, place, 0), i % 2 == 0, sector));
            }
            guest.queue.publish();
            if batch == 1 {
                guest.truncate(2, 0);
            }
        }
        for _ in 0..statuses.len() {
            guest.used_len();
        }
        for (at, (status, may_fail, sector)) in statuses.into_iter().enumerate() {
            match guest.status(status) {
                OK => {}
                IOERR => assert!(may_fail, "request {at}"),
                other => panic!("request {at}: status {other}"),
            }
            if !may_fail {
                let from = usize::try_from(sector * 512).unwrap();
                let data = guest.front.ram.read(status - 0x2000, 4096);
                assert!(data == content()[from..from + 4096], "request {at}");
            }
        }
        guest.assert_goes_on();
    }
}
