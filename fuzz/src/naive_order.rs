//! `VIRTIO_F_IN_ORDER` as a list (virtio 1.3 §2.7.9, §2.8.8).

/// A chain between its pop and its return to the driver.
#[derive(Clone, Debug)]
pub(crate) struct Owned<K> {
    pub(crate) key: K,
    /// Bytes of its writable buffers; `None` if it is broken, and nobody knows.
    pub(crate) room: Option<u64>,
    /// How much was written, once it is pushed and waits for those before it.
    pub(crate) written: Option<u32>,
}

/// The chains that the device has, in the order they came.
#[derive(Clone, Debug)]
pub(crate) struct NaiveOrder<K>(Vec<Owned<K>>);

impl<K: Clone + PartialEq> NaiveOrder<K> {
    pub(crate) const fn new() -> Self {
        Self(Vec::new())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Owned<K>> {
        self.0.iter()
    }

    /// Those popped and not pushed.
    pub(crate) fn in_flight(&self) -> usize {
        self.iter().filter(|chain| chain.written.is_none()).count()
    }

    /// Those pushed that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.0.len() - self.in_flight()
    }

    pub(crate) fn arrive(&mut self, key: K, room: Option<u64>) {
        let written = None;
        self.0.push(Owned { key, room, written });
    }

    /// Takes one out: it is un-popped, or pushed and not in need of any order.
    pub(crate) fn remove(&mut self, key: &K) -> Owned<K> {
        let at = self.0.iter().position(|chain| chain.key == *key);
        self.0.remove(at.expect("it is in flight"))
    }

    /// Notes that one is complete, and may have to wait.
    pub(crate) fn complete(&mut self, key: &K, len: u32) {
        let mut chains = self.0.iter_mut();
        let chain = chains.find(|chain| chain.key == *key);
        chain.expect("it is in flight").written = Some(len);
    }

    /// Takes out those whose turn it is. Each group is given back by the last of it: the ones before
    /// are full, so that the driver can know their lengths.
    pub(crate) fn turns(&mut self) -> Vec<Vec<(K, u32)>> {
        let mut groups = vec![Vec::new()];
        while let Some(written) = self.0.first().and_then(|chain| chain.written) {
            let chain = self.0.remove(0);
            if let Some(group) = groups.last_mut() {
                group.push((chain.key, written));
            }
            if chain.room != Some(u64::from(written)) {
                groups.push(Vec::new());
            }
        }
        groups.retain(|group| !group.is_empty());
        groups
    }
}
