//! A memory map as a list that is scanned from end to end.

use std::collections::BTreeSet;

use hostmem::MapError;

use super::files::Files;
use super::input::{Kind, Region};

/// `MAX_REGIONS` by its meaning: what KVM gives a guest on x86, less its own.
const REGIONS_MAX: usize = 512 - 3;

/// The rules a memory table can break.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Rule {
    Access,
    Alignment,
    FrontendOverlap,
    GuestOverlap,
    Length,
    Overflow,
    Size,
    TooMany,
    Type,
}

/// The rule an error speaks of; the others are not for these inputs.
pub(super) fn rule(error: &MapError) -> Rule {
    match error {
        MapError::AddressOverflow { .. } => Rule::Overflow,
        MapError::FileAccess { .. } => Rule::Access,
        MapError::FileTooShort { .. } => Rule::Length,
        MapError::FileType { .. } => Rule::Type,
        MapError::FrontendOverlap { .. } => Rule::FrontendOverlap,
        MapError::GuestOverlap { .. } => Rule::GuestOverlap,
        MapError::OffsetAlignment { .. } => Rule::Alignment,
        MapError::TooManyRegions { .. } => Rule::TooMany,
        MapError::ZeroSize { .. } => Rule::Size,
        other => panic!("the host is to blame for nothing here: {other:?}"),
    }
}

/// Every rule that adding `new` to `old` breaks.
pub(super) fn broken_rules(old: &[Region], new: &[Region]) -> BTreeSet<Rule> {
    let mut rules = BTreeSet::new();
    let mut check = |broken: bool, rule: Rule| {
        if broken {
            rules.insert(rule);
        }
    };
    check(old.len() + new.len() > REGIONS_MAX, Rule::TooMany);
    for (index, region) in new.iter().enumerate() {
        let &Region {
            guest,
            size,
            frontend,
            file,
            offset,
        } = region;
        let end = |at: u64| u128::from(at) + u128::from(size);
        check(size == 0, Rule::Size);
        check(
            [guest, frontend, offset]
                .into_iter()
                .any(|at| end(at) >= 1 << 64),
            Rule::Overflow,
        );
        check(guest % 16 != offset % 16, Rule::Alignment);
        check(matches!(file, Kind::Directory | Kind::Device), Rule::Type);
        // The directory is open for reading only.
        let access = [Kind::ReadOnly, Kind::WriteOnly, Kind::Path, Kind::Directory];
        check(access.contains(&file), Rule::Access);
        check(end(offset) > u128::from(Files::len(file)), Rule::Length);
        for other in old.iter().chain(&new[..index]) {
            let overlap = |a: u64, b: u64| {
                u128::from(a.max(b)) < end(a).min(u128::from(b) + u128::from(other.size))
            };
            check(overlap(guest, other.guest), Rule::GuestOverlap);
            check(overlap(frontend, other.frontend), Rule::FrontendOverlap);
        }
    }
    rules
}

/// The region that has guest address `at`, and how far into it that is.
pub(super) fn find(regions: &[Region], at: u64) -> Option<(&Region, u64)> {
    let holds = |region: &&Region| at >= region.guest && at - region.guest < region.size;
    regions
        .iter()
        .find(holds)
        .map(|region| (region, at - region.guest))
}

fn find_frontend(regions: &[Region], at: u64) -> Option<(&Region, u64)> {
    let holds = |region: &&Region| at >= region.frontend && at - region.frontend < region.size;
    regions
        .iter()
        .find(holds)
        .map(|region| (region, at - region.frontend))
}

/// The pieces of `[at, at + len)`, each a region, an offset in it and a length, up to the first
/// hole; and whether there was none.
pub(super) fn pieces(regions: &[Region], at: u64, len: u64) -> (Vec<(&Region, u64, u64)>, bool) {
    let mut pieces = Vec::new();
    let (mut next, mut left) = (at, len);
    while left > 0 {
        let Some((region, offset)) = find(regions, next) else {
            return (pieces, false);
        };
        let piece = left.min(region.size - offset);
        pieces.push((region, offset, piece));
        left -= piece;
        // No region holds the last address of all, so this wraps only where a hole follows.
        next = next.wrapping_add(piece);
    }
    (pieces, true)
}

/// The guest address of `[at, at + len)` of the front-end, if it is one range for both.
pub(super) fn frontend_range(regions: &[Region], at: u64, len: u64) -> Option<u64> {
    let (region, offset) = find_frontend(regions, at)?;
    let start = region.guest + offset;
    let mut covered = region.size - offset;
    while covered < len {
        let (region, offset) = find_frontend(regions, at.checked_add(covered)?)?;
        if region.guest + offset != start.checked_add(covered)? {
            return None;
        }
        covered += region.size - offset;
    }
    Some(start)
}
