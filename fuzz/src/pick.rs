//! Choices from the fuzzer's bytes. When these run out every choice is the first and plainest, so
//! an input never ends in a storm of corruption.

use arbitrary::{Result, Unstructured};

/// True once in `n`.
pub(crate) fn rarely(u: &mut Unstructured<'_>, n: u8) -> Result<bool> {
    Ok(u.int_in_range(0..=n - 1)? == n - 1)
}

/// A 16-bit value that matters near `size`: mostly below it, at times at its edge, rarely any.
pub(crate) fn near_u16(u: &mut Unstructured<'_>, size: u16) -> Result<u16> {
    Ok(match u.int_in_range(0..=15u8)? {
        0..=11 => u.int_in_range(0..=size.saturating_sub(1))?,
        12 => size,
        13 => size.saturating_sub(1),
        14 => size.wrapping_add(1),
        _ => u.arbitrary()?,
    })
}

/// A length in bytes: mostly small, rarely huge.
pub(crate) fn length(u: &mut Unstructured<'_>) -> Result<u32> {
    Ok(match u.int_in_range(0..=31u8)? {
        0..=23 => u.int_in_range(0..=64)?,
        24..=28 => u.int_in_range(0..=0x2000)?,
        29 => u32::MAX - u.int_in_range(0..=16)?,
        _ => u.arbitrary()?,
    })
}
