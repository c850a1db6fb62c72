//! What the executor reads: submissions, and the answers of external validators.

use std::collections::HashMap;

use millstream_changes::for_simulation::{self, Effect, LedgerRow};
use millstream_schemas::stream::{
    ChangesMessage, Failure, MAX_FAILURE_MESSAGE_BYTES, MAX_RULE_BYTES, Submission, ValidateRequest,
};
use millstream_schemas::{Change, Code, Operation};
use uuid::Uuid;

use crate::tables::TABLES;

/// A message with submissions: each gets a verdict with a code, and the same message again takes no effect.
pub fn submission(input: &[u8]) {
    let Ok(message) = serde_json::from_slice::<ChangesMessage>(input) else { return };
    for submission in &message.submissions {
        match for_simulation::validate(&TABLES, submission) {
            Ok(steps) => assert!(steps <= submission.changes.len()),
            Err((index, failure)) => {
                let codes = [
                    Code::InvalidChange,
                    Code::InvalidValue,
                    Code::UnknownTable,
                    Code::UnknownColumn,
                    Code::ColumnNotWritable,
                    Code::PermissionDenied,
                    Code::TooLarge,
                ];
                assert!(codes.contains(&failure.code), "{failure:?}");
                check(submission, index, &failure);
            }
        }
    }
    let mut applied = 0;
    let mut apply = |submission: &Submission| {
        applied += 1;
        match submission.changes.len() % 3 {
            0 => Effect::Applied(vec![(0, true)]),
            1 => Effect::Refused(0, Code::BusinessRule, "no"),
            _ => Effect::Applied(Vec::new()),
        }
    };
    let settled = for_simulation::settle(Vec::new(), &TABLES, &message.submissions, |_, _| false, &mut apply);
    let taken: HashMap<Uuid, u64> = settled.clients.iter().map(|known| (known.client_id, known.last_seq)).collect();
    for entry in &settled.origin {
        assert_eq!(taken.get(&entry.client_id), Some(&entry.client_seq), "{entry:?}");
        for failure in &entry.failed {
            assert!((entry.first_seq..=entry.client_seq).contains(&failure.client_seq));
            assert!(failure.message.len() <= MAX_FAILURE_MESSAGE_BYTES);
        }
    }
    let ledger: Vec<LedgerRow> = settled.clients;
    let again = for_simulation::settle(
        ledger,
        &TABLES,
        &message.submissions,
        |_, _| false,
        |submission| {
            // Behind what was taken, only what could not be taken yet is left.
            let last = taken.get(&submission.client_id).copied().unwrap_or_default();
            assert!(submission.client_seq > last, "{} is applied again, {last} was taken", submission.client_seq);
            Effect::Applied(Vec::new())
        },
    );
    let _ = (applied, again);
}

fn check(submission: &Submission, index: usize, failure: &Failure) {
    let change_id = submission.changes.get(index).map(|change| change.change_id);
    assert_eq!(failure.change_id, change_id.unwrap_or_default());
    assert!(index == 0 || change_id.is_some(), "{index}");
    assert!(failure.message.len() <= MAX_FAILURE_MESSAGE_BYTES, "{failure:?}");
    assert!(failure.rule.as_ref().is_none_or(|rule| !rule.is_empty() && rule.len() <= MAX_RULE_BYTES), "{failure:?}");
    // Postgres' text cannot hold it.
    assert!(!failure.message.contains('\0') && !failure.rule.as_ref().is_some_and(|rule| rule.contains('\0')));
}

/// An answer of an external validator: it is no verdict, or one within its limits about a change that was asked about.
pub fn validator(input: &[u8]) {
    let change = |n: u128, table: &str| Change {
        change_id: Uuid::from_u128(n),
        table: table.into(),
        op: Operation::Delete,
        key: vec![Some(n.to_string())],
        columns: Vec::new(),
        values: Vec::new(),
        adds: Vec::new(),
        gone: false,
        stamp: 1,
    };
    let changes = vec![change(1, "notices"), change(2, "tasks"), change(3, "tasks")];
    let asked = changes[1..].to_vec();
    let submission = Submission {
        client_id: Uuid::nil(),
        user_id: "alice".into(),
        client_seq: 1,
        attempt: 1,
        run_id: Uuid::nil(),
        previous: None,
        after: Vec::new(),
        changes,
        traceparent: None,
    };
    let request = ValidateRequest {
        user_id: "alice".into(),
        client_id: Uuid::nil(),
        client_seq: 1,
        attempt: 1,
        changes: asked,
        traceparent: None,
    };
    match for_simulation::answer(input, &request, &submission) {
        Ok(Some((index, failure))) => {
            assert_eq!((failure.code, index > 0), (Code::BusinessRule, true));
            check(&submission, index, &failure);
        }
        Ok(None) => {}
        Err(why) => {
            // It goes to the log, where no values belong.
            assert!(why.len() < 200, "{why}");
        }
    }
}
