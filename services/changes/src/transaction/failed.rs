//! Why a batch was not committed, as the worker has to tell it apart.

use uuid::Uuid;

use crate::decide::results::Results;
use crate::decide::validator::Rejection;
use crate::error::{Fault, classify, is_out_of_time, keeps_connection};
use crate::sql::model::ModelError;

/// Why a batch was not committed. Everything was rolled back, but for [`Failed::Unsure`].
#[derive(Debug)]
pub(crate) enum Failed {
    /// Another owner took a partition over, or a position is not the one in memory.
    Fenced,
    /// Something in the batch cannot be applied, or not together with the rest: the submission with this index, if known.
    Isolate { why: String, at: Option<usize> },
    /// This transaction, alone in its batch, is refused by COMMIT.
    Condemned(Uuid, u64, Rejection),
    /// This transaction met an error that nobody understands.
    Strike(Uuid, u64, sqlx::Error),
    /// The backend went away while it applied the batch.
    Gone(sqlx::Error),
    /// A statement for the batch's changes met a lock, a deadlock or a lack of resources: the server's state, or what one of
    /// the changes does.
    Busy(sqlx::Error),
    /// Postgres cannot serve now.
    Server(sqlx::Error),
    /// The catalog cannot be read now.
    Model(ModelError),
    /// The catalog is old and a refusal depends on it; it will be read again.
    Stale,
    /// The ledger was moved by somebody else.
    Ledger,
    /// Nobody knows whether COMMIT happened. The results hold if it did.
    Unsure(Results, sqlx::Error),
}

impl Failed {
    /// See [`Failed::Isolate`].
    pub fn isolate_at(submission: usize, why: &str) -> Failed {
        Failed::Isolate { why: why.to_owned(), at: Some(submission) }
    }

    /// A fault of the server that a statement for the batch's changes met.
    pub fn at_work(error: sqlx::Error) -> Failed {
        if keeps_connection(&error) { Failed::Busy(error) } else { Failed::Server(error) }
    }

    /// By an error of a statement that ends the batch.
    pub fn of(error: sqlx::Error) -> Failed {
        match classify(&error) {
            _ if is_out_of_time(&error) => Failed::at_work(error),
            Fault::Server => Failed::at_work(error),
            Fault::Gone => Failed::Gone(error),
            Fault::Verdict(refusal) => Failed::Isolate { why: refusal.code.to_string(), at: None },
            Fault::Unknown => Failed::Isolate { why: error.to_string(), at: None },
        }
    }
}
