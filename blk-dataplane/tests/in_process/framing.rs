//! B3 to B6: the driver may cut a request as it likes (virtio 1.3 §2.7.4, §5.2.6).

use crate::support::embedded::single;
use crate::support::pattern;
use crate::support::queue::GuestQueue;
use crate::support::request::{Framing, OK, Request, Table};
use crate::support::scratch::{KINDS, Scratch};

const DATA: usize = 8192;

/// Ways to cut the readable bytes of a write: header and data.
fn readable_cuts() -> Vec<Vec<usize>> {
    vec![
        vec![16],
        vec![8, 8],
        vec![1; 16],
        // B4: header and data joined.
        vec![],
        // The header's tail goes with the data's head.
        vec![8],
        vec![15],
        vec![16, 1],
        vec![16, 512, 512, 1024],
        vec![4, 100, 4000, 3],
        vec![17],
    ]
}

/// Ways to cut the writable bytes of a read: data and status.
fn writable_cuts() -> Vec<Vec<usize>> {
    vec![
        vec![DATA],
        // B5: data and status joined.
        vec![],
        vec![512, 512, 1024],
        vec![1; 16],
        vec![8, 504],
        vec![DATA - 1],
        vec![4095, 2, 4000],
    ]
}

/// Direct, indirect, and with any number of direct descriptors in front of the table.
fn tables(parts: usize) -> Vec<Table> {
    let mut tables = vec![Table::Direct, Table::Indirect];
    tables.extend((1..parts.min(5)).map(Table::Mixed));
    tables
}

fn check(queue: &mut GuestQueue, sector: u64, seed: u64, framing: [Framing; 2]) {
    let [write_framing, read_framing] = framing;
    let data = pattern(seed, DATA);
    let write = queue.run_framed(&Request::write(sector, &data), &write_framing);
    assert_eq!(
        (write.status, write.len),
        (Some(OK), 1),
        "{write_framing:?}"
    );
    let read = queue.run_framed(&Request::read(sector, DATA), &read_framing);
    assert_eq!(read.status, Some(OK), "{read_framing:?}");
    assert_eq!(
        usize::try_from(read.len).unwrap(),
        DATA + 1,
        "{read_framing:?}"
    );
    assert!(read.data == data, "{write_framing:?} {read_framing:?}");
    // Mixed chains sit at the descriptors' start, behind the driver's back.
    assert_eq!(queue.outstanding(), 0);
    queue.arena.reset();
}

#[test]
fn b3_b4_b5_d17_every_framing_moves_the_same_bytes() {
    for kind in KINDS {
        let scratch = Scratch::zeroed(kind, 1 << 20);
        let (_vmm, mut queue) = single(&scratch.device());
        let mut seed = 0;
        for readable in readable_cuts() {
            for table in tables(readable.len() + 1) {
                for skew in [0, 1, 8] {
                    seed += 1;
                    let write = Framing::cut(&readable, &[]).table(table).skew(skew);
                    let read = Framing::cut(&[16], &[DATA]);
                    check(&mut queue, seed % 100, seed, [write, read]);
                }
            }
        }
        for writable in writable_cuts() {
            for table in tables(writable.len() + 1) {
                for skew in [0, 1, 8] {
                    for header in [vec![16], vec![8, 8], vec![1; 16]] {
                        seed += 1;
                        let write = Framing::cut(&[16], &[]);
                        let read = Framing::cut(&header, &writable).table(table).skew(skew);
                        check(&mut queue, seed % 100, seed, [write, read]);
                    }
                }
            }
        }
    }
}

#[test]
fn b3_flush_and_get_id_in_every_framing() {
    let scratch = Scratch::zeroed(KINDS[0], 1 << 20);
    let (_vmm, mut queue) = single(&scratch.device());
    for header in [vec![], vec![8, 8], vec![1; 16], vec![3]] {
        for table in [Table::Direct, Table::Indirect, Table::Mixed(1)] {
            let framing = Framing::cut(&header, &[]).table(table);
            let flush = queue.run_framed(&Request::flush(), &framing);
            assert_eq!((flush.status, flush.len), (Some(OK), 1));
            let framing = Framing::cut(&header, &[7, 13]).table(table);
            let id = queue.run_framed(&Request::get_id(20), &framing);
            assert_eq!((id.status, id.len), (Some(OK), 21));
            assert_eq!(id.data, crate::support::scratch::SERIAL.as_bytes());
        }
    }
}
