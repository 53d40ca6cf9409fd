//! What can be chosen about a device: as flags, as `--device key=value,...`, and in a `--config` file. This is the
//! one list of them; the other two are made of it (`settings.rs`).

use std::path::PathBuf;
use std::time::Duration;

use blk_dataplane::{
    DEFAULT_NUM_QUEUES, DEFAULT_POLL_MAX, DEFAULT_QUEUE_SIZE, DeviceOptions, Engine,
    MAX_NUM_QUEUES, MAX_THREADS, ThreadOptions,
};
use clap::Args;

use crate::Failure;
use crate::cpu_list::{CpuList, parse_cpus};
use crate::device_name::parse_name;
use crate::size::parse_size;

/// The choices about one device.
///
/// A list is an option whose value is called LIST: a configuration file may have an array there.
#[derive(Clone, Debug, Args)]
pub(crate) struct DeviceArguments {
    /// What to call the device in messages and counters, and the name of its socket where systemd passes several
    /// [default: blk0, blk1 and so on where there are several devices].
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    pub(crate) name: Option<String>,

    /// Raw disk image or block device to serve.
    #[arg(long, value_name = "PATH")]
    pub(crate) blk_file: Option<PathBuf>,

    /// Create a sparse image of SIZE (like 512M, 1G) if there is none; an existing one is left as it
    /// is.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with_all = ["null", "read_only"])]
    pub(crate) create: Option<u64>,

    /// Serve a device of SIZE that stores nothing: writes vanish, reads leave the guest's memory as it is,
    /// everything completes at once.
    #[arg(long, value_name = "SIZE", value_parser = parse_size,
          conflicts_with_all = ["blk_file", "read_only"])]
    pub(crate) null: Option<u64>,

    /// With --null: reads give zeroes.
    #[arg(long, conflicts_with = "blk_file")]
    pub(crate) read_zeroes: bool,

    /// Refuse writes, and open the image for reading only.
    #[arg(long)]
    pub(crate) read_only: bool,

    /// Do not lock the image: others may have it open at the same time. Two writers destroy each other's data.
    #[arg(long, conflicts_with = "null")]
    pub(crate) force_share: bool,

    /// The guest is to come here by live migration: lock the image when its rings start, and not yet. The process
    /// that serves it until then lets go of the image when the guest has stopped there.
    #[arg(long, conflicts_with_all = ["null", "create"])]
    pub(crate) incoming: bool,

    /// Where to listen [default: a socket that systemd passes, or else the image's path with .sock appended, or
    /// null.sock].
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    pub(crate) socket_path: Option<PathBuf>,

    /// Group, by name or number, whose members may connect, beside the owner [default: the one the socket gets by
    /// itself]. Its mode is 0660.
    #[arg(long, value_name = "GROUP", conflicts_with = "fd")]
    pub(crate) socket_group: Option<String>,

    /// Serve on this inherited socket instead, listening or connected.
    #[arg(long, value_name = "FDNUM")]
    pub(crate) fd: Option<i32>,

    /// Request queues to offer. A guest uses as many as it has CPUs; unused ones cost nothing.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_NUM_QUEUES)), value_name = "N", default_value_t = DEFAULT_NUM_QUEUES)]
    num_queues: u16,

    /// Data threads, at most one per queue [default: one per CPU, up to that].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_THREADS)), value_name = "N")]
    num_threads: Option<u16>,

    /// Thread of each queue, counted from 0, like 0,0,1; queues past the list's end are served in turn.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    queue_threads: Vec<u16>,

    /// CPUs to bind the data threads to, one each and from the beginning again, like 2,3 or 4-7.
    #[arg(long, value_name = "LIST", value_parser = parse_cpus)]
    cpu_affinity: Option<CpuList>,

    /// Largest ring to accept, a power of two; the front-end chooses the size in use.
    #[arg(long, value_parser = clap::value_parser!(u16).range(2..=32_768), value_name = "N", default_value_t = DEFAULT_QUEUE_SIZE)]
    queue_size: u16,

    /// Look for work for up to N microseconds before sleeping, if that pays; 0 to sleep at once. More
    /// lowers the latency of a guest that waits for each request, and costs CPU while it does.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_POLL_MAX.as_micros().try_into().unwrap_or(u32::MAX))]
    poll_max_us: u32,

    /// Logical block size the guest sees: 512, or 4096 [default: what the image needs].
    #[arg(long, value_name = "BYTES")]
    block_size: Option<u32>,

    /// What to read and write the image with: aio (also native); io_uring, whose I/O may go on for a while after this
    /// program was killed; or auto, which takes the one that suits the file system, and the other with a warning
    /// where the host refuses that.
    // Not auto: the kernel lets a process with Linux AIO under way end only when that has ended, and a successor may
    // serve the same requests again. io_uring's writes would overwrite what it has written.
    #[arg(long, value_name = "ENGINE", default_value_t = Engine::LinuxAio, conflicts_with = "null")]
    engine: Engine,

    /// Keep the image's storage: the guest cannot discard, and what it zeroes stays allocated.
    #[arg(long, conflicts_with = "read_only")]
    no_discard: bool,

    /// Give each request to the host by itself, neighbours too: to see what merging them gains.
    #[arg(long, conflicts_with = "null")]
    no_merge: bool,

    /// Measure how long requests take; SIGUSR1 tells. Costs two readings of the clock per batch of requests.
    #[arg(long)]
    latencies: bool,

    /// Serial number the guest sees, at most 20 bytes.
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true
    )]
    serial: String,
}

impl DeviceArguments {
    /// Checks what no other option can make up for.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        if self.blk_file.is_none() && self.null.is_none() {
            return Err(Failure::usage(
                "--blk-file: there is nothing to serve; give an image, or --null SIZE (see --help)",
            ));
        }
        Ok(())
    }

    /// Whether a socket that systemd passes is for this device.
    pub(crate) fn wants_a_socket(&self) -> bool {
        self.socket_path.is_none() && self.fd.is_none()
    }

    /// Where to listen, absolute.
    pub(crate) fn socket_path(&self) -> Result<PathBuf, Failure> {
        let path = match (&self.socket_path, &self.blk_file) {
            (Some(path), _) => path.clone(),
            (None, Some(image)) => {
                let mut name = image.clone().into_os_string();
                name.push(".sock");
                PathBuf::from(name)
            }
            (None, None) => PathBuf::from("null.sock"),
        };
        // QEMU runs elsewhere as often as not: what is printed for it must not depend on where.
        std::path::absolute(&path).map_err(|error| {
            Failure::usage(format!(
                "--socket-path: {}: {error}; give a path",
                path.display()
            ))
        })
    }

    pub(crate) fn device_options(&self) -> DeviceOptions {
        DeviceOptions {
            serial: self.serial.clone(),
            num_queues: self.num_queues,
            queue_size: self.queue_size,
            block_size: self.block_size,
            engine: self.engine,
            discard: !self.no_discard,
            merge: !self.no_merge,
            latencies: self.latencies,
            threads: ThreadOptions {
                count: self.num_threads,
                queues: self.queue_threads.clone(),
                cpus: self
                    .cpu_affinity
                    .as_ref()
                    .map_or_else(Vec::new, |list| list.0.clone()),
            },
            poll_max: Duration::from_micros(self.poll_max_us.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;
    use crate::settings;

    /// As `--device` has it; the other two ways lead through the same.
    fn parse(text: &str) -> Result<DeviceArguments, settings::Refused> {
        settings::device(&settings::split(&OsString::from(text))?)
    }

    #[test]
    fn the_socket_is_beside_the_image_unless_said_otherwise() {
        let socket = |text| parse(text).unwrap().socket_path().unwrap();
        assert_eq!(
            socket("blk-file=/a/disk.img"),
            PathBuf::from("/a/disk.img.sock")
        );
        let both = "blk-file=/a/disk.img,socket-path=/run/s";
        assert_eq!(socket(both), PathBuf::from("/run/s"));
        assert!(socket("null=1G").ends_with("null.sock"));
    }

    #[test]
    fn contradictions_are_refused() {
        for text in [
            "blk-file=a,null=1G",
            "null=1G,read-only=on",
            "null=1G,create=1G",
            "blk-file=a,create=1G,read-only",
            "blk-file=a,socket-path=s,fd=3",
            "blk-file=a,socket-group=disk,fd=3",
            "blk-file=a,create=lots",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse("name=a").unwrap().check().is_err());
    }

    #[test]
    fn threads_and_processors_are_lists() {
        let threads = |text| parse(text).unwrap().device_options().threads;
        assert_eq!(threads("null=1G"), ThreadOptions::default());
        let text = "null=1G,num-threads=3,queue-threads=0,,0,,2,cpu-affinity=2,,4-5";
        let expected = ThreadOptions {
            count: Some(3),
            queues: vec![0, 0, 2],
            cpus: vec![2, 4, 5],
        };
        assert_eq!(threads(text), expected);
    }

    #[test]
    fn polling_is_on_unless_switched_off() {
        let poll_max = |text| parse(text).unwrap().device_options().poll_max;
        assert_eq!(poll_max("null=1G"), DEFAULT_POLL_MAX);
        assert_eq!(poll_max("null=1G,poll-max-us=0"), Duration::ZERO);
        let fifty = Duration::from_micros(50);
        assert_eq!(poll_max("null=1G,poll-max-us=50"), fifty);
    }

    #[test]
    fn engine_has_the_names_that_qemu_gives_too() {
        let engine = |text| parse(text).unwrap().device_options().engine;
        assert_eq!(engine("blk-file=a"), Engine::LinuxAio);
        assert_eq!(engine("blk-file=a,engine=auto"), Engine::Auto);
        assert_eq!(engine("blk-file=a,engine=native"), Engine::LinuxAio);
        assert_eq!(engine("blk-file=a,engine=io_uring"), Engine::IoUring);
        assert!(parse("blk-file=a,engine=threads").is_err());
        assert!(parse("null=1G,engine=aio").is_err());
    }
}
