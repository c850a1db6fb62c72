//! A task list for the terminal that works offline, against `cargo dev`:
//! `MILLSTREAM_TOKEN=… cargo run -p millstream-client --example terminal`.
//!
//! Each line is a command: `add TITLE`, `done NUMBER`, `offline`, `online` or `quit`. Stop `cargo dev` and go on.

use std::io::BufRead as _;

use anyhow::Context as _;
use futures_util::StreamExt;
use millstream_client::{Client, State, Status, Uuid};
use tokio::sync::mpsc;

#[derive(serde::Deserialize)]
struct Task {
    id: Uuid,
    title: String,
    done: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let token = std::env::var("MILLSTREAM_TOKEN").context("MILLSTREAM_TOKEN holds no token")?;
    let client = Client::builder("terminal.db").edge("ws://127.0.0.1:4800").token(token).open().await?;
    client.ready().await?;
    let projects: Vec<Uuid> = client.query_as("SELECT id FROM projects ORDER BY id LIMIT 1", ()).await?;
    let project = *projects.first().context("the user is a member of no project")?;

    let of_project = client.table::<Task>("tasks").filter("project_id = ? ORDER BY done, title", [project]);
    let mut lists = of_project.watch();
    let mut status = client.status();
    let mut lines = read_lines();
    let (mut tasks, mut told) = (Vec::new(), None);
    loop {
        tokio::select! {
            list = lists.next() => {
                tasks = list.context("the client was closed")??;
                show(&tasks);
            }
            changed = status.changed() => {
                changed?;
                let now = summary(&status.borrow_and_update());
                if told.as_ref() != Some(&now) {
                    println!("-- {now}");
                    told = Some(now);
                }
            }
            line = lines.recv() => match line.as_deref() {
                None | Some("quit") => break,
                Some(line) => run(&client, project, &tasks, line).await?,
            }
        }
    }
    client.close().await?;
    Ok(())
}

/// Lines of the terminal. A thread reads them, since such a read cannot be given up.
fn read_lines() -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if sender.blocking_send(line.trim().to_owned()).is_err() {
                return;
            }
        }
    });
    lines
}

fn show(tasks: &[Task]) {
    for (number, task) in (1..).zip(tasks) {
        println!("{number:>3} [{}] {}", if task.done { "x" } else { " " }, task.title);
    }
}

fn summary(status: &Status) -> String {
    let connection = if status.state == State::Connected { "online" } else { "offline" };
    format!("{connection}, {} to send, {} failed", status.pending.count, status.failed)
}

/// A write is done when it is on the disk: none of these waits for the network.
async fn run(client: &Client, project: Uuid, tasks: &[Task], line: &str) -> millstream_client::Result<()> {
    match line.split_once(' ').unwrap_or((line, "")) {
        ("add", title) => {
            let sql = "INSERT INTO tasks (id, project_id, title) VALUES (millstream_uuid(), ?, ?)";
            client.execute(sql, (project, title)).await?;
        }
        ("done", number) => {
            let place = number.parse::<usize>().ok().and_then(|number| number.checked_sub(1));
            match place.and_then(|place| tasks.get(place)) {
                Some(task) => {
                    client.execute("UPDATE tasks SET done = NOT done WHERE id = ?", [task.id]).await?;
                }
                None => println!("there is no task {number}"),
            }
        }
        ("offline", "") => client.pause(),
        ("online", "") => client.resume(),
        _ => println!("add TITLE, done NUMBER, offline, online, quit"),
    }
    Ok(())
}
