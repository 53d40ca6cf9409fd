//! After the start nothing allocates, whatever the machine. Alone in its file: the count is of the whole
//! process, and another test would add to it.

use benches::workload;

const UNITS: u64 = 1280;

#[test]
fn no_workload_allocates_per_unit() {
    for (name, run) in workload::WORKLOADS {
        assert_eq!(run(UNITS).unwrap(), 0, "{name}");
    }
}
