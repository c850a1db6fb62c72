//! The program as its users meet it, against a stack whose services are the same program.

mod command_line;
mod history;
mod usage;

use anyhow::Result;
use millstream_tests::board::Board;

/// The program, built by cargo together with these tests.
const PROGRAM: &str = env!("CARGO_BIN_EXE_millstream");

/// A stack with the board example.
async fn board() -> Result<Board> {
    Board::with(|builder| builder.executable(PROGRAM)).await
}
