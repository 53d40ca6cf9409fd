//! The program is killed with SIGKILL at random moments under load, and started again with the same command line. The
//! guest here knows what each block holds and what it waits for: nothing may be lost, torn or completed twice.
//!
//! Rounds: `ROUNDS=200 cargo test --release -p blk-dataplane-cli --test killed`, or `make soak ROUNDS=200`.

mod front_end;
mod guest;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use self::front_end::FrontEnd;
use self::guest::{BLOCK_LEN, BLOCKS, Dice, Guest};

/// Rounds without a variable `ROUNDS`: what CI runs, over both ring formats together.
const ROUNDS: usize = 20;

/// Longer than anything takes here on a loaded machine; only a request that was lost gets here.
const DEADLINE: Duration = Duration::from_secs(60);

struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Program {
    fn start(image: &Path, socket: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_blk-dataplane"))
            .args(["--num-queues", "2", "--num-threads", "2", "--blk-file"])
            .arg(image)
            .arg("--socket-path")
            .arg(socket)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        stdout.read_line(&mut ready).unwrap();
        assert!(ready.starts_with("ready"), "{ready}");
        Self(child)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().cast_signed()), signal).unwrap();
    }
}

fn rounds() -> usize {
    std::env::var("ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().unwrap())
}

fn soak(packed: bool, rounds: usize) {
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let seed = u64::try_from(seed.as_nanos() & u128::from(u64::MAX)).unwrap() | 1;
    let mut dice = Dice::new(seed);
    let directory = tempfile::tempdir().unwrap();
    let (image, socket) = (directory.path().join("image"), directory.path().join("s"));
    let file = std::fs::File::create(&image).unwrap();
    file.set_len(BLOCKS * BLOCK_LEN as u64).unwrap();
    drop(file);
    let mut guest = Guest::new(packed, seed);
    let mut record = None;
    let mut in_flight = 0;
    for round in 0..=rounds {
        let mut program = Program::start(&image, &socket);
        let mut front = FrontEnd::connect(&socket);
        record = Some(front.bring_up(&guest, record.take()));
        guest.restart_clock();
        if round == rounds {
            guest.finish(DEADLINE);
            front.stop(&guest);
            drop(front);
            program.signal(Signal::SIGTERM);
            assert!(program.0.wait().unwrap().success());
            break;
        }
        // Sometimes before it has served anything, mostly in the middle.
        let until = Instant::now() + Duration::from_micros(dice.below(60_000));
        while Instant::now() < until {
            guest.turn(DEADLINE);
        }
        program.signal(Signal::SIGKILL);
        program.0.wait().unwrap();
        in_flight += guest.outstanding();
    }
    guest.check_image(&std::fs::read(&image).unwrap());
    let format = if packed { "packed" } else { "split" };
    println!(
        "{format} ring: {rounds} kills (seed {seed}), {in_flight} requests in flight at them, {} completed, each once",
        guest.completed
    );
    assert!(guest.completed > 0);
}

#[test]
fn split_rings_lose_nothing_when_the_program_is_killed() {
    soak(false, rounds().div_ceil(2));
}

#[test]
fn packed_rings_lose_nothing_when_the_program_is_killed() {
    soak(true, rounds().div_ceil(2));
}
