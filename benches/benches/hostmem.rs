//! Looking guest addresses up: hostmem's `MemoryMap` beside vm-memory's `GuestMemoryMmap`, and with 509
//! regions beside one.

use std::hint::black_box;
use std::time::{Duration, Instant};

use benches::Error;
use benches::lookups::{ADDRESSES, Order, Regions, look_up};
use benches::rounds::{Contender, Mode, compare};
use criterion::{Criterion, Throughput};
use hostmem::{MAX_REGIONS, MemoryMap};
use vm_memory::{GuestAddress, GuestMemoryBackend};

fn timed<M: GuestMemoryBackend>(
    map: &M,
    addresses: &[GuestAddress],
    lookups: u64,
) -> Result<Duration, Error> {
    let expected = look_up(map, addresses);
    let start = Instant::now();
    for _ in 0..lookups.div_ceil(ADDRESSES) {
        if look_up(map, black_box(addresses)) != expected {
            return Err("two lookups differ".into());
        }
    }
    Ok(start.elapsed())
}

/// A contender without a peer: all regions against one.
struct Alone {
    name: String,
    map: MemoryMap,
    addresses: Vec<GuestAddress>,
}

impl Alone {
    fn new(name: &str, regions: &Regions, order: Order) -> Result<Self, Error> {
        Ok(Self {
            name: format!("{name}, {} region(s)", regions.count()),
            map: regions.hostmem()?,
            addresses: order.addresses(regions)?,
        })
    }
}

fn main() -> Result<(), Error> {
    let mode = Mode::from_args();
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    let lookups = mode.pick(ADDRESSES * 100, ADDRESSES);
    let layouts = [
        ("even", Regions::even(1)),
        ("even", Regions::even(8)),
        ("even", Regions::even(MAX_REGIONS)),
        ("pc", Regions::pc()),
    ];
    for (layout, regions) in &layouts {
        let (ours, peer) = (regions.hostmem()?, regions.vm_memory()?);
        for order in [Order::Sequential, Order::Random, Order::Runs8] {
            let addresses = order.addresses(regions)?;
            if look_up(&ours, &addresses) != look_up(&peer, &addresses) {
                return Err("the two maps differ".into());
            }
            let count = regions.count();
            let name = format!("hostmem/{layout}-{count}/{order:?}").to_lowercase();
            let mut group = criterion.benchmark_group(&name);
            group.throughput(Throughput::Elements(ADDRESSES));
            group.bench_function("hostmem", |b| b.iter(|| look_up(&ours, &addresses)));
            group.bench_function("GuestMemoryMmap", |b| b.iter(|| look_up(&peer, &addresses)));
            group.finish();

            let mut contenders = [
                Contender::new("hostmem", |n| timed(&ours, &addresses, n)),
                Contender::new("GuestMemoryMmap", |n| timed(&peer, &addresses, n)),
            ];
            compare(mode, &format!("{name}, lookups"), lookups, &mut contenders)?;
        }
    }
    for order in [Order::Sequential, Order::Random, Order::Runs8] {
        let all = layouts
            .iter()
            .rev()
            .map(|(layout, regions)| Alone::new(layout, regions, order))
            .collect::<Result<Vec<_>, _>>()?;
        let mut contenders: Vec<_> = all
            .iter()
            .map(|one| Contender::new(&one.name, |n| timed(&one.map, &one.addresses, n)))
            .collect();
        let title = format!("hostmem, {order:?}: any number of regions beside one, lookups");
        compare(mode, &title, lookups, &mut contenders)?;
    }
    criterion.final_summary();
    Ok(())
}
