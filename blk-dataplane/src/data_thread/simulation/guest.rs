//! A guest's end of one queue: requests with their buffers, and what it remembers of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use ioq::testing::{Change, Dice, Ledger, SECTOR_LEN, Ticket};
use virtio_bindings::virtio_blk as blk;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vring::driver::{SplitDriver, SplitLayout};
use vring::{QueueSize, RingAddresses, RingFeatures, Segment};

pub(super) type Memory = GuestMemoryMmap<()>;

/// Sectors of the disk: few, so that requests meet.
pub(super) const SECTORS: u64 = 64;

/// Guest memory of one queue: the ring, then one place for each request's buffers.
pub(super) const SPAN: u64 = 0x10_0000;
const PLACES: u64 = 0x1_0000;
const PLACE_LEN: u64 = 0x4000;
const PLACE_COUNT: u64 = 24;
const DATA: u64 = 0x200;
const STATUS: u64 = 0x3f00;

/// Entries in the ring: a request takes 5 at most.
pub(super) const RING_SIZE: u32 = 128;
const _: () = assert!(5 * PLACE_COUNT <= RING_SIZE as u64);

/// Sectors in one transfer.
const TRANSFER_MAX: u64 = 12;

#[derive(Debug)]
pub(super) enum Wants {
    /// Each range by itself.
    Change(Vec<Ticket>),
    /// And what was popped before it, as far as the guest could have seen that.
    Flush(Ticket, Vec<Ticket>),
    Read(Ticket, u64),
}

#[derive(Debug)]
pub(super) struct Asked {
    /// Of the queue's requests, which.
    pub(super) number: u64,
    pub(super) wants: Wants,
    place: u64,
    data: u64,
    len: usize,
}

#[derive(Debug)]
pub(super) struct Answered {
    pub(super) wants: Wants,
    pub(super) ok: bool,
    /// Of a read.
    pub(super) data: Vec<u8>,
}

pub(super) struct GuestQueue {
    memory: Arc<Memory>,
    base: u64,
    pub(super) addresses: RingAddresses,
    driver: SplitDriver<Memory>,
    pub(super) outstanding: BTreeMap<u32, Asked>,
    places: Vec<u64>,
    /// Requests published since the beginning.
    pub(super) asked: u64,
    pub(super) answered: u64,
    /// Where the last transfer ended: the next one may follow it and be merged.
    end: u64,
}

impl GuestQueue {
    pub(super) fn new(memory: &Arc<Memory>, index: u16) -> Self {
        let base = u64::from(index) * SPAN;
        let size = QueueSize::new(RING_SIZE).unwrap();
        let layout = SplitLayout::new(GuestAddress(base), size).unwrap();
        let addresses = layout.addresses();
        let features = RingFeatures::default();
        Self {
            driver: SplitDriver::new(Arc::clone(memory), addresses, size, features).unwrap(),
            memory: Arc::clone(memory),
            base,
            addresses,
            outstanding: BTreeMap::new(),
            places: (0..PLACE_COUNT).collect(),
            asked: 0,
            answered: 0,
            end: 0,
        }
    }

    pub(super) fn has_room(&self) -> bool {
        !self.places.is_empty()
    }

    /// Puts one more request into the ring, without telling.
    pub(super) fn ask(&mut self, dice: &mut Dice, ledger: &mut Ledger) {
        let Some(place) = self.places.pop() else {
            return;
        };
        let at = self.base + PLACES + place * PLACE_LEN;
        // Now and then where direct I/O does not take it.
        let data = at + DATA + if dice.chance(150) { 4 } else { 0 };
        let sectors = self.choose_sectors(dice);
        let (kind, sector, wants, len, readable) = match dice.below(100) {
            0..12 => {
                let wants = Wants::Flush(ledger.ask_flush(), Vec::new());
                (blk::VIRTIO_BLK_T_FLUSH, 0, wants, 0, true)
            }
            12..17 => {
                let (wants, len) = self.ranges(dice, ledger, Change::Discard, data);
                (blk::VIRTIO_BLK_T_DISCARD, 0, wants, len, true)
            }
            17..25 => {
                let (wants, len) = self.ranges(dice, ledger, Change::Zeroes, data);
                (blk::VIRTIO_BLK_T_WRITE_ZEROES, 0, wants, len, true)
            }
            25..45 => {
                let len = SECTOR_LEN * usize::try_from(sectors.end - sectors.start).unwrap();
                let wants = Wants::Read(ledger.ask_read(), sectors.start);
                (blk::VIRTIO_BLK_T_IN, sectors.start, wants, len, false)
            }
            _ => {
                let ticket = ledger.ask(Change::Data, sectors.clone());
                let content: Vec<u8> = sectors
                    .clone()
                    .flat_map(|sector| ledger.content(ticket, sector))
                    .collect();
                self.write(data, &content);
                let wants = Wants::Change(vec![ticket]);
                (
                    blk::VIRTIO_BLK_T_OUT,
                    sectors.start,
                    wants,
                    content.len(),
                    true,
                )
            }
        };
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.write(at, &header);
        self.write(at + STATUS, &[0xee]);
        let segment = |addr, len: usize| Segment {
            addr: GuestAddress(addr),
            len: u32::try_from(len).unwrap(),
        };
        let (mut first, mut last) = (vec![segment(at, 16)], vec![segment(at + STATUS, 1)]);
        let cut = if len >= 2 * SECTOR_LEN && dice.chance(400) {
            SECTOR_LEN * (1 + dice.index(len / SECTOR_LEN - 1))
        } else {
            0
        };
        let parts = [segment(data, cut), segment(data + cut as u64, len - cut)];
        let parts = parts.into_iter().filter(|part| part.len > 0);
        if readable {
            first.extend(parts);
        } else {
            last.splice(0..0, parts);
        }
        let head = self.driver.add_chain(&first, &last).unwrap();
        let asked = Asked {
            number: self.asked,
            wants,
            place,
            data,
            len,
        };
        self.asked += 1;
        self.outstanding.insert(u32::from(head), asked);
    }

    fn choose_sectors(&mut self, dice: &mut Dice) -> std::ops::Range<u64> {
        let start = if dice.chance(400) && self.end < SECTORS {
            self.end
        } else {
            dice.below(SECTORS)
        };
        let most = if dice.chance(300) { TRANSFER_MAX } else { 3 };
        let end = SECTORS.min(start + 1 + dice.below(most));
        self.end = end;
        start..end
    }

    /// Up to three ranges to discard or to zero, and the length of the segments that say so.
    fn ranges(
        &mut self,
        dice: &mut Dice,
        ledger: &mut Ledger,
        change: Change,
        data: u64,
    ) -> (Wants, usize) {
        let count = 1 + dice.below(3);
        let mut tickets = Vec::new();
        let mut bytes = Vec::new();
        for _ in 0..count {
            let sectors = self.choose_sectors(dice);
            let len = u32::try_from(sectors.end - sectors.start).unwrap();
            bytes.extend_from_slice(&sectors.start.to_le_bytes());
            bytes.extend_from_slice(&len.to_le_bytes());
            bytes.extend_from_slice(&0u32.to_le_bytes());
            tickets.push(ledger.ask(change, sectors));
        }
        self.write(data, &bytes);
        (Wants::Change(tickets), bytes.len())
    }

    fn write(&self, addr: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub(super) fn publish(&mut self) {
        self.driver.publish();
    }

    /// The next answer, if there is one. An error says what is wrong with it.
    pub(super) fn poll(&mut self) -> Result<Option<Answered>, String> {
        let Some(used) = self.driver.poll_used() else {
            return Ok(None);
        };
        let Some(asked) = self.outstanding.remove(&used.id) else {
            return Err(format!("{used:?} was not outstanding"));
        };
        self.places.push(asked.place);
        self.answered += 1;
        let at = self.base + PLACES + asked.place * PLACE_LEN + STATUS;
        let status: u8 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let is_read = matches!(asked.wants, Wants::Read(..));
        let written = if is_read { asked.len + 1 } else { 1 };
        if status > 1 || status == 0 && usize::try_from(used.len).ok() != Some(written) {
            return Err(format!("status {status}, {used:?}, to {asked:?}"));
        }
        let mut data = vec![0; if is_read { asked.len } else { 0 }];
        self.memory
            .read_slice(&mut data, GuestAddress(asked.data))
            .unwrap();
        Ok(Some(Answered {
            wants: asked.wants,
            ok: status == 0,
            data,
        }))
    }

    /// The tickets of changes outstanding whose number is below `end`.
    pub(super) fn changes_before(&self, end: u64) -> impl Iterator<Item = Ticket> {
        self.outstanding
            .values()
            .filter(move |asked| asked.number < end)
            .filter_map(|asked| match &asked.wants {
                Wants::Change(tickets) => Some(tickets.iter().copied()),
                Wants::Flush(..) | Wants::Read(..) => None,
            })
            .flatten()
    }

    /// The flushes numbered from `start` to `end` now cover `tickets`.
    pub(super) fn flushes_cover(&mut self, start: u64, end: u64, tickets: &[Ticket]) {
        for asked in self.outstanding.values_mut() {
            if let Wants::Flush(_, covers) = &mut asked.wants
                && (start..end).contains(&asked.number)
            {
                covers.extend_from_slice(tickets);
            }
        }
    }

    /// Each flush numbered from `start` to `end` covers the queue's own changes before it.
    pub(super) fn flushes_cover_own(&mut self, start: u64, end: u64) {
        let flushes: Vec<u64> = self
            .outstanding
            .values()
            .filter(|asked| matches!(asked.wants, Wants::Flush(..)))
            .map(|asked| asked.number)
            .filter(|number| (start..end).contains(number))
            .collect();
        for number in flushes {
            let own: Vec<Ticket> = self.changes_before(number).collect();
            self.flushes_cover(number, number + 1, &own);
        }
    }
}
