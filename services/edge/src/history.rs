//! What of the stream's past a user may see. A client says where it stands and which scopes it holds there; that is a claim. The
//! stream itself shows whether it can be so: a scope that the user has now, and of which no membership has moved for the user
//! since that position, was the user's all the time. Any other comes as a snapshot.

use std::collections::BTreeSet;
use std::sync::Arc;

use millstream_schemas::Scope;

use crate::Edge;
use crate::catchup::{CatchUpError, Merge};
use crate::message::Message;
use crate::reach::Reach;

/// The messages behind `from` that tell the holders of `scopes`, all that a user has, of moved memberships.
///
/// # Errors
/// The stream cannot be read, does not reach back so far, or holds more than is worth reading.
pub async fn moves(
    edge: &Edge,
    reach: &Reach,
    from: u64,
    scopes: &BTreeSet<Scope>,
) -> Result<Vec<Arc<Message>>, CatchUpError> {
    let (recent, oldest) = edge.hub.moves_behind(from);
    let oldest = oldest.ok_or(CatchUpError::Discarded)?;
    let mut found = Vec::new();
    if from + 1 < oldest.seq {
        let telling = scopes.iter().filter(|scope| reach.tells(scope));
        let mut older = Merge::new(&edge.nats, &edge.catch_ups, telling, from + 1, oldest.seq).await?;
        while let Some(message) = older.next().await? {
            if message.moves.is_some() {
                found.push(message);
            }
        }
        older.complete().await?;
    }
    let told = |message: &Arc<Message>| message.scope.as_ref().is_some_and(|scope| scopes.contains(scope));
    found.extend(recent.into_iter().filter(told));
    Ok(found)
}
