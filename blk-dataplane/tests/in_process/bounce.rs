//! I1: guest buffers that direct I/O does not take as they lie are bounced, within fixed lanes.

use blk_dataplane::Caching;

use crate::support::embedded::single;
use crate::support::pattern;
use crate::support::queue::GuestQueue;
use crate::support::request::{Framing, IOERR, OK, Request, Table};
use crate::support::scratch::{Kind, Scratch};

const DISK: usize = 4 << 20;

/// Where the tests of this file make sense: direct I/O that demands alignment.
fn direct(content: &[u8]) -> Scratch {
    let scratch = Scratch::new(Kind::Disk, content);
    let image = scratch.image();
    assert_eq!(
        image.caching(),
        &Caching::Direct,
        "these tests need a target directory whose file system takes O_DIRECT"
    );
    assert!(image.memory_alignment() > 1);
    scratch
}

#[test]
fn i1_odd_addresses_and_cuts_never_reach_the_guest_as_errors() {
    let mut model = pattern(1, DISK);
    let scratch = direct(&model);
    let (vmm, mut queue) = single(&scratch.device());
    let cuts: [&[usize]; 5] = [&[8, 504], &[1], &[511], &[3, 509, 512, 7], &[513]];
    let mut seed = 0;
    for len in [512, 1024, 4096, 65536] {
        for cut in cuts {
            for skew in [0, 1, 2, 3, 511] {
                seed += 1;
                let sector = (seed * 37) % 4096;
                let at = usize::try_from(sector * 512).unwrap();
                let data = pattern(seed, len);
                let mut readable = vec![16];
                readable.extend_from_slice(cut);
                let framing = Framing::cut(&readable, &[]).skew(skew);
                let write = queue.run_framed(&Request::write(sector, &data), &framing);
                assert_eq!((write.status, write.len), (Some(OK), 1), "{framing:?}");
                model[at..at + len].copy_from_slice(&data);
                let framing = Framing::cut(&[16], cut).skew(skew);
                let read = queue.run_framed(&Request::read(sector, len), &framing);
                assert_eq!(read.status, Some(OK), "{framing:?}");
                assert!(read.data == data, "{framing:?}");
                queue.arena.reset();
            }
        }
    }
    assert!(scratch.content() == model);
    assert!(vmm.plane.counters().bounced > 100);
}

#[test]
fn i1_requests_larger_than_a_bounce_buffer_go_through_in_rounds() {
    let mut model = pattern(2, DISK);
    let scratch = direct(&model);
    let (vmm, mut queue) = single(&scratch.device());
    // Around one and two buffers of 256 KiB.
    for (seed, kib_times_2) in (1..).zip([511, 512, 513, 1023, 1024, 1025, 2049]) {
        let len = kib_times_2 * 512;
        let data = pattern(seed, len);
        let write = Request::write(seed * 3, &data);
        let done = queue.run_framed(&write, &Framing::classic(&write).skew(1));
        assert_eq!((done.status, done.len), (Some(OK), 1), "{len}");
        let at = usize::try_from(seed * 3 * 512).unwrap();
        model[at..at + len].copy_from_slice(&data);
        let read = Request::read(seed * 3, len);
        let done = queue.run_framed(&read, &Framing::classic(&read).skew(3));
        assert_eq!(done.status, Some(OK));
        assert_eq!(usize::try_from(done.len).unwrap(), len + 1);
        assert!(done.data == data, "{len}");
        queue.arena.reset();
    }
    assert_eq!(vmm.plane.counters().bounced, 14);
    assert!(scratch.content() == model);
}

/// Many requests at once, each in an own place, every `n`th one unaligned.
fn burst(queue: &mut GuestQueue, model: &mut [u8], every: usize) {
    let len = 3 * 512;
    for number in 0..100usize {
        let sector = number * 3 + 5;
        let data = pattern(u64::try_from(number).unwrap() + 1, len);
        let request = Request::write(u64::try_from(sector).unwrap(), &data);
        let skew = u64::from(number.is_multiple_of(every));
        let framing = Framing::classic(&request).table(Table::Indirect).skew(skew);
        queue.add(&request, &framing);
        model[sector * 512..][..len].copy_from_slice(&data);
    }
    queue.publish();
    assert!(queue.finish().iter().all(|done| done.status == Some(OK)));
    let mut heads = std::collections::HashMap::new();
    for number in 0..100usize {
        let sector = number * 3 + 5;
        let request = Request::read(u64::try_from(sector).unwrap(), len);
        let skew = u64::from(number.is_multiple_of(every));
        let framing = Framing::classic(&request).table(Table::Indirect).skew(skew);
        heads.insert(queue.add(&request, &framing), sector);
    }
    queue.publish();
    for done in queue.finish() {
        assert_eq!(done.status, Some(OK));
        assert!(done.data == model[heads[&done.head] * 512..][..len]);
    }
}

#[test]
fn i1_more_bounced_requests_than_lanes_are_all_served() {
    for every in [1, 2, 7] {
        let mut model = pattern(3, DISK);
        let scratch = direct(&model);
        let (vmm, mut queue) = single(&scratch.device());
        burst(&mut queue, &mut model, every);
        assert!(scratch.content() == model);
        assert!(vmm.plane.counters().bounced >= 28);
    }
}

#[test]
fn i7_bounced_read_past_the_end_of_a_truncated_file_is_ioerr_and_frees_its_lane() {
    let scratch = direct(&pattern(4, DISK));
    let (_vmm, mut queue) = single(&scratch.device());
    scratch.truncate(1 << 20);
    // More often than there are lanes; the second round of each fails.
    for _ in 0..10 {
        let read = Request::read(2048 - 512, 512 * 1024);
        let done = queue.run_framed(&read, &Framing::classic(&read).skew(1));
        assert_eq!((done.status, done.len), (Some(IOERR), 0));
        queue.arena.reset();
    }
    let read = Request::read(0, 4096);
    let done = queue.run_framed(&read, &Framing::classic(&read).skew(1));
    assert_eq!((done.status, done.len), (Some(OK), 4097));
}

#[test]
fn d5_hole_in_an_unaligned_request_is_a_bad_chain_and_takes_no_lane() {
    let content = pattern(5, DISK);
    let scratch = direct(&content);
    let (vmm, mut queue) = single(&scratch.device());
    let header = queue.arena.take(16, 16, 0);
    queue.ram.write(header, &Request::write(0, &[]).readable);
    let segment = |addr, len| vring::Segment {
        addr: vm_memory::GuestAddress(addr),
        len,
    };
    let odd = queue.arena.take(1024, 512, 1);
    let status = queue.arena.take(64, 64, 0);
    let hole = segment(crate::support::ram::HOLE, 511);
    for _ in 0..10 {
        queue.add_segments(
            &[segment(header, 16), segment(odd, 513), hole],
            &[segment(status, 1)],
            Table::Direct,
        );
        queue.publish();
        let done = queue.next();
        assert_eq!((done.status, done.len), (Some(0xee), 0));
    }
    let counters = vmm.plane.counters();
    assert_eq!((counters.bad_chains, counters.bounced), (10, 0));
    assert!(scratch.content() == content);
}
