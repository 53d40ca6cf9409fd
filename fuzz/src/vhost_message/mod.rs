//! A front-end that sends messages, good and bad, in any pieces and with any descriptors, to a server on a socket;
//! compared with a model of what a back-end must answer.
//!
//! Every input is a connection of its own. Each answer must be the model's, and no other may come; a connection that
//! must end ends, and one that need not does not. Afterwards the server has returned and every descriptor is closed.

mod files;
mod input;
mod model;

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;

use blk_dataplane::vhost_user::Server;
use blk_dataplane::{Backing, Device, DeviceOptions};
use event_poll::EventNotifier;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use self::files::{Files, Kind};
pub use self::input::Input;
use self::input::Op;
use self::model::{Expect, Model, NUM_QUEUES, QUEUE_SIZE};

/// Far above what any answer takes: nothing passes by being faster.
const DEADLINE: Duration = Duration::from_secs(30);

const GET_VRING_BASE: u32 = 11;
const SET_INFLIGHT_FD: u32 = 32;

/// What outlives an input. One at a time: descriptors are counted.
struct World {
    device: Device,
    config: Vec<u8>,
    files: Files,
}

static WORLD: LazyLock<Mutex<World>> = LazyLock::new(|| {
    let options = DeviceOptions {
        num_queues: u16::try_from(NUM_QUEUES).unwrap(),
        queue_size: u16::try_from(QUEUE_SIZE).unwrap(),
        poll_max: Duration::ZERO,
        ..DeviceOptions::default()
    };
    let device = Device::new(Backing::null_zeroes(1 << 20), &options).unwrap();
    let space = device.config_space();
    let longest = (1..=256).rev().find_map(|len| space.read(0, len));
    let config = longest.expect("it has some").to_vec();
    Mutex::new(World {
        device,
        config,
        files: Files::new(),
    })
});

/// Runs one input; panics where server and model differ.
pub fn run(input: Input) {
    let mut world = WORLD.lock().unwrap_or_else(PoisonError::into_inner);
    let World {
        device,
        config,
        files,
    } = &mut *world;
    let before = files::open();
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(DEADLINE)).unwrap();
    ours.set_write_timeout(Some(DEADLINE)).unwrap();
    let server = Server::inherited(theirs.into(), device.clone()).unwrap();
    let until = EventNotifier::new().unwrap();
    std::thread::scope(|scope| {
        let served = scope.spawn(|| server.serve(&until));
        let mut front = FrontEnd {
            socket: ours,
            files,
            model: Model::new(device.features(), config.clone()),
            due: VecDeque::new(),
            closed: false,
        };
        front.play(input);
        // If it panicked, the socket is closed and the server returns all the same.
        drop(front);
        served.join().unwrap().unwrap();
    });
    drop(until);
    files.inflight = None;
    assert_eq!(files::open(), before, "descriptors were left open");
}

struct FrontEnd<'a> {
    socket: UnixStream,
    files: &'a mut Files,
    model: Model,
    /// What has not been read yet.
    due: VecDeque<(u32, Expect)>,
    closed: bool,
}

/// What came back.
struct Answer {
    head: [u32; 3],
    body: Vec<u8>,
}

impl FrontEnd<'_> {
    fn play(&mut self, input: Input) {
        let Input { ops, cut_off } = input;
        let last = ops.len();
        for (number, op) in (1..).zip(ops) {
            if self.closed {
                return;
            }
            let cut = cut_off.filter(|_| number == last);
            if let Some(cut) = cut {
                self.catch_up();
                let bytes = bytes_of(head_of(&op), &op.body);
                let sent = usize::from(cut) % bytes.len();
                self.send(&bytes[..sent], &op);
                return;
            }
            self.step(op);
        }
        self.catch_up();
        // What was kept that should not have been, or lost, shows in these; what came unasked is in front of them.
        for question in input::last_questions() {
            if self.closed {
                return;
            }
            self.step(question);
        }
    }

    fn step(&mut self, mut op: Op) {
        if op.code == SET_INFLIGHT_FD {
            self.catch_up();
            self.fill_in(&mut op);
        }
        let head = head_of(&op);
        // Of a length that is not so, no body comes: the connection is over.
        let expect = self.model.receive(head, &op.body, &op.fds);
        self.send(&bytes_of(head, &op.body), &op);
        let unsure = self.model.unsure().is_some();
        self.due.push_back((op.code, expect));
        if !op.pipelined || unsure {
            self.catch_up();
        }
        while let Some(index) = self.model.unsure().filter(|_| !self.closed) {
            let body = [index, 0].map(u32::to_le_bytes).concat();
            self.step(Op::question(GET_VRING_BASE, body));
        }
    }

    /// Says of the memory for requests in flight what the server said. Other memory would be taken for that, too.
    fn fill_in(&self, op: &mut Op) {
        for kind in &mut op.fds {
            if matches!(kind, Kind::Ram | Kind::Log) {
                *kind = Kind::Pipe;
            }
        }
        if let Some(given) = &self.model.given
            && op.body.len() >= 20
        {
            op.body[..20].copy_from_slice(&given[..20]);
        }
    }

    fn send(&self, bytes: &[u8], op: &Op) {
        let numbers: Vec<RawFd> = op
            .fds
            .iter()
            .map(|&kind| self.files.fd(kind).as_raw_fd())
            .collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let mut rest = bytes;
        let mut pieces = op.pieces.iter();
        let mut piece = 0;
        let mut carried = numbers.is_empty();
        while !rest.is_empty() {
            let len = pieces.next().map_or(rest.len(), |&len| usize::from(len));
            let len = len.min(rest.len());
            let last = len == rest.len();
            let carries = !carried && (last || piece == op.fds_with);
            let rights = if carries { &rights[..] } else { &[] };
            let parts = [IoSlice::new(&rest[..len])];
            let raw = self.socket.as_raw_fd();
            match sendmsg::<()>(raw, &parts, rights, MsgFlags::MSG_NOSIGNAL, None) {
                Ok(sent) => rest = &rest[sent..],
                // What it thinks of that shows when its answer is read.
                Err(Errno::EPIPE | Errno::ECONNRESET) => return,
                Err(errno) => panic!("cannot send: {errno}"),
            }
            carried |= carries;
            piece += 1;
        }
    }

    /// Reads what is due.
    fn catch_up(&mut self) {
        while let Some((code, expect)) = self.due.pop_front() {
            if self.closed {
                return;
            }
            self.check(code, &expect);
        }
    }

    fn check(&mut self, code: u32, expect: &Expect) {
        if *expect == Expect::Nothing {
            return;
        }
        let with_fd = matches!(expect, Expect::Inflight { .. });
        let answer = self.read(with_fd);
        let Some(Answer { head, body }) = answer else {
            assert_eq!(*expect, Expect::Closed, "closed after {code}");
            self.closed = true;
            return;
        };
        let size = u32::try_from(body.len()).unwrap();
        assert_eq!(head, [code, 5, size], "{expect:?}");
        match expect {
            Expect::Reply(expected) => assert_eq!(body, *expected, "of {code}"),
            Expect::Refused => assert!(body.len() == 8 && body != [0; 8], "{code}: {body:?}"),
            Expect::Base(index) => {
                assert_eq!((body.len(), &body[..4]), (8, &index.to_le_bytes()[..]));
                let base = u32::from_le_bytes(body[4..].try_into().unwrap());
                self.model.stopped(*index, base);
            }
            Expect::Inflight { len, shape } => {
                assert_eq!(body.len(), *len);
                let shape = shape.map(u16::to_le_bytes).concat();
                assert_eq!(body[16..20], shape);
                assert_ne!(body[..8], [0; 8], "bytes");
                assert!(self.files.inflight.is_some(), "without a descriptor");
                self.model.given = Some(body);
            }
            Expect::Nothing | Expect::Closed => panic!("{code}: {head:?} {body:?}"),
        }
    }

    /// `None` at the end of the connection.
    fn read(&mut self, with_fd: bool) -> Option<Answer> {
        let mut head = [0; 12];
        let mut filled = 0;
        if with_fd {
            let (len, fd) = files::receive(&self.socket, &mut head);
            self.files.inflight = fd;
            filled = len;
            if len == 0 {
                return None;
            }
        }
        match self.socket.read_exact(&mut head[filled..]) {
            Ok(()) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset
                ) =>
            {
                return None;
            }
            Err(error) => panic!("no answer: {error}"),
        }
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
        let mut body = vec![0; usize::try_from(word(8)).unwrap()];
        self.socket.read_exact(&mut body).unwrap();
        let head = [word(0), word(4), word(8)];
        Some(Answer { head, body })
    }
}

fn head_of(op: &Op) -> [u32; 3] {
    let size = u32::try_from(op.body.len()).unwrap();
    [op.code, op.flags, op.said.unwrap_or(size)]
}

fn bytes_of(head: [u32; 3], body: &[u8]) -> Vec<u8> {
    let mut bytes = head.map(u32::to_le_bytes).concat();
    bytes.extend(body);
    bytes
}
