//! A back-end without load: how soon it is ready, what it costs while nothing happens.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::backend::{self, Backend};
use super::contenders::Commands;
use super::statistics::Summary;
use super::{client, processes};

/// Starts per round.
const STARTS: usize = 15;

/// How long a back-end is given to come to rest.
const REST: Duration = Duration::from_millis(300);

/// How long a guest works before it stops: it has set everything up by then.
const WORK: Duration = Duration::from_millis(700);

/// How often connecting is tried.
const TRY: Duration = Duration::from_micros(50);

/// How long a start may take.
const START_MAX: Duration = Duration::from_secs(10);

/// Starts and ends it over and over, not bound to a processor; each time from before the fork to when connect(2) succeeds.
pub(crate) fn start(commands: &Commands, socket: &Path, log: &Path) -> Result<Value, String> {
    let mut times = Vec::with_capacity(STARTS);
    for _ in 0..STARTS {
        // One that is left over would be refused for a while.
        let _ = std::fs::remove_file(socket);
        let begun = Instant::now();
        let mut child = backend::spawn(&commands.serve, log)?;
        let connected = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break Ok(stream),
                Err(_) if begun.elapsed() < START_MAX => thread::sleep(TRY),
                Err(error) => break Err(error),
            }
        };
        let took = begun.elapsed();
        // Before it is judged, for it is nobody else's to end; and without asking, since qemu-storage-daemon 7.2 does not
        // hear SIGTERM so early.
        let _ = child.kill();
        let _ = child.wait();
        if let Err(error) = connected {
            let said = backend::last_of(log);
            return Err(format!("{}: {error}: {said}", socket.display()));
        }
        times.push(took.as_secs_f64() * 1e3);
    }
    let summary = Summary::of(times.iter().copied()).ok_or("no starts")?;
    Ok(json!({ "start_ms": {
        "median": summary.median, "min": summary.min, "max": summary.max, "all": times,
    }}))
}

/// Measures it alone, and with a guest that has set everything up and is stopped: its rings are started, and nobody
/// touches them.
pub(crate) fn idle(
    backend: &Backend,
    load_generator: &[String],
    time: Duration,
    scratch: &Path,
) -> Result<Value, String> {
    let alone = rest(backend, time)?;
    let (out, log) = (scratch.join("client.json"), scratch.join("client.log"));
    let mut guest = client::start(load_generator, &out, &log)?;
    thread::sleep(WORK);
    let connected = match guest.try_wait() {
        Ok(None) => {
            processes::signal(guest.id(), Signal::SIGSTOP).and_then(|()| rest(backend, time))
        }
        _ => Err(format!("the client has ended: {}", backend::last_of(&log))),
    };
    // SIGKILL ends a stopped process too.
    let _ = guest.kill();
    let _ = guest.wait();
    Ok(json!({ "alone": alone, "connected": connected? }))
}

fn rest(backend: &Backend, time: Duration) -> Result<Value, String> {
    thread::sleep(REST);
    let pid = backend.pid();
    let (before, begun) = (processes::cpu_time(pid)?, Instant::now());
    thread::sleep(time);
    let spent = processes::cpu_time(pid)?.saturating_sub(before);
    let seconds = begun.elapsed().as_secs_f64();
    let memory = processes::memory(pid)?;
    Ok(json!({
        "seconds": seconds,
        "cpu_ns": u64::try_from(spent.as_nanos()).unwrap_or(u64::MAX),
        "cpu_ns_per_second": spent.as_nanos() as f64 / seconds,
        "resident_kib": memory.resident,
        // Without the guest's memory, which a front-end shares with it.
        "resident_own_kib": memory.resident - memory.shared,
        "proportional_kib": memory.proportional,
    }))
}
