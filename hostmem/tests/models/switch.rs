//! A log is switched on, replaced and switched off while threads mark in it.

use super::watched::Watched;
use super::{
    switch_real as real, switch_without_barrier as without_barrier,
    switch_without_fence as without_fence,
};

/// Loom looks at all orders with up to so many points at which a thread is interrupted where it need
/// not be. Known errors of this kind show with two.
const PREEMPTIONS: usize = 3;

fn model(f: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(PREEMPTIONS);
    model.check(f);
}

/// A log that knows whether it is in use when it goes.
#[derive(Default)]
struct Log {
    memory: Watched,
    marked: loom::sync::atomic::AtomicBool,
}

impl Log {
    fn mark(&self) {
        self.memory.touch();
        self.marked
            .store(true, loom::sync::atomic::Ordering::Release);
    }

    fn is_marked(&self) -> bool {
        self.marked.load(loom::sync::atomic::Ordering::Acquire)
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.memory.free();
    }
}

/// A thread writes to a page and marks it, while another switches the log on and then copies all pages.
macro_rules! page_is_copied_or_marked {
    ($module:ident) => {
        model(|| {
            use loom::sync::Arc;
            use loom::sync::atomic::{AtomicUsize, Ordering};

            let switch = Arc::new($module::switch::Switch::<Log>::default());
            let page = Arc::new(AtomicUsize::new(0));
            let writer = loom::thread::spawn({
                let (switch, page) = (Arc::clone(&switch), Arc::clone(&page));
                move || {
                    page.store(1, Ordering::Relaxed);
                    switch.with(Log::mark);
                }
            });
            let log = Arc::new(Log::default());
            switch.replace(Some(Arc::clone(&log))).unwrap();
            let copy = page.load(Ordering::Relaxed);
            writer.join().unwrap();
            assert!(copy == 1 || log.is_marked(), "lost a write");
        })
    };
}

#[test]
fn write_is_copied_or_marked_when_a_log_is_switched_on() {
    page_is_copied_or_marked!(real);
}

#[test]
#[should_panic(expected = "lost a write")]
fn write_may_be_lost_without_the_barrier() {
    page_is_copied_or_marked!(without_barrier);
}

/// A thread marks, while another switches off the log, which then goes.
macro_rules! log_is_not_freed_in_use {
    ($module:ident) => {
        model(|| {
            use loom::sync::Arc;

            let switch = Arc::new($module::switch::Switch::<Log>::default());
            switch.replace(Some(Arc::new(Log::default()))).unwrap();
            let writer = loom::thread::spawn({
                let switch = Arc::clone(&switch);
                move || {
                    switch.with(Log::mark);
                }
            });
            drop(switch.replace(None).unwrap());
            writer.join().unwrap();
        })
    };
}

#[test]
fn log_is_not_freed_while_a_writer_is_in_it() {
    log_is_not_freed_in_use!(real);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn log_may_be_freed_in_use_without_the_fences() {
    log_is_not_freed_in_use!(without_fence);
}

/// Two threads mark while the log is replaced by another, and that by a third, in the place that the
/// first was in: every mark is in the log that was in force, and logs go when nobody is in them.
#[test]
fn logs_that_follow_one_another_are_neither_mixed_up_nor_freed_in_use() {
    model(|| {
        use loom::sync::Arc;
        use real::switch::Switch;

        let switch = Arc::new(Switch::<Log>::default());
        switch.replace(Some(Arc::new(Log::default()))).unwrap();
        let writer = loom::thread::spawn({
            let switch = Arc::clone(&switch);
            move || {
                assert!(switch.with(Log::mark).is_some());
            }
        });
        let old = switch
            .replace(Some(Arc::new(Log::default())))
            .unwrap()
            .unwrap();
        let in_old = old.is_marked();
        drop(old);
        let middle = switch
            .replace(Some(Arc::new(Log::default())))
            .unwrap()
            .unwrap();
        let in_middle = middle.is_marked();
        drop(middle);
        writer.join().unwrap();
        let in_last = switch.with(Log::is_marked).unwrap();
        assert_eq!(
            [in_old, in_middle, in_last]
                .map(usize::from)
                .iter()
                .sum::<usize>(),
            1
        );
    });
}

#[test]
fn two_writers_and_the_end_of_a_log() {
    model(|| {
        use loom::sync::Arc;
        use real::switch::Switch;

        let switch = Arc::new(Switch::<Log>::default());
        switch.replace(Some(Arc::new(Log::default()))).unwrap();
        let writers = [(); 2].map(|()| {
            let switch = Arc::clone(&switch);
            loom::thread::spawn(move || switch.with(Log::mark).is_some())
        });
        let old = switch.replace(None).unwrap().unwrap();
        let is_marked = old.is_marked();
        drop(old);
        let marked = writers.map(|writer| writer.join().unwrap());
        assert_eq!(marked.contains(&true), is_marked, "marked after the end");
    });
}
