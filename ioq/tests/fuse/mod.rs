//! A file that is as slow as a test wants: a FUSE mount of one file, whose server is a thread of this process and
//! answers reads and writes only when told to. Needs root and `/dev/fuse`, and fails without.
//!
//! The kernel's side is `linux/fuse.h`. The mount is in a namespace of the calling thread's own, so that nothing
//! is left of it whatever becomes of the test.

use std::ffi::CString;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tempfile::NamedTempFile;

const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;

/// `struct fuse_in_header`, and `struct fuse_out_header`.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// What follows the header of a write, before its data.
const WRITE_IN: usize = 40;

/// `FUSE_ASYNC_DIO`: direct I/O may be asynchronous.
const ASYNC_DIO: u32 = 1 << 15;
/// `FOPEN_DIRECT_IO`: no page cache.
const OPEN_DIRECT_IO: u32 = 1;
/// Requests the kernel may have outstanding, more than any test has.
const OUTSTANDING_MAX: u16 = 1024;
/// Most bytes of a write.
const WRITE_MAX: u32 = 1 << 17;

/// A request that waits for its answer.
enum Held {
    Read {
        unique: u64,
        at: usize,
        len: usize,
    },
    Write {
        unique: u64,
        at: usize,
        data: Vec<u8>,
    },
}

#[derive(Default)]
struct State {
    content: Vec<u8>,
    answering: bool,
    held: Vec<Held>,
    answered: usize,
}

struct Shared {
    device: OwnedFd,
    state: Mutex<State>,
    changed: Condvar,
}

/// The file, mounted. Dropping it answers what is held, and unmounts.
pub(crate) struct SlowFile {
    shared: Arc<Shared>,
    mounted_at: NamedTempFile,
    server: Option<JoinHandle<()>>,
}

impl SlowFile {
    /// A file of that content, which answers nothing yet. To be called on a thread of a test's own.
    pub(crate) fn new(content: Vec<u8>) -> Self {
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .expect("this test needs /dev/fuse");
        let mounted_at = NamedTempFile::new().unwrap();
        let options = format!(
            "fd={},rootmode=100644,user_id=0,group_id=0",
            device.as_raw_fd()
        );
        let options = CString::new(options).unwrap();
        let target = CString::new(mounted_at.path().as_os_str().as_bytes()).unwrap();
        // SAFETY: all strings are NUL-terminated and outlive the calls.
        unsafe {
            assert_eq!(
                libc::unshare(libc::CLONE_NEWNS),
                0,
                "this test needs root: {}",
                std::io::Error::last_os_error()
            );
            let none = std::ptr::null();
            let private = libc::MS_REC | libc::MS_PRIVATE;
            assert_eq!(
                libc::mount(none, c"/".as_ptr(), none, private, none.cast()),
                0
            );
            let (name, kind) = (c"ioq".as_ptr(), c"fuse".as_ptr());
            let flags = libc::MS_NOSUID | libc::MS_NODEV;
            assert_eq!(
                libc::mount(name, target.as_ptr(), kind, flags, options.as_ptr().cast()),
                0,
                "{}",
                std::io::Error::last_os_error()
            );
        }
        let shared = Arc::new(Shared {
            device: device.into(),
            state: Mutex::new(State {
                content,
                ..State::default()
            }),
            changed: Condvar::new(),
        });
        let server = {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || shared.serve())
        };
        Self {
            shared,
            mounted_at,
            server: Some(server),
        }
    }

    /// Opened for reading and writing with `O_DIRECT`, which is what Linux AIO is asynchronous for.
    pub(crate) fn open(&self) -> File {
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(self.mounted_at.path())
            .unwrap();
        // Asynchronous is what lies below the end, and the kernel learns of that only when asked.
        let len = file.metadata().unwrap().len();
        assert_eq!(len, self.shared.state().content.len() as u64);
        file
    }

    /// Waits until so many requests wait for their answers.
    pub(crate) fn wait_for_held(&self, count: usize) {
        let state = self.shared.state();
        let (state, timeout) = self
            .shared
            .changed
            .wait_timeout_while(state, Duration::from_secs(60), |state| {
                state.held.len() < count
            })
            .unwrap();
        assert!(!timeout.timed_out(), "{} of {count}", state.held.len());
    }

    /// Tells how many reads and writes have been answered so far; usable from any thread.
    pub(crate) fn answered(&self) -> impl Fn() -> usize + Clone + Send + 'static {
        let shared = Arc::clone(&self.shared);
        move || shared.state().answered
    }

    /// Answers what is held, newest first, and from now on everything at once.
    pub(crate) fn answer(&self) {
        let mut state = self.shared.state();
        state.answering = true;
        while let Some(held) = state.held.pop() {
            self.shared.answer(&mut state, &held);
        }
    }

    /// What is in it now.
    pub(crate) fn content(&self) -> Vec<u8> {
        self.shared.state().content.clone()
    }
}

impl Drop for SlowFile {
    fn drop(&mut self) {
        self.answer();
        let target = CString::new(self.mounted_at.path().as_os_str().as_bytes()).unwrap();
        // Once the last file on it is closed too, the server's read says that it is over.
        // SAFETY: the string is NUL-terminated and outlives the call.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
        let server = self.server.take().unwrap().join();
        if !std::thread::panicking() {
            server.unwrap();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut device = File::from(self.device.try_clone().unwrap());
        // A smaller one than the largest request is refused.
        let mut request = vec![0; IN_HEADER + WRITE_IN + WRITE_MAX as usize];
        loop {
            let len = match device.read(&mut request) {
                Ok(len) => len,
                // Of a request that was taken back in between, or by a signal.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // Unmounted.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return,
                Err(error) => panic!("{error}"),
            };
            self.take(&request[..len]);
        }
    }

    fn take(&self, request: &[u8]) {
        let (opcode, unique) = (u32_at(request, 4), u64_at(request, 8));
        let body = &request[IN_HEADER..];
        let place = || {
            let len = usize::try_from(u32_at(body, 16)).unwrap();
            (usize::try_from(u64_at(body, 8)).unwrap(), len)
        };
        match opcode {
            INIT => self.reply(unique, 0, &init(u32_at(body, 8))),
            GETATTR => {
                let len = self.state().content.len();
                self.reply(unique, 0, &attributes(len as u64));
            }
            OPEN => {
                let mut open = [0; 16];
                open[8..12].copy_from_slice(&OPEN_DIRECT_IO.to_ne_bytes());
                self.reply(unique, 0, &open);
            }
            READ => {
                let (at, len) = place();
                self.hold(Held::Read { unique, at, len });
            }
            WRITE => {
                let (at, len) = place();
                let data = body[WRITE_IN..WRITE_IN + len].to_vec();
                self.hold(Held::Write { unique, at, data });
            }
            FLUSH | RELEASE | DESTROY => self.reply(unique, 0, &[]),
            // None of them wants an answer: an interrupted request is answered when its time comes.
            FORGET | BATCH_FORGET | INTERRUPT => {}
            _ => self.reply(unique, libc::ENOSYS, &[]),
        }
    }

    fn hold(&self, held: Held) {
        let mut state = self.state();
        if state.answering {
            self.answer(&mut state, &held);
        } else {
            state.held.push(held);
            self.changed.notify_all();
        }
    }

    fn answer(&self, state: &mut State, held: &Held) {
        // Counted first: whoever learns of the answer finds it counted.
        state.answered += 1;
        match held {
            Held::Read { unique, at, len } => {
                let end = state.content.len().min(at + len);
                self.reply(*unique, 0, &state.content[(*at).min(end)..end]);
            }
            Held::Write { unique, at, data } => {
                state.content[*at..at + data.len()].copy_from_slice(data);
                let mut written = [0; 8];
                written[..4].copy_from_slice(&u32::try_from(data.len()).unwrap().to_ne_bytes());
                self.reply(*unique, 0, &written);
            }
        }
    }

    fn reply(&self, unique: u64, errno: i32, body: &[u8]) {
        let len = OUT_HEADER + body.len();
        let mut reply = Vec::with_capacity(len);
        reply.extend_from_slice(&u32::try_from(len).unwrap().to_ne_bytes());
        reply.extend_from_slice(&(-errno).to_ne_bytes());
        reply.extend_from_slice(&unique.to_ne_bytes());
        reply.extend_from_slice(body);
        let mut device = File::from(self.device.try_clone().unwrap());
        match device.write(&reply) {
            Ok(written) => assert_eq!(written, len),
            // Nobody waits for it any more.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// `struct fuse_init_out`.
fn init(max_readahead: u32) -> [u8; 64] {
    let mut out = [0; 64];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &7u32.to_ne_bytes());
    put(4, &31u32.to_ne_bytes());
    put(8, &max_readahead.to_ne_bytes());
    put(12, &ASYNC_DIO.to_ne_bytes());
    put(16, &OUTSTANDING_MAX.to_ne_bytes());
    put(18, &OUTSTANDING_MAX.to_ne_bytes());
    put(20, &WRITE_MAX.to_ne_bytes());
    put(24, &1u32.to_ne_bytes());
    out
}

/// `struct fuse_attr_out` of the only file, valid for ever.
fn attributes(len: u64) -> [u8; 104] {
    let mut out = [0; 104];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &u64::from(u32::MAX).to_ne_bytes());
    put(16, &1u64.to_ne_bytes());
    put(24, &len.to_ne_bytes());
    put(76, &(libc::S_IFREG | 0o644).to_ne_bytes());
    put(80, &1u32.to_ne_bytes());
    put(96, &4096u32.to_ne_bytes());
    out
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}
