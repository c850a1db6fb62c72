//! Fuzz targets: whatever bytes come from elsewhere, parsers do not panic, and what they accept holds what they promise.
//!
//! `fuzz/run` runs them guided by coverage (libFuzzer, on stable Rust); `cargo test -p millstream-fuzz` replays the seeds and
//! what was found before. A target is a function of bytes in [`TARGETS`]; its seeds are in `fuzz/seeds/{name}`, and an input
//! that once broke it in `fuzz/crashes/{name}`.

mod changes;
mod client;
mod cut;
mod edge;
mod store;
mod tables;
mod token;
mod wal;

/// Panics if the input breaks what is promised.
pub type Target = fn(&[u8]);

/// The targets by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("client-frame", edge::client_frame),
    ("copy", edge::copy),
    ("fence", edge::fence),
    ("mark", edge::mark),
    ("pgoutput", wal::pgoutput),
    ("server-frame", client::server_frame),
    ("store", store::store),
    ("stream", edge::stream),
    ("submission", changes::submission),
    ("token", token::token),
    ("validator", changes::validator),
    ("value", client::value),
];
