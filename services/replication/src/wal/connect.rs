//! From nothing to a running change stream: connection, TLS, authentication, START_REPLICATION.

use std::io;

use pgwire_replication::PgWireError;
use pgwire_replication::auth::scram::ScramClient;
use pgwire_replication::protocol::framing::{
    MessageReader, write_password_message, write_query, write_ssl_request, write_startup_message,
};
use pgwire_replication::protocol::messages::{auth, parse_auth_request};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpStream, UnixStream};

use super::socket::Socket;
use super::source::Source;
use super::tls::{Answer, Tls};
use crate::error::{Error, ServerError};

/// Version 3.0 of the protocol.
const PROTOCOL: i32 = 196_608;
/// Longest message of the server before the change stream runs, in bytes.
const MAX_START_MESSAGE_BYTES: usize = 64 * 1024;

/// A connection on which the server is in the middle of its change stream.
pub async fn start(source: &Source) -> Result<Box<dyn Socket>, Error> {
    let mut stream = open(source).await?;
    let mut login =
        Login { stream: stream.as_mut(), reader: MessageReader::new().with_max_message_size(MAX_START_MESSAGE_BYTES) };
    login.run(source).await?;
    login.start(source).await?;
    Ok(stream)
}

async fn open(source: &Source) -> Result<Box<dyn Socket>, Error> {
    let failed = |error: io::Error| failed("connect")(error.into());
    let (stream, encrypted): (Box<dyn Socket>, bool) = if source.host.starts_with('/') {
        let path = format!("{}/.s.PGSQL.{}", source.host, source.port);
        secure(UnixStream::connect(path).await.map_err(failed)?, &source.tls, &source.host).await?
    } else {
        let tcp = TcpStream::connect((source.host.as_str(), source.port)).await.map_err(failed)?;
        tcp.set_nodelay(true).map_err(failed)?;
        secure(tcp, &source.tls, &source.host).await?
    };
    millstream_runtime::postgres::tell("change stream", &source.host, encrypted);
    Ok(stream)
}

/// TLS, if it is wanted and the server has it.
async fn secure<S: Socket + 'static>(mut stream: S, tls: &Tls, host: &str) -> Result<(Box<dyn Socket>, bool), Error> {
    if !tls.is_asked_for() {
        return Ok((Box::new(stream), false));
    }
    write_ssl_request(&mut stream).await.map_err(failed("connect"))?;
    // Nothing but this byte: what comes behind it in plain text must not be taken for what comes through TLS.
    let answer = stream.read_u8().await.map_err(|error| failed("connect")(error.into()))?;
    match tls.answer(answer)? {
        Answer::Plain => Ok((Box::new(stream), false)),
        Answer::Handshake => Ok((Box::new(tls.handshake(stream, host).await?), true)),
    }
}

struct Login<'a> {
    stream: &'a mut dyn Socket,
    reader: MessageReader,
}

impl Login<'_> {
    async fn run(&mut self, source: &Source) -> Result<(), Error> {
        let parameters = [
            ("user", source.user.as_str()),
            ("database", source.database.as_str()),
            ("replication", "database"),
            ("client_encoding", "UTF8"),
            ("application_name", "millstream-replication-wal"),
            ("options", source.options.as_str()),
        ];
        write_startup_message(&mut self.stream, PROTOCOL, &parameters).await.map_err(failed("log in"))?;
        loop {
            let (tag, payload) = self.next("log in").await?;
            match tag {
                b'R' => self.authenticate(source, &payload).await?,
                b'Z' => return Ok(()),
                _ => {}
            }
        }
    }

    async fn authenticate(&mut self, source: &Source, request: &[u8]) -> Result<(), Error> {
        let failed = failed("log in");
        let (kind, data) = parse_auth_request(request).map_err(&failed)?;
        match kind {
            auth::OK => Ok(()),
            auth::CLEARTEXT_PASSWORD => {
                let mut password = source.password.clone().into_bytes();
                password.push(0);
                write_password_message(&mut self.stream, &password).await.map_err(failed)
            }
            auth::SASL if data.split(|&byte| byte == 0).any(|name| name == b"SCRAM-SHA-256") => {
                let scram = ScramClient::new(&source.user);
                let mut first = b"SCRAM-SHA-256\0".to_vec();
                first.extend_from_slice(&(scram.client_first.len() as u32).to_be_bytes());
                first.extend_from_slice(scram.client_first.as_bytes());
                write_password_message(&mut self.stream, &first).await.map_err(&failed)?;
                let server_first = self.challenge(auth::SASL_CONTINUE).await?;
                let (last, message, salted) = scram.client_final(&source.password, &server_first).map_err(&failed)?;
                write_password_message(&mut self.stream, last.as_bytes()).await.map_err(&failed)?;
                let server_final = self.challenge(auth::SASL_FINAL).await?;
                ScramClient::verify_server_final(&server_final, &salted, &message).map_err(failed)
            }
            kind => Err(failed(PgWireError::Auth(format!(
                "the server asks for method {kind}; a replication connection knows passwords by scram-sha-256, or in plain text"
            )))),
        }
    }

    async fn challenge(&mut self, expected: i32) -> Result<String, Error> {
        loop {
            let (tag, payload) = self.next("log in").await?;
            if tag != b'R' {
                continue;
            }
            let (kind, data) = parse_auth_request(&payload).map_err(failed("log in"))?;
            if kind != expected {
                return Err(failed("log in")(PgWireError::Auth(format!("unexpected step {kind}"))));
            }
            return Ok(String::from_utf8_lossy(data).into_owned());
        }
    }

    async fn start(&mut self, source: &Source) -> Result<(), Error> {
        let publication = format!("\"{}\"", source.publication.replace('"', "\"\"")).replace('\'', "''");
        let command = format!(
            "START_REPLICATION SLOT {} LOGICAL 0/0 (proto_version '1', publication_names '{publication}', messages 'true')",
            source.slot
        );
        write_query(&mut self.stream, &command).await.map_err(failed("start replication"))?;
        loop {
            // Nothing is read beyond the message, so nothing of the stream is lost with the reader.
            if self.next("start replication").await?.0 == b'W' {
                return Ok(());
            }
        }
    }

    async fn next(&mut self, operation: &'static str) -> Result<(u8, bytes::Bytes), Error> {
        let message = self.reader.read(&mut self.stream).await.map_err(failed(operation))?;
        if message.is_error() {
            return Err(Error::Server { operation, source: ServerError::parse(&message.payload) });
        }
        Ok((message.tag, message.payload))
    }
}

fn failed(operation: &'static str) -> impl Fn(PgWireError) -> Error {
    move |source| Error::Wal { operation, source }
}
