//! What the simulations show.

use super::*;

/// Simulations in a plain test run; `make crash ROUNDS=n` sets another number.
const ROUNDS: u64 = 40;

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| {
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name} is to be a number, and is {value:?}"))
    })
}

#[test]
fn no_loss_of_power_takes_what_was_acknowledged_or_shows_what_was_not_written() {
    let first = from_environment("CRASH_SEED", 1);
    let rounds = from_environment("CRASH_ROUNDS", ROUNDS);
    let mut sum = Report::default();
    for seed in first..first + rounds {
        let plan = Plan::of(seed);
        match simulate(plan) {
            Ok(report) => sum = sum.plus(&report),
            Err(wrong) => panic!("{wrong}\n{plan:?}\nagain: make crash SEED={seed} ROUNDS=1"),
        }
    }
    println!("{sum:#?}");
    if rounds < ROUNDS {
        return;
    }
    // Whether all that was to be tried has been.
    let Report {
        crash_points,
        outcomes: _,
        lives,
        requests,
        failed,
        merged,
        bounced,
        stops,
        pauses,
        toggles,
        new_maps,
        deeds,
    } = sum;
    assert!(crash_points > 100 * rounds && lives == 3 * rounds && requests > 100 * rounds);
    let kinds = [
        failed,
        merged,
        bounced,
        stops,
        pauses,
        toggles,
        new_maps,
        deeds.syncs,
    ];
    assert!(kinds.iter().all(|&count| count > 10));
    let faults = [
        deeds.short,
        deeds.failed,
        deeds.again,
        deeds.busy,
        deeds.refused,
        deeds.failed_syncs,
    ];
    assert!(faults.iter().all(|&count| count > 10));
}

/// The crash points until a mistake is found.
fn crash_points_until_found(mistake: Mistake, adapt: impl Fn(&mut Plan)) -> u64 {
    let mut before = 0;
    for seed in 1..200 {
        let mut plan = Plan {
            mistake: Some(mistake),
            ..Plan::of(seed)
        };
        adapt(&mut plan);
        let mut simulation = Simulation::new(plan);
        for _ in 0..STEPS {
            if simulation.step().is_err() {
                return before + simulation.report.crash_points;
            }
        }
        before += simulation.report.crash_points;
    }
    panic!("{mistake:?} is not noticed in {before} crash points");
}

#[test]
fn mistakes_are_noticed() {
    let any = |_: &mut Plan| {};
    let two_threads = |plan: &mut Plan| (plan.threads, plan.queues) = (2, 2);
    let found = [
        (
            "a flush that does not wait for another queue's writes",
            crash_points_until_found(Mistake::FlushOfOneThread, two_threads),
        ),
        (
            "a write acknowledged before it is stable, in write-through",
            crash_points_until_found(Mistake::NoWriteThrough, |plan| plan.cache = Cache::NoFlush),
        ),
        (
            "the same with the cache turned off at run time",
            crash_points_until_found(Mistake::NoWriteThrough, |plan| plan.cache = Cache::Toggled),
        ),
        (
            "fdatasync skipped",
            crash_points_until_found(Mistake::Disk(Lie::SyncDoesNothing), any),
        ),
        (
            "fdatasync of one queue's writes",
            crash_points_until_found(Mistake::Disk(Lie::SyncOfOneQueue), two_threads),
        ),
        (
            "a failed fdatasync called done",
            crash_points_until_found(Mistake::Disk(Lie::FailedSyncIsDone), |plan| {
                plan.faults.fail_sync = 300;
            }),
        ),
        (
            "an fdatasync trusted after one that has failed",
            crash_points_until_found(Mistake::TrustAfterFailure, |plan| {
                plan.faults = Faults {
                    fail_sync: 50,
                    failed_sync_forgets: true,
                    ..Faults::default()
                };
            }),
        ),
        (
            "a write called done before it was written",
            crash_points_until_found(Mistake::Disk(Lie::WriteDoneEarly), any),
        ),
        (
            "a merged write torn, and called done",
            crash_points_until_found(Mistake::Disk(Lie::PartIsAll), any),
        ),
        (
            "a sector written in the wrong place",
            crash_points_until_found(Mistake::Disk(Lie::NextSector), any),
        ),
        (
            "reads that miss what is in the cache",
            crash_points_until_found(Mistake::Disk(Lie::StaleRead), any),
        ),
        (
            "zeroes not written",
            crash_points_until_found(Mistake::Disk(Lie::NoZeroes), any),
        ),
    ];
    for (mistake, crash_points) in found {
        println!("{crash_points:6} crash points until found: {mistake}");
    }
}
