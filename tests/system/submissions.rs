//! What the edge says of submissions that it does not take: a client that obeys it goes on, and none is left without a word.

use anyhow::{Context, Result, anyhow, ensure};
use millstream_schemas::frame::{ErrorFrame, ServerFrame};
use millstream_tests::board::Board;
use millstream_tests::raw::{Raw, submit};
use serde_json::Value;
use uuid::Uuid;

/// A transaction that is rejected, which settles it as well as any other verdict.
fn transaction(seq: u64) -> Value {
    submit(seq, "nowhere", &["id"], &["x"])
}

async fn refused(raw: &mut Raw) -> Result<ErrorFrame> {
    let error = raw.wait(|frame| if let ServerFrame::Error(error) = frame { Some(error) } else { None });
    error.await.context("no error came")
}

/// The next answer to a submission: the number up to which submissions are accepted, or the code and the number of an error.
async fn answer(raw: &mut Raw) -> Result<(String, Option<u64>)> {
    raw.wait(|frame| match frame {
        ServerFrame::Accepted { seq } => Some(("accepted".into(), Some(seq))),
        ServerFrame::Error(error) => Some((error.code.to_string(), error.seq)),
        _ => None,
    })
    .await
}

/// Waits until everything up to a number is accepted; an error on the way is one.
async fn accepted(raw: &mut Raw, upto: u64) -> Result<()> {
    loop {
        let (word, seq) = answer(raw).await?;
        ensure!(word == "accepted", "{word} {seq:?} instead of {upto} accepted");
        if seq >= Some(upto) {
            return Ok(());
        }
    }
}

async fn confirmed(raw: &mut Raw, upto: u64) -> Result<()> {
    raw.wait(|frame| match frame {
        ServerFrame::Confirmed(confirmed) if confirmed.seq >= upto => Some(Ok(())),
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
            for seq in from..from + 3 {
                raw.frame(transaction(seq)).await?;
            }
            let error = refused(&mut raw).await?;
            ensure!(error.code.as_str() == "gap" && error.seq == Some(2) && !error.fatal, "{error:?}");
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
