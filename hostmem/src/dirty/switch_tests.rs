//! Of `switch.rs`, which is compiled against loom as well and has none of its own for that reason.

use std::sync::Arc;

use super::switch::Switch;

#[test]
fn log_in_force_is_the_one_put_there_last() {
    let switch = Switch::default();
    assert_eq!(switch.with(|n: &u32| *n), None);
    assert_eq!(switch.current(), None);
    for n in 0..5 {
        let old = switch.replace(Some(Arc::new(n))).unwrap();
        assert_eq!(old.as_deref().copied(), n.checked_sub(1));
        assert_eq!(switch.with(|n| *n), Some(n));
        assert_eq!(switch.current().as_deref(), Some(&n));
    }
    assert_eq!(switch.replace(None).unwrap().as_deref(), Some(&4));
    assert_eq!(switch.replace(None).unwrap(), None);
    assert_eq!(switch.with(|n| *n), None);
}

#[test]
fn panic_of_a_writer_does_not_hold_up_control() {
    let switch = Switch::default();
    switch.replace(Some(Arc::new(1))).unwrap();
    let panicked = std::panic::catch_unwind(|| {
        switch.with(|_| panic!("on purpose"));
    });
    assert!(panicked.is_err());
    assert_eq!(switch.replace(None).unwrap().as_deref(), Some(&1));
}

#[test]
fn logs_are_let_go_of() {
    let switch = Switch::default();
    let logs = [Arc::new(1), Arc::new(2)];
    for log in &logs {
        switch.replace(Some(Arc::clone(log))).unwrap();
    }
    assert_eq!(logs.each_ref().map(Arc::strong_count), [1, 2]);
    drop(switch);
    assert_eq!(logs.each_ref().map(Arc::strong_count), [1, 1]);
}
