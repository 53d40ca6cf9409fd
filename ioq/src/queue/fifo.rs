//! Slots in order.

/// A queue of slots in one piece, which is how engines take them. Usually all leave at once, and
/// nothing is ever moved.
#[derive(Debug)]
pub(super) struct Fifo {
    slots: Vec<u16>,
    /// Where the oldest is.
    head: usize,
}

impl Fifo {
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self {
            slots: Vec::with_capacity(capacity),
            head: 0,
        }
    }

    #[inline]
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.head
    }

    /// Oldest first.
    #[inline]
    pub(super) fn as_slice(&self) -> &[u16] {
        &self.slots[self.head..]
    }

    /// Never holds more than its capacity; the room of what has left is reused.
    #[inline]
    pub(super) fn push_back(&mut self, slot: u16) {
        if self.slots.len() == self.slots.capacity() {
            self.slots.drain(..self.head);
            self.head = 0;
        }
        self.slots.push(slot);
    }

    pub(super) fn push_front(&mut self, slot: u16) {
        if let Some(before) = self.head.checked_sub(1) {
            self.head = before;
            self.slots[before] = slot;
        } else {
            self.slots.insert(0, slot);
        }
    }

    #[inline]
    pub(super) fn clear(&mut self) {
        self.slots.clear();
        self.head = 0;
    }

    /// Drops the `count` oldest.
    #[inline]
    pub(super) fn drop_front(&mut self, count: usize) {
        self.head += count;
        debug_assert!(self.head <= self.slots.len());
        if self.head >= self.slots.len() {
            self.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn holds_what_a_deque_holds_and_never_grows(
            acts in prop::collection::vec((0u8..3, 0u16..8), 0..200),
        ) {
            let mut fifo = Fifo::with_capacity(8);
            let capacity = fifo.slots.capacity();
            let mut deque = VecDeque::new();
            for (act, slot) in acts {
                match act {
                    0 if deque.len() < 8 => {
                        fifo.push_back(slot);
                        deque.push_back(slot);
                    }
                    1 if deque.len() < 8 => {
                        fifo.push_front(slot);
                        deque.push_front(slot);
                    }
                    _ => {
                        let count = usize::from(slot).min(deque.len());
                        fifo.drop_front(count);
                        deque.drain(..count);
                    }
                }
                prop_assert_eq!(fifo.as_slice(), deque.make_contiguous());
                prop_assert_eq!(fifo.len(), deque.len());
            }
            prop_assert_eq!(fifo.slots.capacity(), capacity);
        }
    }
}
