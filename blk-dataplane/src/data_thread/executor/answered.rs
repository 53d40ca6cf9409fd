//! What is written into guest memory beside data: status bytes, and what the device knows by itself.

use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileMemory};
use vring::{Chain, Head};

use super::{Current, Executor, Started, used_len};
use crate::data_thread::hot_region::HotRegion;
use crate::data_thread::trace_points;
use crate::request::Status;

impl<M: GuestMemoryBackend> Executor<M> {
    /// What the device knows by itself into the data buffer, as much of it as there is room for.
    pub(super) fn tell(
        &self,
        head: Head,
        chain: &Chain,
        memory: &mut HotRegion<'_, M>,
        status: GuestAddress,
        what: &[u8],
    ) -> Started {
        let writable_data = chain.writable_len() - 1;
        let len = usize::try_from(writable_data).map_or(what.len(), |room| room.min(what.len()));
        match chain.copy_to_writable(memory.map(), 0, &what[..len]) {
            Ok(_) if self.was_lost(chain, memory.map()) => {
                self.answer(head, memory, status, Status::IoErr, 0, writable_data)
            }
            Ok(written) => self.answer(
                head,
                memory,
                status,
                Status::Ok,
                written as u64,
                writable_data,
            ),
            Err(_) => self.bad_chain(head),
        }
    }

    pub(super) fn answer(
        &self,
        head: Head,
        memory: &mut HotRegion<'_, M>,
        addr: GuestAddress,
        status: Status,
        written: u64,
        writable_data: u64,
    ) -> Started {
        self.write_status(memory, addr, status);
        let Current { queue, kind } = self.current;
        let counters = &self.of_queue(queue).requests;
        counters.of(kind).add(1);
        match status {
            Status::Ok => {}
            Status::IoErr => counters.refused.add(1),
            Status::Unsupported => counters.unsupported.add(1),
        }
        let used_len = used_len(written, writable_data);
        trace_points::complete_request(queue, &head, status as u8, used_len);
        Started::Finished { head, used_len }
    }

    #[inline(always)]
    pub(super) fn write_status(
        &self,
        memory: &mut HotRegion<'_, M>,
        addr: GuestAddress,
        status: Status,
    ) {
        match status {
            Status::Ok => {}
            Status::IoErr => self.counters.io_errors.add(1),
            Status::Unsupported => self.counters.unsupported.add(1),
        }
        match memory.slice(addr, 1) {
            Ok(byte) => {
                if let Ok(byte) = byte.get_ref(0) {
                    byte.store(status as u8);
                }
            }
            Err(_) => self.counters.lost_statuses.add(1),
        }
    }

    /// No status byte to answer in: the head goes back with length 0 and the ring goes on.
    pub(super) fn bad_chain(&self, head: Head) -> Started {
        self.counters.bad_chains.add(1);
        self.of_queue(self.current.queue).requests.bad_chains.add(1);
        Started::Finished { head, used_len: 0 }
    }
}
