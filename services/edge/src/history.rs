//! What of the stream's past a user may see. A client says where it stands and which scopes it holds there; that is a claim. The
//! stream itself shows whether it can be so: a scope that the user has now, and of which no membership has moved for the user
//! since that position, was the user's all the time. Any other comes as a snapshot.

use std::collections::BTreeSet;

use millstream_schemas::{Lsn, Scope};

use crate::catchup::{CatchUpError, Merge};
use crate::edge::Edge;
use crate::fence::Fence;
use crate::message::Message;
use crate::reach::{Moves, Reach};

/// Moves of memberships, as the stream tells them to the holders of some scopes.
pub struct Past(Vec<(Lsn, u32, Moves)>);

impl Past {
    /// What is told behind `from` to the holders of `scopes`, all that a user has.
    ///
    /// # Errors
    /// The stream cannot be read, does not reach back so far, or holds more than is worth reading.
    pub async fn read(edge: &Edge, reach: &Reach, from: u64, scopes: &BTreeSet<Scope>) -> Result<Past, CatchUpError> {
        let is_told = |message: &Message| message.scope.as_ref().is_some_and(|scope| scopes.contains(scope));
        // Without their rows, which may be large.
        let move_of = |message: &Message| Some((message.lsn(), message.xid, message.moves.clone()?));
        let (recent, oldest) = edge.hub.moves_behind(from, is_told);
        let oldest = oldest.ok_or(CatchUpError::Discarded)?;
        let recent = recent.iter().filter_map(|message| move_of(message));
        let mut found = Vec::new();
        if from + 1 < oldest.stream_seq {
            let telling = scopes.iter().filter(|scope| reach.tells(scope));
            let mut older = Merge::new(&edge.nats, &edge.catch_ups, telling, from + 1, oldest.stream_seq).await?;
            while let Some(message) = older.next().await? {
                found.extend(move_of(&message));
            }
            older.complete().await?;
        }
        found.extend(recent);
        Ok(Past(found))
    }

    /// Whether a scope may have been lost or won, but for what a moment sees.
    pub fn moved(&self, reach: &Reach, scope: &Scope, since: Option<&Fence>) -> bool {
        let later = self.0.iter().filter(|(lsn, xid, _)| since.is_none_or(|since| !since.sees(*xid, *lsn)));
        later.into_iter().any(|(_, _, moves)| reach.concerns(moves, scope))
    }
}
