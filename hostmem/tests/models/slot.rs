//! The signal handler reads a slot while control fills, empties and fills it again.

use super::{slot_real as real, slot_unfenced as unfenced};

/// Two mappings that differ in every number.
macro_rules! never_mixed {
    ($module:ident) => {
        let mut model = loom::model::Builder::new();
        // Without a bound it takes minutes, and finds no more.
        model.preemption_bound = Some(3);
        model.check(|| {
            use loom::sync::Arc;
            use $module::slot::{Extent, Slot};

            const FIRST: Extent = Extent {
                start: 0x1000,
                len: 0x9000,
                page_size: 0x1000,
            };
            const SECOND: Extent = Extent {
                start: 0x20_0000,
                len: 0x40_0000,
                page_size: 0x20_0000,
            };

            let slot = Arc::new(Slot::default());
            slot.set(Some(FIRST));
            let reader = loom::thread::spawn({
                let slot = Arc::clone(&slot);
                move || slot.get()
            });
            slot.set(None);
            slot.set(Some(SECOND));
            let seen = reader.join().unwrap();
            assert!(
                [None, Some(FIRST), Some(SECOND)].contains(&seen),
                "{seen:?}"
            );
        })
    };
}

#[test]
fn slot_is_never_seen_half_written() {
    never_mixed!(real);
}

#[test]
#[should_panic(expected = "Some(Extent")]
fn slot_without_fences_is_seen_half_written() {
    never_mixed!(unfenced);
}
