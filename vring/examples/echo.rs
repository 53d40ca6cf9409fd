//! An echo device over plain guest memory: it writes back what it reads, for the ring format asked for.
//!
//! ```text
//! cargo run -p vring --features driver --example echo [split|packed]
//! ```
//!
//! The device runs on a thread of its own and sleeps when there is nothing to do, as in a virtual
//! machine monitor. Two channels of one place stand for the two eventfds: a kick too many is dropped,
//! none is lost. The guest is the crate's own driver side.

use std::error::Error;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vring::driver::{Driver, Layout};
use vring::{
    Chain, Finished, PopError, Queue, QueueConfig, QueueSize, RingBase, RingFeatures, Segment,
};

type Memory = GuestMemoryMmap<()>;
type Failure = Box<dyn Error + Send + Sync>;

const MEMORY_LEN: usize = 0x10_0000;
const RING: GuestAddress = GuestAddress(0x1000);
/// One slot of [`SLOT_LEN`] bytes for each request in flight: the message, and after it the echo.
const BUFFERS: u64 = 0x2_0000;
const SLOT_LEN: u64 = 0x1000;
const ECHO_AT: u64 = SLOT_LEN / 2;

const QUEUE_SIZE: u16 = 16;
/// Requests the guest has in flight at a time: two descriptors each, so this many fill the ring.
const DEPTH: u64 = 8;
const MESSAGES: u64 = 1000;
/// Longer than any answer takes: a lost wake-up is an error then, and not the end of all output.
const PATIENCE: Duration = Duration::from_secs(60);

/// Chains of one pass, so that a guest that publishes all the time cannot keep the device here.
const PASS_MAX: u16 = 4;
/// Bytes copied at a time: what a message costs in memory, however long the guest says it is.
const COPY_MAX: usize = 64;

/// The device: a queue, and storage that every request uses again.
struct Echo {
    memory: Arc<Memory>,
    queue: Queue<Memory>,
    chain: Chain,
    buffer: [u8; COPY_MAX],
}

/// What the device did.
#[derive(Default)]
struct Served {
    echoed: u32,
    refused: u32,
    passes: u32,
    interrupts: u32,
}

impl Echo {
    fn new(memory: Arc<Memory>, config: &QueueConfig) -> Result<Self, Failure> {
        Ok(Self {
            queue: Queue::start(Arc::clone(&memory), config)?,
            memory,
            chain: Chain::for_queue(config.size),
            buffer: [0; COPY_MAX],
        })
    }

    /// Serves until the guest is gone.
    fn run(mut self, kicks: &Receiver<()>, interrupts: &SyncSender<()>) -> Result<Served, Failure> {
        let mut served = Served::default();
        loop {
            let Finished { notify, sleep } = self.pass(&mut served)?;
            if notify {
                served.interrupts += 1;
                // Full: the guest has one to take already.
                let _ = interrupts.try_send(());
            }
            if sleep && kicks.recv().is_err() {
                return Ok(served);
            }
        }
    }

    /// One bounded pass over the queue.
    fn pass(&mut self, served: &mut Served) -> Result<Finished, Failure> {
        let Self {
            memory,
            queue,
            chain,
            buffer,
        } = self;
        served.passes += 1;
        let mut batch = queue.batch(PASS_MAX);
        loop {
            match batch.pop(chain) {
                Ok(Some(head)) => {
                    let (written, whole) = echo(memory, chain, buffer);
                    if whole {
                        served.echoed += 1;
                    } else {
                        served.refused += 1;
                    }
                    batch.push(head, written);
                }
                Ok(None) => break,
                // This request is wrong: it goes back with nothing written, and the ring goes on.
                Err(PopError::Chain { head, .. }) => {
                    served.refused += 1;
                    batch.push(head, 0);
                }
                // The ring is: a real device would signal its error eventfd and wait for a reset.
                Err(broken) => return Err(broken.into()),
            }
        }
        Ok(batch.finish())
    }
}

/// Copies the readable buffers to the writable ones, however either are split. Returns the bytes
/// written, and whether all of them were in memory.
fn echo(memory: &Memory, chain: &Chain, buffer: &mut [u8]) -> (u32, bool) {
    let mut done: u32 = 0;
    loop {
        let offset = u64::from(done);
        let Ok(read) = chain.copy_from_readable(memory, offset, buffer) else {
            return (done, false);
        };
        let (written, whole) = match chain.copy_to_writable(memory, offset, &buffer[..read]) {
            Ok(written) => (written, true),
            Err(hole) => (hole.completed, false),
        };
        // At most the buffer's length, and a chain has at most 2^32 bytes both ways together.
        done = done.saturating_add(u32::try_from(written).unwrap_or(0));
        if !whole || written == 0 {
            return (done, whole);
        }
    }
}

/// The guest: sends messages and checks their echoes. Returns how often it kicked and slept.
fn guest(
    memory: &Memory,
    driver: &mut Driver<Memory>,
    kick: &SyncSender<()>,
    interrupts: &Receiver<()>,
) -> Result<(u32, u32), Failure> {
    let (mut kicks, mut sleeps) = (0, 0);
    let mut slot_of = [0; QUEUE_SIZE as usize];
    for first in (0..MESSAGES).step_by(usize::try_from(DEPTH)?) {
        let mut outstanding = 0;
        for message in first..MESSAGES.min(first + DEPTH) {
            let slot = BUFFERS + message % DEPTH * SLOT_LEN;
            let text = text(message);
            memory.write_slice(text.as_bytes(), GuestAddress(slot))?;
            let id = driver.add_chain(
                &[segment(slot, text.len())?],
                &[segment(slot + ECHO_AT, text.len())?],
            )?;
            slot_of[usize::from(id)] = message;
            outstanding += 1;
        }
        driver.publish();
        if driver.needs_kick() {
            kicks += 1;
            let _ = kick.try_send(());
        }
        while outstanding > 0 {
            let Some(used) = driver.poll_used() else {
                if driver.enable_interrupts() {
                    sleeps += 1;
                    interrupts.recv_timeout(PATIENCE)?;
                }
                driver.disable_interrupts();
                continue;
            };
            let message = slot_of[usize::try_from(used.id)?];
            let slot = BUFFERS + message % DEPTH * SLOT_LEN;
            let mut answer = vec![0; usize::try_from(used.len)?];
            memory.read_slice(&mut answer, GuestAddress(slot + ECHO_AT))?;
            if !used.expected || answer != text(message).as_bytes() {
                return Err(format!("message {message} came back as {answer:?}").into());
            }
            outstanding -= 1;
        }
    }

    // What a device must expect: a request to write where no memory is.
    let nowhere = u64::try_from(MEMORY_LEN)?;
    driver.add_chain(&[segment(BUFFERS, 8)?], &[segment(nowhere, 8)?])?;
    driver.publish();
    if driver.needs_kick() {
        kicks += 1;
        let _ = kick.try_send(());
    }
    loop {
        match driver.poll_used() {
            Some(used) if used.len == 0 => return Ok((kicks, sleeps)),
            Some(used) => return Err(format!("written to nowhere: {used:?}").into()),
            None if driver.enable_interrupts() => interrupts.recv_timeout(PATIENCE)?,
            None => {}
        }
    }
}

/// Messages of 20 to 213 bytes: some fit the device's buffer, some do not.
fn text(message: u64) -> String {
    let count = usize::try_from(message % 64).unwrap_or(0);
    format!("message number {message:4} {}", "and on".repeat(count / 2))
}

fn segment(address: u64, len: usize) -> Result<Segment, Failure> {
    Ok(Segment {
        addr: GuestAddress(address),
        len: u32::try_from(len)?,
    })
}

/// Sends all messages over a ring of one format, and writes what came of it to `out`.
fn run(packed: bool, out: &mut dyn Write) -> Result<(), Failure> {
    let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), MEMORY_LEN)])?);
    let size = QueueSize::new(u32::from(QUEUE_SIZE))?;
    // What the driver has accepted, as the transport hands it over: EVENT_IDX and RING_PACKED.
    let features = RingFeatures::from_virtio(1 << 29 | u64::from(packed) << 34);
    let addresses = Layout::new(RING, size, features)?.addresses();
    let mut driver = Driver::new(Arc::clone(&memory), addresses, size, features)?;
    let config = QueueConfig {
        size,
        addresses,
        features,
        base: RingBase::fresh(features),
    };
    let device = Echo::new(Arc::clone(&memory), &config)?;

    let (kick, kicked) = sync_channel(1);
    let (interrupt, interrupted) = sync_channel(1);
    let device = thread::spawn(move || device.run(&kicked, &interrupt));
    let sent = guest(&memory, &mut driver, &kick, &interrupted);
    drop(kick);
    let served = device.join().map_err(|_| "the device panicked")??;
    let (kicks, sleeps) = sent?;

    let format = if packed { "packed" } else { "split" };
    let Served {
        echoed,
        refused,
        passes,
        interrupts,
    } = served;
    writeln!(
        out,
        "{format} ring: {echoed} messages echoed, {refused} refused, in {passes} passes; \
         {kicks} kicks, {interrupts} interrupts, the guest slept {sleeps} times"
    )?;
    Ok(())
}

fn main() -> Result<(), Failure> {
    let formats: &[bool] = match std::env::args().nth(1).as_deref() {
        None => &[false, true],
        Some("split") => &[false],
        Some("packed") => &[true],
        Some(other) => return Err(format!("{other} is no ring format: split or packed").into()),
    };
    for &packed in formats {
        run(packed, &mut io::stdout())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_comes_back_over_either_format() {
        for (packed, format) in [(false, "split"), (true, "packed")] {
            let mut out = Vec::new();
            run(packed, &mut out).unwrap();
            let out = String::from_utf8(out).unwrap();
            let expected = format!("{format} ring: {MESSAGES} messages echoed, 1 refused, in ");
            assert!(out.starts_with(&expected), "{out}");
        }
    }
}
