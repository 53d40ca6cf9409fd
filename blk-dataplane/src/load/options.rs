//! What load is wanted, in fio's vocabulary.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Serialize, Serializer};

use super::error::LoadError;

/// How long a load runs that says neither `runtime` nor `number_ios`.
pub const DEFAULT_RUNTIME: Duration = Duration::from_secs(10);

/// Most requests in flight for each queue: they and their descriptors must fit into the largest ring.
pub const IODEPTH_MAX: u16 = 8192;

/// Most queues of a device, as many as a message can name.
pub const NUMJOBS_MAX: u16 = 256;

/// Most regions of memory: what QEMU can have, and back-ends take.
pub const MEMORY_REGIONS_MAX: u16 = 509;

/// Largest block: the most that Linux makes one request of, with room.
pub const BLOCK_SIZE_MAX: u64 = 32 << 20;

/// Which requests, fio's `rw`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Reads one after another.
    Read,
    /// Writes one after another.
    Write,
    /// Reads anywhere.
    RandRead,
    /// Writes anywhere.
    RandWrite,
    /// Reads and writes one after another, mixed.
    Rw,
    /// Reads and writes anywhere, mixed.
    RandRw,
    /// Nothing but flushes.
    Flush,
}

impl Pattern {
    /// All there are.
    pub const ALL: [Self; 7] = [
        Self::Read,
        Self::Write,
        Self::RandRead,
        Self::RandWrite,
        Self::Rw,
        Self::RandRw,
        Self::Flush,
    ];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::RandRead => "randread",
            Self::RandWrite => "randwrite",
            Self::Rw => "rw",
            Self::RandRw => "randrw",
            Self::Flush => "flush",
        }
    }

    pub(super) const fn is_random(self) -> bool {
        matches!(self, Self::RandRead | Self::RandWrite | Self::RandRw)
    }

    pub(super) const fn reads(self) -> bool {
        matches!(self, Self::Read | Self::RandRead | Self::Rw | Self::RandRw)
    }

    pub(super) const fn writes(self) -> bool {
        matches!(
            self,
            Self::Write | Self::RandWrite | Self::Rw | Self::RandRw
        )
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = Self::ALL.into_iter().find(|pattern| pattern.name() == text);
        // fio has both names for the one.
        let named = named.or_else(|| (text == "readwrite").then_some(Self::Rw));
        named.ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("{text:?} is none of {names}")
        })
    }
}

impl Serialize for Pattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// A load, the same for each device.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LoadOptions {
    /// Which requests.
    pub rw: Pattern,
    /// Reads of a hundred, where reads and writes are mixed.
    pub rwmixread: u8,
    /// A flush after so many writes; 0: none.
    pub fsync: u64,
    /// Bytes of a request.
    pub bs: u64,
    /// Requests in flight for each queue.
    pub iodepth: u16,
    /// Requests that are made available at once, with one decision whether to kick. 1 is what fio does by itself, and
    /// a guest whose requests come from many places; more is a guest that plugs.
    pub iodepth_batch: u16,
    /// One look at the clock for all completions that are taken together, instead of one for each. Cheaper, and less
    /// exact. As fio's option of that name.
    pub gtod_reduce: bool,
    /// Processor time that the client spends on each request before it makes it available: what a guest's kernel and
    /// programs do with the one before. By the clock, busy.
    #[serde(serialize_with = "seconds")]
    pub thinktime: Duration,
    /// Queues of each device, each with a thread of its own.
    pub numjobs: u16,
    /// How long is measured; [`DEFAULT_RUNTIME`] if neither this nor `number_ios` is given.
    #[serde(serialize_with = "seconds_if_any")]
    pub runtime: Option<Duration>,
    /// How long the load is on before it is measured.
    #[serde(serialize_with = "seconds")]
    pub ramp_time: Duration,
    /// Each queue ends after so many requests.
    pub number_ios: Option<u64>,
    /// Bytes of the device that are used, from `offset` on; `None`: to its end.
    pub size: Option<u64>,
    /// Where they begin, in bytes.
    pub offset: u64,
    /// Two loads with the same seed make the same requests.
    pub randseed: u64,
    /// Writes say where and when they were made, and reads are checked for it.
    pub verify: bool,
    /// The client looks for completions without sleeping.
    pub poll: bool,
    /// Requests a second for each queue, due at even distances whatever becomes of those before.
    pub rate_iops: Option<u64>,
    /// Packed rings.
    pub packed: bool,
    /// Each request is one descriptor, of a table of its own.
    pub indirect: bool,
    /// `VIRTIO_F_EVENT_IDX`, if the back-end has it.
    pub event_idx: bool,
    /// Descriptors of a ring; `None`: as many as the depth needs, at least 128 (QEMU's).
    pub queue_size: Option<u16>,
    /// Regions of guest memory, over which the buffers are spread.
    pub memory_regions: u16,
    /// Processors of the threads, in turn; empty: anywhere.
    pub cpus: Vec<u16>,
    /// Whose processor time is told.
    pub backend_pid: Option<u32>,
    /// How long no completion may come while requests are in flight, and no answer to a message.
    #[serde(serialize_with = "seconds")]
    pub io_timeout: Duration,
    /// Has the back-end record what is in flight (`VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD`), as QEMU does.
    pub inflight: bool,
}

fn seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}

fn seconds_if_any<S: Serializer>(
    duration: &Option<Duration>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match duration {
        Some(duration) => seconds(duration, serializer),
        None => serializer.serialize_none(),
    }
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            rw: Pattern::RandRead,
            rwmixread: 50,
            fsync: 0,
            bs: 4096,
            iodepth: 32,
            iodepth_batch: 1,
            gtod_reduce: false,
            thinktime: Duration::ZERO,
            numjobs: 1,
            runtime: None,
            ramp_time: Duration::ZERO,
            number_ios: None,
            size: None,
            offset: 0,
            randseed: 1,
            verify: false,
            poll: false,
            rate_iops: None,
            packed: false,
            indirect: false,
            event_idx: true,
            queue_size: None,
            memory_regions: 1,
            cpus: Vec::new(),
            backend_pid: None,
            io_timeout: Duration::from_secs(30),
            inflight: false,
        }
    }
}

impl LoadOptions {
    /// Whether each option makes sense by itself, and all of them together. What the device makes impossible is
    /// found when it is connected to.
    ///
    /// # Errors
    ///
    /// [`LoadError::Option`].
    pub fn check(&self) -> Result<(), LoadError> {
        let within = |option, value: u64, most: u64| {
            if (1..=most).contains(&value) {
                return Ok(());
            }
            Err(LoadError::option(
                option,
                format!("{value} is not from 1 to {most}"),
            ))
        };
        within("--iodepth", self.iodepth.into(), IODEPTH_MAX.into())?;
        within(
            "--iodepth-batch",
            self.iodepth_batch.into(),
            IODEPTH_MAX.into(),
        )?;
        within("--numjobs", self.numjobs.into(), NUMJOBS_MAX.into())?;
        within(
            "--memory-regions",
            self.memory_regions.into(),
            MEMORY_REGIONS_MAX.into(),
        )?;
        within("--bs", self.bs, BLOCK_SIZE_MAX)?;
        let sectors = |option, value: u64| {
            if value.is_multiple_of(crate::SECTOR_SIZE) {
                return Ok(());
            }
            Err(LoadError::option(
                option,
                format!("{value} is no multiple of 512; requests are of whole sectors"),
            ))
        };
        sectors("--bs", self.bs)?;
        sectors("--offset", self.offset)?;
        if self.rwmixread > 100 {
            let reason = format!("{} is more than 100 of a hundred", self.rwmixread);
            return Err(LoadError::option("--rwmixread", reason));
        }
        if let Some(size) = self.queue_size {
            vring::QueueSize::try_from(size).map_err(|error| {
                LoadError::option("--queue-size", format!("{error}; give 128 or 256"))
            })?;
        }
        for (option, value) in [
            ("--number-ios", self.number_ios),
            ("--rate-iops", self.rate_iops),
        ] {
            if value == Some(0) {
                return Err(LoadError::option(
                    option,
                    "0 requests are no load; give more, or leave it out",
                ));
            }
        }
        if self.rate_iops.is_some_and(|rate| rate > 1_000_000_000) {
            return Err(LoadError::option("--rate-iops", "give at most 1000000000"));
        }
        if self.runtime.is_some_and(|runtime| runtime.is_zero()) {
            return Err(LoadError::option("--runtime", "give more than 0 seconds"));
        }
        if self.io_timeout.is_zero() {
            return Err(LoadError::option(
                "--io-timeout",
                "give more than 0 seconds",
            ));
        }
        if self.rw == Pattern::Flush && self.verify {
            return Err(LoadError::option(
                "--verify",
                "a flush has no data to check; leave it out with --rw flush",
            ));
        }
        Ok(())
    }

    /// When the measured span ends, if time ends it.
    pub(super) fn time_limit(&self) -> Option<Duration> {
        match (self.runtime, self.number_ios) {
            (Some(runtime), _) => Some(runtime),
            (None, Some(_)) => None,
            (None, None) => Some(DEFAULT_RUNTIME),
        }
    }
}
