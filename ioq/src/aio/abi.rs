//! `linux/aio_abi.h`, and the completion ring the kernel maps (`struct aio_ring`, `fs/aio.c`).

use std::sync::atomic::AtomicU32;

/// `IOCB_CMD_PREAD`.
pub(super) const CMD_PREAD: u16 = 0;
/// `IOCB_CMD_PWRITE`.
pub(super) const CMD_PWRITE: u16 = 1;
/// `IOCB_CMD_FDSYNC`, Linux 4.18.
pub(super) const CMD_FDSYNC: u16 = 3;
/// `IOCB_CMD_PREADV`.
pub(super) const CMD_PREADV: u16 = 7;
/// `IOCB_CMD_PWRITEV`.
pub(super) const CMD_PWRITEV: u16 = 8;

/// `IOCB_FLAG_RESFD`: signal the eventfd in `resfd` on completion.
pub(super) const FLAG_RESFD: u32 = 1;

/// `RWF_DSYNC` of `linux/fs.h`.
pub(super) const RWF_DSYNC: u32 = 2;

/// `struct iocb`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Iocb {
    pub(super) data: u64,
    /// Written by `io_submit`.
    #[cfg(target_endian = "little")]
    pub(super) key: u32,
    pub(super) rw_flags: u32,
    #[cfg(target_endian = "big")]
    pub(super) key: u32,
    pub(super) opcode: u16,
    pub(super) reqprio: i16,
    pub(super) fd: u32,
    pub(super) buf: u64,
    pub(super) nbytes: u64,
    pub(super) offset: i64,
    pub(super) reserved2: u64,
    pub(super) flags: u32,
    pub(super) resfd: u32,
}

/// `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct IoEvent {
    pub(super) data: u64,
    pub(super) obj: u64,
    pub(super) res: i64,
    pub(super) res2: i64,
}

/// The header of `struct aio_ring`; the events follow.
#[repr(C)]
#[derive(Debug)]
pub(super) struct RingHeader {
    pub(super) id: u32,
    /// Events in the ring; fixed.
    pub(super) nr: u32,
    /// Next event to take; written by who takes it.
    pub(super) head: AtomicU32,
    /// Where the kernel puts the next event.
    pub(super) tail: AtomicU32,
    pub(super) magic: u32,
    pub(super) compat_features: u32,
    pub(super) incompat_features: u32,
    pub(super) header_length: u32,
}

/// `AIO_RING_MAGIC`.
pub(super) const RING_MAGIC: u32 = 0xa10a_10a1;
/// `AIO_RING_COMPAT_FEATURES`: the layout above.
pub(super) const RING_COMPAT_FEATURES: u32 = 1;
/// `AIO_RING_INCOMPAT_FEATURES`: a bit here would mean a ring a reader must not guess at.
pub(super) const RING_INCOMPAT_FEATURES: u32 = 0;

// The kernel's sizes; a mistake above would misread every completion.
const _: () = assert!(size_of::<Iocb>() == 64);
const _: () = assert!(size_of::<IoEvent>() == 32);
const _: () = assert!(size_of::<RingHeader>() == 32);
