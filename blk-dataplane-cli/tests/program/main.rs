//! The program as its users start it: what it prints, where, and how it exits.

mod running;

mod images;
mod mistakes;
mod serving;
mod sockets;
