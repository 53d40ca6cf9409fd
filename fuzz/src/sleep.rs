//! What a wake-up depends on: one side asks for it and looks again, the other publishes and decides.

/// Whether the next publication of the other side must wake this one.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sleep {
    asleep: bool,
    /// There was a publication, and no decision yet.
    due: bool,
}

impl Sleep {
    /// Notifications were asked for, and a last look found nothing, or did.
    pub(crate) const fn new(asleep: bool) -> Self {
        Self { asleep, due: false }
    }

    pub(crate) const fn published(&mut self, count: usize) {
        self.due |= self.asleep && count > 0;
    }

    /// What the decision was. If nobody has broken a rule, and it had to be yes, it is.
    pub(crate) fn decided(&mut self, notified: bool, clean: bool) {
        assert!(notified || !self.due || !clean, "a wake-up is lost");
        if self.due {
            *self = Self::default();
        }
    }
}
