//! Memory that goes away while it is mapped: with the guard, and in child processes without it.

#[path = "../memfile/mod.rs"]
mod memfile;

mod child;
mod full;
mod nested;
mod truncated;
