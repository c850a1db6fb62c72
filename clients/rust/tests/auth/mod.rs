//! Tokens that run out, and what brings others.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use millstream_client::{BoxError, Client, Code, State};

use crate::edge::{Edge, TOKEN};
use crate::{PATIENCE, assert_equal, builder, directory, insert, ready, until};

/// What the app gives when it is asked for a token, and how often it was.
#[derive(Clone)]
struct Provider {
    token: Arc<Mutex<Result<String, &'static str>>>,
    asked: Arc<AtomicUsize>,
}

impl Provider {
    fn new() -> Provider {
        Provider { token: Arc::new(Mutex::new(Ok(TOKEN.to_owned()))), asked: Arc::default() }
    }

    fn give(&self, token: Result<&str, &'static str>) {
        *self.token.lock().unwrap() = token.map(str::to_owned);
    }

    async fn ask(self) -> Result<String, BoxError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        Ok(self.token.lock().unwrap().clone()?)
    }

    async fn client(&self, edge: &Edge, directory: &tempfile::TempDir) -> Client {
        let provider = self.clone();
        let path = directory.path().join("a");
        ready(Client::builder(path).edge(&edge.url).token_fn(move || provider.clone().ask())).await
    }
}

/// Waits long enough for a reconnect loop to show, and gives the number of connections by then.
async fn connections(edge: &Edge) -> usize {
    tokio::time::sleep(Duration::from_secs(2)).await;
    edge.state().tokens.len()
}

#[tokio::test]
async fn a_session_goes_on_with_a_fresh_token() {
    for code in [Code::NeedsAuth, Code::TokenExpired, Code::BadToken] {
        let (edge, directory, provider) = (Edge::start().await, directory(), Provider::new());
        let client = provider.client(&edge, &directory).await;
        provider.give(Ok("second"));
        (edge.state().token, edge.state().end_with) = (Some("second"), Some(code));
        let mut states = client.status();
        let again = states.wait_for(|status| status.reconnects == 1 && status.state == State::Connected);
        tokio::time::timeout(PATIENCE, again).await.unwrap().unwrap();
        insert(&client, "1", "x").await.confirmed().await.unwrap();
        assert_eq!(edge.state().tokens, [TOKEN, "second"], "{code}");
        assert_eq!(provider.asked.load(Ordering::Relaxed), 2, "{code}: once for each");
        assert_equal(&client, &edge).await;
    }
}

#[tokio::test]
async fn a_token_that_cannot_be_renewed_waits_for_another_and_the_queue_goes_on() {
    let (edge, directory) = (Edge::start().await, directory());
    let client = ready(builder(&directory, "a", &edge)).await;
    (edge.state().token, edge.state().end_with) = (Some("second"), Some(Code::NeedsAuth));
    until(&client, State::NeedsAuth).await;
    assert_eq!(client.status().borrow().last_error.as_ref().unwrap().code, "needs_auth");
    assert!(client.status().borrow().retry_at.is_some());
    let write = insert(&client, "1", "x").await;
    assert_eq!(client.status().borrow().pending.count, 1);
    assert_eq!(connections(&edge).await, 1, "the same token is not tried in a loop");
    client.set_token("second");
    tokio::time::timeout(PATIENCE, write.confirmed()).await.unwrap().unwrap();
    assert_equal(&client, &edge).await;

    // One that is set while the session goes on is there when it ends.
    client.set_token("third");
    (edge.state().token, edge.state().end_with) = (Some("third"), Some(Code::NeedsAuth));
    let mut states = client.status();
    let again = states.wait_for(|status| status.reconnects == 2 && status.state == State::Connected);
    tokio::time::timeout(PATIENCE, again).await.unwrap().unwrap();
    assert_eq!(edge.state().tokens, [TOKEN, "second", "third"]);
}

#[tokio::test]
async fn an_app_that_has_no_fresh_token_is_asked_with_back_off() {
    for given in [Ok(TOKEN), Err("nobody is logged in")] {
        let (edge, directory, provider) = (Edge::start().await, directory(), Provider::new());
        let client = provider.client(&edge, &directory).await;
        provider.give(given);
        (edge.state().token, edge.state().end_with) = (Some("second"), Some(Code::TokenExpired));
        until(&client, State::NeedsAuth).await;
        let connections = connections(&edge).await;
        assert!(connections <= 2, "{given:?}: {connections} connections");
        let asked = provider.asked.load(Ordering::Relaxed);
        assert!((2..10).contains(&asked), "{given:?}: asked {asked} times");
        let status = client.status().borrow().clone();
        assert_eq!(status.state, State::NeedsAuth);
        if let Err(message) = given {
            let told = status.last_error.unwrap().message;
            assert!(told.contains(message), "{told}");
        }
        let write = insert(&client, "1", "x").await;
        provider.give(Ok("second"));
        client.connect_now();
        tokio::time::timeout(PATIENCE, write.confirmed()).await.unwrap().unwrap();
    }
}

/// Each time the app gives another token, and the edge takes none of them, or takes it and ends the session at once.
#[tokio::test]
async fn fresh_tokens_that_are_refused_are_not_tried_in_a_loop() {
    let (edge, directory) = (Edge::start().await, directory());
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let client = Client::builder(directory.path().join("a"))
        .edge(&edge.url)
        .token_fn(move || {
            let n = count.fetch_add(1, Ordering::Relaxed);
            async move { Ok(format!("wrong {n}")) }
        })
        .open()
        .await
        .unwrap();
    until(&client, State::NeedsAuth).await;
    assert_eq!(connections(&edge).await, 2, "the first, and the one that the app was asked for");
    client.set_token(TOKEN);
    tokio::time::timeout(PATIENCE, client.ready()).await.unwrap().unwrap();
}

/// A token for the beginning, and where others come from.
#[tokio::test]
async fn a_first_token_is_used_until_it_is_refused() {
    let (edge, directory, provider) = (Edge::start().await, directory(), Provider::new());
    provider.give(Ok("second"));
    let asks = provider.clone();
    let client = ready(builder(&directory, "a", &edge).token_fn(move || asks.clone().ask())).await;
    assert_eq!(provider.asked.load(Ordering::Relaxed), 0);
    (edge.state().token, edge.state().end_with) = (Some("second"), Some(Code::NeedsAuth));
    insert(&client, "1", "x").await.confirmed().await.unwrap();
    let mut states = client.status();
    let again = states.wait_for(|status| status.reconnects == 1 && status.state == State::Connected);
    tokio::time::timeout(PATIENCE, again).await.unwrap().unwrap();
    client.drop_connection();
    let again = states.wait_for(|status| status.reconnects == 2 && status.state == State::Connected);
    tokio::time::timeout(PATIENCE, again).await.unwrap().unwrap();
    assert_eq!(edge.state().tokens, [TOKEN, "second", "second"]);
}
