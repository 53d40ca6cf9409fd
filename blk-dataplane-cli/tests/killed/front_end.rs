//! The least that a front-end says to bring two rings up, before and after its back-end was killed. Written out
//! here by the specification, byte by byte.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use super::DEADLINE;
use super::guest::{Guest, MEMORY_LEN, QUEUE_SIZE, QUEUES};

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;

const PROTOCOL_FEATURES: u64 = 1 << 30;
/// MQ, REPLY_ACK, INFLIGHT_SHMFD.
const PROTOCOL: u64 = 1 << 0 | 1 << 3 | 1 << 12;
const NEED_REPLY: u32 = 1 << 3;

/// Where guest memory is in the front-end, as far as the program is told.
const USER: u64 = 0x7f00_0000_0000;

/// What the front-end keeps while there is no back-end.
pub(crate) struct Record {
    description: Vec<u8>,
    file: File,
}

pub(crate) struct FrontEnd(UnixStream);

fn pair(low: u32, high: u32) -> Vec<u8> {
    [low, high].map(u32::to_ne_bytes).concat()
}

impl FrontEnd {
    pub(crate) fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Self(stream)
    }

    fn send(&self, request: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
        let size = u32::try_from(body.len()).unwrap();
        let mut message = [request, 1 | flags, size].map(u32::to_ne_bytes).concat();
        message.extend(body);
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights };
        let sent = sendmsg::<()>(
            self.0.as_raw_fd(),
            &[IoSlice::new(&message)],
            rights,
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        assert_eq!(sent.unwrap(), message.len());
    }

    /// The body of a reply.
    fn receive(&mut self) -> Vec<u8> {
        let mut header = [0; 12];
        self.0.read_exact(&mut header).unwrap();
        let size = u32::from_ne_bytes(header[8..].try_into().unwrap());
        let mut body = vec![0; usize::try_from(size).unwrap()];
        self.0.read_exact(&mut body).unwrap();
        body
    }

    /// A message that must be acknowledged as good.
    fn tell(&mut self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send(request, NEED_REPLY, body, fds);
        assert_eq!(self.receive(), [0; 8], "request {request} is refused");
    }

    /// Everything up to rings that run. `record` is what was kept from the back-end before.
    pub(crate) fn bring_up(&mut self, guest: &Guest, record: Option<Record>) -> Record {
        self.send(SET_OWNER, 0, &[], &[]);
        self.send(GET_FEATURES, 0, &[], &[]);
        let features = guest.features | PROTOCOL_FEATURES;
        let offered = u64::from_ne_bytes(self.receive().try_into().unwrap());
        assert_eq!(offered & features, features);
        self.send(SET_PROTOCOL_FEATURES, 0, &PROTOCOL.to_ne_bytes(), &[]);
        self.tell(SET_FEATURES, &features.to_ne_bytes(), &[]);
        let mut table = pair(1, 0);
        table.extend([0, MEMORY_LEN, USER, 0].map(u64::to_ne_bytes).concat());
        self.tell(SET_MEM_TABLE, &table, &[guest.file.as_fd()]);
        let record = record.unwrap_or_else(|| self.get_record());
        self.tell(SET_INFLIGHT_FD, &record.description, &[record.file.as_fd()]);
        for (index, queue) in (0u32..).zip(&guest.queues) {
            self.tell(SET_VRING_NUM, &pair(index, u32::from(QUEUE_SIZE)), &[]);
            let base = guest.base(usize::try_from(index).unwrap());
            self.tell(SET_VRING_BASE, &pair(index, base), &[]);
            let mut addresses = pair(index, 0);
            let areas = [
                queue.addresses.descriptor_area,
                queue.addresses.device_area,
                queue.addresses.driver_area,
            ];
            let [descriptor, used, available] = areas.map(|area| USER + area.0);
            addresses.extend(
                [descriptor, used, available, 0]
                    .map(u64::to_ne_bytes)
                    .concat(),
            );
            self.tell(SET_VRING_ADDR, &addresses, &[]);
            let name = u64::from(index).to_ne_bytes();
            self.tell(SET_VRING_CALL, &name, &[queue.call.as_fd()]);
            self.tell(SET_VRING_KICK, &name, &[queue.kick.as_fd()]);
            self.tell(SET_VRING_ENABLE, &pair(index, 1), &[]);
        }
        record
    }

    fn get_record(&self) -> Record {
        let mut body = [0u64; 2].map(u64::to_ne_bytes).concat();
        body.extend([QUEUES, QUEUE_SIZE].map(u16::to_ne_bytes).concat());
        self.send(GET_INFLIGHT_FD, 0, &body, &[]);
        let mut bytes = [0; 12 + 20];
        let mut space = cmsg_space!(RawFd);
        let mut iov = [IoSliceMut::new(&mut bytes)];
        let message = recvmsg::<()>(
            self.0.as_raw_fd(),
            &mut iov,
            Some(&mut space),
            MsgFlags::empty(),
        )
        .unwrap();
        assert_eq!(message.bytes, 32);
        let fds: Vec<RawFd> = message
            .cmsgs()
            .unwrap()
            .filter_map(|control| match control {
                ControlMessageOwned::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        let [fd] = fds[..] else {
            panic!("{} descriptors with the record", fds.len());
        };
        Record {
            description: bytes[12..].to_vec(),
            file: adopt(fd),
        }
    }

    /// Stops both rings, with nothing in flight.
    pub(crate) fn stop(&mut self, guest: &Guest) {
        for index in 0..u32::from(QUEUES) {
            self.send(GET_VRING_BASE, 0, &pair(index, 0), &[]);
            assert_eq!(self.receive().len(), 8);
        }
        assert_eq!(guest.outstanding(), 0);
    }
}

#[expect(unsafe_code, reason = "nix gives received descriptors as numbers")]
fn adopt(fd: RawFd) -> File {
    // SAFETY: the descriptor has just been received, and nobody else knows of it.
    File::from(unsafe { OwnedFd::from_raw_fd(fd) })
}
