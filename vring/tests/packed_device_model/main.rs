//! `PackedQueue` against a naive model: what the specification says of the device's side, written
//! down plainly, over a copy of memory and positions that take one step at a time.
//!
//! A driver, right most of the time, and a device take random steps. After each, all of memory is
//! what the model says it is, and so is everything the queue answers.

mod model;
mod steps;

use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vring::{
    Chain, Head, PackedPosition, PackedQueue, PopError, QueueConfig, QueueSize, RingAddresses,
    RingBase, RingFeatures,
};

use model::{
    AVAIL, DEVICE_EVENT, DRIVER_EVENT, Descriptor, END, INDIRECT, Model, NEXT, Popped, RING, SEAM,
    USED, step,
};
use steps::{Buffer, Step, steps};

type Memory = GuestMemoryMmap<()>;

/// Enough for every mistake planted to be found many times over in a release build; in a debug build
/// they take thirty times as long.
const CASES: u32 = if cfg!(debug_assertions) { 300 } else { 3000 };

/// The queue and its model, and what the driver knows.
struct Both {
    memory: Arc<Memory>,
    config: QueueConfig,
    queue: PackedQueue<Memory>,
    chain: Chain,
    model: Model,
    /// Where the driver writes its next descriptor, and the ids it gives.
    driver: PackedPosition,
    next_id: u16,
    held: Vec<(u32, Head)>,
}

impl Both {
    fn new(size: u16, features: RingFeatures, at: PackedPosition) -> Self {
        let seam = usize::try_from(SEAM).unwrap();
        let ranges = [(GuestAddress(0), seam), (GuestAddress(SEAM), END - seam)];
        let memory = Arc::new(Memory::from_ranges(&ranges).unwrap());
        let address = |at: usize| GuestAddress(u64::try_from(at).unwrap());
        let config = QueueConfig {
            size: QueueSize::try_from(size).unwrap(),
            addresses: RingAddresses {
                descriptor_area: address(RING),
                driver_area: address(DRIVER_EVENT),
                device_area: address(DEVICE_EVENT),
            },
            features,
            base: RingBase::Packed {
                avail: at,
                used: at,
            },
        };
        let model = Model::new(size, features, at);
        memory.write_slice(&model.bytes, GuestAddress(0)).unwrap();
        Self {
            queue: PackedQueue::start(Arc::clone(&memory), &config).unwrap(),
            chain: Chain::for_queue(config.size),
            memory,
            config,
            model,
            driver: at,
            next_id: 0,
            held: Vec::new(),
        }
    }

    /// The guest writes `bytes`.
    fn write(&mut self, at: usize, bytes: &[u8]) {
        self.model.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        let address = GuestAddress(u64::try_from(at).unwrap());
        self.memory.write_slice(bytes, address).unwrap();
    }

    fn write_descriptor(&mut self, at: usize, descriptor: Descriptor) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&descriptor.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&descriptor.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&descriptor.id.to_le_bytes());
        bytes[14..].copy_from_slice(&descriptor.flags.to_le_bytes());
        self.write(at, &bytes);
    }

    /// The descriptors the driver has free: those it made available and those the device owns are
    /// not.
    fn free(&self) -> usize {
        let mut position = self.model.used;
        let mut taken = 0;
        while position != self.driver && taken <= self.model.size {
            step(&mut position, self.model.size);
            taken += 1;
        }
        usize::from(self.model.size.saturating_sub(taken))
    }

    fn add(
        &mut self,
        buffers: &[Buffer],
        table: Option<u64>,
        id: Option<u16>,
        endless: bool,
        heedless: bool,
    ) {
        let fresh = self.next_id;
        let id = id.unwrap_or(fresh);
        let mut list = Vec::new();
        if let Some(table) = table {
            let at = usize::try_from(table).unwrap();
            for (i, buffer) in buffers.iter().enumerate() {
                let entry = at + 16 * i;
                if entry + 16 <= END {
                    let descriptor = Descriptor {
                        address: buffer.address,
                        len: buffer.len,
                        id,
                        flags: buffer.flags,
                    };
                    self.write_descriptor(entry, descriptor);
                }
            }
            list.push(Buffer {
                address: table,
                len: 16 * u32::try_from(buffers.len()).unwrap(),
                flags: INDIRECT,
            });
        } else {
            list.extend_from_slice(buffers);
        }
        if list.len() > usize::from(self.model.size) || (list.len() > self.free() && !heedless) {
            return;
        }
        self.next_id = fresh.wrapping_add(1);
        for (i, buffer) in list.iter().enumerate() {
            let next = if i + 1 < list.len() || endless {
                NEXT
            } else {
                0
            };
            let bits = if self.driver.wrap { AVAIL } else { USED };
            let flags = buffer.flags & !(AVAIL | USED | NEXT) | bits | next;
            let descriptor = Descriptor {
                address: buffer.address,
                len: buffer.len,
                id,
                flags,
            };
            self.write_descriptor(RING + 16 * usize::from(self.driver.index), descriptor);
            step(&mut self.driver, self.model.size);
        }
    }

    fn pop(&mut self) -> Result<(), TestCaseError> {
        let expected = self.model.pop();
        let number = match &expected {
            Popped::Chain(number, ..) | Popped::Broken(number, _) => *number,
            Popped::Empty | Popped::Ring(_) => u32::MAX,
        };
        let found = match self.queue.pop(&mut self.chain) {
            Ok(None) => Popped::Empty,
            Ok(Some(head)) => {
                self.held.push((number, head));
                let (readable, writable) = (self.chain.readable(), self.chain.writable());
                Popped::Chain(number, readable.to_vec(), writable.to_vec())
            }
            Err(PopError::Chain { head, fault }) => {
                self.held.push((number, head));
                Popped::Broken(number, fault)
            }
            Err(PopError::Ring(fault)) => Popped::Ring(fault),
            Err(other) => panic!("{other:?}"),
        };
        prop_assert_eq!(found, expected);
        let mut slots: Vec<_> = self.held.iter().map(|(_, head)| head.index()).collect();
        slots.sort_unstable();
        slots.dedup();
        prop_assert_eq!(slots.len(), self.held.len(), "slots are unique");
        prop_assert!(slots.iter().all(|&slot| slot < self.model.size));
        Ok(())
    }

    fn push(&mut self, which: usize, len: Option<u32>) {
        if self.held.is_empty() {
            return;
        }
        let (number, head) = self.held.remove(which % self.held.len());
        let mut chains = self.model.chains.iter();
        let chain = chains.find(|chain| chain.number == number).unwrap();
        let all = chain.writable.unwrap_or(0);
        let len = len.unwrap_or_else(|| u32::try_from(all).unwrap_or(u32::MAX));
        self.model.push(number, len);
        self.queue.push(head, len);
    }

    fn restart(&mut self) {
        if self.model.in_flight() != 0 || self.model.fault.is_some() {
            return;
        }
        self.model.publish();
        self.queue.publish();
        let base = self.queue.base();
        self.config.base = base;
        self.queue = PackedQueue::start(Arc::clone(&self.memory), &self.config).unwrap();
        self.model.decided = false;
        self.model.passed.clear();
        self.model.latest = None;
        self.model.write_device_event(0, 0);
    }

    fn take(&mut self, next: &Step) -> Result<(), TestCaseError> {
        match *next {
            Step::Add {
                ref buffers,
                table,
                id,
                endless,
                heedless,
            } => self.add(buffers, table, id, endless, heedless),
            Step::Poke { at, value } => self.write(at, &value.to_le_bytes()),
            Step::DriverEvent { desc, flags } => {
                self.write(DRIVER_EVENT, &desc.to_le_bytes());
                self.write(DRIVER_EVENT + 2, &flags.to_le_bytes());
            }
            Step::Pop => self.pop()?,
            Step::Unpop { which } => {
                if let Some(at) = self.held.len().checked_sub(1 + which) {
                    let (number, head) = self.held.remove(at);
                    match self.queue.unpop(head) {
                        Ok(()) => prop_assert!(self.model.unpop(number)),
                        Err(head) => {
                            prop_assert!(!self.model.unpop(number));
                            self.held.insert(at, (number, head));
                        }
                    }
                }
            }
            Step::Push { which, len } => self.push(which, len),
            Step::Publish => prop_assert_eq!(self.queue.publish(), self.model.publish()),
            Step::ShouldNotify => {
                prop_assert_eq!(self.queue.should_notify(), self.model.should_notify());
            }
            Step::Enable => {
                let empty = self.queue.enable_notification();
                if self.model.fault.is_some() {
                    prop_assert!(empty);
                } else {
                    let (desc, flags) = if self.model.features.event_idx {
                        (self.model.avail.to_bits(), 2)
                    } else {
                        (0, 0)
                    };
                    self.model.write_device_event(desc, flags);
                    prop_assert_eq!(empty, !self.model.is_available());
                }
            }
            Step::Disable => {
                self.queue.disable_notification();
                self.model.write_device_event(0, 1);
            }
            Step::Restart => self.restart(),
        }
        Ok(())
    }

    fn agree(&self) -> Result<(), TestCaseError> {
        let mut bytes = vec![0; END];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        let differs = bytes
            .iter()
            .zip(&self.model.bytes)
            .position(|(a, b)| a != b);
        prop_assert_eq!(differs, None, "memory");
        let base = RingBase::Packed {
            avail: self.model.avail,
            used: self.model.used,
        };
        prop_assert_eq!(self.queue.base(), base);
        prop_assert_eq!(usize::from(self.queue.in_flight()), self.model.in_flight());
        prop_assert_eq!(self.queue.fault(), self.model.fault);
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(CASES))]

    #[test]
    fn the_queue_agrees_with_a_naive_model(
        shift in 0u32..5,
        start in 0u16..16,
        wrap: bool,
        indirect_desc in prop_oneof![9 => Just(true), 1 => Just(false)],
        event_idx: bool,
        in_order: bool,
        steps in steps(),
    ) {
        let size = 1 << shift;
        let features = RingFeatures { indirect_desc, event_idx, in_order, packed: true };
        let at = PackedPosition { index: start % size, wrap };
        let mut both = Both::new(size, features, at);
        both.agree()?;
        for step in &steps {
            both.take(step)?;
            both.agree()?;
        }
        // Nothing is left behind.
        while !both.held.is_empty() {
            both.push(0, None);
        }
        prop_assert_eq!(both.queue.publish(), both.model.publish());
        both.agree()?;
        prop_assert_eq!(both.queue.in_flight(), 0);
    }
}
