//! Medians, and ratios of what was measured side by side.

/// Of the rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Summary {
    /// `None` of nothing.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_unstable_by(f64::total_cmp);
        Some(Self {
            median: median(&values)?,
            min: *values.first()?,
            max: *values.last()?,
        })
    }

    /// How much of `ours` there is for one of `theirs`: the ratio within each round that has both, since these two were
    /// measured one after the other; then the median of the ratios.
    pub(crate) fn of_ratios(ours: &[Option<f64>], theirs: &[Option<f64>]) -> Option<Self> {
        let pairs = ours.iter().zip(theirs);
        Self::of(pairs.filter_map(|(ours, theirs)| {
            let (ours, theirs) = ((*ours)?, (*theirs)?);
            // Of nothing there is no multiple.
            (theirs != 0.0).then_some(ours / theirs)
        }))
    }
}

/// The middle of sorted values; between the two middle ones of an even number.
fn median(sorted: &[f64]) -> Option<f64> {
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    let lower = *sorted.get(middle.checked_sub(1)?)?;
    Some(f64::midpoint(lower, upper))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(median: f64, min: f64, max: f64) -> Option<Summary> {
        Some(Summary { median, min, max })
    }

    #[test]
    fn the_median_is_the_middle_or_between_the_two_middle_ones() {
        assert_eq!(Summary::of([3.0, 1.0, 2.0]), summary(2.0, 1.0, 3.0));
        assert_eq!(Summary::of([4.0, 1.0, 2.0, 8.0]), summary(3.0, 1.0, 8.0));
        assert_eq!(Summary::of([5.0]), summary(5.0, 5.0, 5.0));
        assert_eq!(Summary::of([]), None);
    }

    #[test]
    fn an_outlier_does_not_move_the_median() {
        assert_eq!(Summary::of([1.0, 1.0, 1000.0]).unwrap().median, 1.0);
    }

    #[test]
    fn ratios_are_taken_within_a_round_before_the_median() {
        // The machine was ten times slower in the second round, for both.
        let ours = [Some(20.0), Some(2.0), Some(22.0)];
        let theirs = [Some(10.0), Some(1.0), Some(10.0)];
        assert_eq!(Summary::of_ratios(&ours, &theirs), summary(2.0, 2.0, 2.2));
    }

    #[test]
    fn rounds_in_which_either_is_missing_do_not_count() {
        let ours = [Some(3.0), None, Some(8.0), Some(1.0)];
        let theirs = [Some(1.0), Some(1.0), None, Some(0.0)];
        assert_eq!(Summary::of_ratios(&ours, &theirs), summary(3.0, 3.0, 3.0));
        assert_eq!(Summary::of_ratios(&ours, &[]), None);
    }
}
