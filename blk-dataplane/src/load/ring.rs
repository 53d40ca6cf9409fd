//! A queue's ring with a fixed set of requests: descriptors are made once for each, and again only when a request
//! turns from a read into a write. In a split ring they stay where they are, and making one available costs an
//! entry of the available ring; a packed ring is written through from end to end, so there they are copied.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vring::driver::{
    Driver, DriverError, F_INDIRECT, F_NEXT, F_WRITE, PackedDriver, RawDescriptor, SplitDriver,
};
use vring::{QueueSize, RingAddresses, RingFeatures};

use super::guest::{DESCRIPTOR_LEN, HEADER_LEN, Places, STATUS_OFFSET};

/// What a back-end wrote into a ring that makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingFault {
    /// A used element, or descriptor, names a chain that the device does not have.
    #[error("the back-end gave back chain {id}, which it did not have")]
    UnknownId {
        /// The chain's id.
        id: u32,
    },
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
}

impl Kind {
    /// Its number, from 0.
    #[inline]
    pub(super) const fn index(self) -> usize {
        self as usize
    }
}

/// How a request's descriptors are laid out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Bytes of data.
    pub(super) block: u32,
    /// Most bytes of one descriptor.
    pub(super) segment: u32,
    /// Each request is one descriptor, of a table.
    pub(super) indirect: bool,
}

impl Shape {
    /// Descriptors of a request with data.
    pub(super) fn descriptors(&self) -> u32 {
        2 + self.block.div_ceil(self.segment)
    }

    /// Those of the ring.
    pub(super) fn ring_descriptors(&self) -> u32 {
        if self.indirect { 1 } else { self.descriptors() }
    }
}

/// No request, in a table of them.
const NONE: u16 = u16::MAX;

/// One side of a ring of either format, as the client uses it. Requests are numbered from 0.
pub(super) trait Ring {
    /// Stages the request.
    fn offer(&mut self, request: u16, kind: Kind);
    /// Whether there is a completion.
    fn has_used(&self) -> bool;
    /// The next completion.
    fn poll(&mut self) -> Option<Result<u16, RingFault>>;
    fn publish(&mut self);
    fn needs_kick(&mut self) -> bool;
    fn enable_interrupts(&mut self) -> bool;
    fn disable_interrupts(&mut self);
}

/// The descriptors of each request.
#[derive(Debug)]
struct Chains {
    memory: Arc<GuestMemoryMmap>,
    shape: Shape,
    places: Vec<Places>,
    /// What each request's descriptors are for now; `None` before its first time.
    kinds: Vec<Option<Kind>>,
    /// Of each request in turn, `stride` of them; those of the ring.
    descriptors: Vec<RawDescriptor>,
    stride: usize,
    /// How many of them count.
    lens: Vec<usize>,
    scratch: Vec<RawDescriptor>,
    packed: bool,
}

impl Chains {
    fn new(memory: Arc<GuestMemoryMmap>, shape: Shape, places: Vec<Places>, packed: bool) -> Self {
        let stride = usize::try_from(shape.ring_descriptors()).unwrap_or(usize::MAX);
        let nothing = RawDescriptor {
            address: 0,
            len: 0,
            flags: 0,
        };
        Self {
            kinds: vec![None; places.len()],
            descriptors: vec![nothing; places.len() * stride],
            lens: vec![0; places.len()],
            scratch: Vec::new(),
            memory,
            shape,
            places,
            stride,
            packed,
        }
    }

    /// The request's descriptors in the ring.
    #[inline]
    fn of(&self, request: usize) -> &[RawDescriptor] {
        let first = request * self.stride;
        &self.descriptors[first..first + self.lens[request]]
    }

    /// Has them made for this kind.
    #[inline]
    fn turn_to(&mut self, request: usize, kind: Kind) {
        if self.kinds[request] != Some(kind) {
            self.make(request, kind);
        }
    }

    #[cold]
    fn make(&mut self, request: usize, kind: Kind) {
        let places = self.places[request];
        self.kinds[request] = Some(kind);
        self.scratch.clear();
        self.scratch.push(RawDescriptor {
            address: places.line.0,
            len: HEADER_LEN,
            flags: F_NEXT,
        });
        if kind != Kind::Flush {
            let flags = if kind == Kind::Read {
                F_WRITE | F_NEXT
            } else {
                F_NEXT
            };
            let mut done = 0;
            while done < self.shape.block {
                let len = (self.shape.block - done).min(self.shape.segment);
                self.scratch.push(RawDescriptor {
                    address: places.data.0 + u64::from(done),
                    len,
                    flags,
                });
                done += len;
            }
        }
        self.scratch.push(RawDescriptor {
            address: places.line.0 + STATUS_OFFSET,
            len: 1,
            flags: F_WRITE,
        });
        let first = request * self.stride;
        if self.shape.indirect {
            self.write_table(places.table);
            self.descriptors[first] = RawDescriptor {
                address: places.table.0,
                len: u32::try_from(self.scratch.len()).unwrap_or(u32::MAX)
                    * u32::try_from(DESCRIPTOR_LEN).unwrap_or(u32::MAX),
                flags: F_INDIRECT,
            };
            self.lens[request] = 1;
        } else {
            self.lens[request] = self.scratch.len();
            self.descriptors[first..first + self.scratch.len()].copy_from_slice(&self.scratch);
        }
    }

    /// Virtio 1.3 §2.7.5.3 for split rings: linked by `next`. §2.8.7 for packed ones: in order, without NEXT.
    fn write_table(&self, table: GuestAddress) {
        let mut bytes = Vec::with_capacity(self.scratch.len() * 16);
        for (descriptor, next) in self.scratch.iter().zip(1u16..) {
            let more = descriptor.flags & F_NEXT != 0;
            let (flags, next) = match (self.packed, more) {
                (true, _) => (descriptor.flags & !F_NEXT, 0),
                (false, true) => (descriptor.flags, next),
                (false, false) => (descriptor.flags, 0),
            };
            bytes.extend(descriptor.address.to_le_bytes());
            bytes.extend(descriptor.len.to_le_bytes());
            // A packed ring's descriptor has id and flags, a split one's flags and next.
            let words = if self.packed {
                [0, flags]
            } else {
                [flags, next]
            };
            bytes.extend(words.map(u16::to_le_bytes).as_flattened());
        }
        // The layout has put it inside.
        let written = self.memory.write_slice(&bytes, table);
        debug_assert!(written.is_ok());
    }
}

/// What a ring is made of.
pub(super) struct RingParts {
    pub(super) memory: Arc<GuestMemoryMmap>,
    pub(super) addresses: RingAddresses,
    pub(super) size: QueueSize,
    pub(super) features: RingFeatures,
    pub(super) shape: Shape,
    pub(super) places: Vec<Places>,
}

/// A split ring: request `n` has its descriptors at `n` times their number.
pub(super) struct SplitClient {
    driver: SplitDriver<GuestMemoryMmap>,
    chains: Chains,
    heads: Vec<u16>,
    /// The request in flight of each head.
    requests: Box<[u16]>,
}

/// A packed ring: ids come and go.
pub(super) struct PackedClient {
    driver: PackedDriver<GuestMemoryMmap>,
    chains: Chains,
    /// The request of each id in flight.
    requests: Box<[u16]>,
}

/// A ring of either format.
pub(super) enum Client {
    Packed(PackedClient),
    Split(SplitClient),
}

impl Client {
    pub(super) fn new(parts: RingParts) -> Result<Self, DriverError> {
        let RingParts {
            memory,
            addresses,
            size,
            features,
            shape,
            places,
        } = parts;
        let packed = features.packed;
        let count = places.len();
        let entries = usize::from(size.get());
        let chains = Chains::new(Arc::clone(&memory), shape, places, packed);
        Ok(match Driver::new(memory, addresses, size, features)? {
            Driver::Packed(driver) => Self::Packed(PackedClient {
                driver,
                chains,
                requests: vec![NONE; entries].into_boxed_slice(),
            }),
            Driver::Split(driver) => {
                let stride = chains.stride;
                let heads =
                    (0..count).map(|request| u16::try_from(request * stride).unwrap_or(NONE));
                Self::Split(SplitClient {
                    driver,
                    heads: heads.collect(),
                    chains,
                    requests: vec![NONE; entries].into_boxed_slice(),
                })
            }
        })
    }
}

/// The request in flight of a chain that was given back, which it is no longer.
#[inline]
fn take(requests: &mut [u16], id: u32) -> Result<u16, RingFault> {
    let entry = usize::try_from(id).ok().and_then(|id| requests.get_mut(id));
    match entry.map(|entry| std::mem::replace(entry, NONE)) {
        Some(request) if request != NONE => Ok(request),
        _ => Err(RingFault::UnknownId { id }),
    }
}

impl SplitClient {
    #[cold]
    fn write(&mut self, request: usize) {
        let first = self.heads[request];
        for (descriptor, index) in self.chains.of(request).iter().zip(first..) {
            let RawDescriptor {
                address,
                len,
                flags,
            } = *descriptor;
            let next = if flags & F_NEXT == 0 { 0 } else { index + 1 };
            self.driver.write_desc(index, address, len, flags, next);
        }
    }
}

impl Ring for SplitClient {
    #[inline]
    fn offer(&mut self, request: u16, kind: Kind) {
        let at = usize::from(request);
        self.chains.turn_to(at, kind);
        // Each time, though they are mostly the same: drivers do, since their next request has other buffers.
        self.write(at);
        let head = self.heads[at];
        if let Some(entry) = self.requests.get_mut(usize::from(head)) {
            *entry = request;
        }
        self.driver.offer(head);
    }

    #[inline]
    fn poll(&mut self) -> Option<Result<u16, RingFault>> {
        self.driver
            .poll_used()
            .map(|used| take(&mut self.requests, used.id))
    }

    #[inline]
    fn has_used(&self) -> bool {
        self.driver.has_used()
    }

    #[inline]
    fn publish(&mut self) {
        self.driver.publish();
    }

    #[inline]
    fn needs_kick(&mut self) -> bool {
        self.driver.needs_kick()
    }

    #[inline]
    fn enable_interrupts(&mut self) -> bool {
        self.driver.enable_interrupts()
    }

    #[inline]
    fn disable_interrupts(&mut self) {
        self.driver.disable_interrupts();
    }
}

impl Ring for PackedClient {
    #[inline]
    fn offer(&mut self, request: u16, kind: Kind) {
        let at = usize::from(request);
        self.chains.turn_to(at, kind);
        // The queue has as many descriptors as all requests together, so this is never refused.
        if let Ok(id) = self.driver.add_raw(self.chains.of(at))
            && let Some(entry) = self.requests.get_mut(usize::from(id))
        {
            *entry = request;
        }
    }

    #[inline]
    fn poll(&mut self) -> Option<Result<u16, RingFault>> {
        self.driver
            .poll_used()
            .map(|used| take(&mut self.requests, used.id))
    }

    #[inline]
    fn has_used(&self) -> bool {
        self.driver.has_used()
    }

    #[inline]
    fn publish(&mut self) {
        self.driver.publish();
    }

    #[inline]
    fn needs_kick(&mut self) -> bool {
        self.driver.needs_kick()
    }

    #[inline]
    fn enable_interrupts(&mut self) -> bool {
        self.driver.enable_interrupts()
    }

    #[inline]
    fn disable_interrupts(&mut self) {
        self.driver.disable_interrupts();
    }
}
