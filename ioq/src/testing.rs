//! Disks in memory, for the tests of this crate and of those built on it.
//!
//! [`FaultDisk`] answers like the kernel: it takes part of a batch, refuses one operation, moves
//! fewer bytes than asked, fails, and completes late and in another order, as scripted. What is
//! not scripted succeeds.
//!
//! ```
//! use ioq::testing::{FaultDisk, Step};
//! use ioq::{Config, IoErrorKind, IoQueue};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let disk = FaultDisk::new(vec![7; 4096]);
//! disk.script(0..512, [Step::AtMost(100)]);
//! disk.script(512..1024, [Step::Fail(5)]); // EIO
//!
//! let mut queue: IoQueue<(Vec<u8>, u32)> = disk.queue(&Config::default())?;
//! queue.read(0, (vec![0; 512], 0))?;
//! queue.read(512, (vec![0; 512], 1))?;
//! queue.submit();
//! while !queue.is_idle() {
//!     queue.reap(|(_, id), result| match id {
//!         0 => assert_eq!(result, Ok(512)), // continued after 100 bytes
//!         _ => assert_eq!(result.unwrap_err().kind(), IoErrorKind::Storage),
//!     });
//! }
//! # Ok(())
//! # }
//! ```
//!
//! [`PowerLossDisk`] has a write cache and loses power, whatever the queues on it were doing; [`Ledger`] knows
//! what may be found afterwards. [`Disk`] is for a disk of your own: [`queue_over`] puts a queue on it.

mod dice;
mod disk;
mod fault_disk;
mod ledger;
mod power_loss;

pub use self::dice::Dice;
pub use self::disk::{Disk, Operation, Outcome, Refusal, Waker, queue_over};
pub use self::fault_disk::{Event, FaultDisk, Imitates, Step, SubmitStep};
pub use self::ledger::{Change, Ledger, Ticket, Violation};
pub use self::power_loss::{Deeds, Faults, Lie, PowerLossDisk, SECTOR_LEN};
