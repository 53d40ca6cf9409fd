//! What is measured, and the bars it is held against.

use super::sample::Metric;

/// What serves as the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Image {
    /// Nothing: what is written is gone, what is read is anything.
    Null,
    /// A file in memory, opened with `O_DIRECT`.
    Tmpfs,
    /// A file on a disk, opened with `O_DIRECT`.
    Disk,
}

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Load {
    pub(crate) rw: &'static str,
    pub(crate) bs: &'static str,
    pub(crate) depth: u16,
    /// The guest spins on the used ring; else it sleeps for its interrupt, as Linux's driver does.
    pub(crate) polls: bool,
    /// Time that the guest is busy with each request, as fio's option has it.
    pub(crate) thinktime: Option<&'static str>,
    /// Requests a second, if they are paced.
    pub(crate) rate: Option<u32>,
    pub(crate) devices: u16,
    pub(crate) memory_regions: u16,
}

/// 4 KiB at random, one at a time, from a guest that sleeps.
const LOAD: Load = Load {
    rw: "randread",
    bs: "4k",
    depth: 1,
    polls: false,
    thinktime: None,
    rate: None,
    devices: 1,
    memory_regions: 1,
};

/// What is done with a back-end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Job {
    Load(Load),
    /// Started over and over.
    Start,
    /// Left alone.
    Idle,
}

/// A way to run this back-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ours {
    /// As it is unless told otherwise: Linux AIO, adaptive polling, merging.
    Default,
    IoUring,
    NoPolling,
    NoMerging,
}

/// Which peers take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peers {
    None,
    All,
    /// qemu-storage-daemon with its default engine for direct I/O, where another of its would tell nothing.
    QemuNative,
}

/// A bare loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Floor {
    Libaio,
    IoUring,
    Memcpy,
}

/// Whom a figure is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Against {
    /// Each qemu-storage-daemon there is, at its best.
    Qemu,
    /// Each peer there is, at its best.
    EveryPeer,
    Ours(Ours),
    Floor(Floor),
    /// fio with this engine.
    Fio(Floor),
    /// Nobody: the figure is its own.
    Nobody,
}

/// What a figure has to be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Limit {
    AtLeast(f64),
    AtMost(f64),
    MoreThan(f64),
}

impl Limit {
    pub(crate) fn is_met_by(self, figure: f64) -> bool {
        match self {
            Self::AtLeast(limit) => figure >= limit,
            Self::AtMost(limit) => figure <= limit,
            Self::MoreThan(limit) => figure > limit,
        }
    }
}

/// A requirement.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Bar {
    pub(crate) ours: Ours,
    pub(crate) metric: Metric,
    pub(crate) against: Against,
    pub(crate) limit: Limit,
}

/// A line of points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Series {
    /// The cost of a request over the depth of the queue.
    Depth,
    /// The same over devices in one process.
    Devices,
    /// The same over regions of guest memory.
    MemoryRegions,
    /// The latency over the depth of the queue, beside the peers'.
    Latency,
}

impl Series {
    /// Those that have to be flat, from which point on, and why from there.
    pub(crate) const FLAT: [(Self, u16, &'static str); 3] = [
        (Self::Depth, BATCHING, "depth, from 32 on, client polling"),
        (
            Self::Devices,
            1,
            "devices, 32 requests in flight on each, clients sleeping",
        ),
        (
            Self::MemoryRegions,
            1,
            "regions of guest memory, depth 32, client polling",
        ),
    ];
}

/// The depth from which on what is done once a batch is little beside what is done for each request: the depth of the
/// other bars.
const BATCHING: u16 = 32;

/// How flat a series has to be: its dearest point by its cheapest.
pub(crate) const FLAT: f64 = 1.3;

/// One work, for several contenders.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    /// As `--rows` has it.
    pub(crate) id: String,
    pub(crate) title: String,
    pub(crate) image: Image,
    pub(crate) job: Job,
    pub(crate) ours: &'static [Ours],
    pub(crate) peers: Peers,
    pub(crate) floors: &'static [Floor],
    /// fio with these engines on the same file.
    pub(crate) fio: &'static [Floor],
    pub(crate) bars: Vec<Bar>,
    pub(crate) points: Vec<(Series, u16)>,
}

impl Row {
    fn new(id: impl Into<String>, title: impl Into<String>, image: Image, load: Load) -> Self {
        Self {
            id: id.into(),
            title: title.into(),
            image,
            job: Job::Load(load),
            ours: &[Ours::Default],
            peers: Peers::All,
            floors: &[],
            fio: &[],
            bars: Vec::new(),
            points: Vec::new(),
        }
    }

    fn bar(self, metric: Metric, against: Against, limit: Limit) -> Self {
        self.bar_of(Ours::Default, metric, against, limit)
    }

    fn bar_of(mut self, ours: Ours, metric: Metric, against: Against, limit: Limit) -> Self {
        self.bars.push(Bar {
            ours,
            metric,
            against,
            limit,
        });
        self
    }

    fn point(mut self, series: Series, x: u16) -> Self {
        self.points.push((series, x));
        self
    }
}

/// All of them, in the order of the report. `quick`: fewer points of the lines.
pub(crate) fn all(quick: bool) -> Vec<Row> {
    let mut rows = null_rows();
    rows.extend(tmpfs_rows());
    rows.extend(disk_rows());
    rows.extend(own_rows());
    rows.extend(line_rows(quick));
    rows
}

fn null_rows() -> Vec<Row> {
    let polling = &[Ours::Default, Ours::NoPolling];
    vec![
        Row {
            ours: polling,
            ..Row::new(
                "null-d32",
                "null device, 4 KiB reads, depth 32, client sleeping",
                Image::Null,
                Load { depth: 32, ..LOAD },
            )
        }
        .bar(Metric::Rate, Against::Qemu, Limit::AtLeast(4.3))
        .bar(Metric::BackendCpu, Against::Qemu, Limit::AtMost(1.0 / 4.3)),
        Row::new(
            "null-d32-busy",
            "null device, 4 KiB reads, depth 32, client sleeping, and busy for 0.1 us with each request",
            Image::Null,
            Load {
                depth: 32,
                thinktime: Some("100ns"),
                ..LOAD
            },
        ),
        Row {
            ours: polling,
            ..Row::new(
                "null-d64-poll",
                "null device, 4 KiB reads, depth 64, client polling",
                Image::Null,
                Load {
                    depth: 64,
                    polls: true,
                    ..LOAD
                },
            )
        }
        .bar(Metric::Rate, Against::Qemu, Limit::AtLeast(3.8)),
    ]
}

fn tmpfs_rows() -> Vec<Row> {
    const FLOORS: &[Floor] = &[Floor::Libaio, Floor::IoUring, Floor::Memcpy];
    const ENGINES: &[Ours] = &[Ours::Default, Ours::IoUring];
    const MERGING: &[Ours] = &[Ours::Default, Ours::NoMerging];
    let mut rows = vec![
        Row {
            ours: &[Ours::Default, Ours::NoPolling],
            ..Row::new(
                "tmpfs-paced",
                "tmpfs image, 4 KiB random reads, 5,000 a second",
                Image::Tmpfs,
                Load {
                    rate: Some(5000),
                    ..LOAD
                },
            )
        }
        .bar(
            Metric::BackendCpu,
            Against::Ours(Ours::NoPolling),
            Limit::AtMost(1.2),
        ),
    ];
    for rw in ["randread", "randwrite"] {
        let title = format!("tmpfs image, 4 KiB {rw}, depth 32, client sleeping");
        let load = Load {
            rw,
            depth: 32,
            ..LOAD
        };
        let mut row = Row {
            ours: ENGINES,
            floors: FLOORS,
            ..Row::new(format!("tmpfs-{rw}-d32"), title, Image::Tmpfs, load)
        }
        .bar(Metric::Rate, Against::Qemu, Limit::AtLeast(1.8))
        .bar(
            Metric::BackendCpu,
            Against::Floor(Floor::Libaio),
            Limit::AtMost(1.2),
        );
        if rw == "randread" {
            row = row.point(Series::Latency, 32);
        }
        rows.push(row);
        // The back-end's own work, without what it takes to wake a client, which a bare loop has not got either.
        rows.push(
            Row {
                floors: &[Floor::Libaio],
                peers: Peers::QemuNative,
                ..Row::new(
                    format!("tmpfs-{rw}-d32-poll"),
                    format!("tmpfs image, 4 KiB {rw}, depth 32, client polling"),
                    Image::Tmpfs,
                    Load {
                        polls: true,
                        ..load
                    },
                )
            }
            .bar(
                Metric::BackendCpu,
                Against::Floor(Floor::Libaio),
                Limit::AtMost(1.2),
            ),
        );
    }
    rows.push(
        Row {
            ours: &[Ours::Default, Ours::IoUring, Ours::NoPolling],
            floors: FLOORS,
            ..Row::new(
                "tmpfs-randread-d1",
                "tmpfs image, 4 KiB randread, depth 1, client sleeping",
                Image::Tmpfs,
                LOAD,
            )
        }
        .bar(Metric::Median, Against::Qemu, Limit::AtMost(0.25))
        .bar_of(
            Ours::NoPolling,
            Metric::Median,
            Against::Qemu,
            Limit::AtMost(1.0),
        )
        .point(Series::Latency, 1),
    );
    rows.push(
        Row {
            ours: ENGINES,
            ..Row::new(
                "tmpfs-randread-d1-poll",
                "tmpfs image, 4 KiB randread, depth 1, client polling",
                Image::Tmpfs,
                Load {
                    polls: true,
                    ..LOAD
                },
            )
        }
        .bar(Metric::Median, Against::Qemu, Limit::AtMost(0.8)),
    );
    for rw in ["read", "write"] {
        let title = format!("tmpfs image, sequential 4 KiB {rw}s, depth 32, client sleeping");
        let load = Load {
            rw,
            depth: 32,
            ..LOAD
        };
        rows.push(
            Row {
                ours: MERGING,
                peers: Peers::QemuNative,
                ..Row::new(format!("tmpfs-seq{rw}-d32"), title, Image::Tmpfs, load)
            }
            .bar(
                Metric::Rate,
                Against::Ours(Ours::NoMerging),
                Limit::AtLeast(1.5),
            ),
        );
    }
    rows.push(
        Row {
            ours: ENGINES,
            floors: FLOORS,
            peers: Peers::QemuNative,
            ..Row::new(
                "tmpfs-64k-d16",
                "tmpfs image, 64 KiB randread, depth 16, client sleeping",
                Image::Tmpfs,
                Load {
                    bs: "64k",
                    depth: 16,
                    ..LOAD
                },
            )
        }
        .bar(
            Metric::Rate,
            Against::Floor(Floor::Libaio),
            Limit::AtLeast(1.0 / 1.1),
        ),
    );
    rows.push(
        Row {
            floors: &[Floor::Libaio],
            peers: Peers::QemuNative,
            ..Row::new(
                "tmpfs-64k-d16-poll",
                "tmpfs image, 64 KiB randread, depth 16, client polling",
                Image::Tmpfs,
                Load {
                    bs: "64k",
                    depth: 16,
                    polls: true,
                    ..LOAD
                },
            )
        }
        .bar(
            Metric::Rate,
            Against::Floor(Floor::Libaio),
            Limit::AtLeast(1.0 / 1.1),
        ),
    );
    rows
}

fn disk_rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for rw in ["randread", "randwrite"] {
        for depth in [1, 32, 64] {
            let title = format!("disk image, 4 KiB {rw}, depth {depth}, client sleeping");
            let row = Row {
                ours: &[Ours::Default, Ours::IoUring],
                floors: &[Floor::Libaio],
                fio: &[Floor::Libaio, Floor::IoUring],
                ..Row::new(
                    format!("disk-{rw}-d{depth}"),
                    title,
                    Image::Disk,
                    Load { rw, depth, ..LOAD },
                )
            };
            rows.push(
                row.bar(
                    Metric::Rate,
                    Against::Fio(Floor::Libaio),
                    Limit::AtLeast(0.97),
                )
                .bar_of(
                    Ours::IoUring,
                    Metric::Rate,
                    Against::Fio(Floor::IoUring),
                    Limit::AtLeast(0.97),
                )
                .bar(Metric::Rate, Against::EveryPeer, Limit::MoreThan(1.0)),
            );
        }
    }
    rows
}

/// What takes no load.
fn own_rows() -> Vec<Row> {
    let row = |id: &str, title: &str, job| Row {
        job,
        peers: Peers::QemuNative,
        ..Row::new(id, title, Image::Tmpfs, LOAD)
    };
    vec![
        row(
            "idle",
            "an idle device: nobody connected, and a guest connected that does nothing",
            Job::Idle,
        )
        .bar(Metric::IdleCpu, Against::Nobody, Limit::AtMost(0.0))
        .bar(Metric::ConnectedCpu, Against::Nobody, Limit::AtMost(0.0))
        .bar(Metric::Resident, Against::Nobody, Limit::AtMost(8192.0))
        .bar(
            Metric::ConnectedResident,
            Against::Nobody,
            Limit::AtMost(8192.0),
        ),
        row("start", "from exec to the socket accepting", Job::Start).bar(
            Metric::Start,
            Against::Nobody,
            Limit::AtMost(30.0),
        ),
    ]
}

fn line_rows(quick: bool) -> Vec<Row> {
    let mut rows = Vec::new();
    let pick = |full: &'static [u16], few: &'static [u16]| if quick { few } else { full };
    let own = |id: String, title: String, load| Row {
        peers: Peers::None,
        ..Row::new(id, title, Image::Null, load)
    };
    for &depth in pick(&[1, 2, 4, 8, 16, 32, 64, 128, 256], &[1, 32, 256]) {
        let title = format!("null device, depth {depth}, client polling");
        // With a client that sleeps the figure is of how long that takes to wake: the back-end polls meanwhile.
        let load = Load {
            depth,
            polls: true,
            ..LOAD
        };
        let row = own(format!("scale-depth-{depth}"), title, load);
        rows.push(row.point(Series::Depth, depth));
    }
    for &devices in pick(&[1, 4, 16, 64], &[1, 64]) {
        let title = format!("null devices, {devices} in one process, depth 32 each");
        let load = Load {
            devices,
            depth: 32,
            ..LOAD
        };
        let row = own(format!("scale-devices-{devices}"), title, load);
        rows.push(row.point(Series::Devices, devices));
    }
    for &memory_regions in pick(&[1, 8, 64, 509], &[1, 509]) {
        let title = format!(
            "null device, guest memory in {memory_regions} regions, depth 32, client polling"
        );
        let load = Load {
            memory_regions,
            depth: 32,
            polls: true,
            ..LOAD
        };
        let row = own(format!("scale-regions-{memory_regions}"), title, load);
        rows.push(row.point(Series::MemoryRegions, memory_regions));
    }
    // 1 and 32 are rows of their own.
    for &depth in pick(&[4, 16, 64, 256], &[256]) {
        let title = format!("tmpfs image, 4 KiB randread, depth {depth}, client sleeping");
        let row = Row {
            peers: Peers::QemuNative,
            ..Row::new(
                format!("latency-d{depth}"),
                title,
                Image::Tmpfs,
                Load { depth, ..LOAD },
            )
        };
        rows.push(row.point(Series::Latency, depth));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_row_has_a_name_of_its_own() {
        let rows = all(false);
        let names: HashSet<_> = rows.iter().map(|row| &row.id).collect();
        assert_eq!(names.len(), rows.len());
    }

    #[test]
    fn a_quick_run_has_a_row_for_every_bar_and_series() {
        let bars = |quick| -> usize { all(quick).iter().map(|row| row.bars.len()).sum() };
        assert_eq!(bars(true), bars(false));
        for (series, ..) in Series::FLAT {
            let points = |row: &Row| row.points.iter().any(|point| point.0 == series);
            assert!(all(true).iter().filter(|row| points(row)).count() >= 2);
        }
    }

    #[test]
    fn whoever_a_bar_compares_takes_part_in_its_row() {
        for row in all(false) {
            for bar in &row.bars {
                assert!(row.ours.contains(&bar.ours), "{}", row.id);
                match bar.against {
                    Against::Ours(ours) => assert!(row.ours.contains(&ours), "{}", row.id),
                    Against::Floor(floor) => assert!(row.floors.contains(&floor), "{}", row.id),
                    Against::Fio(engine) => assert!(row.fio.contains(&engine), "{}", row.id),
                    Against::Qemu | Against::EveryPeer => assert_eq!(row.peers, Peers::All),
                    Against::Nobody => {}
                }
            }
        }
    }

    #[test]
    fn a_limit_is_met_at_the_limit() {
        assert!(Limit::AtLeast(1.8).is_met_by(1.8) && !Limit::AtLeast(1.8).is_met_by(1.79));
        assert!(Limit::AtMost(1.2).is_met_by(1.2) && !Limit::AtMost(1.2).is_met_by(1.21));
        assert!(!Limit::MoreThan(1.0).is_met_by(1.0));
        // What was not measured is not met.
        assert!(!Limit::AtMost(1.0).is_met_by(f64::NAN));
    }
}
