//! Which heads the device owns.

/// Whether each head is in flight: a byte for each descriptor of the table, which is looked up in half the steps that a
/// bit takes.
#[derive(Debug)]
pub(crate) struct InFlight {
    heads: Box<[bool]>,
    count: u16,
}

impl InFlight {
    /// Room for heads below `size`; the only allocation.
    pub(crate) fn new(size: u16) -> Self {
        Self {
            heads: vec![false; usize::from(size)].into_boxed_slice(),
            count: 0,
        }
    }

    #[inline]
    pub(crate) const fn count(&self) -> u16 {
        self.count
    }

    /// Marks `head`; false if it was marked already or there is no room for it.
    #[inline]
    pub(crate) fn insert(&mut self, head: u16) -> bool {
        match self.heads.get_mut(usize::from(head)) {
            Some(owned @ false) => {
                *owned = true;
                // At most the heads there are.
                self.count = self.count.wrapping_add(1);
                true
            }
            _ => false,
        }
    }

    /// Clears `head`; false if it was not marked.
    #[inline]
    pub(crate) fn remove(&mut self, head: u16) -> bool {
        match self.heads.get_mut(usize::from(head)) {
            Some(owned @ true) => {
                *owned = false;
                self.count = self.count.wrapping_sub(1);
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::InFlight;

    #[test]
    fn a_head_is_marked_once_and_cleared_once() {
        let mut heads = InFlight::new(128);
        assert!(heads.insert(127));
        assert!(!heads.insert(127));
        assert_eq!(heads.count(), 1);
        assert!(heads.remove(127));
        assert!(!heads.remove(127));
        assert_eq!(heads.count(), 0);
    }

    #[test]
    fn heads_beyond_the_room_are_refused() {
        let mut heads = InFlight::new(64);
        assert!(!heads.insert(64));
        assert!(!heads.remove(u16::MAX));
        assert_eq!(heads.count(), 0);
    }

    #[test]
    fn every_head_of_the_largest_queue_fits() {
        let mut heads = InFlight::new(32768);
        assert!((0..32768).all(|head| heads.insert(head)));
        assert_eq!(heads.count(), 32768);
    }
}
