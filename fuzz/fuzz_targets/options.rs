//! Any string: reading it does not panic, and what was read stays the same when it is written and
//! read again.

#![no_main]

use guest_memory_shm::RamOptions;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(options) = text.parse::<RamOptions>() {
        let written = options.to_string();
        let again = written.parse::<RamOptions>();
        assert_eq!(again.ok().as_ref(), Some(&options), "{written}");
    }
});
