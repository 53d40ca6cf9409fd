//! The counters as text.

use std::fmt::Write;
use std::time::Duration;

use blk_dataplane::{Device, LatencyHistogram};

/// Everything counted since the program started: a line for the device, and some for each queue that has been
/// used. `name=number`, so that scripts can read it. Each line begins with `prefix`.
pub(crate) fn counters(prefix: &str, device: &Device) -> String {
    let mut text = String::new();
    line(&mut text, prefix, "device", device.counters().iter());
    for index in 0..device.num_queues() {
        let Some(queue) = device.queue_counters(index) else {
            continue;
        };
        if queue.requests.iter().all(|(_, number)| number == 0) {
            continue;
        }
        let what = format!("queue {index}");
        line(&mut text, prefix, &what, queue.requests.iter());
        for (what, latency) in [
            ("reads", &queue.read_latency),
            ("writes", &queue.write_latency),
            ("others", &queue.other_latency),
        ] {
            if let Some(times) = times(latency) {
                // Writing to a String cannot fail.
                let _ = writeln!(text, "{prefix}queue {index} {what}: {times}");
            }
        }
    }
    text
}

fn line(
    text: &mut String,
    prefix: &str,
    what: &str,
    counters: impl Iterator<Item = (&'static str, u64)>,
) {
    let _ = write!(text, "{prefix}{what}:");
    for (name, number) in counters {
        let _ = write!(text, " {name}={number}");
    }
    text.push('\n');
}

/// Bounds that so many of the requests kept to, each at most twice the time itself.
fn times(latency: &LatencyHistogram) -> Option<String> {
    let bound = |percent| latency.percentile(percent).map(Duration::from_nanos);
    Some(format!(
        "{} timed, 50% within {:.1?}, 99% within {:.1?}, all within {:.1?}",
        latency.count(),
        bound(50.0)?,
        bound(99.0)?,
        bound(100.0)?,
    ))
}

#[cfg(test)]
mod tests {
    use blk_dataplane::{Backing, DeviceOptions};

    use super::*;

    #[test]
    fn idle_device_has_one_line_and_every_counter_in_it() {
        let device = Device::new(Backing::null(1 << 20), &DeviceOptions::default()).unwrap();
        let text = counters("blk-dataplane: vda: ", &device);
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.starts_with("blk-dataplane: vda: device: "), "{text}");
        for (name, _) in device.counters().iter() {
            assert!(text.contains(&format!(" {name}=0")), "{name}: {text}");
        }
    }

    #[test]
    fn times_are_bounds_in_readable_units() {
        assert_eq!(times(&LatencyHistogram::default()), None);
        let mut latency = LatencyHistogram::default();
        latency.buckets[14] = 99;
        latency.buckets[21] = 1;
        assert_eq!(
            times(&latency).unwrap(),
            "100 timed, 50% within 16.4µs, 99% within 16.4µs, all within 2.1ms"
        );
    }
}
