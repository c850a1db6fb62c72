//! The shape of the workspace: who may depend on whom.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

/// Our crates and which of ours they use. Services meet in the contract and never depend on each other; the client's
/// core knows neither sockets nor files.
const ALLOWED: &[(&str, &str, &[&str])] = &[
    ("schemas", "millstream-schemas", &[]),
    ("services/runtime", "millstream-runtime", &["millstream-schemas"]),
    ("services/catalog", "millstream-catalog", &["millstream-schemas"]),
    ("services/edge", "millstream-edge", &["millstream-catalog", "millstream-runtime", "millstream-schemas"]),
    ("services/changes", "millstream-changes", &["millstream-catalog", "millstream-runtime", "millstream-schemas"]),
    (
        "services/replication",
        "millstream-replication",
        &["millstream-catalog", "millstream-runtime", "millstream-schemas"],
    ),
    ("clients/core", "millstream-client-core", &["millstream-schemas"]),
    ("clients/store", "millstream-client-store", &["millstream-client-core", "millstream-schemas"]),
    ("clients/rust", "millstream-client", &["millstream-client-core", "millstream-client-store", "millstream-schemas"]),
    ("cli/provision", "millstream-provision", &["millstream-catalog", "millstream-runtime", "millstream-schemas"]),
    ("cli/stack", "millstream-stack", &["millstream-catalog", "millstream-provision", "millstream-runtime"]),
    (
        "cli/bench",
        "millstream-bench",
        &[
            "millstream-changes",
            "millstream-client",
            "millstream-provision",
            "millstream-runtime",
            "millstream-schemas",
            "millstream-stack",
        ],
    ),
    (
        "cli/millstream",
        "millstream",
        &[
            "millstream-bench",
            "millstream-catalog",
            "millstream-changes",
            "millstream-client",
            "millstream-edge",
            "millstream-provision",
            "millstream-replication",
            "millstream-runtime",
            "millstream-schemas",
            "millstream-stack",
        ],
    ),
];

/// What the client's core and store must never need.
const NOT_IN_THE_CORE: [&str; 4] = ["tokio", "async-nats", "sqlx", "tokio-tungstenite"];

#[test]
fn crates_depend_only_on_what_is_below_them() -> Result<()> {
    for (folder, name, allowed) in ALLOWED {
        let path = format!("{}/../{folder}/Cargo.toml", env!("CARGO_MANIFEST_DIR"));
        let manifest: toml::Table = std::fs::read_to_string(&path).context(path)?.parse()?;
        ensure!(manifest["package"]["name"].as_str() == Some(name), "{folder}");
        let dependencies: BTreeMap<String, toml::Value> = manifest["dependencies"].clone().try_into()?;
        let ours: Vec<&str> =
            dependencies.keys().filter(|name| name.starts_with("millstream")).map(String::as_str).collect();
        ensure!(ours == *allowed, "{name} depends on {ours:?}, not {allowed:?}");
        if folder.starts_with("clients/core") || folder.starts_with("clients/store") {
            for banned in NOT_IN_THE_CORE {
                ensure!(!dependencies.contains_key(banned), "{name} depends on {banned}");
            }
        }
    }
    Ok(())
}

#[test]
fn the_readme_shows_the_example_that_is_compiled() -> Result<()> {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let readme = std::fs::read_to_string(format!("{root}/README.md"))?;
    let example = std::fs::read_to_string(format!("{root}/clients/rust/examples/hello.rs"))?;
    // Without what only a file of its own needs.
    let program = &example[example.find("use ").context("no program")?..];
    ensure!(readme.contains(program.trim()), "README.md and clients/rust/examples/hello.rs differ");
    Ok(())
}
