use vm_memory::{GuestAddress, GuestMemoryMmap};
use vring::RingBase;
use vring::driver::SplitLayout;

use super::*;
use crate::device::{Backing, DeviceOptions};
use crate::threads::ThreadOptions;

#[test]
fn thread_starts_with_the_first_queue_it_serves() {
    let memory: Arc<GuestMemoryMmap> =
        Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap());
    let threads = ThreadOptions {
        count: Some(3),
        ..ThreadOptions::default()
    };
    let options = DeviceOptions {
        threads,
        ..DeviceOptions::default()
    };
    let device = Device::new(Backing::null(512), &options).unwrap();
    let mut plane = DataPlane::start(&device, memory).unwrap();
    let running = |plane: &DataPlane<GuestMemoryMmap>| -> Vec<bool> {
        plane.threads.iter().map(Option::is_some).collect()
    };
    let setup = |base| QueueSetup {
        size: 16,
        addresses: SplitLayout::new(GuestAddress(base), QueueSize::new(16).unwrap())
            .unwrap()
            .addresses(),
        base: RingBase::Split { next_avail: 0 },
        features: 1 << 32,
        kick: Some(EventNotifier::new().unwrap()),
        call: None,
        err: None,
        enabled: true,
        inflight: None,
    };
    assert_eq!(running(&plane), [true, false, false]);
    plane.start_queue(3, setup(0)).unwrap();
    assert_eq!(running(&plane), [true, false, false]);
    // A ring outside memory.
    assert!(plane.start_queue(1, setup(0x20000)).is_err());
    assert_eq!(running(&plane), [true, false, false]);
    plane.start_queue(5, setup(0x1000)).unwrap();
    assert_eq!(running(&plane), [true, false, true]);
    plane.stop_queue(5).unwrap();
    assert_eq!(running(&plane), [true, false, true]);
    plane.stop().unwrap();
}
