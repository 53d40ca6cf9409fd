//! From the result of a merged request to the results of its parts.

use std::borrow::Borrow;

use crate::request::Part;

/// What became of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartOutcome {
    /// All of its bytes were transferred: complete it, with its own length.
    Complete,
    /// Not all of them, maybe none: submit it again by itself, whole. A part that fails then, or
    /// stays short, is the bad one, and fails alone.
    Retry,
}

/// Tells which parts of a merged request are complete after the kernel transferred `done` bytes of
/// it. `parts` are [`Merged::parts`](crate::Merged::parts) in their order; a request that failed has
/// `done` = 0.
///
/// Transfers fill a request from its beginning, so the complete parts come first. More bytes than the
/// parts have are taken as all of them.
///
/// A request of one part has nothing to tell apart: report its failure rather than retry it for
/// ever.
///
/// # Example
///
/// ```
/// use iosched::{Part, PartOutcome, split_completion};
///
/// let part = |tag, offset, len| Part { tag, segments: 1, offset, len };
/// let parts = [part(7, 0, 4096), part(3, 4096, 512), part(5, 4608, 4096)];
/// // The kernel stopped within the last part.
/// let outcome: Vec<_> =
///     split_completion(&parts, 5000).map(|(part, outcome)| (part.tag, outcome)).collect();
/// assert_eq!(
///     outcome,
///     [(7, PartOutcome::Complete), (3, PartOutcome::Complete), (5, PartOutcome::Retry)]
/// );
/// ```
pub fn split_completion<I>(parts: I, done: u64) -> SplitCompletion<I::IntoIter>
where
    I: IntoIterator,
    I::Item: Borrow<Part>,
{
    SplitCompletion {
        parts: parts.into_iter(),
        left: Some(done),
    }
}

/// Iterator of [`split_completion`]: every part once, in order.
#[derive(Clone, Debug)]
pub struct SplitCompletion<I> {
    parts: I,
    /// Bytes transferred and not yet given to a part; `None` once they ran out within one. What
    /// follows is not complete then, even if empty.
    left: Option<u64>,
}

impl<I> Iterator for SplitCompletion<I>
where
    I: Iterator,
    I::Item: Borrow<Part>,
{
    type Item = (Part, PartOutcome);

    fn next(&mut self) -> Option<Self::Item> {
        let part = *self.parts.next()?.borrow();
        self.left = self.left.and_then(|left| left.checked_sub(part.len));
        let outcome = if self.left.is_some() {
            PartOutcome::Complete
        } else {
            PartOutcome::Retry
        };
        Some((part, outcome))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.parts.size_hint()
    }
}

impl<I> ExactSizeIterator for SplitCompletion<I>
where
    I: ExactSizeIterator,
    I::Item: Borrow<Part>,
{
}

#[cfg(test)]
mod tests {
    use super::*;
    use PartOutcome::{Complete, Retry};

    fn outcomes(lens: &[u64], done: u64) -> Vec<PartOutcome> {
        let parts = lens.iter().map(|&len| Part {
            tag: 0,
            segments: 1,
            offset: 0,
            len,
        });
        split_completion(parts, done)
            .map(|(_, outcome)| outcome)
            .collect()
    }

    #[test]
    fn all_bytes_complete_all_parts() {
        assert_eq!(outcomes(&[512, 1024, 512], 2048), [Complete; 3]);
    }

    #[test]
    fn i3_a_failed_request_retries_every_part() {
        assert_eq!(outcomes(&[512, 1024, 512], 0), [Retry; 3]);
    }

    #[test]
    fn a_short_transfer_completes_only_whole_parts() {
        assert_eq!(outcomes(&[512, 1024, 512], 511), [Retry; 3]);
        assert_eq!(outcomes(&[512, 1024, 512], 512), [Complete, Retry, Retry]);
        assert_eq!(outcomes(&[512, 1024, 512], 1535), [Complete, Retry, Retry]);
        assert_eq!(
            outcomes(&[512, 1024, 512], 1536),
            [Complete, Complete, Retry]
        );
    }

    #[test]
    fn a_part_that_would_fit_after_one_that_did_not_is_not_complete() {
        assert_eq!(outcomes(&[1024, 512, 0], 600), [Retry; 3]);
    }

    #[test]
    fn more_bytes_than_asked_for_and_lengths_that_overflow_are_total() {
        assert_eq!(outcomes(&[512], u64::MAX), [Complete]);
        assert_eq!(outcomes(&[u64::MAX, u64::MAX], u64::MAX), [Complete, Retry]);
    }

    #[test]
    fn the_number_of_parts_is_known_ahead() {
        let parts = [Part {
            tag: 0,
            segments: 1,
            offset: 0,
            len: 1,
        }; 5];
        assert_eq!(split_completion(&parts, 2).len(), 5);
    }
}
