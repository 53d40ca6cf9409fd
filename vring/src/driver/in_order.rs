//! The driver's side of `VIRTIO_F_IN_ORDER` (virtio 1.3 §2.7.9, §2.8.8): from a used element that
//! may stand for a run of chains to the completion of each.

/// A chain made available and not reported complete yet.
#[derive(Clone, Copy, Debug)]
struct Offered {
    id: u16,
    /// Bytes of its writable buffers.
    writable: u32,
}

/// The chains outstanding, oldest first, and the run being reported.
#[derive(Debug)]
pub(super) struct Order {
    /// A ring; the oldest at `first`.
    chains: Box<[Offered]>,
    first: usize,
    count: usize,
    /// Chains still to be reported of the latest used element, and the length it gave.
    run: usize,
    run_len: u32,
}

impl Order {
    /// Room for `size` chains.
    pub(super) fn new(size: u16) -> Self {
        let nothing = Offered { id: 0, writable: 0 };
        Self {
            chains: vec![nothing; usize::from(size)].into_boxed_slice(),
            first: 0,
            count: 0,
            run: 0,
            run_len: 0,
        }
    }

    /// Notes the next chain made available. A wrong driver that offers more than the ring holds
    /// forgets the oldest.
    pub(super) fn offer(&mut self, id: u16, writable: u32) {
        if self.count == self.chains.len() {
            self.first = (self.first + 1) % self.chains.len();
            self.count -= 1;
        }
        let position = (self.first + self.count) % self.chains.len();
        self.chains[position] = Offered { id, writable };
        self.count += 1;
    }

    /// Takes a used element, once [`next`](Self::next) has nothing left of the one before; false if
    /// the device is wrong: none of the `limit` oldest chains has this id.
    pub(super) fn begin_run(&mut self, id: u32, len: u32, limit: usize) -> bool {
        let mut outstanding = 0..self.count.min(limit);
        let found = outstanding.find(|&ahead| u32::from(self.chain(ahead).id) == id);
        self.run = found.map_or(0, |ahead| ahead + 1);
        self.run_len = len;
        found.is_some()
    }

    /// The next chain of the run, and how much was written to it: all there was room for, unless it
    /// is the run's last.
    pub(super) fn next(&mut self) -> Option<(u16, u32)> {
        self.run = self.run.checked_sub(1)?;
        let Offered { id, writable } = self.chain(0);
        self.first = (self.first + 1) % self.chains.len();
        self.count -= 1;
        let len = if self.run == 0 {
            self.run_len
        } else {
            writable
        };
        Some((id, len))
    }

    /// Whether [`next`](Self::next) has something left.
    pub(super) const fn has_next(&self) -> bool {
        self.run != 0
    }

    fn chain(&self, ahead: usize) -> Offered {
        self.chains[(self.first + ahead) % self.chains.len()]
    }
}

#[cfg(test)]
mod tests {
    use super::Order;

    #[test]
    fn a_used_element_completes_all_up_to_the_chain_it_names() {
        let mut order = Order::new(4);
        for id in [7, 5, 9] {
            order.offer(id, 100);
        }
        assert!(order.begin_run(5, 20, 3));
        assert_eq!(order.next(), Some((7, 100)));
        assert_eq!(order.next(), Some((5, 20)));
        assert_eq!(order.next(), None);
        assert!(order.begin_run(9, 0, 1));
        assert_eq!(order.next(), Some((9, 0)));
        assert_eq!(order.next(), None);
    }

    #[test]
    fn an_element_beyond_the_used_index_or_of_no_chain_is_wrong() {
        let mut order = Order::new(4);
        order.offer(1, 0);
        order.offer(2, 0);
        assert!(!order.begin_run(2, 0, 1));
        assert!(!order.begin_run(3, 0, 2));
        assert_eq!(order.next(), None);
    }

    #[test]
    fn offering_more_than_the_ring_holds_forgets_the_oldest() {
        let mut order = Order::new(2);
        for id in 0..3 {
            order.offer(id, 0);
        }
        assert!(!order.begin_run(0, 0, 2));
        assert!(order.begin_run(2, 0, 2));
        assert_eq!(order.next(), Some((1, 0)));
    }
}
