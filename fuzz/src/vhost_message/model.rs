//! What a back-end must answer, from the rules of the specification and of hostile-inputs.md alone. Takes messages as
//! bytes, with numbers at the places the specification gives them.

use super::files::{Kind, LOG_LEN, RAM_LEN};

pub(super) const NUM_QUEUES: usize = 2;
pub(super) const QUEUE_SIZE: u32 = 16;

const LOG_ALL: u64 = 1 << 26;
const PROTOCOL: u64 = 1 << 30;
const PACKED: u64 = 1 << 34;
const FLUSH: u64 = 1 << 9;
const CONFIG_WCE: u64 = 1 << 11;

const REPLY_ACK: u64 = 1 << 3;
/// MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS, STATUS.
const PROTOCOL_OFFERED: u64 =
    1 | 1 << 1 | REPLY_ACK | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 16;

/// What must come back.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Expect {
    /// A body.
    Reply(Vec<u8>),
    /// The state of a ring whose record says where it goes on: any number, of this index.
    Base(u32),
    /// Memory for the requests in flight: the description, of this length and with these numbers, and a descriptor.
    Inflight {
        len: usize,
        shape: [u16; 2],
    },
    /// An acknowledgement that is not 0.
    Refused,
    Nothing,
    Closed,
}

#[derive(Clone, Debug, Default)]
struct Ring {
    size: Option<u32>,
    addresses: Option<[u64; 3]>,
    base: Option<u32>,
    stopped_at: Option<u32>,
    /// Where it was started, while it runs; `None` inside: where a record says, or there is something to serve.
    running: Option<Option<u32>>,
    /// It has stopped where only the back-end knows, which is to be asked for.
    unsure: bool,
}

#[derive(Debug)]
pub(super) struct Model {
    /// As read, with `writeback` on.
    config: Vec<u8>,
    offered: u64,
    acked: u64,
    features: u64,
    features_refused: bool,
    status: u8,
    writeback: bool,
    rings: [Ring; NUM_QUEUES],
    /// Guest, size, front-end, offset.
    regions: Vec<[u64; 4]>,
    /// Bytes.
    log: Option<u64>,
    /// What GET_INFLIGHT_FD replied last.
    pub(super) given: Option<Vec<u8>>,
    /// Queues and entries.
    inflight: Option<[u16; 2]>,
}

enum Done {
    Reply(Vec<u8>),
    Base(u32),
    Inflight([u16; 2]),
    Quietly,
}

/// Refused.
struct No;

type Outcome = Result<Done, No>;

fn u32_at(body: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(body[at..at + 4].try_into().unwrap())
}

fn u64_at(body: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(body[at..at + 8].try_into().unwrap())
}

fn rule(holds: bool) -> Result<(), No> {
    if holds { Ok(()) } else { Err(No) }
}

fn number(value: u64) -> Outcome {
    Ok(Done::Reply(value.to_le_bytes().to_vec()))
}

fn file_len(kind: Kind) -> Option<u64> {
    match kind {
        Kind::Ram => Some(RAM_LEN),
        Kind::Log => Some(LOG_LEN),
        _ => None,
    }
}

/// Whether a message has a reply of its own.
fn replies(code: u32) -> bool {
    [1, 6, 11, 15, 17, 24, 31, 36, 40].contains(&code)
}

/// Least and most bytes of a body, and descriptors; `None` for a request that is not known.
fn shape(code: u32, body: &[u8], fds: usize) -> Option<bool> {
    let len = body.len();
    let (sizes, due): (&[usize], usize) = match code {
        1 | 3 | 4 | 15 | 17 | 34 | 36 | 40 => (&[0], 0),
        2 | 16 | 39 | 8 | 10 | 11 | 18 => (&[8], 0),
        12..=14 => {
            if len != 8 {
                return Some(false);
            }
            let word = u64_at(body, 0);
            (&[8], usize::from(word & 0x100 == 0))
        }
        9 => (&[40], 0),
        6 => (&[16], 1),
        7 | 21 => (&[0], 1),
        37 => (&[40], 1),
        38 => return Some(len == 40),
        5 => {
            let regions = len.wrapping_sub(8) / 32;
            let said = len >= 8 && u64::from(u32_at(body, 0)) == regions as u64;
            return Some(said && regions <= 8 && len == 8 + 32 * regions && fds == regions);
        }
        24 | 25 => {
            let said = len >= 12 && u64::from(u32_at(body, 4)) == (len - 12) as u64;
            return Some(said && len <= 268 && fds == 0);
        }
        31 => (&[20, 24], 0),
        32 => (&[20, 24], 1),
        _ => return None,
    };
    Some(sizes.contains(&len) && fds == due)
}

impl Model {
    pub(super) fn new(features: u64, config: Vec<u8>) -> Self {
        Self {
            config,
            offered: features | PROTOCOL | LOG_ALL,
            acked: 0,
            features: 0,
            features_refused: false,
            status: 0,
            writeback: true,
            rings: Default::default(),
            regions: Vec::new(),
            log: None,
            given: None,
            inflight: None,
        }
    }

    /// One message: its code, flags and size, and what came with it.
    pub(super) fn receive(&mut self, head: [u32; 3], body: &[u8], fds: &[Kind]) -> Expect {
        let [code, flags, size] = head;
        if flags & 3 != 1 || flags & !9 != 0 || size > 4096 || fds.len() > 32 {
            return Expect::Closed;
        }
        let Some(sound) = shape(code, body, fds.len()) else {
            return if flags & 8 != 0 && self.acked & REPLY_ACK != 0 {
                Expect::Refused
            } else {
                Expect::Closed
            };
        };
        let outcome = if sound {
            self.carry_out(code, body, fds)
        } else {
            Err(No)
        };
        let due = flags & 8 != 0 && self.acked & REPLY_ACK != 0;
        match outcome {
            Ok(Done::Reply(body)) => Expect::Reply(body),
            Ok(Done::Base(index)) => Expect::Base(index),
            Ok(Done::Inflight(shape)) => Expect::Inflight {
                len: body.len(),
                shape,
            },
            Ok(Done::Quietly) if due => Expect::Reply(vec![0; 8]),
            Ok(Done::Quietly) => Expect::Nothing,
            Err(No) if code == 24 => {
                let word = |at: usize| body.get(at..at + 4).unwrap_or(&[0; 4]).to_vec();
                Expect::Reply([word(0), vec![0; 4], word(8)].concat())
            }
            Err(No) if replies(code) && !(code == 6 && due) => Expect::Closed,
            Err(No) if due => Expect::Refused,
            Err(No) => Expect::Nothing,
        }
    }

    fn carry_out(&mut self, code: u32, body: &[u8], fds: &[Kind]) -> Outcome {
        let needed = match code {
            6 | 7 => 1,
            21 => 5,
            25 => 9,
            31 | 32 => 12,
            34 => 13,
            37 | 38 => 15,
            39 => 16,
            _ => 0,
        };
        if needed != 0 {
            rule(self.acked & 1 << needed != 0)?;
        }
        match code {
            1 => return number(self.offered),
            2 => self.set_features(u64_at(body, 0))?,
            3 => {}
            4 => self.stop_all(),
            5 => {
                let regions = (0..fds.len()).map(|at| region(body, 8 + 32 * at)).collect();
                self.set_regions(regions, fds)?;
            }
            37 => {
                let mut regions = self.regions.clone();
                regions.push(region(body, 8));
                rule(self.fits_file(&regions[self.regions.len()], fds[0]))?;
                self.set_known_regions(regions)?;
            }
            38 => {
                let [guest, size, user, _] = region(body, 8);
                let at = self
                    .regions
                    .iter()
                    .position(|found| found[..3] == [guest, size, user]);
                self.regions.remove(at.ok_or(No)?);
            }
            6 => {
                let (size, offset) = (u64_at(body, 0), u64_at(body, 8));
                let end = size.checked_add(offset).ok_or(No)?;
                rule(size > 0 && file_len(fds[0]).is_some_and(|len| end <= len))?;
                rule(self.covers(size, &self.regions))?;
                self.log = Some(size);
                return Ok(Done::Reply(body.to_vec()));
            }
            7 => rule(self.is_event(fds[0]))?,
            8..=14 | 18 => return self.ring(code, body, fds),
            15 => return number(PROTOCOL_OFFERED),
            16 => {
                rule(u64_at(body, 0) & !PROTOCOL_OFFERED == 0)?;
                self.acked = u64_at(body, 0);
            }
            17 => return number(NUM_QUEUES as u64),
            21 => rule(fds[0] == Kind::Stream)?,
            24 => {
                let (from, len) = (u64::from(u32_at(body, 0)), u64::from(u32_at(body, 4)));
                // Counted from 0, or from 0x100 as old front-ends do.
                let from = from.checked_sub(0x100).unwrap_or(from);
                rule(from + len <= self.config.len() as u64 && len > 0)?;
                let mut config = self.config.clone();
                config[32] = u8::from(self.writeback);
                let mut reply = body[..12].to_vec();
                let from = usize::try_from(from).unwrap();
                reply.extend(&config[from..from + usize::try_from(len).unwrap()]);
                return Ok(Done::Reply(reply));
            }
            25 => {
                rule(u32_at(body, 0) == 32 && body.len() == 13)?;
                self.writeback = body[12] != 0;
            }
            31 => {
                let shape = inflight_shape(body);
                rule((1..=NUM_QUEUES).contains(&usize::from(shape[0])))?;
                rule(shape[1].is_power_of_two() && u32::from(shape[1]) <= QUEUE_SIZE)?;
                return Ok(Done::Inflight(shape));
            }
            32 => {
                // Padding apart, what the back-end said itself.
                rule(fds[0] == Kind::Inflight && self.given.is_some())?;
                rule(self.given.as_ref().unwrap()[..20] == body[..20])?;
                rule(self.rings.iter().all(|ring| ring.running.is_none()))?;
                self.inflight = Some(inflight_shape(body));
            }
            34 => self.reset(),
            36 => return number(509),
            39 => {
                let status = u8::try_from(u64_at(body, 0)).map_err(|_| No)?;
                if status == 0 {
                    self.reset();
                }
                self.status = if self.features_refused {
                    status & !8
                } else {
                    status
                };
            }
            40 => return number(u64::from(self.status)),
            _ => unreachable!("it has a shape"),
        }
        Ok(Done::Quietly)
    }

    /// Whether what came as this kind is an eventfd.
    fn is_event(&self, kind: Kind) -> bool {
        kind == Kind::Event || kind == Kind::Inflight && self.given.is_none()
    }

    fn set_features(&mut self, features: u64) -> Result<(), No> {
        self.features_refused = true;
        rule(features & !self.offered == 0)?;
        if (features ^ self.features) & !LOG_ALL != 0 {
            rule(self.rings.iter().all(|ring| ring.running.is_none()))?;
        }
        if let Some(size) = self.log
            && features & LOG_ALL != 0
        {
            rule(self.covers(size, &self.regions))?;
        }
        self.features = features;
        self.features_refused = false;
        self.heed_features();
        Ok(())
    }

    /// A driver that cannot flush and could turn the cache off has it off.
    fn heed_features(&mut self) {
        if self.features & CONFIG_WCE != 0 && self.features & FLUSH == 0 {
            self.writeback = false;
        }
    }

    fn reset(&mut self) {
        self.stop_all();
        for ring in &mut self.rings {
            *ring = Ring {
                stopped_at: ring.base.or(ring.stopped_at),
                unsure: ring.unsure,
                ..Ring::default()
            };
        }
        self.features = 0;
        self.features_refused = false;
        self.status = 0;
        self.writeback = true;
    }

    fn stop_all(&mut self) {
        for ring in &mut self.rings {
            ring.stop();
        }
    }

    /// A bit for each page of memory.
    fn covers(&self, size: u64, regions: &[[u64; 4]]) -> bool {
        let last = |region: &[u64; 4]| region[0] + region[1] - 1;
        regions.iter().map(last).all(|last| last / 0x8000 < size)
    }

    fn fits_file(&self, region: &[u64; 4], kind: Kind) -> bool {
        let [guest, size, user, offset] = *region;
        let ends = [guest, user, offset].map(|start| start.checked_add(size));
        let Some(end) = ends[2].filter(|_| ends.iter().all(Option::is_some)) else {
            return false;
        };
        size > 0 && guest % 16 == offset % 16 && file_len(kind).is_some_and(|len| end <= len)
    }

    fn set_regions(&mut self, regions: Vec<[u64; 4]>, fds: &[Kind]) -> Result<(), No> {
        for (region, kind) in regions.iter().zip(fds) {
            rule(self.fits_file(region, *kind))?;
        }
        self.set_known_regions(regions)
    }

    fn set_known_regions(&mut self, regions: Vec<[u64; 4]>) -> Result<(), No> {
        for (at, one) in regions.iter().enumerate() {
            for other in &regions[..at] {
                for field in [0, 2] {
                    let apart = one[field] + one[1] <= other[field]
                        || other[field] + other[1] <= one[field];
                    rule(apart)?;
                }
            }
        }
        if let Some(size) = self.log
            && self.features & LOG_ALL != 0
        {
            rule(self.covers(size, &regions))?;
        }
        self.regions = regions;
        Ok(())
    }

    /// The guest's address of the front-end's.
    fn guest(&self, user: u64) -> Option<u64> {
        let inside = |region: &&[u64; 4]| user >= region[2] && user - region[2] < region[1];
        let region = self.regions.iter().find(inside)?;
        Some(region[0] + (user - region[2]))
    }

    fn is_memory(&self, guest: u64, len: u64) -> bool {
        (guest..guest + len).all(|byte| {
            let inside = |region: &[u64; 4]| byte >= region[0] && byte - region[0] < region[1];
            self.regions.iter().any(inside)
        })
    }

    fn ring(&mut self, code: u32, body: &[u8], fds: &[Kind]) -> Outcome {
        let index = if (12..=14).contains(&code) {
            let word = u64_at(body, 0);
            rule(word & !0x1ff == 0)?;
            usize::from(body[0])
        } else {
            usize::try_from(u32_at(body, 0)).unwrap()
        };
        rule(index < NUM_QUEUES)?;
        let running = self.rings[index].running.is_some();
        let num = u32_at(body, 4);
        match code {
            8 => {
                rule(!running && num.is_power_of_two() && num <= QUEUE_SIZE)?;
                self.rings[index].size = Some(num);
            }
            9 => {
                let addresses = [8, 16, 24].map(|at| u64_at(body, at));
                // The flag that asks for the used ring to be logged.
                rule(num & !1 == 0)?;
                if running {
                    rule(self.rings[index].addresses == Some(addresses))?;
                    return Ok(Done::Quietly);
                }
                rule(addresses.iter().all(|&at| self.guest(at).is_some()))?;
                self.rings[index].addresses = Some(addresses);
            }
            10 => {
                rule(!running && (self.features & PACKED != 0 || num <= 0xffff))?;
                self.rings[index].base = Some(num);
            }
            11 => {
                let fresh = if self.features & PACKED != 0 {
                    0x8000_8000
                } else {
                    0
                };
                let ring = &mut self.rings[index];
                if ring.stop() || ring.unsure {
                    return Ok(Done::Base(u32_at(body, 0)));
                }
                let base = ring.base.or(ring.stopped_at).unwrap_or(fresh);
                let mut reply = body[..4].to_vec();
                reply.extend(base.to_le_bytes());
                return Ok(Done::Reply(reply));
            }
            12 => {
                rule(fds.iter().all(|&kind| self.is_event(kind)))?;
                if !running {
                    self.start(index)?;
                }
            }
            13 | 14 => rule(fds.iter().all(|&kind| self.is_event(kind)))?,
            18 => rule(num <= 1 && self.features & PROTOCOL != 0)?,
            _ => unreachable!("no other is about a ring"),
        }
        Ok(Done::Quietly)
    }

    /// A ring of which only the back-end knows where it stands.
    pub(super) fn unsure(&self) -> Option<u32> {
        let at = self.rings.iter().position(|ring| ring.unsure)?;
        u32::try_from(at).ok()
    }

    /// It stands there.
    pub(super) fn stopped(&mut self, index: u32, base: u32) {
        let ring = &mut self.rings[usize::try_from(index).unwrap()];
        ring.unsure = false;
        // After a reset it begins anew, and still says where it was.
        if ring.base.is_some() {
            ring.base = Some(base);
        } else {
            ring.stopped_at = Some(base);
        }
    }

    fn start(&mut self, index: usize) -> Result<(), No> {
        let ring = &self.rings[index];
        let size = ring.size.ok_or(No)?;
        let [descriptors, used, available] = ring.addresses.ok_or(No)?;
        let packed = self.features & PACKED != 0;
        let entries = u64::from(size);
        let areas = if packed {
            [
                (descriptors, 16, 16 * entries),
                (used, 4, 4),
                (available, 4, 4),
            ]
        } else {
            [
                (descriptors, 16, 16 * entries),
                (used, 4, 6 + 8 * entries),
                (available, 2, 6 + 2 * entries),
            ]
        };
        for (at, alignment, len) in areas {
            let guest = self.guest(at).ok_or(No)?;
            rule(guest % alignment == 0 && self.is_memory(guest, len))?;
        }
        let base = ring.base.unwrap_or(if packed { 0x8000_8000 } else { 0 });
        if packed {
            let [available, used] = [base & 0x7fff, base >> 16 & 0x7fff];
            rule(available < size && used < size)?;
            // What is available is at most the whole ring ahead of what is used: no further on in the same pass as
            // behind in the next.
            let same_pass = base >> 15 & 1 == base >> 31;
            rule(if same_pass {
                available >= used
            } else {
                available <= used
            })?;
        } else {
            rule(base <= 0xffff)?;
        }
        // In memory of zeroes the driver stands at 0: a ring that begins a little before has chains, and goes on.
        let behind = 0x1_0000 - (base & 0xffff);
        let mut from = (packed || behind > size).then_some(base);
        if let Some([queues, most]) = self.inflight {
            rule(index < usize::from(queues) && size <= u32::from(most))?;
            from = None;
        }
        self.rings[index].running = Some(from);
        self.heed_features();
        Ok(())
    }
}

impl Ring {
    /// Whether it stands where only its record says.
    fn stop(&mut self) -> bool {
        match self.running.take() {
            None => false,
            Some(None) => {
                self.base = Some(0);
                self.unsure = true;
                true
            }
            Some(Some(base)) => {
                self.base = Some(base);
                false
            }
        }
    }
}

fn region(body: &[u8], at: usize) -> [u64; 4] {
    [0, 8, 16, 24].map(|field| u64_at(body, at + field))
}

fn inflight_shape(body: &[u8]) -> [u16; 2] {
    [16, 18].map(|at| u16::from_le_bytes(body[at..at + 2].try_into().unwrap()))
}
