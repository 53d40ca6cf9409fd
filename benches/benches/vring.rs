//! Pop and push of a chain of three descriptors: vring beside virtio-queue.

use std::time::Duration;

use benches::Error;
use benches::rings::{Layout, Ring, Server};
use benches::rounds::{Contender, Mode, compare};
use criterion::{Criterion, Throughput};

const BATCHES: [u16; 2] = [1, 32];

fn main() -> Result<(), Error> {
    let mode = Mode::from_args();
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    for layout in [Layout::Direct, Layout::Indirect] {
        for batch in BATCHES {
            let name = format!("vring/{layout:?}/batch-{batch}").to_lowercase();
            let mut ours = Ring::new(Server::Vring, layout)?;
            let mut peer = Ring::new(Server::VirtioQueue, layout)?;

            let mut group = criterion.benchmark_group(&name);
            group.throughput(Throughput::Elements(u64::from(batch)));
            for (server, ring) in [("vring", &mut ours), ("virtio-queue", &mut peer)] {
                group.bench_function(server, |b| {
                    b.iter_custom(|batches| ring.run(batches, batch).expect("a sound ring"));
                });
            }
            group.finish();

            let chains = mode.pick(320_000, 320);
            let mut contenders = [
                Contender::new("vring", |n| ours.run(n / u64::from(batch), batch)),
                Contender::new("virtio-queue", |n| peer.run(n / u64::from(batch), batch)),
            ];
            compare(mode, &format!("{name}, chains"), chains, &mut contenders)?;
        }
    }
    criterion.final_summary();
    Ok(())
}
