//! A processor each for the two sides of a device.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::Error;

/// The processors of device and guest: the first two that this thread may use, or one for both.
pub(crate) fn processors() -> Result<(usize, usize), Error> {
    let usable = sched_getaffinity(Pid::from_raw(0))?;
    let mut usable = (0..CpuSet::count()).filter(|&cpu| usable.is_set(cpu).unwrap_or(false));
    let first = usable.next().ok_or("no processor")?;
    let second = usable.next().unwrap_or_else(|| {
        eprintln!("one processor: device and guest share it, the rates mean little");
        first
    });
    Ok((first, second))
}

/// The calling thread, bound to one processor until this is dropped.
pub(crate) struct Bound(CpuSet);

impl Bound {
    pub(crate) fn to(processor: usize) -> Result<Self, Error> {
        let before = sched_getaffinity(Pid::from_raw(0))?;
        let mut set = CpuSet::new();
        set.set(processor)?;
        sched_setaffinity(Pid::from_raw(0), &set)?;
        Ok(Self(before))
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        // Worst, what this thread does next stays on one processor.
        let _ = sched_setaffinity(Pid::from_raw(0), &self.0);
    }
}
