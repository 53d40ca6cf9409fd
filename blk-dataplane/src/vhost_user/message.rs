//! The wire format of vhost-user messages, as functions of bytes: nothing here reads or writes a socket.
//!
//! A message is a header of three 32-bit words (request, flags, size of the body) and a body. All numbers are in
//! the byte order of the host, which both ends are on. Section names are those of `vhost-user.rst`.

/// A header's size in bytes.
pub(crate) const HEADER_LEN: usize = 12;

/// Longest body that is read. The longest that any request here has is a configuration write of 268 bytes; a page
/// leaves room for those of front-ends that are to be told "no" and not cut off.
pub(crate) const BODY_MAX: usize = 4096;

/// Most descriptors that may come with one message: more than any takes ([`REGIONS_MAX`]), so that a message with
/// some too many is refused like any other, and few enough that a front-end cannot use up this process's.
pub(crate) const DESCRIPTORS_MAX: usize = 32;

/// Regions that SET_MEM_TABLE can carry ("Multiple memory regions description").
pub(crate) const REGIONS_MAX: usize = 8;

/// Longest part of the configuration space that a message carries ("Virtio device config space").
pub(super) const CONFIG_MAX: u32 = 256;

/// The body before the bytes in GET_CONFIG and SET_CONFIG: offset, size and flags.
pub(crate) const CONFIG_HEADER_LEN: usize = 12;

/// Flags of a header.
pub(crate) const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
pub(crate) const REPLY: u32 = 1 << 2;
pub(crate) const NEED_REPLY: u32 = 1 << 3;

/// A header that a stream can be trusted after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// The request.
    pub(super) code: u32,
    /// Whether the front-end wants to be told how it went, where the message has no reply of its own.
    pub(super) need_reply: bool,
    /// Bytes of the body, at most [`BODY_MAX`].
    pub(super) size: usize,
}

/// The stream cannot be trusted (answer CLOSE): what follows may not be a body of the size said, or a message at
/// all. The front-end's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FramingError {
    /// Row S6.
    #[error("version {0} in a header, and not 1")]
    Version(u32),
    /// Row S6.
    #[error("reserved flags {0:#x} in a header")]
    ReservedFlags(u32),
    /// Row S7.
    #[error("a reply, and not a request")]
    Reply,
    /// Row S4.
    #[error("a body of {0} bytes, of at most {BODY_MAX}")]
    TooLarge(u32),
    /// Row F3: some have been lost, so it cannot be said which is which.
    #[error(
        "more descriptors with a message than {DESCRIPTORS_MAX}, or than this process may have"
    )]
    DescriptorsCut,
}

impl Header {
    /// Checks a request's header.
    pub(super) fn parse(bytes: [u8; HEADER_LEN]) -> Result<Self, FramingError> {
        let [code, flags, size] = words(bytes);
        if flags & VERSION_MASK != VERSION {
            return Err(FramingError::Version(flags & VERSION_MASK));
        }
        if flags & REPLY != 0 {
            return Err(FramingError::Reply);
        }
        let reserved = flags & !(VERSION_MASK | REPLY | NEED_REPLY);
        if reserved != 0 {
            return Err(FramingError::ReservedFlags(reserved));
        }
        let fits = usize::try_from(size).ok().filter(|&size| size <= BODY_MAX);
        Ok(Self {
            code,
            need_reply: flags & NEED_REPLY != 0,
            size: fits.ok_or(FramingError::TooLarge(size))?,
        })
    }
}

/// The three words of a header: request, flags, size of the body.
pub(crate) fn words(bytes: [u8; HEADER_LEN]) -> [u32; 3] {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = bytes;
    [[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_ne_bytes)
}

/// What goes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// A number, or how a message without a reply of its own went: 0, or else not 0.
    U64(u64),
    /// Two 32-bit words, as of a vring: its index and a number.
    VringState { index: u32, num: u32 },
    /// A part of the configuration space; no bytes tell of an error (row C11).
    Config {
        offset: u32,
        flags: u32,
        bytes: Vec<u8>,
    },
    /// Where the log of written pages lies, as it was asked for.
    Log { size: u64, offset: u64 },
    /// Where requests in flight are recorded; a descriptor goes with it.
    Inflight {
        area: InflightArea,
        /// Whether the front-end's structure ends with the padding that a C compiler gives it.
        padded: bool,
    },
}

/// "Inflight description".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct InflightArea {
    /// Bytes.
    pub(super) size: u64,
    /// Where in the file it begins, in bytes.
    pub(super) offset: u64,
    pub(super) num_queues: u16,
    pub(super) queue_size: u16,
}

/// Its size as the specification lists the fields, and as C compilers lay the structure out: QEMU and rust-vmm send
/// the latter, and want it back.
pub(crate) const INFLIGHT_LEN: usize = 20;
pub(crate) const INFLIGHT_PADDED_LEN: usize = 24;

impl Reply {
    /// The whole message, header and body.
    pub(super) fn encode(&self, code: u32) -> Vec<u8> {
        let mut body = Vec::new();
        match self {
            Self::U64(value) => body.extend(value.to_ne_bytes()),
            Self::VringState { index, num } => {
                body.extend([index, num].into_iter().flat_map(|word| word.to_ne_bytes()));
            }
            Self::Config {
                offset,
                flags,
                bytes,
            } => {
                let len = u32::try_from(bytes.len()).unwrap_or(0);
                for word in [*offset, len, *flags] {
                    body.extend(word.to_ne_bytes());
                }
                body.extend(bytes);
            }
            Self::Log { size, offset } => {
                body.extend(
                    [size, offset]
                        .into_iter()
                        .flat_map(|word| word.to_ne_bytes()),
                );
            }
            Self::Inflight { area, padded } => {
                body.extend(area.size.to_ne_bytes());
                body.extend(area.offset.to_ne_bytes());
                body.extend(area.num_queues.to_ne_bytes());
                body.extend(area.queue_size.to_ne_bytes());
                if *padded {
                    body.resize(INFLIGHT_PADDED_LEN, 0);
                }
            }
        }
        encode(code, VERSION | REPLY, &body)
    }
}

/// CONFIG_CHANGE_MSG of "Back-end message types", wanting no answer: there is nothing to do without one.
pub(super) fn config_change() -> Vec<u8> {
    const CONFIG_CHANGE_MSG: u32 = 2;
    encode(CONFIG_CHANGE_MSG, VERSION, &[])
}

pub(crate) fn encode(code: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER_LEN + body.len());
    // At most CONFIG_MAX and its header.
    let size = u32::try_from(body.len()).unwrap_or(u32::MAX);
    for word in [code, flags, size] {
        message.extend(word.to_ne_bytes());
    }
    message.extend(body);
    message
}

/// Bits of GET_PROTOCOL_FEATURES ("Protocol features").
pub(crate) mod protocol {
    pub(crate) const MQ: u64 = 1 << 0;
    pub(crate) const LOG_SHMFD: u64 = 1 << 1;
    pub(crate) const REPLY_ACK: u64 = 1 << 3;
    pub(crate) const BACKEND_REQ: u64 = 1 << 5;
    pub(crate) const CONFIG: u64 = 1 << 9;
    pub(crate) const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub(crate) const RESET_DEVICE: u64 = 1 << 13;
    pub(crate) const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub(crate) const STATUS: u64 = 1 << 16;
}

/// Bits of GET_FEATURES that are the protocol's and not the device's.
pub(crate) mod feature {
    /// VHOST_F_LOG_ALL
    pub(crate) const LOG_ALL: u64 = 1 << 26;
    /// VHOST_USER_F_PROTOCOL_FEATURES
    pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(code: u32, flags: u32, size: u32) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        for (place, word) in bytes.chunks_exact_mut(4).zip([code, flags, size]) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    proptest! {
        #[test]
        fn s4_s6_s7_header_is_taken_exactly_if_the_stream_can_be_trusted_after_it(
            code: u32, flags: u32, simple in 0u32..16, size in 0u32..10_000,
        ) {
            for flags in [flags, simple] {
                let good = matches!(flags, 1 | 9) && size <= 4096;
                let parsed = Header::parse(header(code, flags, size));
                prop_assert_eq!(parsed.is_ok(), good);
                if let Ok(parsed) = parsed {
                    let size = usize::try_from(size).unwrap();
                    prop_assert_eq!(parsed, Header { code, need_reply: flags == 9, size });
                }
            }
        }
    }

    #[test]
    fn replies_are_laid_out_as_the_specification_has_them() {
        let body = |reply: Reply| {
            let message = reply.encode(24);
            let size = message.len() - HEADER_LEN;
            assert_eq!(
                message[..HEADER_LEN],
                header(24, 5, u32::try_from(size).unwrap())
            );
            message[HEADER_LEN..].to_vec()
        };
        assert_eq!(body(Reply::U64(7)), 7u64.to_ne_bytes());
        let state = Reply::VringState { index: 1, num: 2 };
        assert_eq!(body(state), [1u32, 2].map(u32::to_ne_bytes).concat());
        let config = Reply::Config {
            offset: 3,
            flags: 1,
            bytes: vec![9; 5],
        };
        let mut expected = [3u32, 5, 1].map(u32::to_ne_bytes).concat();
        expected.extend([9; 5]);
        assert_eq!(body(config), expected);
        let log = Reply::Log { size: 4, offset: 5 };
        assert_eq!(body(log), [4u64, 5].map(u64::to_ne_bytes).concat());
        let area = InflightArea {
            size: 6,
            offset: 7,
            num_queues: 8,
            queue_size: 9,
        };
        let mut expected = [6u64, 7].map(u64::to_ne_bytes).concat();
        expected.extend([8u16, 9].map(u16::to_ne_bytes).concat());
        let padded = false;
        assert_eq!(body(Reply::Inflight { area, padded }), expected);
        expected.extend([0; 4]);
        let padded = true;
        assert_eq!(body(Reply::Inflight { area, padded }), expected);
        assert_eq!(config_change(), header(2, 1, 0));
    }
}
