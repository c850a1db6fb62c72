//! Rights that end: a token that runs out, a membership that is taken back during a snapshot or a catch-up, with very many others
//! or with all that a user has. Sessions lose them in time, whatever they are busy with.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::future::{join_all, try_join_all};
use millstream_schemas::frame::ServerFrame;
use serde_json::json;
use uuid::Uuid;

use super::peer::{Heard, Held, Peer};
use super::{Allow, RIGHTS, Scene, insert, scaled, submit};

/// Clocks may differ by this much when a token is checked.
const LEEWAY: Duration = Duration::from_secs(30);
/// Life of a token that runs out.
const LIFE: Duration = Duration::from_secs(3);
/// Rows of a large scope, of some 200 bytes each.
const ROWS: u32 = 120_000;
/// How fast a slow client reads, in bytes a second: the large scope takes it half a minute.
const SLOW: u64 = 1_500_000;
/// Members of one project, who all lose it in one transaction.
const MEMBERS: u32 = 20_000;
const ALL_MEMBERS: u32 = 200_000;
/// Those of them with a session.
const CONNECTED: u32 = 20;
/// Scopes of one user, who loses them all.
const SCOPES: u32 = 5_000;

fn seed() -> String {
    format!(
        "INSERT INTO tasks SELECT 'huge-' || n, 'huge', repeat('x', 150) FROM generate_series(1, {ROWS}) AS n;
         INSERT INTO members SELECT 'leaver-' || n, 'huge', 'leaver-' || n FROM generate_series(1, 4) AS n;
         INSERT INTO members VALUES ('slow', 'huge', 'expired-snapshot'), ('writer', 'writers', 'expired-writer'),
             ('reader', 'neighbours', 'expired-reader'), ('other', 'small', 'leaver-2'), ('backlog', 'backlog', 'leaver-3');
         INSERT INTO tasks VALUES ('small', 'small', 'x');"
    )
}

/// Reads no faster than [`SLOW`].
struct Slowly {
    since: Instant,
    bytes: u64,
}

impl Slowly {
    fn from(peer: &Peer) -> Slowly {
        Slowly { since: Instant::now(), bytes: peer.bytes }
    }

    async fn next(&mut self, peer: &mut Peer, limit: Duration) -> Heard {
        let due = self.since + Duration::from_micros((peer.bytes - self.bytes) * 1_000_000 / SLOW);
        tokio::time::sleep_until(due.into()).await;
        peer.next(limit).await
    }
}

/// Sessions with a token that has 3 s left: readers, writers, and one in the middle of a snapshot.
async fn expiry(scene: &Scene) -> Result<()> {
    let mint = |user: &str| millstream_provision::token::mint(scene.board.stack.token_secret(), user, LIFE);
    let start = Instant::now();
    let limit = LIFE + LEEWAY + RIGHTS;
    let until_closed = async |user: &str, slow: bool, writes: bool| -> Result<()> {
        let mut peer = Peer::narrow(&scene.url(), 32_768).await?;
        peer.say(millstream_tests::raw::hello(Uuid::now_v7(), &mint(user)?)).await?;
        peer.welcome().await.with_context(|| user.to_owned())?;
        let (mut pace, mut client_seq, mut last) = (Slowly::from(&peer), 0, None);
        loop {
            let late = start.elapsed();
            ensure!(
                late < limit,
                "{user}: a session is still open {limit:.0?} after its token got {LIFE:?}; writes up to {client_seq}"
            );
            if writes && late > Duration::from_secs(1) * client_seq as u32 {
                client_seq += 1;
                let id = format!("expired-{client_seq}");
                let row = insert("tasks", &[("id", &id), ("project_id", "writers"), ("title", "x")]);
                let _ = peer.say(submit(client_seq, Uuid::nil(), vec![row])).await;
            }
            // A fifth of the pace: it must not be through with its snapshot.
            if slow {
                tokio::time::sleep(Duration::from_millis(400)).await;
            }
            match pace.next(&mut peer, Duration::from_millis(200)).await {
                Heard::Text(text) if text.contains("\"error\"") => {
                    let error: ServerFrame = serde_json::from_str(&text)?;
                    if let ServerFrame::Error(error) = error {
                        last = Some(error.code.to_string());
                    }
                }
                Heard::Closed => break,
                _ => {}
            }
        }
        // Where rows were cut half-way, the reason is in the close frame only.
        let word = last.as_deref().or(peer.reason.as_deref()).unwrap_or("no word");
        ensure!(word == "needs_auth", "{user}: the session ended with {word} after {:.1?}", start.elapsed());
        ensure!(
            start.elapsed() > LIFE - Duration::from_secs(1),
            "{user}: it ended early, after {:.1?}",
            start.elapsed()
        );
        println!("  {user}: needs_auth {:.1?} after its token got {LIFE:?}", start.elapsed());
        Ok(())
    };
    let ends = [
        until_closed("expired-reader", false, false),
        until_closed("expired-writer", false, true),
        until_closed("expired-snapshot", true, false),
    ];
    let wrong: Vec<String> =
        join_all(ends).await.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}

/// Reads slowly; once 3 MB have come, the membership goes. How long rows of the large scope come after that.
async fn revoked_while_reading(scene: &Scene, user: &str, mut peer: Peer, sql: &str, of: &str) -> Result<()> {
    let (mut pace, mut revoked, mut last, mut after) = (Slowly::from(&peer), None, None, 0);
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        ensure!(Instant::now() < end, "{user}: rows come for 60 s; {} KiB by now", peer.bytes >> 10);
        match pace.next(&mut peer, Duration::from_secs(3)).await {
            Heard::Text(text) => {
                if text.contains(of) {
                    last = Some(Instant::now());
                    after += if revoked.is_some() { text.len() as u64 } else { 0 };
                }
            }
            Heard::Silence | Heard::Closed => break,
        }
        if revoked.is_none() && peer.bytes > 3_000_000 {
            scene.sql(sql.to_owned()).await?;
            revoked = Some(Instant::now());
        }
    }
    let (revoked, last) =
        (revoked.context("it was never revoked: the snapshot is too small")?, last.context("no rows")?);
    let late = last.saturating_duration_since(revoked);
    println!("  {user}: rows of a lost scope came for {late:.1?}, {} KiB", after >> 10);
    ensure!(
        late <= RIGHTS,
        "{user}: rows of a lost scope came for {late:.1?} after the revocation, {} KiB",
        after >> 10
    );
    Ok(())
}

async fn revocations(scene: &Scene) -> Result<()> {
    let (url, revoke) = (scene.url(), |user: &str| format!("DELETE FROM members WHERE id = '{user}'"));
    // A new client; one that held another scope before, and so has longer for it; one in catch-up.
    let new = async {
        let mut peer = Peer::narrow(&url, 32_768).await?;
        peer.say(millstream_tests::raw::hello(Uuid::now_v7(), &scene.token("leaver-1"))).await?;
        revoked_while_reading(scene, "a new client", peer, &revoke("leaver-1"), "snapshot_rows").await
    };
    let held_before = async {
        scene.sql("DELETE FROM members WHERE id = 'leaver-2'").await?;
        let held = scene.snapshot("leaver-2").await?;
        let mut peer = Peer::narrow(&url, 32_768).await?;
        peer.say(held.hello(Uuid::now_v7(), &scene.token("leaver-2"))).await?;
        peer.welcome().await?;
        scene.sql("INSERT INTO members VALUES ('leaver-2', 'huge', 'leaver-2')").await?;
        revoked_while_reading(scene, "a client with another scope", peer, &revoke("leaver-2"), "snapshot_rows").await
    };
    let catching_up = async {
        scene.sql(revoke("leaver-3")).await?;
        let held = scene.snapshot("leaver-3").await?;
        for _ in 0..7 {
            let sql = "INSERT INTO docs (id, project_id, note) SELECT gen_random_uuid(), 'backlog', repeat('x', 1000000) FROM generate_series(1, 2)";
            scene.sql(sql).await?;
        }
        scene.healed(Instant::now(), Duration::from_secs(30)).await?;
        let mut peer = Peer::narrow(&url, 32_768).await?;
        peer.say(held.hello(Uuid::now_v7(), &scene.token("leaver-3"))).await?;
        revoked_while_reading(
            scene,
            "a client in catch-up",
            peer,
            "DELETE FROM members WHERE id = 'backlog'",
            "backlog",
        )
        .await
    };
    let (a, b, c) = tokio::join!(new, held_before, catching_up);
    let wrong: Vec<String> = [a, b, c].into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}

/// A live session of a user, with what it holds.
async fn live(scene: &Scene, user: String) -> Result<(Peer, Held)> {
    let mut peer = Peer::connect(&scene.url()).await?;
    let mut held = Held::default();
    peer.say(held.hello(Uuid::now_v7(), &scene.token(&user))).await?;
    while held.position.is_none() {
        let frame = peer.frame(Duration::from_secs(60)).await?.context("closed")?;
        if let Some(error) = held.take(frame) {
            anyhow::bail!("{user}: {}", error.code);
        }
    }
    Ok((peer, held))
}

/// Reads until so many scopes are gone; a session that is ended for it has lost them as well.
async fn loses(mut peer: Peer, mut held: Held, scopes: u64, canary: &str, committed: Instant) -> Result<Duration> {
    while held.removed < scopes {
        ensure!(
            committed.elapsed() < Duration::from_secs(60),
            "{} of {scopes} scopes are lost after 60 s",
            held.removed
        );
        match peer.next(Duration::from_secs(5)).await {
            Heard::Text(text) => {
                ensure!(!text.contains(canary), "a row from behind the revocation was sent");
                held.take(serde_json::from_str(&text)?);
            }
            Heard::Closed => break,
            Heard::Silence => {}
        }
    }
    Ok(committed.elapsed())
}

async fn in_bulk(scene: &Scene) -> Result<()> {
    let members = scaled(MEMBERS, ALL_MEMBERS);
    let step = members / CONNECTED;
    let sessions = try_join_all((1..=CONNECTED).map(|n| live(scene, format!("crowd-{}", n * step)))).await?;
    scene.sql("DELETE FROM members WHERE project_id = 'crowd'").await?;
    let committed = Instant::now();
    scene.sql("INSERT INTO tasks VALUES ('behind-crowd', 'crowd', 'x')").await?;
    let lose = sessions.into_iter().map(|(peer, held)| loses(peer, held, 1, "behind-crowd", committed));
    let worst = try_join_all(lose).await?.into_iter().max().unwrap_or_default();
    println!("  {members} memberships in one transaction: lost after {worst:.1?} at most");
    ensure!(worst <= RIGHTS, "of {members} memberships that ended in one transaction, the last took {worst:.1?}");
    Ok(())
}

async fn all_scopes(scene: &Scene) -> Result<()> {
    let (peer, held) = live(scene, "wide".into()).await?;
    ensure!(held.scopes.len() > SCOPES as usize, "{} scopes", held.scopes.len());
    scene.sql("DELETE FROM members WHERE user_id = 'wide'").await?;
    let committed = Instant::now();
    scene.sql(format!("INSERT INTO tasks VALUES ('behind-wide', 'wide-{SCOPES}', 'x')")).await?;
    let took = loses(peer, held, u64::from(SCOPES), "behind-wide", committed).await?;
    println!("  {SCOPES} scopes of one user: lost after {took:.1?}");
    ensure!(took <= RIGHTS, "a user's {SCOPES} scopes took {took:.1?} to be lost");
    Ok(())
}

/// Tries both, one after the other, and tells of both.
#[tokio::test(flavor = "multi_thread")]
async fn rights_of_very_many_end_in_time() -> Result<()> {
    let members = scaled(MEMBERS, ALL_MEMBERS);
    let seed = format!(
        "INSERT INTO members SELECT 'crowd-' || n, 'crowd', 'crowd-' || n FROM generate_series(1, {members}) AS n;
         INSERT INTO members SELECT 'wide-' || n, 'wide-' || n, 'wide' FROM generate_series(1, {SCOPES}) AS n;"
    );
    let scene = Scene::start(&seed).await?;
    let checked = scene.check("rights of very many", Allow::Pause, async {
        let ends = [in_bulk(&scene).await, all_scopes(&scene).await];
        let wrong: Vec<String> = ends.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
        ensure!(wrong.is_empty(), "{}", wrong.join("; "));
        Ok(())
    });
    let checked = checked.await;
    scene.board.explain(checked)
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_that_end_end_in_time() -> Result<()> {
    let scene = Scene::start(&seed()).await?;
    let checked = scene.check("rights that end", Allow::Pause, async {
        let (expired, revoked) = tokio::join!(expiry(&scene), revocations(&scene));
        let wrong: Vec<String> =
            [expired, revoked].into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
        ensure!(wrong.is_empty(), "{}", wrong.join("; "));
        Ok(())
    });
    let checked = checked.await;
    scene.board.explain(checked)
}

/// A token that is good is no reason to end a session, and neither is another's that is not.
#[tokio::test(flavor = "multi_thread")]
async fn rights_that_last_are_left_alone() -> Result<()> {
    let scene = Scene::start("INSERT INTO members VALUES ('a', 'a', 'stays'), ('b', 'b', 'goes');").await?;
    let result = async {
        let (mut peer, mut held) = live(&scene, "stays".into()).await?;
        scene.sql("DELETE FROM members WHERE id = 'b'; INSERT INTO tasks VALUES ('later', 'a', 'x')").await?;
        let end = Instant::now() + RIGHTS;
        while !held.tasks.contains_key("later") {
            ensure!(Instant::now() < end, "a row does not arrive: {}", json!(held.scopes));
            let frame = peer.frame(RIGHTS).await?.context("closed")?;
            ensure!(held.take(frame).is_none(), "an error");
        }
        ensure!(held.removed == 0, "a scope was lost");
        Ok(())
    };
    let result = result.await;
    scene.board.explain(result)
}
