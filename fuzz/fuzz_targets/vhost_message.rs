//! See `README.md`.
#![no_main]

use blk_dataplane_fuzz::vhost_message::{Input, run};

libfuzzer_sys::fuzz_target!(|input: Input| run(input));
