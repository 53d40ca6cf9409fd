//! The device side of a split ring over plain bytes: every result and every byte it should write.

use vring::{ChainFault, RingFault};

use crate::device::room;
use crate::naive_memory::NaiveMemory;
use crate::naive_order::NaiveOrder;
use crate::naive_walk::{Buffer, walk};

/// Addresses of the three areas.
#[derive(Clone, Copy, Debug)]
pub(super) struct Areas {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

impl Areas {
    /// Whether a ring of `size` can be here (virtio 1.3 §2.7; one region each, see `vring`).
    pub(super) fn hold(&self, memory: &NaiveMemory, size: u16) -> bool {
        let size = u64::from(size);
        let areas = [
            (self.descriptors, 16 * size, 16),
            (self.available, 6 + 2 * size, 2),
            (self.used, 6 + 8 * size, 4),
        ];
        areas
            .iter()
            .all(|&(at, len, alignment)| at % alignment == 0 && memory.in_one_region(at, len))
    }
}

/// What a pop should return.
#[derive(Debug)]
pub(super) enum Popped {
    Nothing,
    Chain { head: u16, buffers: Vec<Buffer> },
    BadChain { head: u16, fault: ChainFault },
    Broken(RingFault),
}

/// What the ring features change.
#[derive(Clone, Copy, Debug)]
pub(super) struct Features {
    pub(super) indirect_desc: bool,
    pub(super) event_idx: bool,
    pub(super) in_order: bool,
}

#[derive(Debug)]
pub(super) struct Model {
    pub(super) areas: Areas,
    pub(super) size: u16,
    pub(super) features: Features,
    pub(super) next_avail: u16,
    /// Entries seen to be available and not fetched yet.
    seen: u16,
    pub(super) used_idx: u16,
    pub(super) staged: Vec<(u16, u32)>,
    /// Elements published since the latest notification decision; `None` before the first.
    undecided: Option<u32>,
    /// By head.
    pub(super) owned: NaiveOrder<u16>,
    latest: Option<u16>,
    pub(super) fault: Option<RingFault>,
    reported: bool,
    lost: bool,
    kicks_disabled: bool,
}

impl Model {
    /// What starting a queue does. The areas hold it.
    pub(super) fn start(
        memory: &mut NaiveMemory,
        areas: Areas,
        size: u16,
        features: Features,
        base: u16,
    ) -> Self {
        let used_idx = memory.word(areas.used + 2);
        memory.write(areas.used, &[0, 0]);
        Self {
            areas,
            size,
            features,
            next_avail: base,
            seen: 0,
            used_idx,
            staged: Vec::new(),
            undecided: None,
            owned: NaiveOrder::new(),
            latest: None,
            fault: None,
            reported: false,
            lost: false,
            kicks_disabled: false,
        }
    }

    fn avail_idx(&self, memory: &NaiveMemory) -> u16 {
        memory.word(self.areas.available + 2)
    }

    fn used_slot(&self, position: u16) -> u64 {
        self.areas.used + 4 + 8 * u64::from(position % self.size)
    }

    pub(super) fn pop(&mut self, memory: &NaiveMemory) -> Popped {
        if self.seen == 0 {
            if let Some(fault) = self.fault {
                let first = !std::mem::replace(&mut self.reported, true);
                return if first {
                    Popped::Broken(fault)
                } else {
                    Popped::Nothing
                };
            }
            let avail_idx = self.avail_idx(memory);
            let ahead = avail_idx.wrapping_sub(self.next_avail);
            if ahead > self.size {
                return self.broken(RingFault::AvailIndexJump {
                    avail_idx,
                    next_avail: self.next_avail,
                    size: self.size,
                });
            }
            if ahead == 0 {
                return Popped::Nothing;
            }
            self.seen = ahead;
        }
        let entry = self.areas.available + 4 + 2 * u64::from(self.next_avail % self.size);
        let head = memory.word(entry);
        if head >= self.size {
            return self.broken(RingFault::HeadOutOfRange {
                head,
                size: self.size,
            });
        }
        if self.owned.iter().any(|chain| chain.key == head) {
            return self.broken(RingFault::HeadInFlight { head });
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        self.seen -= 1;
        self.latest = Some(head);
        let walked = walk(
            memory,
            (self.areas.descriptors, self.size),
            self.features.indirect_desc,
            head,
        );
        self.owned.arrive(head, walked.as_deref().ok().map(room));
        match walked {
            Ok(buffers) => Popped::Chain { head, buffers },
            Err(fault) => Popped::BadChain { head, fault },
        }
    }

    fn broken(&mut self, fault: RingFault) -> Popped {
        self.seen = 0;
        self.fault = Some(fault);
        self.reported = true;
        Popped::Broken(fault)
    }

    /// Whether `head` can be taken back; if so, it is.
    pub(super) fn unpop(&mut self, head: u16) -> bool {
        if self.latest != Some(head) {
            return false;
        }
        self.latest = None;
        self.owned.remove(&head);
        self.next_avail = self.next_avail.wrapping_sub(1);
        if self.fault.is_none() {
            self.seen += 1;
        }
        true
    }

    /// Bytes there are to write, if the chain is sound.
    pub(super) fn room(&self, head: u16) -> Option<u64> {
        self.owned.iter().find(|chain| chain.key == head)?.room
    }

    pub(super) fn push(&mut self, memory: &mut NaiveMemory, head: u16, len: u32) {
        if self.latest == Some(head) {
            self.latest = None;
        }
        if self.features.in_order {
            self.owned.complete(&head, len);
            return;
        }
        self.owned.remove(&head);
        if !self.lost {
            self.stage(memory, head, len);
            self.staged.push((head, len));
        }
    }

    fn stage(&self, memory: &mut NaiveMemory, head: u16, len: u32) {
        let at = self.used_slot(self.used_idx.wrapping_add(self.staged_count()));
        memory.write(at, &u32::from(head).to_le_bytes());
        memory.write(at + 4, &len.to_le_bytes());
    }

    /// At most 65536 / 2 heads are in flight at once, but one may be pushed again and again before
    /// a publish; indices wrap, and so does this.
    fn staged_count(&self) -> u16 {
        u16::try_from(self.staged.len() % 0x1_0000).expect("below 0x10000")
    }

    /// What is published.
    pub(super) fn publish(&mut self, memory: &mut NaiveMemory) -> Vec<(u16, u32)> {
        if self.features.in_order && !self.lost {
            for group in self.owned.turns() {
                if let Some(&(last, len)) = group.last() {
                    self.stage(memory, last, len);
                }
                self.staged.extend(group);
            }
        }
        if !self.staged.is_empty() {
            self.used_idx = self.used_idx.wrapping_add(self.staged_count());
            memory.write(self.areas.used + 2, &self.used_idx.to_le_bytes());
        }
        if let (Some(undecided), Ok(count)) =
            (&mut self.undecided, u32::try_from(self.staged.len()))
        {
            *undecided += count;
        }
        std::mem::take(&mut self.staged)
    }

    pub(super) fn should_notify(&mut self, memory: &NaiveMemory) -> bool {
        if self.lost {
            return false;
        }
        let published = self.undecided.replace(0);
        if published == Some(0) {
            return false;
        }
        if !self.features.event_idx {
            return memory.word(self.areas.available) & 1 == 0;
        }
        let Some(published) = published else {
            return true;
        };
        let event = memory.word(self.areas.available + 4 + 2 * u64::from(self.size));
        // Whether the element at position `event` is among those published since (§2.7.7.1).
        (1..=published).any(|back| {
            let back = u16::try_from(back % 0x1_0000).expect("below 0x10000");
            self.used_idx.wrapping_sub(back) == event
        })
    }

    pub(super) fn enable_notification(&mut self, memory: &mut NaiveMemory) -> bool {
        if self.fault.is_some() {
            return true;
        }
        if self.features.event_idx {
            let at = self.areas.used + 4 + 8 * u64::from(self.size);
            memory.write(at, &self.next_avail.to_le_bytes());
        } else {
            memory.write(self.areas.used, &[0, 0]);
            self.kicks_disabled = false;
        }
        self.avail_idx(memory) == self.next_avail
    }

    /// The device writes the flag once, whatever the guest makes of it afterwards.
    pub(super) fn disable_notification(&mut self, memory: &mut NaiveMemory) {
        if !self.features.event_idx && !self.lost && !self.kicks_disabled {
            memory.write(self.areas.used, &[1, 0]);
            self.kicks_disabled = true;
        }
    }

    pub(super) fn has_available(&self, memory: &NaiveMemory) -> bool {
        match self.fault {
            Some(_) => !self.reported,
            None => self.seen > 0 || self.avail_idx(memory) != self.next_avail,
        }
    }

    /// Whether the ring moves to `areas`; if not, it has lost its memory.
    pub(super) fn set_memory(&mut self, memory: &NaiveMemory, areas: Areas) -> bool {
        if self.lost {
            return false;
        }
        if areas.hold(memory, self.size) {
            self.areas = areas;
            return true;
        }
        self.fault.get_or_insert(RingFault::MemoryLost);
        self.seen = 0;
        self.lost = true;
        self.staged.clear();
        false
    }

    /// Whether a chain would be forgotten if another device took over now.
    pub(super) fn is_idle(&self) -> bool {
        self.owned.iter().next().is_none() && self.staged.is_empty()
    }
}
