//! Runs libFuzzer on the target that `MILLSTREAM_FUZZ_TARGET` names: one program for all of them, so that one link is enough.
#![no_main]

use std::sync::OnceLock;

use millstream_fuzz::Target;

static TARGET: OnceLock<Target> = OnceLock::new();

fn chosen() -> Target {
    let name = std::env::var("MILLSTREAM_FUZZ_TARGET").unwrap_or_default();
    let found = millstream_fuzz::TARGETS.iter().find(|(known, _)| *known == name);
    found.unwrap_or_else(|| panic!("MILLSTREAM_FUZZ_TARGET={name:?} is no target; see fuzz/run")).1
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    TARGET.get_or_init(chosen)(input);
});
