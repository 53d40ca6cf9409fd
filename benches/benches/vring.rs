//! Pop and push of a chain of three descriptors: vring's two formats beside virtio-queue.

use std::path::Path;
use std::time::Duration;

use benches::rings::{Layout, Ring, Server};
use benches::rounds::{Contender, Mode, compare};
use benches::{Error, instructions, workload};
use criterion::{Criterion, Throughput};

const BATCHES: [u16; 2] = [1, 32];

/// The columns. The last two are the same peer, used in its two ways.
const COLUMNS: [(&str, Server); 4] = [
    ("vring-split", Server::VringSplit),
    ("vring-packed", Server::VringPacked),
    ("virtio-queue-iter", Server::VirtioQueueIter),
    ("virtio-queue", Server::VirtioQueue),
];

/// Chains for the count of allocations.
const ALLOCATION_UNITS: u64 = 100_000;

fn main() -> Result<(), Error> {
    let mode = Mode::from_args();
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    for layout in [Layout::Direct, Layout::Indirect] {
        for batch in BATCHES {
            let name = format!("vring/{layout:?}/batch-{batch}").to_lowercase();
            let mut rings = Vec::new();
            for (column, server) in COLUMNS {
                rings.push((column, Ring::new(server, layout)?));
            }
            let mut group = criterion.benchmark_group(&name);
            group.throughput(Throughput::Elements(u64::from(batch)));
            for (column, ring) in &mut rings {
                group.bench_function(*column, |b| {
                    b.iter_custom(|batches| ring.run(batches, batch).expect("a sound ring"));
                });
            }
            group.finish();

            let chains = mode.pick(320_000, 320);
            let mut contenders: Vec<_> = rings
                .iter_mut()
                .map(|(column, ring)| {
                    Contender::new(*column, move |n| ring.run(n / u64::from(batch), batch))
                })
                .collect();
            compare(mode, &format!("{name}, chains"), chains, &mut contenders)?;
        }
    }
    criterion.final_summary();
    if mode == Mode::Measure {
        print_counts()?;
    }
    Ok(())
}

/// What does not depend on the clock, per chain.
fn print_counts() -> Result<(), Error> {
    let load = Path::new(env!("CARGO_BIN_EXE_load"));
    print!("\nper chain, batches of 32          ");
    for (column, _) in COLUMNS {
        print!("{column:>18}");
    }
    println!();
    for layout in ["direct", "indirect"] {
        print!("  {:<32}", format!("instructions, {layout}"));
        for (column, _) in COLUMNS {
            let name = format!("{column}-{layout}");
            let count = instructions::per_unit(load, &name)?;
            print!("{count:>18.1}");
        }
        print!("\n  {:<32}", format!("allocations, {layout}"));
        for (column, _) in COLUMNS {
            let allocations = workload::run(&format!("{column}-{layout}"), ALLOCATION_UNITS)?;
            let each = allocations as f64 / (ALLOCATION_UNITS / 2) as f64;
            print!("{each:>18.4}");
        }
        println!();
    }
    Ok(())
}
