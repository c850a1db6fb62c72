//! The program as its users meet it: help, exit codes, what goes to which stream.

use std::process::{Command, Output};

/// Runs `millstream`, with nothing of the caller's settings.
fn millstream(args: &[&str]) -> Output {
    let mut command = Command::new(crate::PROGRAM);
    command.args(args).env("NO_COLOR", "1").env_remove("DATABASE_URL");
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("MILLSTREAM_") {
            command.env_remove(name);
        }
    }
    command.output().expect("millstream runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn help_begins_with_examples() {
    for args in [
        vec!["--help"],
        vec!["dev", "--help"],
        vec!["client", "--help"],
        vec!["history", "--help"],
        vec!["bench", "--help"],
        vec!["attach", "--help"],
        vec!["check", "--help"],
    ] {
        let output = millstream(&args);
        assert!(output.status.success(), "{args:?}");
        assert!(text(&output.stdout).starts_with("Examples:"), "{args:?}: {:.200}", text(&output.stdout));
    }
}

#[test]
fn every_flag_of_a_service_has_an_environment_variable() {
    for service in ["edge", "changes", "replication"] {
        let help = text(&millstream(&[service, "--help"]).stdout);
        let mut flags = 0;
        for part in help.split("\n  ").filter(|part| part.trim_start().starts_with("--")) {
            if !part.contains("--help") && !part.contains("--version") {
                flags += 1;
                assert!(part.contains("[env:") || help.contains("[env:"), "{service}: {part}");
            }
        }
        assert!(flags > 3, "{service}: {help}");
        assert!(!help.contains("postgres://postgres:"), "{service} shows a secret");
    }
}

#[test]
fn exit_codes_are_those_of_the_help() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("a.db");
    let store = store.to_str().unwrap();
    // Usage.
    let output = millstream(&["nonsense"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty() && !output.stderr.is_empty());
    // Configuration: nobody says who the user is.
    let output = millstream(&["client", "--store", store, "sql", "SELECT 1"]);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    // Configuration: neither DATABASE_URL nor dev mode's data.
    let board = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/board/millstream.toml");
    let missing = folder.path().join("missing");
    for command in [&["history", "list"][..], &["check", "--config", board], &["attach", "--config", board]] {
        let data = ["--data", missing.to_str().unwrap()];
        let output = millstream(&[&command[..1], &data, &command[1..]].concat());
        assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains("cargo dev"), "{}", text(&output.stderr));
    }
    // Dependency down: no Postgres.
    let nowhere = "postgres://u:p@127.0.0.1:9/app";
    let output = millstream(&["history", "--database-url", nowhere, "list"]);
    assert_eq!(output.status.code(), Some(4), "{}", text(&output.stderr));
    // Dependency down: a new store cannot get its tables.
    let output = millstream(&[
        "client",
        "--store",
        store,
        "--edge",
        "ws://127.0.0.1:9",
        "--token-file",
        "/dev/null",
        "sql",
        "SELECT 1",
    ]);
    assert!(matches!(output.status.code(), Some(3 | 4)), "{}", text(&output.stderr));
    // Options may follow the subcommand.
    let output = millstream(&["client", "--store", store, "status", "-o", "json"]);
    assert_ne!(output.status.code(), Some(2), "{}", text(&output.stderr));
    // Neither the file nor the database is there.
    let nowhere = "postgres://nobody@127.0.0.1:9/nothing";
    for command in ["check", "attach"] {
        let output = millstream(&[command, "--config", "/nonexistent.toml", "--database-url", nowhere]);
        assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
        let output = millstream(&[command, "--config", board, "--database-url", nowhere]);
        assert_eq!(output.status.code(), Some(4), "{}", text(&output.stderr));
        assert!(output.stdout.is_empty());
    }
    // A service whose configuration is not there.
    for service in ["changes", "replication"] {
        let output = millstream(&[service, "--config", "/nonexistent.toml", "--database-url", nowhere]);
        assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    }
    let output = millstream(&["healthcheck", "http://127.0.0.1:9/readyz"]);
    assert_eq!(output.status.code(), Some(4), "{}", text(&output.stderr));
    assert!(output.stdout.is_empty());
}
