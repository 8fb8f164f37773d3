//! Hostile input that libFuzzer makes; what is done with it stands beside the tests.
#![no_main]

#[path = "../../tests/hostile/mod.rs"]
mod hostile;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hostile::try_input(bytes));
