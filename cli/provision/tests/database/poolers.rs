//! Connection poolers: one that drops the settings with which a session begins is refused, since values would be written in
//! another form than the change stream has them.

use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use millstream_provision::setup;
use millstream_runtime::postgres;

use crate::database;

/// Asks for TLS, in place of a version.
const TLS: u32 = 80_877_103;

/// Passes connections on to a server, without `options`, as PgBouncer does with `ignore_startup_parameters`. Returns its port.
fn pooler(server: String) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("it works");
    let port = listener.local_addr().expect("it works").port();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let server = server.clone();
            std::thread::spawn(move || pass_on(client?, &server));
        }
    });
    port
}

/// The parameters with which a session begins: version, names and values.
fn startup(client: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    client.read_exact(&mut length)?;
    let mut body = vec![0; u32::from_be_bytes(length) as usize - 4];
    client.read_exact(&mut body)?;
    Ok(body)
}

fn pass_on(mut client: TcpStream, server: &str) -> io::Result<()> {
    let mut body = startup(&mut client)?;
    if body[..4] == TLS.to_be_bytes() {
        client.write_all(b"N")?;
        body = startup(&mut client)?;
    }
    let mut kept = body[..4].to_vec();
    let texts: Vec<&[u8]> = body[4..].split(|byte| *byte == 0).collect();
    for pair in texts.chunks_exact(2).filter(|pair| !pair[0].is_empty() && pair[0] != b"options") {
        kept.extend([pair[0], b"\0", pair[1], b"\0"].concat());
    }
    kept.push(0);
    let mut upstream = TcpStream::connect(server)?;
    upstream.write_all(&(kept.len() as u32 + 4).to_be_bytes())?;
    upstream.write_all(&kept)?;
    let (mut answers, mut asked) = (upstream.try_clone()?, client.try_clone()?);
    std::thread::spawn(move || io::copy(&mut answers, &mut asked));
    io::copy(&mut client, &mut upstream)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_drops_settings_is_refused() {
    let config = "[tables.notes]\nscope = { kind = \"global\" }\n";
    let (stack, connection) = database("CREATE TABLE notes (id int PRIMARY KEY)", config).await;
    drop(connection);
    let direct = stack.postgres_url();
    let (rest, path) = direct.rsplit_once('/').expect("it works");
    let (user, server) = rest.rsplit_once('@').expect("it works");
    let args = |server: &str| postgres::Args { database_url: format!("{user}@{server}/{path}") };
    let through = args(&format!("127.0.0.1:{}", pooler(server.to_owned())));

    // What `check`, `attach` and `setup` say.
    setup::connect(&args(server), Duration::ZERO).await.expect("Postgres itself");
    let error = setup::connect(&through, Duration::ZERO).await.expect_err("through the pooler");
    let text = std::error::Error::source(&error).expect("it works").to_string();
    for part in ["IntervalStyle", "pooler", "ignore_startup_parameters", "DATABASE_URL"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // What services connect by.
    let pool = postgres::pool(&args(server), "test", 1).expect("it works");
    assert!(pool.acquire().await.is_ok());
    let pool = postgres::pool(&through, "test", 1).expect("it works");
    assert!(pool.acquire().await.is_err());
}
