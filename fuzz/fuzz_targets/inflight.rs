//! See `README.md`.
#![no_main]

use blk_dataplane_fuzz::inflight::{Input, run};

libfuzzer_sys::fuzz_target!(|input: Input| run(input));
