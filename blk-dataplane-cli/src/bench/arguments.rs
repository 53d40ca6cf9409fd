//! The command line of `blk-dataplane bench`.

use std::path::PathBuf;
use std::time::Duration;

use blk_dataplane::load::{LoadOptions, Pattern};
use clap::{Args, ValueEnum};

use crate::cpu_list::{CpuList, parse_cpus};
use crate::size::parse_size;

/// Puts load on vhost-user-blk back-ends and measures them.
///
/// Connects to a back-end, this program's or any other, as a virtual machine would, with rings and buffers of its own
/// and no virtual machine. The options are fio's where fio has them. The table, or the JSON, is on stdout; everything
/// else on stderr. SIGINT or SIGTERM ends the measuring, and prints what was measured so far; the second one ends the
/// program.
#[derive(Clone, Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct BenchArguments {
    /// Socket of a back-end; once for each device that the load is put on, all at the same time.
    #[arg(long = "socket-path", value_name = "PATH", required = true)]
    pub(crate) sockets: Vec<PathBuf>,

    /// Which requests: read, write, randread, randwrite, rw, randrw, flush. What writes overwrites the disk.
    #[arg(long, value_name = "PATTERN", default_value_t = LoadOptions::default().rw)]
    rw: Pattern,

    /// Reads of a hundred requests, with rw and randrw.
    #[arg(long, value_name = "PERCENT", default_value_t = LoadOptions::default().rwmixread)]
    rwmixread: u8,

    /// A flush after so many writes; 0 for none.
    #[arg(long, value_name = "WRITES", default_value_t = LoadOptions::default().fsync)]
    fsync: u64,

    /// Bytes of a request.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "4k")]
    bs: u64,

    /// Requests in flight for each queue.
    #[arg(long, value_name = "NUMBER", default_value_t = LoadOptions::default().iodepth)]
    iodepth: u16,

    /// Requests made available at once, with one decision whether to kick.
    #[arg(long, value_name = "NUMBER", default_value_t = LoadOptions::default().iodepth_batch)]
    iodepth_batch: u16,

    /// Look at the clock once for all completions that are taken together, instead of once for each: the client takes
    /// half as long, and latencies are less exact.
    #[arg(long)]
    gtod_reduce: bool,

    /// How long the client is busy with each request before it makes it available, as a guest's kernel and programs
    /// are: 150ns, 2us; microseconds without a unit, as fio has it.
    #[arg(long, value_name = "TIME", value_parser = parse_thinktime, default_value = "0")]
    thinktime: Duration,

    /// Queues of each device, each with a thread that drives it.
    #[arg(long, value_name = "NUMBER", default_value_t = LoadOptions::default().numjobs)]
    numjobs: u16,

    /// How long is measured, in seconds [default: 10, unless --number-ios ends it]
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    runtime: Option<Duration>,

    /// How long the load is on before it is measured, in seconds.
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, default_value = "0")]
    ramp_time: Duration,

    /// End after so many requests of each queue.
    #[arg(long, value_name = "NUMBER")]
    number_ios: Option<u64>,

    /// Use so many bytes of the device [default: all from --offset on]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    size: Option<u64>,

    /// Where what is used begins.
    #[arg(long, value_name = "SIZE", value_parser = parse_offset, default_value = "0")]
    offset: u64,

    /// Loads with the same seed make the same requests.
    #[arg(long, value_name = "NUMBER", default_value_t = LoadOptions::default().randseed)]
    randseed: u64,

    /// Have each write say where it belongs and which it is, check each read for it, and read back at the end what
    /// was written. With reads alone every block must be of an earlier load with --verify and the same --randseed.
    #[arg(long)]
    verify: bool,

    /// Look for completions without sleeping; without it, sleep on the interrupt as Linux's driver does.
    #[arg(long)]
    poll: bool,

    /// Make so many requests a second for each queue, at even distances, whatever becomes of those before; their
    /// latencies count from when they were due.
    #[arg(long, value_name = "NUMBER")]
    rate_iops: Option<u64>,

    /// Packed rings.
    #[arg(long)]
    packed: bool,

    /// One descriptor for each request, of a table of its own.
    #[arg(long)]
    indirect: bool,

    /// Do not use VIRTIO_F_EVENT_IDX.
    #[arg(long)]
    no_event_idx: bool,

    /// Descriptors of each ring [default: as many as --iodepth needs, at least 128]
    #[arg(long, value_name = "NUMBER")]
    queue_size: Option<u16>,

    /// Regions of guest memory, over which the buffers are spread; with more than 8 the back-end must have
    /// CONFIGURE_MEM_SLOTS.
    #[arg(long, value_name = "NUMBER", default_value_t = LoadOptions::default().memory_regions)]
    memory_regions: u16,

    /// Bind the threads to these CPUs, in turn, like 0,2,4-7.
    #[arg(long, value_name = "CPUS", value_parser = parse_cpus)]
    cpus: Option<CpuList>,

    /// Tell how much processor time this process, the back-end, takes for each request.
    #[arg(long, value_name = "PID")]
    backend_pid: Option<u32>,

    /// Give up when requests are in flight and none has completed for so long, or a message was not answered.
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, default_value = "30")]
    io_timeout: Duration,

    /// Have the back-end record what is in flight (INFLIGHT_SHMFD), as QEMU does.
    #[arg(long)]
    inflight: bool,

    /// What is printed.
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = OutputFormat::Normal)]
    pub(crate) output_format: OutputFormat,

    /// Print it into this file.
    #[arg(long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,

    /// Draw the distribution of latencies into this file, as SVG.
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,

    /// Say how it goes, once a second on stderr.
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = Eta::Auto)]
    pub(crate) eta: Eta,
}

/// What is printed at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// A table.
    Normal,
    /// One JSON object.
    Json,
}

/// When progress is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Eta {
    /// If stderr is a terminal.
    Auto,
    /// Whatever stderr is.
    Always,
    /// Not.
    Never,
}

impl BenchArguments {
    pub(crate) fn load_options(&self) -> LoadOptions {
        LoadOptions {
            rw: self.rw,
            rwmixread: self.rwmixread,
            fsync: self.fsync,
            bs: self.bs,
            iodepth: self.iodepth,
            iodepth_batch: self.iodepth_batch,
            gtod_reduce: self.gtod_reduce,
            thinktime: self.thinktime,
            numjobs: self.numjobs,
            runtime: self.runtime,
            ramp_time: self.ramp_time,
            number_ios: self.number_ios,
            size: self.size,
            offset: self.offset,
            randseed: self.randseed,
            verify: self.verify,
            poll: self.poll,
            rate_iops: self.rate_iops,
            packed: self.packed,
            indirect: self.indirect,
            event_idx: !self.no_event_idx,
            queue_size: self.queue_size,
            memory_regions: self.memory_regions,
            cpus: self
                .cpus
                .as_ref()
                .map_or_else(Vec::new, |list| list.0.clone()),
            backend_pid: self.backend_pid,
            io_timeout: self.io_timeout,
            inflight: self.inflight,
        }
    }
}

fn parse_offset(text: &str) -> Result<u64, String> {
    // Sizes begin at a sector.
    if text == "0" { Ok(0) } else { parse_size(text) }
}

/// As fio's times: a number with `ns`, `us`, `ms` or `s`, or of microseconds.
fn parse_thinktime(text: &str) -> Result<Duration, String> {
    let units = [
        ("ns", 1),
        ("us", 1_000),
        ("ms", 1_000_000),
        ("s", 1_000_000_000),
    ];
    let unit = units
        .into_iter()
        .find_map(|(unit, nanoseconds)| Some((text.strip_suffix(unit)?, nanoseconds)));
    let (number, nanoseconds) = unit.unwrap_or((text, 1_000));
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(nanoseconds))
        .filter(|&time| time <= 1_000_000_000)
        .map(Duration::from_nanos)
        .ok_or_else(|| format!("{text} is no time of at most a second, such as 150ns or 2us"))
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    // A year is more than anybody waits, and far from any overflow.
    let seconds = text
        .parse::<f64>()
        .ok()
        .filter(|seconds| (0.0..=31_536_000.0).contains(seconds));
    seconds
        .map(Duration::from_secs_f64)
        .ok_or_else(|| format!("{text:?} is no time in seconds; write one like 10 or 0.5"))
}

const EXIT_CODES: &str = "\
Exit codes:
  0  the load has run, or until SIGINT or SIGTERM; every request succeeded and every block was what it should be
  1  requests failed, or blocks were wrong (the report has the numbers); or the back-end went, went silent or broke
     the protocol, or the host refused something
  2  the command line is not usable, or not with this back-end";
