//! A connection of any kind: TCP or a Unix socket, with TLS or without.

use tokio::io::{AsyncRead, AsyncWrite};

/// Any way to the server.
pub trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Socket for S {}
