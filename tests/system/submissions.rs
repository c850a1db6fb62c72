//! What the edge says of submissions that it does not take: a client that obeys it goes on, and none is left without a word.

use anyhow::{Context, Result, anyhow, ensure};
use millstream_schemas::frame::{ErrorFrame, MAX_FRAME_BYTES, MAX_TRANSACTION_CHANGES, ServerFrame};
use millstream_tests::board::Board;
use millstream_tests::raw::{Raw, hello, submit};
use serde_json::Value;
use uuid::Uuid;

/// A transaction that is rejected, which settles it as well as any other verdict.
fn transaction(client_seq: u64) -> Value {
    submit(client_seq, "nowhere", &["id"], &["x"])
}

async fn refused(raw: &mut Raw) -> Result<ErrorFrame> {
    let error = raw.wait(|frame| if let ServerFrame::Error(error) = frame { Some(error) } else { None });
    error.await.context("no error came")
}

/// The next answer to a submission: the number up to which submissions are accepted, or the code and the number of an error.
async fn answer(raw: &mut Raw) -> Result<(String, Option<u64>)> {
    raw.wait(|frame| match frame {
        ServerFrame::Accepted { client_seq } => Some(("accepted".into(), Some(client_seq))),
        ServerFrame::Error(error) => Some((error.code.to_string(), error.client_seq)),
        _ => None,
    })
    .await
}

/// Waits until everything up to a number is accepted; an error on the way is one.
async fn accepted(raw: &mut Raw, upto: u64) -> Result<()> {
    loop {
        let (word, client_seq) = answer(raw).await?;
        ensure!(word == "accepted", "{word} {client_seq:?} instead of {upto} accepted");
        if client_seq >= Some(upto) {
            return Ok(());
        }
    }
}

async fn confirmed(raw: &mut Raw, upto: u64) -> Result<()> {
    raw.wait(|frame| match frame {
        ServerFrame::Confirmed(confirmed) if confirmed.client_seq >= upto => Some(Ok(())),
        ServerFrame::Error(error) => Some(Err(anyhow!("{error:?} instead of {upto} confirmed"))),
        _ => None,
    })
    .await?
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_is_told_whenever_a_client_starts_behind_it() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let mut raw = Raw::connect(&board.stack.edge_url()).await?;
        raw.hello(Uuid::now_v7(), &board.stack.token("alice")).await?;
        raw.frame(transaction(1)).await?;
        accepted(&mut raw, 1).await?;
        // Once for those that follow each other, and again for a client that has not understood.
        for from in [3, 3, 4, 9] {
            for client_seq in from..from + 3 {
                raw.frame(transaction(client_seq)).await?;
            }
            let error = refused(&mut raw).await?;
            ensure!(error.code.as_str() == "gap" && error.client_seq == Some(2) && !error.fatal, "{error:?}");
        }
        raw.frame(transaction(2)).await?;
        accepted(&mut raw, 2).await?;
        // Told for each gap, also where it begins behind the last number that was passed over.
        raw.frame(transaction(12)).await?;
        ensure!(answer(&mut raw).await? == ("gap".into(), Some(3)));
        raw.frame(transaction(3)).await?;
        accepted(&mut raw, 3).await?;
        confirmed(&mut raw, 3).await
    };
    board.explain(result.await)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_number_of_a_refused_submission_is_free_for_the_next() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let mut raw = Raw::connect(&board.stack.edge_url()).await?;
        raw.hello(Uuid::now_v7(), &board.stack.token("alice")).await?;
        let refusals = |client_seq| {
            let large = submit(client_seq, "projects", &["id", "name"], &["x", &"x".repeat(MAX_FRAME_BYTES)]);
            // Within the limit, but not with its user on the broker.
            let mut close = submit(client_seq, "projects", &["id", "name"], &["x", ""]);
            let room = MAX_FRAME_BYTES - close.to_string().len();
            close["changes"][0]["values"][1] = "x".repeat(room).into();
            let mut many = transaction(client_seq);
            many["changes"] = vec![many["changes"][0].clone(); MAX_TRANSACTION_CHANGES + 1].into();
            let mut bad = transaction(client_seq);
            bad["surprise"] = 1.into();
            let mut unnumbered = transaction(client_seq);
            unnumbered["attempt"] = 0.into();
            [
                (large, "too_large"),
                (close, "too_large"),
                (many, "too_large"),
                (bad, "bad_frame"),
                (unnumbered, "bad_frame"),
            ]
        };
        let mut client_seq = 1;
        for kind in 0..5 {
            let (refusal, code) = refusals(client_seq)[kind].clone();
            // Those behind it were under way: they are told of once.
            for frame in [refusal, transaction(client_seq + 1), transaction(client_seq + 2)] {
                raw.frame(frame).await?;
            }
            let error = refused(&mut raw).await?;
            ensure!(error.code.as_str() == code && error.client_seq == Some(client_seq) && !error.fatal, "{error:?}");
            ensure!(answer(&mut raw).await? == ("gap".into(), Some(client_seq)));
            for _ in 0..2 {
                raw.frame(transaction(client_seq)).await?;
                accepted(&mut raw, client_seq).await?;
                client_seq += 1;
            }
        }
        confirmed(&mut raw, client_seq - 1).await
    };
    board.explain(result.await)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_the_ledger_would_skip_is_refused() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let (url, token, id) = (board.stack.edge_url(), board.stack.token("alice"), Uuid::now_v7());
        let (first, second) = (Uuid::new_v4(), Uuid::new_v4());
        let by = |client_seq, run_id: Uuid, previous: Option<Uuid>| {
            let mut frame = transaction(client_seq);
            frame["run_id"] = run_id.to_string().into();
            if let Some(previous) = previous {
                frame["previous"] = previous.to_string().into();
            }
            frame
        };
        let mut raw = Raw::connect(&url).await?;
        raw.hello(id, &token).await?;
        raw.frame(by(1, first, None)).await?;
        confirmed(&mut raw, 1).await?;
        // In the session that knows the transaction before, and in one that read of it.
        for again in [false, true] {
            for previous in [None, Some(second), Some(Uuid::nil())] {
                if again {
                    raw = Raw::connect(&url).await?;
                    raw.hello(id, &token).await?;
                }
                raw.frame(by(2, second, previous)).await?;
                let error = refused(&mut raw).await?;
                ensure!(
                    error.code.as_str() == "wrong_previous" && error.client_seq == Some(2) && error.fatal,
                    "{error:?}"
                );
                ensure!(error.message.contains(&first.to_string()), "{}", error.message);
                ensure!(raw.next_text().await?.is_none(), "the session went on");
                if !again {
                    raw = Raw::connect(&url).await?;
                    raw.hello(id, &token).await?;
                    raw.frame(by(1, first, None)).await?;
                    accepted(&mut raw, 1).await?;
                }
            }
        }
        // As `welcome.runs` says; then each of the same run, one sent again, and the run after it.
        let mut raw = Raw::connect(&url).await?;
        raw.frame(hello(id, &token)).await?;
        let spans = raw.wait(|frame| match frame {
            ServerFrame::Welcome(welcome) => Some(welcome.runs),
            _ => None,
        });
        ensure!(spans.await?.last().is_some_and(|span| span.run_id == first));
        for frame in [
            by(2, second, Some(first)),
            by(3, second, None),
            by(3, second, None),
            by(4, second, Some(Uuid::nil())),
            by(5, first, Some(second)),
        ] {
            let client_seq = frame["client_seq"].as_u64().context("a number")?;
            raw.frame(frame).await?;
            accepted(&mut raw, client_seq).await?;
        }
        confirmed(&mut raw, 5).await?;
        // By another session of the same client, meanwhile.
        let mut other = Raw::connect(&url).await?;
        other.hello(id, &token).await?;
        other.frame(by(6, second, Some(first))).await?;
        confirmed(&mut raw, 6).await?;
        raw.frame(by(7, first, None)).await?;
        ensure!(answer(&mut raw).await? == ("wrong_previous".into(), Some(7)));
        Ok(())
    };
    board.explain(result.await)
}
