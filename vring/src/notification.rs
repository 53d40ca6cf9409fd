//! The one inequality both sides of a ring decide notifications by.

/// Whether an index that advanced from `old` to `new` passed the entry the other side asked to
/// be told about (virtio 1.3 §2.7.10; indices are free-running and wrap at 65536).
///
/// `event` names the entry whose completion matters, so the index that announces it is
/// `event + 1`; the answer is whether that lies in the half-open interval `(old, new]`:
///
/// ```text
///        old      event+1      new
///   ──────┼──────────┼──────────┼──────>   notify: event+1 - old is within the stride
///         └────── new - old ────┘
/// ```
#[inline]
pub(crate) const fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::need_event;

    /// The specification's sentence read literally: walk every index published and look.
    fn passed(event: u16, new: u16, old: u16) -> bool {
        let mut index = old;
        while index != new {
            if index == event {
                return true;
            }
            index = index.wrapping_add(1);
        }
        false
    }

    proptest! {
        #[test]
        fn need_event_agrees_with_walking_the_indices(
            old: u16, stride in 0u16..600, offset in -700i32..700
        ) {
            let new = old.wrapping_add(stride);
            let event = u16::try_from((i32::from(old) + offset).rem_euclid(65536)).unwrap();
            prop_assert_eq!(need_event(event, new, old), passed(event, new, old));
        }

        #[test]
        fn need_event_agrees_with_walking_the_indices_anywhere(old: u16, new: u16, event: u16) {
            prop_assert_eq!(need_event(event, new, old), passed(event, new, old));
        }
    }
}
