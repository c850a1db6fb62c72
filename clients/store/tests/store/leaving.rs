//! Scopes that leave, very many at once: it costs as much as their rows, and not as much as rows times scopes.

use std::time::{Duration, Instant};

use millstream_client_core::replica::{Batch, Step, Work};
use millstream_schemas::{Scope, TableOp};

use crate::fixture::*;

const SCOPES: usize = 596;
const ROWS: usize = 27_000;
/// A revocation takes effect within this time (G8); leaving the rows is a part of it.
const LIMIT: Duration = Duration::from_secs(5);

fn scopes(of: &str) -> Vec<Scope> {
    (0..SCOPES).map(|n| Scope::new("project", format!("{of} {n}"))).collect()
}

/// The rows of these scopes, as a snapshot brings them.
fn staged(of: &str) -> Vec<Work> {
    let row = |n: usize| task(&format!("task {n}"), &format!("{of} {}", n % SCOPES), "t", false);
    let pages = (0..ROWS).collect::<Vec<_>>();
    let page =
        |page: &[usize]| Work::Stage(vec![changes("tasks", TableOp::Upsert, page.iter().map(|n| row(*n)).collect())]);
    std::iter::once(Work::ClearStage).chain(pages.chunks(1_000).map(page)).collect()
}

#[test]
fn scopes_that_leave_together_cost_as_much_as_their_rows() {
    let mut f = fixture();
    let removed = |of: &str| scopes(of).into_iter().map(Step::ScopeRemoved).collect::<Vec<_>>();
    let apply = |steps: Vec<Step>| Work::Apply(Batch { steps, ..Batch::default() });
    let rows = |f: &Fixture, of: &str| f.read(&format!("SELECT count(*) FROM tasks WHERE project_id LIKE '{of} %'"));

    let snapshot = Step::Snapshot { scopes: scopes("first"), full: true };
    f.store.perform(&[staged("first"), vec![apply(vec![snapshot])]].concat()).unwrap();
    update(&mut f, "task 1", "mine");
    assert_eq!(rows(&f, "first"), ROWS.to_string());

    // The rows move to as many other scopes.
    let start = Instant::now();
    let snapshot = Step::Snapshot { scopes: scopes("second"), full: false };
    let moved = [vec![snapshot], removed("first")].concat();
    f.store.perform(&[staged("second"), vec![apply(moved)]].concat()).unwrap();
    let took = start.elapsed();
    println!("{ROWS} rows moved to {SCOPES} other scopes in {took:.2?}");
    assert_eq!((rows(&f, "first"), rows(&f, "second")), ("0".into(), ROWS.to_string()));
    assert!(took < LIMIT, "{took:?}");

    // And leave with them.
    let start = Instant::now();
    f.store.perform(&[apply(removed("second"))]).unwrap();
    let took = start.elapsed();
    println!("{ROWS} rows of {SCOPES} scopes left in {took:.2?}");
    assert_eq!(f.tasks(), "");
    assert!(took < LIMIT, "{took:?}");
    assert_eq!(f.read("SELECT count(*) FROM millstream_scopes"), "0");
}
