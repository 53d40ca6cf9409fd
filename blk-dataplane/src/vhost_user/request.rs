//! Requests of a front-end, parsed: from here on every field has been looked at, and the descriptors are where they
//! belong. Functions of bytes and of descriptors that are only passed on.

use super::message::{
    CONFIG_HEADER_LEN, CONFIG_MAX, INFLIGHT_LEN, INFLIGHT_PADDED_LEN, InflightArea, REGIONS_MAX,
    protocol,
};

/// Why a message is refused though the stream goes on (answer NACK). The front-end's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    /// Row S5.
    #[error("{code:?} with a body of {size} bytes")]
    Size { code: Code, size: usize },
    /// Rows F1, F2, F4, M15.
    #[error("{code:?} with {found} descriptors in the place of {due}")]
    Descriptors {
        code: Code,
        due: usize,
        found: usize,
    },
    /// Row F5.
    #[error("{code:?} with reserved bits {bits:#x}")]
    ReservedBits { code: Code, bits: u64 },
    /// Row M2.
    #[error("a memory table of {0} regions, of at most {REGIONS_MAX}")]
    Regions(u32),
}

macro_rules! codes {
    ($($name:ident = $number:literal,)*) => {
        /// Requests that this back-end knows ("Front-end message types").
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Code {
            $($name = $number,)*
        }

        impl Code {
            #[cfg(test)]
            pub(super) const ALL: &[Self] = &[$(Self::$name,)*];

            /// The request of this number.
            pub(super) fn of(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

codes! {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    ResetOwner = 4,
    SetMemTable = 5,
    SetLogBase = 6,
    SetLogFd = 7,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    SetVringErr = 14,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    SetBackendReqFd = 21,
    GetConfig = 24,
    SetConfig = 25,
    GetInflightFd = 31,
    SetInflightFd = 32,
    ResetDevice = 34,
    GetMaxMemSlots = 36,
    AddMemReg = 37,
    RemMemReg = 38,
    SetStatus = 39,
    GetStatus = 40,
}

impl Code {
    /// Whether it has a reply of its own, that a front-end waits for whatever becomes of it. (In the text of the
    /// specification SET_LOG_BASE has, where its memory comes with it.)
    pub(super) fn has_reply(self) -> bool {
        matches!(
            self,
            Self::GetFeatures
                | Self::GetProtocolFeatures
                | Self::GetVringBase
                | Self::GetQueueNum
                | Self::GetConfig
                | Self::GetInflightFd
                | Self::GetMaxMemSlots
                | Self::GetStatus
                | Self::SetLogBase
        )
    }

    /// Protocol features without which it must not be sent; 0 if there are none. What only asks is answered all the
    /// same (rows C1, C14).
    pub(super) fn needs(self) -> u64 {
        match self {
            Self::SetLogBase | Self::SetLogFd => protocol::LOG_SHMFD,
            Self::SetBackendReqFd => protocol::BACKEND_REQ,
            Self::SetConfig => protocol::CONFIG,
            Self::GetInflightFd | Self::SetInflightFd => protocol::INFLIGHT_SHMFD,
            Self::ResetDevice => protocol::RESET_DEVICE,
            Self::AddMemReg | Self::RemMemReg => protocol::CONFIGURE_MEM_SLOTS,
            Self::SetStatus => protocol::STATUS,
            _ => 0,
        }
    }
}

/// "Memory region description".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) guest_addr: u64,
    pub(super) size: u64,
    pub(super) frontend_addr: u64,
    pub(super) mmap_offset: u64,
}

/// "Vring state description": an index and a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct VringWord {
    pub(super) index: u32,
    pub(super) num: u32,
}

/// "Vring address description"; addresses are the front-end's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct VringAddress {
    pub(super) index: u32,
    /// Bit 0, VHOST_VRING_F_LOG: what is written to the used ring is to be logged.
    pub(super) flags: u32,
    pub(super) descriptor: u64,
    pub(super) used: u64,
    pub(super) available: u64,
}

/// "Vring descriptor index": a ring, and its descriptor unless it goes without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct VringFd<F> {
    pub(super) index: u8,
    pub(super) fd: Option<F>,
}

/// "Log description".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LogArea {
    pub(super) size: u64,
    pub(super) offset: u64,
}

/// One request. `F` is a descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request<F> {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<(Region, F)>),
    SetLogBase(LogArea, F),
    SetLogFd(F),
    SetVringNum(VringWord),
    SetVringAddr(VringAddress),
    SetVringBase(VringWord),
    /// The index. The number beside it means nothing in this direction (row C10).
    GetVringBase(u32),
    SetVringKick(VringFd<F>),
    SetVringCall(VringFd<F>),
    SetVringErr(VringFd<F>),
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable(VringWord),
    SetBackendReqFd(F),
    GetConfig {
        offset: u32,
        size: u32,
        flags: u32,
    },
    SetConfig {
        offset: u32,
        bytes: Vec<u8>,
    },
    GetInflightFd {
        num_queues: u16,
        queue_size: u16,
        /// See [`super::message::Reply::Inflight`].
        padded: bool,
    },
    SetInflightFd(InflightArea, F),
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(Region, F),
    /// A descriptor that older front-ends send with it is of no use and closed (row M16).
    RemMemReg(Region),
    SetStatus(u64),
    GetStatus,
}

/// What is left of a body.
struct Body<'a> {
    code: Code,
    size: usize,
    rest: &'a [u8],
}

impl<'a> Body<'a> {
    fn wrong(&self) -> Malformed {
        Malformed::Size {
            code: self.code,
            size: self.size,
        }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or_else(|| self.wrong())?;
        self.rest = rest;
        Ok(*taken)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        self.take().map(u16::from_ne_bytes)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.take().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        self.take().map(u64::from_ne_bytes)
    }

    fn region(&mut self) -> Result<Region, Malformed> {
        Ok(Region {
            guest_addr: self.u64()?,
            size: self.u64()?,
            frontend_addr: self.u64()?,
            mmap_offset: self.u64()?,
        })
    }

    /// "Single memory region description": padding first.
    fn padded_region(&mut self) -> Result<Region, Malformed> {
        self.u64()?;
        self.region()
    }

    fn vring_word(&mut self) -> Result<VringWord, Malformed> {
        Ok(VringWord {
            index: self.u32()?,
            num: self.u32()?,
        })
    }

    /// The area, and whether the structure was padded.
    fn inflight(&mut self) -> Result<(InflightArea, bool), Malformed> {
        let padded = match self.size {
            INFLIGHT_LEN => false,
            INFLIGHT_PADDED_LEN => true,
            _ => return Err(self.wrong()),
        };
        let area = InflightArea {
            size: self.u64()?,
            offset: self.u64()?,
            num_queues: self.u16()?,
            queue_size: self.u16()?,
        };
        if padded {
            // What a C structure ends with is whatever was there.
            self.u32()?;
        }
        Ok((area, padded))
    }

    fn all(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }
}

/// Exactly `N` descriptors; the others are closed when the vector is dropped.
fn exactly<const N: usize, F>(code: Code, fds: Vec<F>) -> Result<[F; N], Malformed> {
    <[F; N]>::try_from(fds).map_err(|fds| Malformed::Descriptors {
        code,
        due: N,
        found: fds.len(),
    })
}

fn one<F>(code: Code, fds: Vec<F>) -> Result<F, Malformed> {
    exactly(code, fds).map(|[fd]: [F; 1]| fd)
}

/// Bits 0 to 7 are the index, bit 8 says that there is no descriptor, the others are reserved.
fn vring_fd<F>(code: Code, word: u64, fds: Vec<F>) -> Result<VringFd<F>, Malformed> {
    const INDEX_MASK: u64 = 0xff;
    const NOFD: u64 = 1 << 8;
    let bits = word & !(INDEX_MASK | NOFD);
    if bits != 0 {
        return Err(Malformed::ReservedBits { code, bits });
    }
    let [index, ..] = word.to_le_bytes();
    let fd = if word & NOFD == 0 {
        Some(one(code, fds)?)
    } else {
        let [] = exactly(code, fds)?;
        None
    };
    Ok(VringFd { index, fd })
}

impl<F> Request<F> {
    /// Checks a message's size, its descriptors and its fields. The descriptors of a message that is refused are
    /// closed.
    pub(super) fn parse(code: Code, bytes: &[u8], mut fds: Vec<F>) -> Result<Self, Malformed> {
        let mut body = Body {
            code,
            size: bytes.len(),
            rest: bytes,
        };
        if code == Code::RemMemReg {
            fds.clear();
        }
        let mut take_fds = || std::mem::take(&mut fds);
        let request = match code {
            Code::GetFeatures => Self::GetFeatures,
            Code::SetFeatures => Self::SetFeatures(body.u64()?),
            Code::SetOwner => Self::SetOwner,
            Code::ResetOwner => Self::ResetOwner,
            Code::SetMemTable => Self::SetMemTable(mem_table(&mut body, take_fds())?),
            Code::SetLogBase => {
                let area = LogArea {
                    size: body.u64()?,
                    offset: body.u64()?,
                };
                Self::SetLogBase(area, one(code, take_fds())?)
            }
            Code::SetLogFd => Self::SetLogFd(one(code, take_fds())?),
            Code::SetVringNum => Self::SetVringNum(body.vring_word()?),
            Code::SetVringAddr => {
                let (index, flags) = (body.u32()?, body.u32()?);
                let address = VringAddress {
                    index,
                    flags,
                    descriptor: body.u64()?,
                    used: body.u64()?,
                    available: body.u64()?,
                };
                // Where the used ring lies for the guest: what the memory table says of its address holds.
                body.u64()?;
                Self::SetVringAddr(address)
            }
            Code::SetVringBase => Self::SetVringBase(body.vring_word()?),
            Code::GetVringBase => Self::GetVringBase(body.vring_word()?.index),
            Code::SetVringKick => Self::SetVringKick(vring_fd(code, body.u64()?, take_fds())?),
            Code::SetVringCall => Self::SetVringCall(vring_fd(code, body.u64()?, take_fds())?),
            Code::SetVringErr => Self::SetVringErr(vring_fd(code, body.u64()?, take_fds())?),
            Code::GetProtocolFeatures => Self::GetProtocolFeatures,
            Code::SetProtocolFeatures => Self::SetProtocolFeatures(body.u64()?),
            Code::GetQueueNum => Self::GetQueueNum,
            Code::SetVringEnable => Self::SetVringEnable(body.vring_word()?),
            Code::SetBackendReqFd => Self::SetBackendReqFd(one(code, take_fds())?),
            Code::GetConfig => {
                let (offset, size, flags) = config_range(&mut body)?;
                // Room for the reply; its contents mean nothing yet.
                body.all();
                Self::GetConfig {
                    offset,
                    size,
                    flags,
                }
            }
            Code::SetConfig => {
                let (offset, ..) = config_range(&mut body)?;
                let bytes = body.all().to_vec();
                Self::SetConfig { offset, bytes }
            }
            Code::GetInflightFd => {
                let (area, padded) = body.inflight()?;
                Self::GetInflightFd {
                    num_queues: area.num_queues,
                    queue_size: area.queue_size,
                    padded,
                }
            }
            Code::SetInflightFd => {
                let (area, _) = body.inflight()?;
                Self::SetInflightFd(area, one(code, take_fds())?)
            }
            Code::ResetDevice => Self::ResetDevice,
            Code::GetMaxMemSlots => Self::GetMaxMemSlots,
            Code::AddMemReg => Self::AddMemReg(body.padded_region()?, one(code, take_fds())?),
            Code::RemMemReg => Self::RemMemReg(body.padded_region()?),
            Code::SetStatus => Self::SetStatus(body.u64()?),
            Code::GetStatus => Self::GetStatus,
        };
        if !body.rest.is_empty() {
            return Err(body.wrong());
        }
        // Row F1: whoever takes some has taken all.
        let [] = exactly(code, fds)?;
        Ok(request)
    }
}

/// "Multiple memory regions description", each with its descriptor.
fn mem_table<F>(body: &mut Body<'_>, fds: Vec<F>) -> Result<Vec<(Region, F)>, Malformed> {
    let count = body.u32()?;
    body.u32()?;
    let due = usize::try_from(count)
        .ok()
        .filter(|&count| count <= REGIONS_MAX)
        .ok_or(Malformed::Regions(count))?;
    if fds.len() != due {
        return Err(Malformed::Descriptors {
            code: body.code,
            due,
            found: fds.len(),
        });
    }
    fds.into_iter().map(|fd| Ok((body.region()?, fd))).collect()
}

/// Offset, size and flags of a part of the configuration space whose bytes follow.
fn config_range(body: &mut Body<'_>) -> Result<(u32, u32, u32), Malformed> {
    let (offset, size, flags) = (body.u32()?, body.u32()?, body.u32()?);
    let said = usize::try_from(size).ok().filter(|_| size <= CONFIG_MAX);
    if said.and_then(|said| said.checked_add(CONFIG_HEADER_LEN)) != Some(body.size) {
        return Err(body.wrong());
    }
    Ok((offset, size, flags))
}

#[cfg(test)]
mod tests;
