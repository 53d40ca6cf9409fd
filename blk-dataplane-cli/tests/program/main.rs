//! The program as its users start it: what it prints, where, and how it exits.

// What tests are made of:
mod libblkio;
mod load;
mod running;

// The tests:
mod activation;
mod bench;
mod idle;
mod images;
mod lifecycle;
mod mistakes;
mod serving;
mod several;
mod sockets;
mod third_party;
