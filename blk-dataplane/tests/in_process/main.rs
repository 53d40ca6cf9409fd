//! The device and the vhost-user server in this process, against a guest and a front-end that may be
//! hostile. Names begin with the row of hostile-inputs.md that a test is for, where it has one.

#[path = "../support/mod.rs"]
mod support;

mod bounce;
mod config;
#[cfg(feature = "vhost-user")]
mod config_change;
mod control;
mod counters;
#[cfg(feature = "vhost-user")]
mod descriptors;
mod engines;
mod fairness;
mod framing;
#[cfg(feature = "vhost-user")]
mod front_end;
mod hostile_chains;
mod image;
#[cfg(feature = "vhost-user")]
mod listening;
mod load;
#[cfg(feature = "vhost-user")]
mod lost_memory;
mod model;
mod packed;
mod ranges;
mod requests;
mod rings;
#[cfg(feature = "vhost-user")]
mod several;
mod storm;
mod threads;
