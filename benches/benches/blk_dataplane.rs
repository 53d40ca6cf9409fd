//! Requests a second through a running `DataPlane`, guest and device on a processor each, beside a bare
//! `io_submit` loop that needs neither.

use std::cell::Cell;
use std::time::Duration;

use benches::Error;
use benches::disk::{Cost, Disk, Guest};
use benches::fixture::BlockFile;
use benches::reads::{Reader, Reads};
use benches::rounds::{Contender, Mode, compare};
use criterion::Criterion;

const DEPTHS: [u16; 2] = [1, 32];

/// 64 MiB when measuring: more than the caches.
const BLOCKS: u64 = 16_384;

fn main() -> Result<(), Error> {
    let mode = Mode::from_args();
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    let file = BlockFile::new(mode.pick(BLOCKS, 64))?;

    let mut group = criterion.benchmark_group("blk-dataplane");
    for (name, file) in [("null", None), ("image", Some(&file))] {
        for depth in DEPTHS {
            let mut disk = Disk::new(file, Guest::Sleeps)?;
            group.bench_function(format!("{name}/depth-{depth}"), |b| {
                b.iter_custom(|n| disk.run(n, depth).expect("a sound device").time);
            });
        }
    }
    group.finish();

    for depth in DEPTHS {
        let count = mode.pick(u64::from(depth) * 1000 + 9000, 200);
        let disk = |file, guest| Disk::new(file, guest);
        let costs: [Cell<Cost>; 4] = Default::default();
        let names = [
            "null, guest sleeps",
            "null, guest polls",
            "image, guest sleeps",
            "image, guest polls",
        ];
        let mut disks = [
            disk(None, Guest::Sleeps)?,
            disk(None, Guest::Polls)?,
            disk(Some(&file), Guest::Sleeps)?,
            disk(Some(&file), Guest::Polls)?,
        ];
        let mut bare = Reads::new(&file, Reader::Bare, depth, depth)?;
        let mut contenders: Vec<_> = disks
            .iter_mut()
            .zip(names)
            .zip(&costs)
            .map(|((disk, name), cell)| {
                Contender::new(name, move |n| {
                    let cost = disk.run(n, depth)?;
                    cell.set(cost);
                    Ok(cost.time)
                })
            })
            .collect();
        contenders.push(Contender::new("bare io_submit on the image", |n| {
            bare.run(n)
        }));
        let title = format!("blk-dataplane/depth-{depth}, requests");
        compare(mode, &title, count, &mut contenders)?;
        drop(contenders);
        if mode == Mode::Measure {
            print_costs(&names, &costs);
        }
    }
    criterion.final_summary();
    Ok(())
}

/// Of the last round.
fn print_costs(names: &[&str], costs: &[Cell<Cost>]) {
    println!(
        "  {:<22} {:>8} {:>11} {:>13} {:>12} {:>11} {:>12}",
        "per request",
        "kicks",
        "interrupts",
        "device sleeps",
        "guest sleeps",
        "operations",
        "allocations"
    );
    for (name, cost) in names.iter().zip(costs) {
        let cost = cost.get();
        println!(
            "  {:<22} {:>8.3} {:>11.3} {:>13.3} {:>12.3} {:>11.3} {:>12.4}",
            name,
            cost.per_request(cost.kicks),
            cost.per_request(cost.interrupts),
            cost.per_request(cost.device_sleeps),
            cost.per_request(cost.guest_sleeps),
            cost.per_request(cost.operations),
            cost.per_request(cost.allocations),
        );
    }
}
