//! The trace points, as a subscriber sees them. On its own: a subscriber is the whole process's.

#[expect(dead_code, reason = "what only the other tests need")]
mod support;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use support::embedded::Embedded;
use support::request::{Framing, IOERR, OK, Request};
use support::scratch::null_device;

type Fields = BTreeMap<&'static str, u64>;

/// Writes down what the trace points say.
#[derive(Clone, Default)]
struct Listener(Arc<Mutex<Vec<(&'static str, Fields)>>>);

struct Collect(Fields);

impl Visit for Collect {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name(), value);
    }

    fn record_debug(&mut self, _: &Field, _: &dyn Debug) {}
}

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "blk_dataplane::trace"
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut collect = Collect(Fields::new());
        event.record(&mut collect);
        let name = event.metadata().name();
        self.0.lock().unwrap().push((name, collect.0));
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[test]
fn trace_points_tell_of_start_and_stop_and_of_each_request_once_per_end() {
    let listener = Listener::default();
    tracing::subscriber::set_global_default(listener.clone()).unwrap();
    let mut vmm = Embedded::new(&null_device(1 << 20));
    let mut queue = vmm.queue(3, 16);
    let read = Request::read(0, 1024);
    let read_head = queue.add(&read, &Framing::cut(&[16], &[512, 512]));
    queue.publish();
    assert_eq!(queue.next().status, Some(OK));
    // Answered on the spot.
    let beyond = Request::read(1 << 40, 512);
    let beyond_head = queue.add(&beyond, &Framing::joined());
    queue.publish();
    assert_eq!(queue.next().status, Some(IOERR));
    let thread = vmm.plane.device().thread_of(3).unwrap();
    vmm.plane.stop().unwrap();

    let told = listener.0.lock().unwrap();
    let of = |wanted: &str| -> Vec<Fields> {
        let named = told.iter().filter(|(name, _)| *name == wanted);
        named.map(|(_, fields)| fields.clone()).collect()
    };
    let fields = |pairs: &[(&'static str, u64)]| pairs.iter().copied().collect::<Fields>();
    assert_eq!(
        of("process_request"),
        [
            fields(&[
                ("queue", 3),
                ("head", read_head.into()),
                ("out_num", 1),
                ("in_num", 3)
            ]),
            fields(&[
                ("queue", 3),
                ("head", beyond_head.into()),
                ("out_num", 1),
                ("in_num", 1)
            ]),
        ]
    );
    assert_eq!(
        of("complete_request"),
        [
            fields(&[
                ("queue", 3),
                ("head", read_head.into()),
                ("status", 0),
                ("used_len", 1025)
            ]),
            fields(&[
                ("queue", 3),
                ("head", beyond_head.into()),
                ("status", 1),
                ("used_len", 0)
            ]),
        ]
    );
    // The first thread, and the queue's if that is another.
    let mut threads = vec![0];
    threads.extend((thread != 0).then_some(u64::from(thread)));
    for point in ["start", "stop"] {
        let mut seen: Vec<u64> = of(point).iter().map(|fields| fields["thread"]).collect();
        seen.sort_unstable();
        assert_eq!(seen, threads, "{point}");
    }
}
