//! Why sessions end, and what their clients are told.

use std::time::Duration;

use millstream_runtime::error::chain;
use millstream_schemas::Code;
use millstream_schemas::frame::ErrorFrame;

use crate::catchup::CatchUpError;

/// When to try again after a fault of ours, in milliseconds.
pub const RETRY_MS: u64 = 500;

/// Why a session ended.
pub enum End {
    /// The client went away.
    Gone,
    /// We refuse to go on; the client is told.
    Fatal(ErrorFrame),
}

impl End {
    pub fn fatal(code: Code, message: impl Into<String>) -> End {
        End::Fatal(ErrorFrame { code, message: message.into(), client_seq: None, retry_after_ms: None, fatal: true })
    }

    pub fn retry(code: Code, message: impl Into<String>) -> End {
        let frame =
            ErrorFrame { code, message: message.into(), client_seq: None, retry_after_ms: Some(RETRY_MS), fatal: true };
        End::Fatal(frame)
    }

    pub fn overloaded(wait: Duration, message: &str) -> End {
        End::Fatal(ErrorFrame {
            code: Code::Overloaded,
            message: message.into(),
            client_seq: None,
            retry_after_ms: Some(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)),
            fatal: true,
        })
    }

    pub fn schema_changed() -> End {
        End::retry(Code::SchemaChanged, "the synced tables have changed; connect again for the new schema")
    }

    pub fn shutting_down() -> End {
        End::retry(Code::ShuttingDown, "this edge is shutting down; connect again")
    }

    /// The client drops its position when it is told so, and gets a snapshot.
    pub fn too_far(error: CatchUpError) -> End {
        match error {
            CatchUpError::TooMany | CatchUpError::Discarded => {
                End::retry(Code::EpochChanged, "too far behind; a snapshot is cheaper")
            }
            error => End::unavailable(&error),
        }
    }

    /// A part that we need failed: the log has the cause, the client the advice.
    pub fn unavailable(error: &dyn std::error::Error) -> End {
        tracing::warn!(error = chain(error), "a session cannot go on");
        End::retry(Code::Unavailable, "a part of the server does not answer; nothing is lost, try again")
    }
}
