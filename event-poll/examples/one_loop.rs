//! A timer, an eventfd and a unix socket in one loop.
//!
//! ```text
//! cargo run -p event-poll --example one_loop              # with a client of its own, ends by itself
//! cargo run -p event-poll --example one_loop -- /tmp/s    # for others: socat - UNIX-CONNECT:/tmp/s
//! ```
//!
//! The server answers each line that a client sends by the same in upper case. `quit` ends it. The timer
//! reports once in a while what was done; the eventfd stands for a guest's kick and is signalled for
//! each line by a second thread.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::ops::ControlFlow;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::Duration;

use event_poll::{EventNotifier, EventPoll, Registry, Timer, Token};

const TIMER: Token = Token(0);
const KICK: Token = Token(1);
const LISTENER: Token = Token(2);
/// Clients have this and the following.
const FIRST_CLIENT: u64 = 16;

/// Longest line; a client that sends more without an end is dropped.
const LINE_MAX: usize = 4096;

struct Client {
    stream: UnixStream,
    /// What has come of the next line.
    partial: Vec<u8>,
}

struct Server {
    listener: UnixListener,
    registry: Registry,
    clients: BTreeMap<u64, Client>,
    next_client: u64,
    lines: Sender<()>,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    ticks: u64,
    kicks: u64,
    clients: u64,
    lines: u64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args_os().nth(1).map(PathBuf::from);
    let own_client = path.is_none();
    let path = path.unwrap_or_else(|| {
        std::env::temp_dir().join(format!("one_loop-{}.sock", std::process::id()))
    });
    let listener = UnixListener::bind(&path)?;
    let counts = serve(listener, own_client.then_some(path.as_path()));
    std::fs::remove_file(&path)?;
    let Counts {
        ticks,
        kicks,
        clients,
        lines,
    } = counts?;
    println!("{clients} clients, {lines} lines, {kicks} wakes by kicks, {ticks} ticks");
    Ok(())
}

fn serve(listener: UnixListener, own_client: Option<&Path>) -> Result<Counts, Box<dyn Error>> {
    listener.set_nonblocking(true)?;
    let timer = Timer::new()?;
    timer.set_periodic(Duration::from_millis(20))?;
    let kick = EventNotifier::new()?;

    let mut poll = EventPoll::new(16)?;
    poll.add(&timer, TIMER)?;
    poll.add(&kick, KICK)?;
    poll.add(&listener, LISTENER)?;

    // The far end of the eventfd: kicks once for each line.
    let far_end = kick.try_clone()?;
    let (lines, kicks) = mpsc::channel();
    let kicker = thread::spawn(move || kicks.iter().try_for_each(|()| far_end.notify()));
    let client = own_client.map(|path| {
        let path = path.to_owned();
        thread::spawn(move || talk(&path))
    });

    let mut server = Server {
        listener,
        registry: poll.registry(),
        clients: BTreeMap::new(),
        next_client: FIRST_CLIENT,
        lines,
        counts: Counts::default(),
    };
    let mut failed = None;
    poll.run(|event| {
        let result = match event.token {
            TIMER => timer.test_and_clear().map(|ticks| {
                server.counts.ticks += ticks;
                println!("tick: {} lines so far", server.counts.lines);
                ControlFlow::Continue(())
            }),
            KICK => kick.test_and_clear().map(|kicked| {
                server.counts.kicks += u64::from(kicked);
                ControlFlow::Continue(())
            }),
            LISTENER => server.accept(),
            Token(client) => server.read(client),
        };
        result.unwrap_or_else(|error| {
            failed = Some(error);
            ControlFlow::Break(())
        })
    })?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    let Server { counts, lines, .. } = server;
    drop(lines);
    kicker.join().map_err(|_| "the kicker panicked")??;
    if let Some(client) = client {
        client.join().map_err(|_| "the client panicked")??;
    }
    Ok(counts)
}

impl Server {
    fn accept(&mut self) -> io::Result<ControlFlow<()>> {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            // It has gone again.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                return Ok(ControlFlow::Continue(()));
            }
            Err(error) => return Err(error),
        };
        stream.set_nonblocking(true)?;
        let token = self.next_client;
        self.next_client += 1;
        // While the loop runs.
        self.registry
            .add(&stream, Token(token))
            .map_err(io::Error::other)?;
        self.counts.clients += 1;
        let partial = Vec::new();
        self.clients.insert(token, Client { stream, partial });
        Ok(ControlFlow::Continue(()))
    }

    /// Reads what there is; not the connection's fault is an error.
    fn read(&mut self, token: u64) -> io::Result<ControlFlow<()>> {
        let Some(client) = self.clients.get_mut(&token) else {
            return Ok(ControlFlow::Continue(()));
        };
        let mut buffer = [0; 1024];
        let alive = match client.stream.read(&mut buffer) {
            Ok(0) => false,
            Ok(count) => {
                client.partial.extend_from_slice(&buffer[..count]);
                while let Some(end) = client.partial.iter().position(|&byte| byte == b'\n') {
                    let line: Vec<u8> = client.partial.drain(..=end).collect();
                    if line == b"quit\n" {
                        return Ok(ControlFlow::Break(()));
                    }
                    self.counts.lines += 1;
                    // The kicker lives as long as the server.
                    let _ = self.lines.send(());
                    // A client that does not read its answers is dropped, as one that has gone.
                    if client.stream.write_all(&line.to_ascii_uppercase()).is_err() {
                        return self.drop_client(token);
                    }
                }
                client.partial.len() <= LINE_MAX
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => true,
            Err(_) => false,
        };
        if alive {
            Ok(ControlFlow::Continue(()))
        } else {
            self.drop_client(token)
        }
    }

    fn drop_client(&mut self, token: u64) -> io::Result<ControlFlow<()>> {
        if let Some(client) = self.clients.remove(&token) {
            // Before it is closed.
            self.registry
                .remove(&client.stream)
                .map_err(io::Error::other)?;
        }
        Ok(ControlFlow::Continue(()))
    }
}

/// The client for a run without others: some lines, one by one, with pauses for the timer to be seen.
fn talk(path: &Path) -> io::Result<()> {
    let mut stream = UnixStream::connect(path)?;
    let mut answers = BufReader::new(stream.try_clone()?);
    for line in ["header\n", "data\n", "status\n"] {
        stream.write_all(line.as_bytes())?;
        let mut answer = String::new();
        answers.read_line(&mut answer)?;
        print!("{} -> {answer}", line.trim_end());
        if answer != line.to_uppercase() {
            return Err(ErrorKind::InvalidData.into());
        }
        thread::sleep(Duration::from_millis(30));
    }
    stream.write_all(b"quit\n")
}
