//! Regions, who owns them, and which of them holds an address. Knows nothing of what a region is
//! made of.

use super::index::{Span, SpanIndex};
use super::sync::Arc;

/// Something that has its place in both address spaces.
pub(crate) trait Placed {
    fn guest_span(&self) -> Span;
    fn frontend_span(&self) -> Span;
}

/// Immutable. A set made from another shares the regions that are in both; a region goes when the
/// last set that has it does.
#[derive(Debug)]
pub(crate) struct RegionSet<R> {
    /// By guest address.
    regions: Box<[Arc<R>]>,
    /// Position for position the addresses of `regions`.
    guest: SpanIndex,
    /// By front-end address.
    frontend: SpanIndex,
    /// Position for position the guest address of each span of `frontend`.
    frontend_guest: Box<[u64]>,
}

impl<R> Default for RegionSet<R> {
    fn default() -> Self {
        Self {
            regions: Box::default(),
            guest: SpanIndex::default(),
            frontend: SpanIndex::default(),
            frontend_guest: Box::default(),
        }
    }
}

impl<R: Placed> RegionSet<R> {
    /// `regions` do not overlap, and come in any order.
    pub(crate) fn new(mut regions: Vec<Arc<R>>) -> Self {
        regions.sort_unstable_by_key(|region| region.frontend_span().start);
        let frontend = SpanIndex::new(regions.iter().map(|r| r.frontend_span()).collect());
        let frontend_guest = regions.iter().map(|r| r.guest_span().start).collect();
        regions.sort_unstable_by_key(|region| region.guest_span().start);
        Self {
            guest: SpanIndex::new(regions.iter().map(|r| r.guest_span()).collect()),
            regions: regions.into_boxed_slice(),
            frontend,
            frontend_guest,
        }
    }

    /// With one more, which overlaps none.
    pub(crate) fn with(&self, added: R) -> Self {
        let added = Arc::new(added);
        Self::new(self.regions.iter().cloned().chain([added]).collect())
    }

    /// Without those that `is_meant` is true of. `None` if there are none.
    pub(crate) fn without(&self, is_meant: impl Fn(&R) -> bool) -> Option<Self> {
        let left: Vec<_> = (self.regions.iter())
            .filter(|region| !is_meant(region))
            .cloned()
            .collect();
        (left.len() < self.regions.len()).then(|| Self::new(left))
    }

    #[inline]
    pub(crate) fn regions(&self) -> &[Arc<R>] {
        &self.regions
    }

    /// The region that holds guest address `addr`, and how far into it that is.
    #[inline]
    pub(crate) fn find(&self, addr: u64) -> Option<(&R, u64)> {
        let (position, offset) = self.guest.find(addr)?;
        Some((self.regions.get(position)?, offset))
    }

    /// Whether there are regions without a gap from `addr` for `len` bytes, of which there is one at
    /// least.
    #[inline]
    pub(crate) fn covers(&self, addr: u64, len: u64) -> bool {
        let Some((mut position, offset)) = self.guest.find(addr) else {
            return false;
        };
        let Some(mut span) = self.guest.get(position) else {
            return false;
        };
        // Almost always the range lies in one region, and the loop is not entered.
        let mut covered = span.size - offset;
        while covered < len {
            position += 1;
            match self.guest.get(position) {
                Some(next) if next.start == span.end() => {
                    // Cannot overflow: spans do not overlap, and the last ends below 2^64.
                    covered += next.size;
                    span = next;
                }
                _ => return false,
            }
        }
        true
    }

    /// The guest address of `len` bytes from `addr` on in the front-end's address space, if they are
    /// one range for the guest as well. The answer for a `len` of 0 is that for `addr` alone.
    pub(crate) fn frontend_to_guest(&self, addr: u64, len: u64) -> Option<u64> {
        let (mut position, offset) = self.frontend.find(addr)?;
        let mut span = self.frontend.get(position)?;
        let mut guest_addr = *self.frontend_guest.get(position)?;
        // Cannot overflow: no region reaches past the end of the guest's address space.
        let found = guest_addr + offset;

        // Of the range, in bytes, from `addr` to the end of `span`.
        let mut covered = span.size - offset;
        while covered < len {
            position += 1;
            let next = self.frontend.get(position)?;
            let next_guest_addr = *self.frontend_guest.get(position)?;
            if next.start != span.end() || next_guest_addr != guest_addr + span.size {
                return None;
            }
            // Cannot overflow: spans do not overlap, and the last ends below 2^64.
            covered += next.size;
            (span, guest_addr) = (next, next_guest_addr);
        }
        Some(found)
    }
}
