//! What the sectors of a disk may hold, for all that whoever wrote them was told.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::power_loss::SECTOR_LEN;

/// What a writer asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// To write [`Ledger::content`].
    Data,
    /// To write zeroes.
    Zeroes,
    /// To discard: each sector becomes zero, or keeps what it holds.
    Discard,
}

/// A change or a read that was asked for; in the order in which they were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);

/// A sector holds what it must not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which.
    pub sector: u64,
    /// What it holds.
    pub found: String,
    /// What it may hold.
    pub allowed: Vec<String>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            sector,
            found,
            allowed,
        } = self;
        write!(
            f,
            "sector {sector} holds {found}; allowed: {}",
            allowed.join(", ")
        )
    }
}

#[derive(Clone, Debug)]
enum Version {
    /// What was there at the beginning.
    Found(Arc<[u8]>),
    Written(Change, Ticket),
}

#[derive(Clone, Debug)]
struct Entry {
    version: Version,
    /// When it was asked for.
    asked: u64,
    /// When its end was seen.
    ended: Option<u64>,
    /// It ended well.
    ok: bool,
    /// Since when something newer is known to be stable.
    outdated: Option<u64>,
}

#[derive(Clone, Debug)]
struct Asked {
    change: Change,
    sectors: Range<u64>,
    ended: Option<(u64, bool)>,
    /// A flush that covers it has ended well.
    flushed: bool,
}

/// Keeps book of what was asked of a disk and answered, and knows what each sector may hold: now, for whoever
/// reads it, and after a loss of power.
///
/// One change comes after another if it was asked for when the other's end had been seen; between others any
/// order is right. A sector holds a change that no later one has replaced. After a loss of power, only what is
/// stable has surely replaced what was before it; whatever was asked for may be there. Each sector stands by itself.
///
/// ```
/// use ioq::testing::{Change, Ledger, SECTOR_LEN};
///
/// let mut ledger = Ledger::new(&[0; 4 * SECTOR_LEN]);
/// let write = ledger.ask(Change::Data, 1..2);
/// let content = ledger.content(write, 1);
/// ledger.answer(write, true);
/// assert!(ledger.check_after_power_loss(1, &[0; SECTOR_LEN]).is_ok());
/// assert!(ledger.check_after_power_loss(1, &content).is_ok());
///
/// let flush = ledger.ask_flush();
/// ledger.answer_flush(flush);
/// assert!(ledger.check_after_power_loss(1, &[0; SECTOR_LEN]).is_err());
/// assert!(ledger.check_after_power_loss(1, &content).is_ok());
/// ```
#[derive(Clone, Debug)]
pub struct Ledger {
    sectors: Vec<Vec<Entry>>,
    clock: u64,
    /// Changes that are not both answered and stable or failed.
    open: BTreeMap<Ticket, Asked>,
    /// Reads whose end has not been seen, and when they were asked for.
    reads: BTreeMap<Ticket, u64>,
}

impl Ledger {
    /// Of a disk that holds `image`, all of it stable.
    pub fn new(image: &[u8]) -> Self {
        let found = |content: &[u8]| {
            vec![Entry {
                version: Version::Found(content.into()),
                asked: 0,
                ended: Some(0),
                ok: true,
                outdated: None,
            }]
        };
        Self {
            sectors: image.chunks_exact(SECTOR_LEN).map(found).collect(),
            clock: 0,
            open: BTreeMap::new(),
            reads: BTreeMap::new(),
        }
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A change of some sectors is asked for.
    ///
    /// # Panics
    /// If there are no such sectors.
    pub fn ask(&mut self, change: Change, sectors: Range<u64>) -> Ticket {
        let now = self.tick();
        let ticket = Ticket(now);
        for sector in sectors.clone() {
            self.entries(sector).push(Entry {
                version: Version::Written(change, ticket),
                asked: now,
                ended: None,
                ok: false,
                outdated: None,
            });
        }
        let asked = Asked {
            change,
            sectors,
            ended: None,
            flushed: false,
        };
        self.open.insert(ticket, asked);
        ticket
    }

    fn entries(&mut self, sector: u64) -> &mut Vec<Entry> {
        &mut self.sectors[usize::try_from(sector).unwrap_or(usize::MAX)]
    }

    /// What a [`Change::Data`] writes into one of its sectors: each differs from all others.
    pub fn content(&self, ticket: Ticket, sector: u64) -> [u8; SECTOR_LEN] {
        content(ticket, sector)
    }

    /// The end of a change is seen.
    pub fn answer(&mut self, ticket: Ticket, ok: bool) {
        let now = self.tick();
        let Some(asked) = self.open.get_mut(&ticket) else {
            return;
        };
        asked.ended = Some((now, ok));
        let (sectors, flushed) = (asked.sectors.clone(), asked.flushed);
        for sector in sectors {
            let own = |entry: &&mut Entry| entry.is(ticket);
            if let Some(entry) = self.entries(sector).iter_mut().find(own) {
                (entry.ended, entry.ok) = (Some(now), ok);
            }
        }
        if !ok {
            // It may be there or not, for ever, until something newer is.
            self.open.remove(&ticket);
        } else if flushed {
            self.stable(ticket);
        }
    }

    /// A change is stable, or will be when it ends well: a flush that covers it has ended well, or there is
    /// no cache.
    pub fn flushed(&mut self, ticket: Ticket) {
        let Some(asked) = self.open.get_mut(&ticket) else {
            return;
        };
        asked.flushed = true;
        if asked.ended.is_some() {
            self.stable(ticket);
        }
    }

    fn stable(&mut self, ticket: Ticket) {
        let now = self.tick();
        let Some(asked) = self.open.remove(&ticket) else {
            return;
        };
        // A discard replaces nothing: what was there may stay.
        if asked.change == Change::Discard {
            return;
        }
        let oldest_read = self.reads.values().min().copied().unwrap_or(now);
        for sector in asked.sectors {
            for entry in self.entries(sector).iter_mut() {
                if entry.ended.is_some_and(|ended| ended < ticket.0) && entry.outdated.is_none() {
                    entry.outdated = Some(now);
                }
            }
            // A read that was asked for before may still find them.
            self.entries(sector)
                .retain(|entry| entry.outdated.is_none_or(|since| since > oldest_read));
        }
    }

    /// A flush is asked for. It covers every change whose good end has been seen.
    pub fn ask_flush(&mut self) -> Ticket {
        Ticket(self.tick())
    }

    /// A flush has ended well.
    pub fn answer_flush(&mut self, flush: Ticket) {
        let covered: Vec<Ticket> = self
            .open
            .iter()
            .filter(|(_, asked)| asked.ended.is_some_and(|(at, ok)| ok && at < flush.0))
            .map(|(&ticket, _)| ticket)
            .collect();
        for ticket in covered {
            self.flushed(ticket);
        }
    }

    /// A read is asked for.
    pub fn ask_read(&mut self) -> Ticket {
        let now = self.tick();
        self.reads.insert(Ticket(now), now);
        Ticket(now)
    }

    /// The end of a read is seen, which found `data` from `sector` on; `None` if it failed.
    ///
    /// # Errors
    /// The data are not what was there at any moment between.
    pub fn answer_read(
        &mut self,
        read: Ticket,
        sector: u64,
        data: Option<&[u8]>,
    ) -> Result<(), Violation> {
        let Some(asked) = self.reads.remove(&read) else {
            return Ok(());
        };
        for (at, found) in (sector..).zip(data.unwrap_or_default().chunks_exact(SECTOR_LEN)) {
            let entries = &self.sectors[usize::try_from(at).unwrap_or(usize::MAX)];
            // Replaced, when the read was asked for, by something whose good end had been seen.
            let replaced = |old: &Entry| {
                entries.iter().any(|new| {
                    new.is_firm()
                        && new.ok
                        && new.ended.is_some_and(|ended| ended < asked)
                        && old.ended.is_some_and(|ended| ended < new.asked)
                })
            };
            check(at, found, entries.iter().filter(|entry| !replaced(entry)))?;
        }
        Ok(())
    }

    /// The power was lost, and the disk holds `image`: the book begins anew with it. What was asked for and not
    /// answered never will be.
    ///
    /// # Errors
    /// As [`check_after_power_loss`](Self::check_after_power_loss), of the first sector that is wrong.
    pub fn power_was_lost(&mut self, image: &[u8]) -> Result<(), Violation> {
        for (sector, found) in (0..).zip(image.chunks_exact(SECTOR_LEN)) {
            self.check_after_power_loss(sector, found)?;
        }
        // Time goes on: a ticket is never given twice.
        let clock = self.clock;
        *self = Self {
            clock,
            ..Self::new(image)
        };
        Ok(())
    }

    /// Checks what a sector may hold after a loss of power at this moment.
    ///
    /// # Errors
    /// Something stable has gone, or something was never written.
    pub fn check_after_power_loss(&self, sector: u64, found: &[u8]) -> Result<(), Violation> {
        let entries = &self.sectors[usize::try_from(sector).unwrap_or(usize::MAX)];
        let possible = entries.iter().filter(|entry| entry.outdated.is_none());
        check(sector, found, possible)
    }
}

impl Entry {
    fn is(&self, ticket: Ticket) -> bool {
        matches!(self.version, Version::Written(_, own) if own == ticket)
    }

    /// Whether it replaces what was before it.
    fn is_firm(&self) -> bool {
        !matches!(self.version, Version::Written(Change::Discard, _))
    }

    fn matches(&self, sector: u64, found: &[u8]) -> bool {
        match &self.version {
            Version::Found(content) => **content == *found,
            Version::Written(Change::Data, ticket) => is_data(found, *ticket, sector),
            Version::Written(Change::Zeroes | Change::Discard, _) => is_zero(found),
        }
    }
}

fn check<'a>(
    sector: u64,
    found: &[u8],
    possible: impl Iterator<Item = &'a Entry> + Clone,
) -> Result<(), Violation> {
    if possible.clone().any(|entry| entry.matches(sector, found)) {
        return Ok(());
    }
    Err(Violation {
        sector,
        found: describe(found),
        allowed: possible
            .map(|entry| match &entry.version {
                Version::Found(content) => describe(content),
                Version::Written(change, Ticket(at)) => format!("{change:?} of {at}"),
            })
            .collect(),
    })
}

/// Who wrote it and where, over and over.
fn content(Ticket(ticket): Ticket, sector: u64) -> [u8; SECTOR_LEN] {
    let mut content = [0; SECTOR_LEN];
    for part in content.chunks_exact_mut(16) {
        part[..8].copy_from_slice(&ticket.to_le_bytes());
        part[8..].copy_from_slice(&sector.to_le_bytes());
    }
    content
}

fn is_data(found: &[u8], ticket: Ticket, sector: u64) -> bool {
    // Tests compare millions of them, most of which differ at once.
    found.starts_with(&ticket.0.to_le_bytes()) && *found == content(ticket, sector)
}

fn is_zero(found: &[u8]) -> bool {
    *found == [0; SECTOR_LEN]
}

fn describe(found: &[u8]) -> String {
    if is_zero(found) {
        return "zeroes".into();
    }
    let mut words = found
        .chunks_exact(8)
        .filter_map(|word| Some(u64::from_le_bytes(word.try_into().ok()?)));
    let (Some(ticket), Some(sector)) = (words.next(), words.next()) else {
        return "too little".into();
    };
    if is_data(found, Ticket(ticket), sector) {
        format!("Data of {ticket} for sector {sector}")
    } else {
        format!("a mixture that begins with {ticket:#x} {sector:#x}")
    }
}
