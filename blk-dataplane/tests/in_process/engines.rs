//! What reads and writes the image. Random requests through both engines are in `model.rs`.

use blk_dataplane::{Backing, Device, DeviceError, DeviceOptions, Engine};

use crate::support::embedded::{Embedded, single};
use crate::support::pattern;
use crate::support::queue::FEATURES;
use crate::support::request::{DISCARD, Framing, OK, Request, WRITE_ZEROES};
use crate::support::scratch::{KINDS, Scratch};

const ENGINES: [Engine; 3] = [Engine::Auto, Engine::LinuxAio, Engine::IoUring];

/// Every kind of request that reaches the image, in one batch.
#[test]
fn every_engine_serves_every_kind_of_request() {
    for kind in KINDS {
        for engine in ENGINES {
            let scratch = Scratch::new(kind, &pattern(1, 1 << 20));
            let mut vmm = Embedded::new(&scratch.device_through(engine));
            let ranges = 1 << 13 | 1 << 14;
            let mut queue = vmm.queue_with(0, 128, FEATURES | ranges);
            let data = pattern(2, 8192);
            for request in [
                Request::write(16, &data),
                Request::ranges(WRITE_ZEROES, &[(64, 16, 0)]),
                Request::ranges(DISCARD, &[(128, 16, 0)]),
                Request::flush(),
                Request::read(256, 4096),
            ] {
                queue.add(&request, &Framing::classic(&request));
            }
            queue.publish();
            for done in queue.finish() {
                assert_eq!(done.status, Some(OK), "{kind:?} {engine}");
            }
            vmm.plane.stop().unwrap();
            let content = scratch.content();
            assert_eq!(content[8192..][..8192], data);
            assert!(content[32768..][..8192].iter().all(|&byte| byte == 0));
        }
    }
}

/// Asleep before each: whatever an engine says while its queue is disarmed, no completion is slept through.
#[test]
fn no_completion_is_slept_through_with_polling_switched_off() {
    for kind in KINDS {
        for engine in ENGINES {
            let scratch = Scratch::new(kind, &pattern(3, 1 << 20));
            let options = DeviceOptions {
                poll_max: std::time::Duration::ZERO,
                engine,
                ..DeviceOptions::default()
            };
            let device = Device::new(Backing::Image(scratch.image()), &options).unwrap();
            let (vmm, mut queue) = single(&device);
            for round in 0..200 {
                // Now one, now more than one, and now and then one that the engine does on another thread.
                for sector in 0..=round % 3 {
                    let request = Request::read(sector * 64 + round, 4096);
                    queue.add(&request, &Framing::classic(&request));
                }
                if round % 7 == 0 {
                    let request = Request::flush();
                    queue.add(&request, &Framing::classic(&request));
                }
                queue.publish();
                for done in queue.finish() {
                    assert_eq!(done.status, Some(OK), "{kind:?} {engine}");
                }
                queue.arena.reset();
            }
            vmm.plane.stop().unwrap();
        }
    }
}

#[test]
fn null_engine_is_refused_for_what_is_to_keep_data() {
    let options = DeviceOptions {
        engine: Engine::Null,
        ..DeviceOptions::default()
    };
    assert_eq!(options.check().unwrap_err(), DeviceError::NullEngine);
}
