//! A back-end that does as a test tells it: right by default, wrong where that is asked for.

// UNSAFETY: descriptors come as numbers.
#![expect(unsafe_code)]

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use nix::cmsg_space;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tempfile::TempDir;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use vring::{QueueConfig, QueueSize, RingAddresses, RingBase, RingFeatures};

use crate::support::queue::{EVENT_IDX, FEATURES};
use crate::support::wire::*;

/// Bytes of the configuration space that it tells.
pub(crate) const CONFIG_LEN: usize = 60;

/// What the back-end says and does. Everything is right unless changed.
pub(crate) struct Manners {
    pub(crate) features: u64,
    pub(crate) protocol_features: u64,
    /// Little-endian, as the front-end reads it.
    pub(crate) config: Vec<u8>,
    pub(crate) num_queues: u64,
    pub(crate) max_mem_slots: u64,
    /// Replaces the answer to a message of this code: all of its bytes; none for no answer; `None` to close.
    pub(crate) instead: Option<(u32, Option<Vec<u8>>)>,
    /// What is done when a ring has been enabled, on a thread of its own.
    pub(crate) serve: fn(Ring),
}

/// A ring as the device sees it.
pub(crate) struct Ring {
    pub(crate) memory: Arc<GuestMemoryMmap>,
    pub(crate) config: QueueConfig,
    pub(crate) kick: OwnedFd,
    pub(crate) call: OwnedFd,
    pub(crate) err: OwnedFd,
    /// Closes the connection when it is shut down.
    pub(crate) stream: UnixStream,
}

impl Default for Manners {
    fn default() -> Self {
        let mut config = vec![0; CONFIG_LEN];
        // Capacity in sectors; and one queue.
        config[..8].copy_from_slice(&2048u64.to_le_bytes());
        config[34..36].copy_from_slice(&1u16.to_le_bytes());
        Self {
            features: FEATURES | EVENT_IDX | PROTOCOL_FEATURES,
            protocol_features: P_MQ | P_CONFIG | P_REPLY_ACK | P_CONFIGURE_MEM_SLOTS,
            config,
            num_queues: 1,
            max_mem_slots: 32,
            instead: None,
            serve: |_| (),
        }
    }
}

pub(crate) struct Fake {
    _dir: TempDir,
    pub(crate) path: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl Fake {
    /// Listens, and serves one connection.
    pub(crate) fn new(manners: Manners) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            Session::new(stream, manners).run();
        });
        Self {
            _dir: dir,
            path,
            thread: Some(thread),
        }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

/// A region that the front-end told of: where it is for itself, and how long.
struct Region {
    user: u64,
    guest: u64,
    size: u64,
}

struct Session {
    wire: Wire,
    manners: Manners,
    acknowledges: bool,
    features: u64,
    memory: Option<Arc<GuestMemoryMmap>>,
    regions: Vec<Region>,
    size: u32,
    base: u32,
    /// Descriptors, used ring, available ring, where the front-end has them.
    addresses: [u64; 3],
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
}

impl Session {
    fn new(stream: UnixStream, manners: Manners) -> Self {
        Self {
            wire: Wire::over(stream),
            manners,
            acknowledges: false,
            features: 0,
            memory: None,
            regions: Vec::new(),
            size: 0,
            base: 0,
            addresses: [0; 3],
            kick: None,
            call: None,
            err: None,
        }
    }

    fn run(mut self) {
        while let Some((code, flags, body, fds)) = self.receive() {
            let own = self.obey(code, &body, fds);
            let due = own.or_else(|| {
                let acknowledge = self.acknowledges && flags & NEED_REPLY != 0;
                acknowledge.then(|| 0u64.to_le_bytes().to_vec())
            });
            let bytes = match &self.manners.instead {
                Some((instead, bytes)) if *instead == code => match bytes {
                    Some(bytes) => bytes.clone(),
                    None => return,
                },
                _ => due.map_or_else(Vec::new, |body| message(code, V1 | REPLY, &body)),
            };
            if !self.wire.send_bytes(&bytes, &[]) {
                return;
            }
            if code == SET_VRING_ENABLE {
                self.serve();
            }
        }
    }

    /// Header, body and descriptors; `None` at the end.
    fn receive(&mut self) -> Option<(u32, u32, Vec<u8>, Vec<OwnedFd>)> {
        let mut header = [0; 12];
        let mut fds = Vec::new();
        let mut space = cmsg_space!([i32; 8]);
        let mut parts = [IoSliceMut::new(&mut header)];
        let raw = self.wire.stream.as_raw_fd();
        let received = recvmsg::<()>(raw, &mut parts, Some(&mut space), MsgFlags::MSG_WAITALL);
        let received = received.ok()?;
        if received.bytes == 0 {
            return None;
        }
        assert_eq!(received.bytes, 12);
        for message in received.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(numbers) = message {
                fds.extend(numbers.into_iter().map(owned));
            }
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let mut body = vec![0; usize::try_from(word(8)).unwrap()];
        std::io::Read::read_exact(&mut self.wire.stream, &mut body).unwrap();
        assert_eq!(word(4) & 3, 1, "version 1");
        Some((word(0), word(4), body, fds))
    }

    /// Does what the message wants; the body of the answer, if it has one of its own.
    fn obey(&mut self, code: u32, body: &[u8], fds: Vec<OwnedFd>) -> Option<Vec<u8>> {
        let u64_at = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().unwrap());
        let u32_at = |at: usize| u32::from_le_bytes(body[at..at + 4].try_into().unwrap());
        let number = |number: u64| Some(number.to_le_bytes().to_vec());
        let mut fd = fds.into_iter();
        match code {
            GET_FEATURES => return number(self.manners.features),
            GET_PROTOCOL_FEATURES => return number(self.manners.protocol_features),
            GET_QUEUE_NUM => return number(self.manners.num_queues),
            GET_MAX_MEM_SLOTS => return number(self.manners.max_mem_slots),
            GET_CONFIG => {
                let asked = usize::try_from(u32_at(4)).unwrap();
                let mut answer = body[..12].to_vec();
                // As back-ends do that know one size alone: no payload says no.
                if asked == self.manners.config.len() {
                    answer.extend(&self.manners.config);
                }
                return Some(answer);
            }
            GET_VRING_BASE => return Some(vring_state(u32_at(0), 0)),
            SET_PROTOCOL_FEATURES => {
                assert_eq!(u64_at(0) & !self.manners.protocol_features, 0);
                self.acknowledges = u64_at(0) & P_REPLY_ACK != 0;
            }
            SET_FEATURES => {
                self.features = u64_at(0);
                assert_eq!(
                    self.features & !self.manners.features,
                    0,
                    "what was not offered"
                );
            }
            SET_MEM_TABLE => {
                let count = usize::try_from(u32_at(0)).unwrap();
                let mapped = (0..count).map(|n| 8 + 32 * n).map(|at| {
                    let [guest, size, user, offset] =
                        [0, 8, 16, 24].map(|field| u64_at(at + field));
                    self.regions.push(Region { user, guest, size });
                    let file = FileOffset::new(fd.next().unwrap().into(), offset);
                    let size = usize::try_from(size).unwrap();
                    GuestRegionMmap::from_range(GuestAddress(guest), size, Some(file)).unwrap()
                });
                let memory = GuestMemoryMmap::from_regions(mapped.collect()).unwrap();
                self.memory = Some(Arc::new(memory));
            }
            SET_VRING_NUM => self.size = u32_at(4),
            SET_VRING_BASE => self.base = u32_at(4),
            SET_VRING_ADDR => self.addresses = [8, 16, 24].map(u64_at),
            SET_VRING_KICK => self.kick = fd.next(),
            SET_VRING_CALL => self.call = fd.next(),
            SET_VRING_ERR => self.err = fd.next(),
            _ => {}
        }
        None
    }

    fn serve(&mut self) {
        let guest = |user: u64| {
            let region = self
                .regions
                .iter()
                .find(|region| (region.user..region.user + region.size).contains(&user));
            let region = region.expect("an address of the front-end's, in its memory");
            GuestAddress(user - region.user + region.guest)
        };
        let features = RingFeatures::from_virtio(self.features);
        let [descriptors, used, available] = self.addresses;
        let ring = Ring {
            memory: Arc::clone(self.memory.as_ref().unwrap()),
            config: QueueConfig {
                size: QueueSize::new(self.size).unwrap(),
                addresses: RingAddresses {
                    descriptor_area: guest(descriptors),
                    driver_area: guest(available),
                    device_area: guest(used),
                },
                features,
                base: RingBase::from_vhost_user(self.base, features).unwrap(),
            },
            kick: self.kick.take().unwrap(),
            call: self.call.take().unwrap(),
            err: self.err.take().unwrap(),
            stream: self.wire.stream.try_clone().unwrap(),
        };
        let serve = self.manners.serve;
        std::thread::spawn(move || serve(ring));
    }
}

impl Ring {
    /// Waits for a kick; false if the front-end has gone.
    pub(crate) fn wait(&self) -> bool {
        let mut fds = [
            PollFd::new(self.kick.as_fd(), PollFlags::POLLIN),
            // That it has been closed is told unasked.
            PollFd::new(self.stream.as_fd(), PollFlags::empty()),
        ];
        poll(&mut fds, PollTimeout::NONE).unwrap();
        let kicked = fds[0].any().unwrap();
        kicked && nix::unistd::read(&self.kick, &mut [0; 8]).is_ok()
    }

    pub(crate) fn interrupt(&self) {
        nix::unistd::write(&self.call, &1u64.to_ne_bytes()).unwrap();
    }
}

/// A descriptor that has just been received.
fn owned(number: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made it for this process, and nobody else knows of it.
    unsafe { OwnedFd::from_raw_fd(number) }
}
