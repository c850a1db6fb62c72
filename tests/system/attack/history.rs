//! What was before a membership, or between two, is nobody's to read: neither by a position from elsewhere nor by an honest
//! client that was away, whatever made the user a member, ended that and made them one again.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use millstream_schemas::Scope;
use rand::SeedableRng;
use rand::rngs::StdRng;
use uuid::Uuid;

use super::generator::{Batch, Claim, Tale, Visit, some};
use super::peer::{Held, Peer};
use super::{Scene, commit};

/// How a user becomes a member of a project, stops being one, and becomes one again: `{u}`, `{p}`, `{q}` and `{o}` stand for
/// the user, the project, another project of theirs and an organisation.
const WAYS: [(&str, &str, &str, &str); 12] = [
    (
        "a row",
        "INSERT INTO members VALUES ('{u}', '{p}', '{u}')",
        "DELETE FROM members WHERE id = '{u}'",
        "INSERT INTO members VALUES ('{u}', '{p}', '{u}')",
    ),
    (
        "another row",
        "INSERT INTO members VALUES ('{u}', '{p}', '{u}')",
        "DELETE FROM members WHERE id = '{u}'",
        "INSERT INTO members VALUES ('{u}2', '{p}', '{u}', 'owner')",
    ),
    (
        "a role",
        "INSERT INTO members VALUES ('{u}', '{p}', '{u}')",
        "UPDATE members SET role = 'muted' WHERE id = '{u}'",
        "UPDATE members SET role = 'owner' WHERE id = '{u}'",
    ),
    (
        "a row that moves to another project and back",
        "INSERT INTO members VALUES ('{u}', '{p}', '{u}')",
        "UPDATE members SET project_id = '{q}' WHERE id = '{u}'",
        "UPDATE members SET project_id = '{p}' WHERE id = '{u}'",
    ),
    (
        "a row that goes to another user and back",
        "INSERT INTO members VALUES ('{u}', '{p}', '{u}')",
        "UPDATE members SET user_id = 'nobody' WHERE id = '{u}'",
        "UPDATE members SET user_id = '{u}' WHERE id = '{u}'",
    ),
    (
        "an organisation",
        "INSERT INTO staff VALUES ('{o}', '{u}', 'engineer'); UPDATE projects SET organisation_id = '{o}' WHERE id = '{p}'",
        "DELETE FROM staff WHERE user_id = '{u}'",
        "INSERT INTO staff VALUES ('{o}', '{u}', 'boss')",
    ),
    (
        "a role in an organisation",
        "INSERT INTO staff VALUES ('{o}', '{u}', 'engineer'); UPDATE projects SET organisation_id = '{o}' WHERE id = '{p}'",
        "UPDATE staff SET role = 'trainee' WHERE user_id = '{u}'",
        "UPDATE staff SET role = 'engineer' WHERE user_id = '{u}'",
    ),
    (
        "a project that leaves its organisation and comes back",
        "INSERT INTO staff VALUES ('{o}', '{u}', 'engineer'); UPDATE projects SET organisation_id = '{o}' WHERE id = '{p}'",
        "UPDATE projects SET organisation_id = NULL WHERE id = '{p}'",
        "UPDATE projects SET organisation_id = '{o}' WHERE id = '{p}'",
    ),
    (
        "a project that is deleted and made again",
        "INSERT INTO staff VALUES ('{o}', '{u}', 'engineer'); UPDATE projects SET organisation_id = '{o}' WHERE id = '{p}'",
        "DELETE FROM projects WHERE id = '{p}'",
        "INSERT INTO projects VALUES ('{p}', '{o}', 'again')",
    ),
    (
        "one way, and then another",
        "INSERT INTO members VALUES ('{u}', '{p}', '{u}')",
        "DELETE FROM members WHERE id = '{u}'",
        "INSERT INTO staff VALUES ('{o}', '{u}', 'engineer'); UPDATE projects SET organisation_id = '{o}' WHERE id = '{p}'",
    ),
    (
        "several ways at once",
        "INSERT INTO members VALUES ('{u}', '{p}', '{u}', 'reader'), ('{u}2', '{p}', '{u}', 'owner'); INSERT INTO staff VALUES ('{o}', '{u}', 'boss');
         UPDATE projects SET organisation_id = '{o}' WHERE id = '{p}'",
        "DELETE FROM members WHERE user_id = '{u}'; DELETE FROM staff WHERE user_id = '{u}'",
        "INSERT INTO members VALUES ('{u}2', '{p}', '{u}', 'owner'); INSERT INTO staff VALUES ('{o}', '{u}', 'boss')",
    ),
    (
        "several ways, one by one",
        "INSERT INTO members VALUES ('{u}', '{p}', '{u}'), ('{u}2', '{p}', '{u}')",
        "DELETE FROM members WHERE id = '{u}'; UPDATE members SET role = 'muted' WHERE id = '{u}2'",
        "UPDATE members SET role = 'reader' WHERE id = '{u}2'",
    ),
];

/// Who comes by, and with which claim.
#[derive(Clone, Copy, Debug)]
enum Comer {
    /// Never there before; a position from before the membership, and all scopes.
    Stranger,
    /// The same by the token of a snapshot.
    StrangersToken,
    /// There while a member, away while not.
    Honest,
    /// There while a member; between, and back as it was.
    Restored,
    /// Connected all the time.
    Live,
}

fn tales() -> Vec<Tale> {
    let mut all = Vec::new();
    for (way, (name, grant, revoke, again)) in WAYS.into_iter().enumerate() {
        for comer in [Comer::Stranger, Comer::StrangersToken, Comer::Honest, Comer::Restored, Comer::Live] {
            let n = format!("{way}-{comer:?}").to_lowercase();
            let (u, p, q, o) = (format!("user-{n}"), format!("p-{n}"), format!("q-{n}"), format!("o-{n}"));
            let fill = |sql: &str| sql.replace("{u}", &u).replace("{p}", &p).replace("{q}", &q).replace("{o}", &o);
            let task = |task: &str, project: &str, title: &str| {
                format!("INSERT INTO tasks VALUES ('key-{n}-{task}', '{project}', 'text-{n}-{title}')")
            };
            let title = |task: &str, title: &str| {
                format!("UPDATE tasks SET title = 'text-{n}-{title}' WHERE id = 'key-{n}-{task}'")
            };
            let steps = vec![
                // 0: all there is, and a project of the user's own.
                format!(
                    "INSERT INTO projects VALUES ('{p}', NULL, 'p'), ('{q}', NULL, 'q'); INSERT INTO members VALUES ('{u}q', '{q}', '{u}');
                     {}; {}; {}",
                    task("own", &q, "own"),
                    task("kept", &p, "first"),
                    task("moved", &p, "to be moved")
                ),
                // 1 to 3: before.
                title("kept", "overwritten-before"),
                format!("{}; {}", title("kept", "overwritten-again"), task("before", &p, "deleted-before")),
                format!(
                    "DELETE FROM tasks WHERE id = 'key-{n}-before';
                     UPDATE tasks SET project_id = 'third-{n}', title = 'text-{n}-moved-before' WHERE id = 'key-{n}-moved'; {}",
                    title("kept", "clean")
                ),
                // 4, 5: a member.
                fill(grant),
                title("kept", "while-a-member"),
                // 6 to 9: no member.
                fill(revoke),
                format!("{}; {}", title("kept", "overwritten-between"), task("between", &p, "deleted-between")),
                format!("UPDATE tasks SET project_id = 'third-{n}' WHERE id = 'key-{n}-between'; {}", task("gone", &p, "gone-between")),
                format!("DELETE FROM tasks WHERE id IN ('key-{n}-between', 'key-{n}-gone'); {}", title("kept", "clean-again")),
                // 10, 11: again.
                fill(again),
                title("kept", "while-a-member-again"),
            ];
            let visit = |after, claim| Visit { after, claim, stays: matches!(comer, Comer::Live) };
            let visits = match comer {
                Comer::Stranger => vec![
                    visit(4, Claim::Forged(0)),
                    visit(5, Claim::Forged(2)),
                    visit(10, Claim::Forged(5)),
                    visit(11, Claim::Forged(0)),
                ],
                Comer::StrangersToken => {
                    vec![
                        visit(4, Claim::Token(0)),
                        visit(5, Claim::Token(2)),
                        visit(10, Claim::Token(5)),
                        visit(11, Claim::Token(0)),
                    ]
                }
                Comer::Honest => vec![visit(1, Claim::Honest), visit(5, Claim::Honest), visit(11, Claim::Honest)],
                Comer::Restored => vec![
                    visit(0, Claim::Honest),
                    visit(5, Claim::Honest),
                    visit(7, Claim::Honest),
                    visit(8, Claim::Restored(1)),
                    visit(10, Claim::Restored(1)),
                    visit(11, Claim::Restored(0)),
                ],
                Comer::Live => vec![
                    visit(0, Claim::Honest),
                    visit(5, Claim::Honest),
                    visit(8, Claim::Honest),
                    visit(11, Claim::Honest),
                ],
            };
            let scopes = [
                Scope::global(),
                Scope::user(u.as_str()),
                Scope::new("project", p.as_str()),
                Scope::new("project", q.as_str()),
                Scope::new("organisation", o.as_str()),
            ];
            all.push(Tale { name: format!("{name}, {comer:?}"), user: u, scopes: scopes.into(), steps, visits });
        }
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn history_from_outside_a_membership_is_never_sent() -> Result<()> {
    let mut scene = Scene::start("").await?;
    let result = async {
        let mut batch = Batch::new(&scene, "scripted", tales()).await?;
        batch.tell(&scene).await?;
        let in_the_ring = batch.judge().await?;
        scene.board.kill_and_restart(millstream_stack::Service::Edge).await?;
        batch.again(&scene, &mut StdRng::seed_from_u64(1)).await?;
        let wrong = batch.judge().await?;
        println!("{} tales are wrong, {} of them while the ring reached back", wrong.len(), in_the_ring.len());
        ensure!(wrong.is_empty(), "{} of {} tales are wrong:\n{}", wrong.len(), tales().len(), some(&wrong));
        Ok(())
    };
    let result = result.await;
    scene.board.explain(result)
}

/// A socket that is full, so that its session stands still, while the user is revoked and made a member again.
#[tokio::test(flavor = "multi_thread")]
async fn history_is_not_sent_to_a_session_that_lags() -> Result<()> {
    let seed = "INSERT INTO projects VALUES ('secret', NULL, 's'), ('loud', NULL, 'l');
        INSERT INTO members VALUES ('lag-1', 'secret', 'laggard'), ('lag-2', 'loud', 'laggard');
        INSERT INTO tasks VALUES ('key-kept', 'secret', 'text-first');";
    let scene = Scene::start(seed).await?;
    let result = async {
        let mut peer = Peer::narrow(&scene.url(), 4_096).await?;
        let mut held = Held::default();
        peer.say(held.hello(Uuid::now_v7(), &scene.token("laggard"))).await?;
        while held.position.is_none() {
            held.take(peer.frame(Duration::from_secs(10)).await?.context("closed")?);
        }
        let mut postgres = scene.board.postgres().await?;
        let loud = |project: &str, rows: u32| {
            format!(
                "INSERT INTO docs (id, project_id, note) SELECT gen_random_uuid(), '{project}', repeat('x', 1000000) FROM generate_series(1, {rows})"
            )
        };
        // Fills its socket; then what it must not hear; then more than the ring holds.
        for _ in 0..4 {
            commit(&mut postgres, loud("loud", 3)).await?;
        }
        for sql in [
            "DELETE FROM members WHERE id = 'lag-1'",
            "INSERT INTO tasks VALUES ('key-between', 'secret', 'text-between'); UPDATE tasks SET title = 'text-overwritten' WHERE id = 'key-kept'",
            "DELETE FROM tasks WHERE id = 'key-between'; UPDATE tasks SET title = 'text-clean' WHERE id = 'key-kept'",
            "INSERT INTO members VALUES ('lag-1', 'secret', 'laggard')",
        ] {
            commit(&mut postgres, sql.to_owned()).await?;
        }
        for _ in 0..20 {
            commit(&mut postgres, loud("elsewhere", 3)).await?;
        }
        commit(&mut postgres, "INSERT INTO marks VALUES ('laggard', 'end')".to_owned()).await?;
        scene.healed(std::time::Instant::now(), Duration::from_secs(20)).await?;
        let start = std::time::Instant::now();
        while held.mark != "end" || held.in_bracket() {
            ensure!(start.elapsed() < Duration::from_secs(30), "it does not catch up");
            let error = match peer.frame(Duration::from_secs(20)).await? {
                Some(frame) => held.take(frame).filter(|error| error.fatal).is_some(),
                None => true,
            };
            if error {
                let canaries = std::mem::take(&mut peer.canaries);
                peer = Peer::connect(&scene.url()).await?;
                peer.canaries = canaries;
                peer.say(held.hello(Uuid::now_v7(), &scene.token("laggard"))).await?;
            }
        }
        let secret: Vec<&str> = ["key-between", "text-between", "text-overwritten"]
            .into_iter()
            .filter(|word| peer.canaries.contains(*word))
            .collect();
        ensure!(secret.is_empty(), "a session that lagged was sent {secret:?}");
        let kept = held.tasks.get("key-kept").map(|(_, title)| title.as_str());
        ensure!(kept == Some("text-clean"), "it holds {kept:?}");
        Ok(())
    };
    let result = result.await;
    scene.board.explain(result)
}
