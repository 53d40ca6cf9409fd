//! A device, connected to: features, configuration, memory and rings, told as QEMU's front-end tells them.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::{Serialize, Serializer};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SIZE_MAX, virtio_blk_config,
};
use virtio_bindings::virtio_config::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vring::{QueueSize, RingBase, RingFeatures};

use super::connection::Connection;
use super::error::LoadError;
use super::guest::{Guest, Needs, Shared};
use super::options::LoadOptions;
use super::ring::Shape;
use crate::vhost_user::message::{
    CONFIG_HEADER_LEN, INFLIGHT_PADDED_LEN, REGIONS_MAX, feature, protocol,
};
use crate::vhost_user::request::Code;

/// Ring size that QEMU has unless told otherwise.
const QUEUE_SIZE_MIN: u32 = 128;

/// Largest ring that is asked for unless told otherwise: QEMU's largest, and that of many back-ends.
const QUEUE_SIZE_MAX: u16 = 1024;

/// Bytes of the configuration space that are asked for, in turn, until one of them is answered: up to where QEMU
/// asked before zoned devices (write zeroes included), the whole structure of today, and what Firecracker reads.
/// Some back-ends answer only the size of their own structure.
const CONFIG_SIZES: [u32; 4] = [60, 96, 64, 8];

/// What a back-end is and can, as it said.
#[derive(Clone, Debug, Serialize)]
pub struct Backend {
    /// Its socket.
    pub socket: String,
    /// Virtio features it offers.
    #[serde(serialize_with = "hexadecimal")]
    pub features: u64,
    /// Vhost-user protocol features it offers.
    #[serde(serialize_with = "hexadecimal")]
    pub protocol_features: u64,
    /// Virtio features that are in use.
    #[serde(serialize_with = "hexadecimal")]
    pub negotiated_features: u64,
    /// Bytes of the device.
    pub capacity_bytes: u64,
    /// Bytes of a logical block; 512 if it does not say.
    pub block_size: u32,
    /// Queues it has.
    pub num_queues: u64,
    /// Descriptors of each ring in use.
    pub queue_size: u16,
    /// Requests change nothing.
    pub read_only: bool,
}

fn hexadecimal<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{value:#x}"))
}

/// Descriptors of a queue beside its ring.
#[derive(Debug)]
pub(super) struct Notifiers {
    pub(super) kick: EventFd,
    pub(super) call: EventFd,
    pub(super) err: EventFd,
}

/// A device whose rings are running.
#[derive(Debug)]
pub(super) struct FrontEnd {
    pub(super) connection: Connection,
    pub(super) backend: Backend,
    pub(super) guest: Guest,
    pub(super) shape: Shape,
    pub(super) queue_size: QueueSize,
    pub(super) ring_features: RingFeatures,
    pub(super) notifiers: Vec<Notifiers>,
    /// The record of requests in flight, which the back-end made.
    _inflight: Option<OwnedFd>,
}

/// Little-endian words of the configuration space, zero where it ends.
struct Config(Vec<u8>);

impl Config {
    fn bytes<const N: usize>(&self, offset: usize) -> [u8; N] {
        let field = self.0.get(offset..).and_then(<[u8]>::first_chunk);
        field.copied().unwrap_or([0; N])
    }
}

macro_rules! field {
    ($config:ident . $name:ident as $type:ty) => {
        <$type>::from_le_bytes($config.bytes(std::mem::offset_of!(virtio_blk_config, $name)))
    };
}

impl FrontEnd {
    /// Connects and negotiates. The rings are laid out; [`start`](Self::start) makes them run.
    pub(super) fn connect(socket: &Path, options: &LoadOptions) -> Result<Self, LoadError> {
        let mut connection = Connection::open(socket, options.io_timeout)?;
        let offered = connection.ask_number(Code::GetFeatures)?;
        let missing = |feature| LoadError::Feature {
            socket: socket.to_owned(),
            feature,
        };
        if offered & feature::PROTOCOL_FEATURES == 0 {
            return Err(missing("VHOST_USER_F_PROTOCOL_FEATURES (bit 30)"));
        }
        if offered & bit(VIRTIO_F_VERSION_1) == 0 {
            return Err(missing("VIRTIO_F_VERSION_1 (bit 32)"));
        }
        let protocol_offered = connection.ask_number(Code::GetProtocolFeatures)?;
        if protocol_offered & protocol::CONFIG == 0 {
            return Err(missing("VHOST_USER_PROTOCOL_F_CONFIG (bit 9)"));
        }
        let mut protocol_wanted =
            protocol::MQ | protocol::CONFIG | protocol::REPLY_ACK | protocol::CONFIGURE_MEM_SLOTS;
        if options.inflight {
            if protocol_offered & protocol::INFLIGHT_SHMFD == 0 {
                return Err(cannot("--inflight", "has no INFLIGHT_SHMFD"));
            }
            protocol_wanted |= protocol::INFLIGHT_SHMFD;
        }
        let protocols = protocol_offered & protocol_wanted;
        connection.tell(Code::SetProtocolFeatures, &protocols.to_ne_bytes(), &[])?;
        if protocols & protocol::REPLY_ACK != 0 {
            connection.acknowledge();
        }
        connection.tell(Code::SetOwner, &[], &[])?;
        let num_queues = if protocols & protocol::MQ == 0 {
            1
        } else {
            connection.ask_number(Code::GetQueueNum)?
        };
        let config = read_config(&connection)?;

        let features = choose_features(offered, options)?;
        let num_queues = if features & bit(VIRTIO_BLK_F_MQ) == 0 {
            1
        } else {
            num_queues.min(field!(config.num_queues as u16).max(1).into())
        };
        if u64::from(options.numjobs) > num_queues {
            let reason = format!(
                "{} queues, and the back-end at {} has {num_queues}; give at most so many",
                options.numjobs,
                socket.display()
            );
            return Err(LoadError::option("--numjobs", reason));
        }
        let size_max = match field!(config.size_max as u32) {
            // qemu-storage-daemon has the feature and says nothing.
            limit if features & bit(VIRTIO_BLK_F_SIZE_MAX) != 0 && limit != 0 => limit,
            _ => u32::MAX,
        };
        let (shape, queue_size) = choose_shape(options, features, size_max)?;
        let backend = Backend {
            socket: socket.display().to_string(),
            features: offered,
            protocol_features: protocol_offered,
            negotiated_features: features,
            capacity_bytes: field!(config.capacity as u64).saturating_mul(crate::SECTOR_SIZE),
            block_size: match field!(config.blk_size as u32) {
                size if offered & bit(VIRTIO_BLK_F_BLK_SIZE) != 0 && size != 0 => size,
                _ => 512,
            },
            num_queues,
            queue_size: queue_size.get(),
            read_only: offered & bit(VIRTIO_BLK_F_RO) != 0,
        };
        check_against(&backend, options)?;

        connection.tell(Code::SetFeatures, &features.to_ne_bytes(), &[])?;
        let ring_features = RingFeatures::from_virtio(features);
        let guest = Guest::new(&Needs {
            queues: options.numjobs,
            depth: options.iodepth,
            queue_size,
            features: ring_features,
            table_len: if shape.indirect {
                u16::try_from(shape.descriptors()).unwrap_or(u16::MAX)
            } else {
                0
            },
            block: options.bs,
            regions: options.memory_regions,
        })?;
        let notifiers = (0..options.numjobs)
            .map(|_| Notifiers::new())
            .collect::<Result<_, _>>()?;
        let inflight = if options.inflight {
            Some(record_in_flight(&connection, options.numjobs, queue_size)?)
        } else {
            None
        };
        set_memory(&connection, &guest, protocols)?;
        Ok(Self {
            connection,
            backend,
            guest,
            shape,
            queue_size,
            ring_features,
            notifiers,
            _inflight: inflight,
        })
    }

    /// Has the back-end start its rings. Whoever drives them has initialised them.
    pub(super) fn start(&self) -> Result<(), LoadError> {
        let connection = &self.connection;
        for (index, (notifiers, layout)) in
            (0u32..).zip(self.notifiers.iter().zip(&self.guest.rings))
        {
            let state = |num: u32| [index, num].map(u32::to_ne_bytes).concat();
            let base = RingBase::fresh(self.ring_features).to_vhost_user();
            connection
                .tell(Code::SetVringNum, &state(self.queue_size.get().into()), &[])
                .map_err(|error| self.too_large(error))?;
            connection.tell(Code::SetVringBase, &state(base), &[])?;
            let addresses = layout.addresses();
            let mut body = [index, 0].map(u32::to_ne_bytes).concat();
            for address in [
                self.guest.user(addresses.descriptor_area),
                self.guest.user(addresses.device_area),
                self.guest.user(addresses.driver_area),
                // Where the used ring is logged, which nobody has asked for.
                0,
            ] {
                body.extend(address.to_ne_bytes());
            }
            connection.tell(Code::SetVringAddr, &body, &[])?;
            let body = u64::from(index).to_ne_bytes();
            for (code, fd) in [
                (Code::SetVringErr, &notifiers.err),
                (Code::SetVringKick, &notifiers.kick),
                (Code::SetVringCall, &notifiers.call),
            ] {
                connection.tell(code, &body, &[fd.as_fd()])?;
            }
        }
        for index in (0u32..).take(self.notifiers.len()) {
            let body = [index, 1].map(u32::to_ne_bytes).concat();
            connection.tell(Code::SetVringEnable, &body, &[])?;
        }
        Ok(())
    }

    /// What a refusal of a ring's size means.
    fn too_large(&self, error: LoadError) -> LoadError {
        match error {
            LoadError::Refused { socket, .. } => {
                let reason = format!(
                    "the back-end at {} refuses rings of {} descriptors; give a smaller one, and less --iodepth or \
                     --indirect where that needs it",
                    socket.display(),
                    self.queue_size
                );
                LoadError::option("--queue-size", reason)
            }
            error => error,
        }
    }

    /// Has the back-end stop its rings, as a front-end does before it goes.
    pub(super) fn stop(&self) -> Result<(), LoadError> {
        for index in (0u32..).take(self.notifiers.len()) {
            let body = [index, 0].map(u32::to_ne_bytes).concat();
            self.connection.ask(Code::GetVringBase, &body)?;
        }
        Ok(())
    }
}

impl Notifiers {
    fn new() -> Result<Self, LoadError> {
        let eventfd = |flags| {
            EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | flags)
                .map_err(|errno| LoadError::host("eventfd", errno))
        };
        Ok(Self {
            kick: eventfd(EfdFlags::EFD_NONBLOCK)?,
            // The client sleeps by reading it.
            call: eventfd(EfdFlags::empty())?,
            err: eventfd(EfdFlags::EFD_NONBLOCK)?,
        })
    }
}

const fn bit(feature: u32) -> u64 {
    1 << feature
}

fn cannot(option: &'static str, what: &str) -> LoadError {
    LoadError::option(option, format!("the back-end {what}; leave it out"))
}

/// The configuration space, as far as the back-end tells it.
fn read_config(connection: &Connection) -> Result<Config, LoadError> {
    for size in CONFIG_SIZES {
        let mut body = [0u32, size, 0].map(u32::to_ne_bytes).concat();
        // The request has room for the answer.
        body.resize(CONFIG_HEADER_LEN + usize::try_from(size).unwrap_or(0), 0);
        let answer = connection.ask(Code::GetConfig, &body)?.body;
        // No payload says no ("Virtio device config space"); some say it with other sizes.
        if answer.len() == body.len() {
            let bytes = answer.get(CONFIG_HEADER_LEN..).unwrap_or_default();
            return Ok(Config(bytes.to_vec()));
        }
    }
    let reason = format!("the configuration space is told in none of the sizes {CONFIG_SIZES:?}");
    Err(connection.broken(Code::GetConfig, reason))
}

fn choose_features(offered: u64, options: &LoadOptions) -> Result<u64, LoadError> {
    let mut wanted = feature::PROTOCOL_FEATURES
        | bit(VIRTIO_F_VERSION_1)
        | bit(VIRTIO_BLK_F_MQ)
        | bit(VIRTIO_BLK_F_FLUSH)
        | bit(VIRTIO_BLK_F_BLK_SIZE)
        | bit(VIRTIO_BLK_F_SIZE_MAX)
        | bit(VIRTIO_BLK_F_RO)
        | bit(VIRTIO_RING_F_INDIRECT_DESC);
    if options.event_idx {
        wanted |= bit(VIRTIO_RING_F_EVENT_IDX);
    }
    if options.packed {
        if offered & bit(VIRTIO_F_RING_PACKED) == 0 {
            return Err(cannot("--packed", "has no VIRTIO_F_RING_PACKED"));
        }
        wanted |= bit(VIRTIO_F_RING_PACKED);
    }
    if options.indirect && offered & bit(VIRTIO_RING_F_INDIRECT_DESC) == 0 {
        return Err(cannot("--indirect", "has no VIRTIO_F_INDIRECT_DESC"));
    }
    let flushes = options.rw == super::Pattern::Flush || options.fsync != 0;
    if flushes && offered & bit(VIRTIO_BLK_F_FLUSH) == 0 {
        let option = if options.fsync != 0 {
            "--fsync"
        } else {
            "--rw"
        };
        return Err(cannot(
            option,
            "has no VIRTIO_BLK_F_FLUSH, and cannot flush",
        ));
    }
    Ok(offered & wanted)
}

/// Descriptors of a request, and of the ring. Requests go indirect where the ring has no room for them otherwise.
fn choose_shape(
    options: &LoadOptions,
    features: u64,
    size_max: u32,
) -> Result<(Shape, QueueSize), LoadError> {
    let block = u32::try_from(options.bs).unwrap_or(u32::MAX);
    let direct = Shape {
        block,
        segment: size_max,
        indirect: false,
    };
    let largest = u32::from(options.queue_size.unwrap_or(QUEUE_SIZE_MAX));
    let needs = |shape: &Shape| u32::from(options.iodepth).checked_mul(shape.ring_descriptors());
    let fits = |shape: &Shape| needs(shape).is_some_and(|needed| needed <= largest);
    let can_indirect = features & bit(VIRTIO_RING_F_INDIRECT_DESC) != 0;
    let indirect = options.indirect || (!fits(&direct) && can_indirect);
    let shape = Shape { indirect, ..direct };
    // No chain may be longer than the ring, those of a table included (virtio 1.3 §2.7.5.3.1, §2.8.19).
    if shape.descriptors() > largest {
        let reason = format!(
            "{} bytes are {} descriptors where one has at most {size_max} bytes (VIRTIO_BLK_F_SIZE_MAX), more than a \
             ring of {largest} holds; give less",
            options.bs,
            shape.descriptors()
        );
        return Err(LoadError::option("--bs", reason));
    }
    if !fits(&shape) {
        let reason = format!(
            "{} requests of {} descriptors each are more than a ring of {largest} holds; give less --iodepth or more \
             --queue-size",
            options.iodepth,
            shape.ring_descriptors()
        );
        return Err(LoadError::option("--iodepth", reason));
    }
    let needed = needs(&shape).unwrap_or(u32::MAX).max(shape.descriptors());
    let size = match options.queue_size {
        Some(size) => size.into(),
        None => needed.next_power_of_two().max(QUEUE_SIZE_MIN),
    };
    let size = QueueSize::new(size)
        .map_err(|error| LoadError::option("--queue-size", error.to_string()))?;
    Ok((shape, size))
}

/// What the device itself makes impossible.
fn check_against(backend: &Backend, options: &LoadOptions) -> Result<(), LoadError> {
    let place = &backend.socket;
    if backend.read_only && options.rw.writes() {
        let reason = format!("the device at {place} is read-only; give --rw randread or read");
        return Err(LoadError::option("--rw", reason));
    }
    if !options.bs.is_multiple_of(backend.block_size.into()) {
        let reason = format!(
            "{} is no multiple of {}, the block size of the device at {place}",
            options.bs, backend.block_size
        );
        return Err(LoadError::option("--bs", reason));
    }
    if !options.offset.is_multiple_of(backend.block_size.into()) {
        let reason = format!(
            "{} is no multiple of {}, the block size of the device at {place}",
            options.offset, backend.block_size
        );
        return Err(LoadError::option("--offset", reason));
    }
    let capacity = backend.capacity_bytes;
    let Some(room) = capacity.checked_sub(options.offset) else {
        let reason = format!("the device at {place} ends at {capacity}; give less");
        return Err(LoadError::option("--offset", reason));
    };
    if let Some(size) = options.size
        && size > room
    {
        let reason = format!(
            "the device at {place} has {capacity} bytes, {room} of them from the offset on; give at most that"
        );
        return Err(LoadError::option("--size", reason));
    }
    // Sequential and verified loads are dealt out over the queues.
    if options.size.unwrap_or(room) / options.bs < u64::from(options.numjobs) {
        let reason = format!(
            "{} queues have less than a block of {} bytes each in {} bytes of the device at {place}; give less of \
             --bs or --numjobs, or more of --size",
            options.numjobs,
            options.bs,
            options.size.unwrap_or(room)
        );
        return Err(LoadError::option("--bs", reason));
    }
    Ok(())
}

fn region_body(region: &Shared<'_>) -> Vec<u8> {
    [region.guest, region.size, region.user, region.offset]
        .map(u64::to_ne_bytes)
        .concat()
}

fn set_memory(connection: &Connection, guest: &Guest, protocols: u64) -> Result<(), LoadError> {
    let regions: Vec<_> = guest.regions().collect();
    if regions.len() <= REGIONS_MAX {
        let count = u32::try_from(regions.len()).unwrap_or(0);
        let mut body = [count, 0].map(u32::to_ne_bytes).concat();
        body.extend(regions.iter().flat_map(region_body));
        let fds: Vec<_> = regions.iter().map(|region| region.file.as_fd()).collect();
        return connection.tell(Code::SetMemTable, &body, &fds);
    }
    if protocols & protocol::CONFIGURE_MEM_SLOTS == 0 {
        let reason = format!(
            "the back-end takes {REGIONS_MAX}, since it has no CONFIGURE_MEM_SLOTS; give less"
        );
        return Err(LoadError::option("--memory-regions", reason));
    }
    let slots = connection.ask_number(Code::GetMaxMemSlots)?;
    if u64::try_from(regions.len()).is_ok_and(|count| count > slots) {
        let reason = format!("the back-end takes {slots}; give less");
        return Err(LoadError::option("--memory-regions", reason));
    }
    for region in &regions {
        // "Single memory region description": padding first.
        let mut body = 0u64.to_ne_bytes().to_vec();
        body.extend(region_body(region));
        connection.tell(Code::AddMemReg, &body, &[region.file.as_fd()])?;
    }
    Ok(())
}

/// The back-end makes the record, and is handed it back with the same words.
fn record_in_flight(
    connection: &Connection,
    queues: u16,
    size: QueueSize,
) -> Result<OwnedFd, LoadError> {
    let mut body = vec![0; INFLIGHT_PADDED_LEN];
    body[16..18].copy_from_slice(&queues.to_ne_bytes());
    body[18..20].copy_from_slice(&size.get().to_ne_bytes());
    let answer = connection.ask(Code::GetInflightFd, &body)?;
    let mut fds = answer.fds.into_iter();
    let (Some(fd), None) = (fds.next(), fds.next()) else {
        return Err(connection.broken(
            Code::GetInflightFd,
            "it comes without a descriptor, or with several",
        ));
    };
    connection.tell(Code::SetInflightFd, &answer.body, &[fd.as_fd()])?;
    Ok(fd)
}
