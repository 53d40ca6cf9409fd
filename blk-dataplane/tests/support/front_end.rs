//! A front-end over the socket: the server on a thread, and the `vhost` crate's `Frontend`.

// UNSAFETY: `Frontend` wants its own type of eventfd, which can only be made from a raw descriptor.
#![expect(unsafe_code)]

use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use blk_dataplane::Device;
use blk_dataplane::vhost_user::{ServeError, Server};
use event_poll::EventNotifier;
use std::os::fd::AsRawFd;
use tempfile::TempDir;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

use super::queue::{FEATURES, GuestQueue};
use super::ram::{GuestRam, RamRegion};
use super::wire::{P_ALL, PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, Wire};
use super::{DEADLINE, eventually};

/// A server at work.
pub(crate) struct Served {
    _dir: TempDir,
    pub(crate) path: PathBuf,
    pub(crate) until: EventNotifier,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl Served {
    pub(crate) fn new(device: Device) -> Self {
        // Short: a socket's path holds 107 bytes.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let server = Server::bind(&path, device).unwrap();
        let until = EventNotifier::new().unwrap();
        let stop = until.try_clone().unwrap();
        let thread = std::thread::spawn(move || server.serve(&stop));
        Self {
            _dir: dir,
            path,
            until,
            thread: Some(thread),
        }
    }

    /// Tells the server to stop and waits until it has.
    pub(crate) fn stop(mut self) -> Result<(), ServeError> {
        self.until.notify().unwrap();
        let thread = self.thread.take().unwrap();
        eventually("the server to stop", || thread.is_finished());
        thread.join().unwrap()
    }

    pub(crate) fn connect(&self, ram: &Arc<GuestRam>) -> FrontEnd {
        FrontEnd::connect(&self.path, ram)
    }

    pub(crate) fn wire(&self) -> Wire {
        Wire::connect(&self.path)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let told = self.until.notify();
        if let Some(thread) = self.thread.take()
            && !std::thread::panicking()
        {
            told.unwrap();
            eventually("the server to stop", || thread.is_finished());
            thread.join().unwrap().unwrap();
        }
    }
}

/// `Frontend`'s own type of eventfd, whose name this crate does not know.
fn adopt<T: FromRawFd>(notifier: &EventNotifier) -> T {
    let fd: OwnedFd = notifier.as_fd().try_clone_to_owned().unwrap();
    // SAFETY: the descriptor is an eventfd, and its ownership is passed on.
    unsafe { T::from_raw_fd(fd.into_raw_fd()) }
}

pub(crate) struct FrontEnd {
    pub(crate) vhost: Frontend,
    pub(crate) ram: Arc<GuestRam>,
    stream: UnixStream,
}

pub(crate) fn region_info(region: &RamRegion) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: region.guest,
        memory_size: region.size,
        userspace_addr: region.user(),
        mmap_offset: region.offset,
        mmap_handle: region.file.as_raw_fd(),
    }
}

impl FrontEnd {
    /// Connected, and nothing said yet.
    pub(crate) fn connect(path: &Path, ram: &Arc<GuestRam>) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        let vhost = Frontend::from_stream(stream.try_clone().unwrap(), 256);
        Self {
            vhost,
            ram: Arc::clone(ram),
            stream,
        }
    }

    /// Features and protocol features; every message is acknowledged from then on.
    pub(crate) fn negotiate(&mut self, features: u64) {
        self.vhost.set_owner().unwrap();
        let offered = self.vhost.get_features().unwrap();
        let features = features | PROTOCOL_FEATURES;
        assert_eq!(offered & features, features, "{offered:#x}");
        self.vhost.set_features(features).unwrap();
        let protocol = self.vhost.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        assert!(protocol.contains(wanted), "{protocol:?}");
        self.vhost.set_protocol_features(wanted).unwrap();
        self.vhost.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }

    /// As [`negotiate`](Self::negotiate), with every protocol feature there is; those that `Frontend` does not know
    /// are for its [`wire`](Self::wire).
    pub(crate) fn negotiate_all(&mut self, features: u64) {
        self.negotiate(features);
        let known = self.vhost.get_protocol_features().unwrap();
        self.vhost.set_protocol_features(known).unwrap();
        let all = P_ALL.to_le_bytes();
        assert!(self.wire().acknowledged(SET_PROTOCOL_FEATURES, &all, &[]));
    }

    /// The regions of memory in the order of `order`.
    pub(crate) fn set_memory(&self, order: &[usize]) {
        let regions: Vec<_> = order
            .iter()
            .map(|&index| region_info(&self.ram.regions[index]))
            .collect();
        self.vhost.set_mem_table(&regions).unwrap();
    }

    /// Size, addresses and base of a ring.
    pub(crate) fn configure(&self, queue: &GuestQueue, base: u16) {
        let index = usize::from(queue.index);
        self.vhost
            .set_vring_num(index, queue.driver.size().get())
            .unwrap();
        self.vhost
            .set_vring_addr(index, &self.ring_addresses(queue))
            .unwrap();
        self.vhost.set_vring_base(index, base).unwrap();
    }

    /// Size and addresses, and a base that means nothing: a ring begins anew, or where its record says.
    pub(crate) fn configure_only(&self, queue: &GuestQueue) {
        let index = usize::from(queue.index);
        self.vhost
            .set_vring_num(index, queue.driver.size().get())
            .unwrap();
        self.vhost
            .set_vring_addr(index, &self.ring_addresses(queue))
            .unwrap();
    }

    pub(crate) fn ring_addresses(&self, queue: &GuestQueue) -> VringConfigData {
        let size = queue.driver.size().get();
        VringConfigData {
            queue_max_size: size,
            queue_size: size,
            flags: 0,
            desc_table_addr: self.ram.user(queue.addresses.descriptor_area),
            used_ring_addr: self.ram.user(queue.addresses.device_area),
            avail_ring_addr: self.ram.user(queue.addresses.driver_area),
            log_addr: None,
        }
    }

    /// Call, err and, which starts the ring, kick.
    pub(crate) fn set_notifiers(&self, queue: &GuestQueue) {
        self.set_call_and_err(queue);
        self.set_kick(queue).unwrap();
    }

    pub(crate) fn set_call_and_err(&self, queue: &GuestQueue) {
        let index = usize::from(queue.index);
        self.vhost
            .set_vring_call(index, &adopt(&queue.call))
            .unwrap();
        self.vhost.set_vring_err(index, &adopt(&queue.err)).unwrap();
    }

    pub(crate) fn set_kick(&self, queue: &GuestQueue) -> vhost::Result<()> {
        self.vhost
            .set_vring_kick(usize::from(queue.index), &adopt(&queue.kick))
    }

    pub(crate) fn enable(&mut self, queue: &GuestQueue, enable: bool) {
        self.vhost
            .set_vring_enable(usize::from(queue.index), enable)
            .unwrap();
    }

    /// Starts a ring of the guest's and enables it.
    pub(crate) fn start(&mut self, queue: &GuestQueue, base: u16) {
        self.configure(queue, base);
        self.set_notifiers(queue);
        self.enable(queue, true);
    }

    pub(crate) fn queue(&mut self, index: u16, size: u32) -> GuestQueue {
        let queue = GuestQueue::new(&self.ram, index, size, FEATURES);
        self.start(&queue, 0);
        queue
    }

    /// Negotiated, memory set, and one queue of 128 running.
    pub(crate) fn up(&mut self) -> GuestQueue {
        self.negotiate(FEATURES);
        self.set_memory(&[0, 1, 2]);
        self.queue(0, 128)
    }

    pub(crate) fn stop(&self, queue: &GuestQueue) -> u16 {
        let base = self.vhost.get_vring_base(usize::from(queue.index)).unwrap();
        u16::try_from(base).unwrap()
    }

    pub(crate) fn config(&mut self, len: u32) -> vhost::Result<Vec<u8>> {
        let buffer = vec![0; usize::try_from(len).unwrap()];
        self.vhost
            .get_config(0, len, VhostUserConfigFlags::WRITABLE, &buffer)
            .map(|(_, bytes)| bytes)
    }

    /// The same connection, for a guest whose memory is `ram`.
    pub(crate) fn over(self, ram: &Arc<GuestRam>) -> Self {
        Self {
            ram: Arc::clone(ram),
            ..self
        }
    }

    /// The connection for messages that `Frontend` does not send.
    pub(crate) fn wire(&self) -> Wire {
        Wire::over(self.stream.try_clone().unwrap())
    }
}
