//! Loads on this crate's own server: every kind of request and ring, counted on both sides.

use std::path::PathBuf;
use std::time::Duration;

use blk_dataplane::RequestSnapshot;
use blk_dataplane::load::{self, LoadError, LoadOptions, Pattern, Report};
use event_poll::EventNotifier;
use serde_json::Value;

use crate::fake::{Fake, Manners};
use crate::support::front_end::Served;
use crate::support::scratch::{Kind, Scratch, null_device};
use crate::support::{Watchdog, eventually};
use crate::{endless, options, run};

const CAPACITY: u64 = 64 << 20;

/// Requests of each kind: reads, writes, flushes.
fn counts(report: &Report) -> [u64; 3] {
    [&report.read, &report.write, &report.flush]
        .map(|kind| kind.as_ref().map_or(0, |kind| kind.total_ios))
}

fn assert_right(report: &Report, options: &LoadOptions) {
    assert_eq!((report.errors, report.verify_errors), (0, 0));
    let kinds = [&report.read, &report.write, &report.flush];
    assert_eq!(report.total_ios, counts(report).iter().sum::<u64>());
    for kind in kinds.into_iter().flatten() {
        let lat = &kind.lat_ns;
        assert!(0 < lat.min && lat.min <= lat.max);
        assert!(lat.percentiles.is_sorted_by_key(|&(_, value)| value));
        assert!(lat.at_percentile(100.0) <= lat.max && lat.mean >= 1.0);
    }
    let data = report.read.iter().chain(&report.write);
    assert!(
        data.clone()
            .all(|kind| kind.io_bytes == kind.total_ios * options.bs)
    );
}

#[test]
fn every_pattern_on_every_ring_with_every_client_makes_the_requests_asked_for() {
    let served = Served::new(null_device(CAPACITY));
    let rings = [(false, false), (false, true), (true, false), (true, true)];
    for rw in Pattern::ALL {
        for (packed, indirect) in rings {
            for poll in [false, true] {
                let options = LoadOptions {
                    rw,
                    packed,
                    indirect,
                    poll,
                    event_idx: !indirect,
                    ..options()
                };
                let report = run(&served.path, &options).unwrap();
                assert_right(&report, &options);
                let [reads, writes, flushes] = counts(&report);
                assert_eq!(reads + writes + flushes, 300, "{options:?}");
                let does = |kind: u64| kind != 0;
                let expected = match rw {
                    Pattern::Read | Pattern::RandRead => [true, false, false],
                    Pattern::Write | Pattern::RandWrite => [false, true, false],
                    Pattern::Rw | Pattern::RandRw => [true, true, false],
                    Pattern::Flush => [false, false, true],
                };
                assert_eq!([reads, writes, flushes].map(does), expected, "{rw}");
                assert!(report.sleeps == 0 || !poll);
            }
        }
    }
}

#[test]
fn device_has_served_what_the_report_says() {
    let device = null_device(CAPACITY);
    let served = Served::new(device.clone());
    let options = LoadOptions {
        rw: Pattern::RandRw,
        rwmixread: 70,
        fsync: 10,
        numjobs: 4,
        bs: 16 << 10,
        ..options()
    };
    let report = run(&served.path, &options).unwrap();
    assert_right(&report, &options);
    let sum = |of: fn(&RequestSnapshot) -> u64| {
        let queues = (0..4).map(|queue| device.queue_counters(queue).unwrap());
        queues.map(|queue| of(&queue.requests)).sum::<u64>()
    };
    let [reads, writes, flushes] = counts(&report);
    assert_eq!(reads + writes + flushes, 4 * 300);
    assert_eq!(sum(|requests| requests.reads), reads);
    assert_eq!(sum(|requests| requests.writes), writes);
    assert_eq!(sum(|requests| requests.flushes), flushes);
    assert_eq!(sum(|requests| requests.bytes_written), writes * options.bs);
    assert!(
        reads > writes && flushes >= writes / 10 - 4,
        "{reads} {writes} {flushes}"
    );
}

#[test]
fn several_devices_are_loaded_at_the_same_time() {
    let _watchdog = Watchdog::start();
    let served = [null_device(CAPACITY), null_device(CAPACITY)].map(Served::new);
    let sockets: Vec<PathBuf> = served.iter().map(|served| served.path.clone()).collect();
    let options = LoadOptions {
        numjobs: 2,
        cpus: vec![0],
        ..options()
    };
    let report = load::run(&sockets, &options, |_| ()).unwrap();
    assert_right(&report, &options);
    assert_eq!(report.total_ios, 2 * 2 * 300);
    assert_eq!(report.more_backends.len(), 1);
    assert!(report.to_string().contains("devices=2"));
}

#[test]
fn memory_in_many_regions_and_blocks_of_any_size_are_served() {
    let served = Served::new(null_device(CAPACITY));
    for memory_regions in [1, 8, 9, 100, 509] {
        for (bs, iodepth, queue_size) in
            [(512, 1, None), (4096, 64, Some(64)), (1 << 20, 5, Some(16))]
        {
            let options = LoadOptions {
                memory_regions,
                bs,
                iodepth,
                queue_size,
                number_ios: Some(100),
                ..options()
            };
            let report = run(&served.path, &options).unwrap();
            assert_right(&report, &options);
            assert_eq!(report.total_ios, 100);
        }
    }
}

#[test]
fn record_of_requests_in_flight_is_made_for_who_asks() {
    for packed in [false, true] {
        let served = Served::new(null_device(CAPACITY));
        let options = LoadOptions {
            inflight: true,
            packed,
            numjobs: 2,
            ..options()
        };
        let report = run(&served.path, &options).unwrap();
        assert_right(&report, &options);
    }
}

#[test]
fn paced_load_is_as_fast_as_its_rate_and_sleeps_between() {
    let served = Served::new(null_device(CAPACITY));
    let options = LoadOptions {
        rate_iops: Some(1000),
        number_ios: Some(101),
        ..options()
    };
    let report = run(&served.path, &options).unwrap();
    assert_right(&report, &options);
    assert_eq!(report.total_ios, 101);
    // 100 distances of a millisecond: no sooner, however late a loaded machine makes it.
    assert!(report.runtime_ms >= 99.9, "{}", report.runtime_ms);
    assert!(report.sleeps > 0);
}

#[test]
fn latency_of_a_paced_load_counts_from_when_a_request_was_due() {
    let served = Served::new(null_device(CAPACITY));
    // A thousandth of a nanosecond's distance would be needed for less.
    let options = LoadOptions {
        rate_iops: Some(1_000_000_000),
        iodepth: 1,
        number_ios: Some(1000),
        ..options()
    };
    let report = run(&served.path, &options).unwrap();
    // One at a time, all due at once: the last has waited for all others.
    let lat = report.read.unwrap().lat_ns;
    let run = report.runtime_ms * 1e6;
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let longest = lat.max as f64;
    assert!(longest > run / 2.0, "{longest} of {run}");
}

#[test]
fn what_ramps_up_is_not_counted() {
    let served = Served::new(null_device(CAPACITY));
    let options = LoadOptions {
        ramp_time: Duration::from_millis(50),
        ..options()
    };
    let report = run(&served.path, &options).unwrap();
    assert_right(&report, &options);
    assert_eq!(report.total_ios, 300);
}

#[test]
fn time_ends_a_load_and_progress_is_told_meanwhile() {
    let _watchdog = Watchdog::start();
    let served = Served::new(null_device(CAPACITY));
    let options = LoadOptions {
        runtime: Some(Duration::from_millis(2500)),
        backend_pid: Some(std::process::id()),
        ..endless()
    };
    let mut told = Vec::new();
    let sockets = [served.path.clone()];
    let report = load::run(&sockets, &options, |progress| told.push(*progress)).unwrap();
    assert_right(&report, &options);
    assert!(report.runtime_ms >= 2500.0, "{}", report.runtime_ms);
    assert!(report.backend_cpu_ns_per_io.is_some_and(|time| time > 0.0));
    assert!(!told.is_empty());
    assert!(
        told.iter()
            .all(|progress| progress.measuring && progress.completed > 0)
    );
    assert!(told.is_sorted_by_key(|progress| progress.completed));
    assert_eq!(told[0].total, options.runtime);
}

#[test]
fn load_that_is_ended_early_reports_what_was_measured() {
    let _watchdog = Watchdog::start();
    let scratch = Scratch::zeroed(Kind::Shm, 1 << 20);
    let device = scratch.device();
    let served = Served::new(device.clone());
    let sockets = [served.path.clone()];
    let polls = LoadOptions {
        poll: true,
        ..endless()
    };
    let paced = LoadOptions {
        rate_iops: Some(200),
        ..endless()
    };
    // Its next request would be due in a second.
    let idle = LoadOptions {
        rate_iops: Some(1),
        ..endless()
    };
    let ramping = LoadOptions {
        ramp_time: Duration::from_secs(3600),
        ..endless()
    };
    for options in [endless(), polls, paced, idle, ramping] {
        let options = LoadOptions {
            verify: true,
            rw: Pattern::RandRw,
            ..options
        };
        let ending = EventNotifier::new().unwrap();
        let end = ending.try_clone().unwrap();
        let device = device.clone();
        let before = device.counters().requests;
        let ender = std::thread::spawn(move || {
            eventually("a request", || device.counters().requests > before);
            // The others are on their way.
            std::thread::sleep(Duration::from_millis(100));
            end.notify().unwrap();
        });
        let report = load::run_until(&sockets, &options, &ending, |_| ()).unwrap();
        ender.join().unwrap();
        assert_right(&report, &options);
        // The one request of a second may have been seen too late.
        let measures = options.ramp_time.is_zero() && options.rate_iops != Some(1);
        assert!(report.total_ios > 0 || !measures, "{options:?}");
        assert!(report.total_ios == 0 || options.ramp_time.is_zero());
    }
}

#[test]
fn second_order_to_end_ends_a_load_that_cannot_end() {
    let _watchdog = Watchdog::start();
    let fake = Fake::new(Manners::default());
    let ending = EventNotifier::new().unwrap();
    let end = ending.try_clone().unwrap();
    let ender = std::thread::spawn(move || {
        for _ in 0..2 {
            std::thread::sleep(Duration::from_millis(200));
            end.notify().unwrap();
        }
    });
    let sockets = [fake.path.clone()];
    let error = load::run_until(&sockets, &endless(), &ending, |_| ()).unwrap_err();
    ender.join().unwrap();
    assert!(matches!(error, LoadError::Interrupted), "{error}");
}

#[test]
fn next_front_end_is_welcome_after_a_load() {
    let device = null_device(CAPACITY);
    let served = Served::new(device.clone());
    for _ in 0..3 {
        run(&served.path, &options()).unwrap();
    }
    let requests = || device.counters().requests;
    eventually("all requests to be counted", || requests() == 900);
}

#[test]
fn size_and_offset_bound_what_is_touched() {
    let scratch = Scratch::zeroed(Kind::Shm, 1 << 20);
    let served = Served::new(scratch.device());
    for rw in [Pattern::Write, Pattern::RandWrite] {
        let options = LoadOptions {
            rw,
            offset: 256 << 10,
            size: Some(128 << 10),
            numjobs: 3,
            ..options()
        };
        let report = run(&served.path, &options).unwrap();
        assert_right(&report, &options);
        let content = scratch.content();
        let is_zero = |range: std::ops::Range<usize>| content[range].iter().all(|&byte| byte == 0);
        assert!(is_zero(0..256 << 10) && is_zero(384 << 10..1 << 20), "{rw}");
        assert!(!is_zero(256 << 10..260 << 10), "{rw}");
    }
}

#[test]
fn report_is_json_with_the_fields_that_others_rely_on() {
    let served = Served::new(null_device(CAPACITY));
    let options = LoadOptions {
        rw: Pattern::RandRw,
        ..options()
    };
    let report = run(&served.path, &options).unwrap();
    let json: Value = serde_json::from_str(&report.to_json()).unwrap();
    let number = |path: &str| {
        json.pointer(path)
            .unwrap_or_else(|| panic!("{path}"))
            .as_f64()
    };
    for path in [
        "/backend/capacity_bytes",
        "/backend/num_queues",
        "/runtime_ms",
        "/total_ios",
        "/iops",
        "/bw_bytes",
        "/read/total_ios",
        "/read/io_bytes",
        "/write/iops",
        "/write/bw_bytes",
        "/write/errors",
        "/read/lat_ns/min",
        "/read/lat_ns/max",
        "/read/lat_ns/mean",
        "/read/lat_ns/stddev",
        "/read/lat_ns/percentile/1.000000",
        "/read/lat_ns/percentile/50.000000",
        "/read/lat_ns/percentile/99.900000",
        "/write/lat_ns/percentile/99.990000",
        "/errors",
        "/verify_errors",
        "/kicks",
        "/interrupts",
        "/kicks_per_io",
        "/interrupts_per_io",
        "/sleeps",
        "/client_cpu_ns_per_io",
        "/options/iodepth",
    ] {
        assert!(number(path).is_some(), "{path}");
    }
    assert_eq!(number("/total_ios"), Some(300.0));
    assert!(json["backend_cpu_ns_per_io"].is_null());
    let features = json["backend"]["features"].as_str().unwrap();
    assert!(features.starts_with("0x"));
    assert_eq!(json["options"]["rw"], "randrw");
}

#[test]
fn plot_has_a_curve_and_a_legend_for_each_kind() {
    let served = Served::new(null_device(CAPACITY));
    let options = LoadOptions {
        rw: Pattern::RandRw,
        fsync: 10,
        ..options()
    };
    let svg = run(&served.path, &options).unwrap().to_svg().unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    for kind in [
        "read: median",
        "write: median",
        "flush: median",
        "99.9%",
        "randrw",
    ] {
        assert!(svg.contains(kind), "{kind}");
    }
    // One request alone has no distribution to speak of, and is drawn as well.
    let options = LoadOptions {
        number_ios: Some(1),
        ..options
    };
    run(&served.path, &options).unwrap().to_svg().unwrap();
}
