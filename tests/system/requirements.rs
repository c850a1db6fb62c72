//! The table of requirements names tests that exist.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Result, ensure};

const ITEMS: &str = "1 2 3 4 5 6 7a 7b 7c 7d 8a 8b 8c 9a 9b 9c 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 \
                     36 37 38 55 58 59 61";

/// Names of the functions marked as tests in the Rust files below a folder.
fn tests(folder: &Path, found: &mut BTreeSet<String>) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() && path.file_name().is_none_or(|name| name != "target") {
            tests(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path)?;
            for block in text.split("#[test]").chain(text.split("#[tokio::test")).skip(1) {
                if let Some((_, rest)) = block.split_once("fn ") {
                    found.extend(rest.split_once('(').map(|(name, _)| name.to_owned()));
                }
            }
        }
    }
    Ok(())
}

#[test]
fn each_requirement_has_its_tests() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut known = BTreeSet::new();
    for folder in ["schemas", "services", "clients", "cli", "tests"] {
        tests(&root.join("..").join(folder), &mut known)?;
    }
    let table = std::fs::read_to_string(root.join("REQUIREMENTS.md"))?;
    let mut items = Vec::new();
    for line in table.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| #")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        items.push(cells[1]);
        let named: Vec<&str> = cells[3].split('`').skip(1).step_by(2).collect();
        ensure!(!named.is_empty(), "item {} names no test", cells[1]);
        for name in named {
            ensure!(known.contains(name), "item {}: there is no test `{name}`", cells[1]);
        }
    }
    ensure!(items == ITEMS.split_whitespace().collect::<Vec<_>>(), "the table's items are {items:?}");
    Ok(())
}
