//! Asks a service whether it is ready: one plain HTTP request.

use std::io::{self, Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::Duration;

use millstream_provision::exit::{Exit, HasExit};

/// Longest time for connecting, and for each read and write.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Most bytes of an answer that are read.
const MAX_ANSWER_BYTES: u64 = 64 * 1024;

/// The service is not ready.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a URL that we ask.
    #[error("{0:?} is no http:// URL with a host")]
    Url(String),
    /// No answer.
    #[error("no answer from {url}")]
    Io {
        /// Who was asked.
        url: String,
        /// Why.
        source: io::Error,
    },
    /// The answer is not 200.
    #[error("{url} answers {status}: {body}")]
    Status {
        /// Who was asked.
        url: String,
        /// The status line without the version.
        status: String,
        /// What came with it.
        body: String,
    },
}

impl HasExit for Error {
    fn exit(&self) -> Exit {
        Exit::Dependency
    }
}

/// The body of a 200 answer. Blocks for at most a few seconds.
pub fn get(url: &str) -> Result<String, Error> {
    let (authority, path) = split(url).ok_or_else(|| Error::Url(url.into()))?;
    let answer = ask(authority, path).map_err(|source| Error::Io { url: url.into(), source })?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.lines().next().and_then(|line| line.split_once(' ')).map_or("", |(_, status)| status);
    if status.split(' ').next() == Some("200") {
        return Ok(body.to_owned());
    }
    let body = body.trim().replace('\n', ", ");
    Err(Error::Status { url: url.into(), status: status.into(), body })
}

/// Host with port, and path.
fn split(url: &str) -> Option<(&str, &str)> {
    let rest = url.strip_prefix("http://")?;
    let (authority, path) = match rest.find('/') {
        Some(at) => rest.split_at(at),
        None => (rest, "/readyz"),
    };
    (!authority.is_empty()).then_some((authority, if path == "/" { "/readyz" } else { path }))
}

fn ask(authority: &str, path: &str) -> io::Result<String> {
    let with_port = if authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) {
        authority.to_owned()
    } else {
        format!("{authority}:80")
    };
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in with_port.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, TIMEOUT) {
            Ok(mut stream) => {
                stream.set_read_timeout(Some(TIMEOUT))?;
                stream.set_write_timeout(Some(TIMEOUT))?;
                stream.write_all(
                    format!("GET {path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n").as_bytes(),
                )?;
                let mut answer = Vec::new();
                stream.take(MAX_ANSWER_BYTES).read_to_end(&mut answer)?;
                return Ok(String::from_utf8_lossy(&answer).into_owned());
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn urls() {
        let check = |url: &str, expected| assert_eq!(split(url), expected, "{url}");
        check("http://127.0.0.1:4800", Some(("127.0.0.1:4800", "/readyz")));
        check("http://127.0.0.1:4800/", Some(("127.0.0.1:4800", "/readyz")));
        check("http://edge/livez", Some(("edge", "/livez")));
        check("https://edge/livez", None);
        check("http:///livez", None);
    }

    #[test]
    fn only_200_is_ready() {
        let check = |answer: &'static str, ready: bool| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap());
            let server = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 1024];
                let read = stream.read(&mut request).unwrap();
                assert!(request[..read].starts_with(b"GET /readyz HTTP/1.1\r\n"));
                stream.write_all(answer.as_bytes()).unwrap();
            });
            assert_eq!(get(&url).is_ok(), ready, "{answer}");
            server.join().unwrap();
        };
        check("HTTP/1.1 200 OK\r\n\r\nok", true);
        check("HTTP/1.1 503 Service Unavailable\r\n\r\nnats: not ready", false);
        check("", false);
    }
}
