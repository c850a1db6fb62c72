//! Users whose sessions an operator has ended (`millstream sessions end`): their older tokens are not taken any more.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use millstream_runtime::error::chain;
use millstream_runtime::shutdown::Shutdown;
use sqlx::{PgPool, Row};
use tokio::sync::watch;

/// How often it is looked.
const LOOK: Duration = Duration::from_secs(1);

/// For each user, until when tokens were issued that are good no more, in seconds since 1970.
type Ended = HashMap<String, f64>;

/// What is known of them.
#[derive(Default)]
pub struct Evictions(watch::Sender<Arc<Ended>>);

impl Evictions {
    /// Whether a token of this user, issued then, is good no more. One that does not say when counts as old.
    pub fn hold(&self, user_id: &str, issued: Option<f64>) -> bool {
        is_ended(&self.0.borrow(), user_id, issued)
    }

    /// Waits until such a token is good no more.
    pub async fn wait(&self, user_id: &str, issued: Option<f64>) {
        let mut ended = self.0.subscribe();
        if ended.wait_for(|ended| is_ended(ended, user_id, issued)).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Looks until shutdown.
    pub async fn run(self: Arc<Self>, pool: PgPool, shutdown: Shutdown) {
        let mut told = false;
        loop {
            match read(&pool).await {
                Ok(found) => {
                    told = false;
                    self.0.send_if_modified(|ended| {
                        let changed = **ended != found;
                        if changed {
                            *ended = Arc::new(found);
                        }
                        changed
                    });
                }
                // What is known holds on.
                Err(error) if !told => {
                    told = true;
                    tracing::warn!(error = chain(&error), "cannot look whose sessions were ended");
                }
                Err(_) => {}
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = shutdown.requested() => return,
            }
        }
    }
}

fn is_ended(ended: &Ended, user_id: &str, issued: Option<f64>) -> bool {
    ended.get(user_id).is_some_and(|until| issued.is_none_or(|issued| issued <= *until))
}

async fn read(pool: &PgPool) -> Result<Ended, sqlx::Error> {
    let rows =
        sqlx::query("SELECT user_id, extract(epoch FROM ended_at)::float8 AS until FROM millstream.ended_sessions")
            .fetch_all(pool)
            .await?;
    rows.iter().map(|row| Ok((row.try_get("user_id")?, row.try_get("until")?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_tokens_are_good_no_more() {
        let ended = Ended::from([("a".to_owned(), 100.5)]);
        let check = |user, issued| is_ended(&ended, user, issued);
        assert!(check("a", Some(100.0)) && check("a", None));
        assert!(!check("a", Some(101.0)) && !check("b", None) && !check("b", Some(1.0)));
    }
}
