//! The device and the vhost-user server in this process, against a guest and a front-end that may be
//! hostile. Names begin with the row of hostile-inputs.md that a test is for, where it has one.

#[path = "../support/mod.rs"]
mod support;

mod bounce;
mod fairness;
mod framing;
mod image;
mod requests;
mod rings;
