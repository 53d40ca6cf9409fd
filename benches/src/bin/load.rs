//! Runs one workload, for whoever counts or profiles: `load WORKLOAD UNITS`. Prints its allocations.

use benches::{Error, workload};

fn main() -> Result<(), Error> {
    let mut arguments = std::env::args().skip(1);
    let (Some(name), Some(units), None) = (arguments.next(), arguments.next(), arguments.next())
    else {
        let names: Vec<_> = workload::WORKLOADS.iter().map(|(name, _)| *name).collect();
        return Err(format!(
            "usage: load WORKLOAD UNITS\nworkloads: {}",
            names.join(", ")
        )
        .into());
    };
    let allocations = workload::run(&name, units.parse()?)?;
    println!("{allocations}");
    Ok(())
}
