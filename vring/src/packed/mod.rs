//! Packed rings (virtio 1.3 §2.8).

// Until the device side is here.
#![expect(dead_code, reason = "only the driver side uses it so far")]

pub(crate) mod descriptor;
pub(crate) mod event;
pub(crate) mod layout;
pub(crate) mod rings;
