//! End to end: the program serves a disk, a stock Linux kernel in QEMU uses it, and both sides are asked
//! what they have seen.
//!
//! The guest is a Debian cloud kernel with an initramfs that `ci/guest-assets.sh` makes; what that and the
//! tests need is installed by `ci/install-test-deps.sh`, or named where it may not. `GUEST_ACCEL=kvm`
//! chooses KVM in place of QEMU's own translator.

// What tests are made of:
mod backend;
mod cpio;
mod deadline;
mod lab;
mod machine;
mod monitor;
mod pattern;

// The tests:
mod attaching;
mod blocks;
mod contents;
mod features;
mod file_system;
mod fio;
mod killed;
mod migration;
mod releasing;
mod resizing;
mod stable_storage;
mod trouble;
