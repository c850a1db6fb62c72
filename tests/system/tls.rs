//! Connections to Postgres are encrypted as `sslmode` says, the replication connection like the others.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use millstream_provision::keys::Role;
use millstream_stack::Service;
use millstream_tests::board::{Board, PATIENCE};
use uuid::Uuid;

/// An authority of our own, and a certificate of it for 127.0.0.1; made anew for each test.
struct Authority {
    folder: tempfile::TempDir,
}

impl Authority {
    fn new() -> Result<Authority> {
        let folder = tempfile::tempdir()?;
        // Postgres may run as another user.
        std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755))?;
        let authority = Authority { folder };
        let extensions = "basicConstraints=critical,CA:FALSE\nsubjectAltName=IP:127.0.0.1,DNS:localhost\n";
        std::fs::write(authority.path("extensions"), extensions)?;
        // Everything by TCP has to be encrypted.
        std::fs::write(
            authority.path("hba"),
            "hostssl all all 127.0.0.1/32 scram-sha-256\nhostssl replication all 127.0.0.1/32 scram-sha-256\n",
        )?;
        let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
        for name in ["root", "other"] {
            let subject = format!("-subj /CN={name} -addext basicConstraints=critical,CA:TRUE");
            authority.openssl(&format!("req -x509 {key} -days 2 {subject} -keyout {name}.key -out {name}.pem"))?;
        }
        authority.openssl(&format!("req {key} -subj /CN=postgres -keyout server.key -out server.csr"))?;
        authority.openssl(
            "x509 -req -in server.csr -CA root.pem -CAkey root.key -CAcreateserial -days 2 -extfile extensions -out server.pem",
        )?;
        std::fs::set_permissions(authority.path("server.key"), PermissionsExt::from_mode(0o600))?;
        if nix::unistd::geteuid().is_root() {
            // As the stack chooses.
            let user = ["postgres", "nobody"].iter().find_map(|name| nix::unistd::User::from_name(name).ok().flatten());
            let user = user.context("no user for Postgres")?;
            chown(authority.path("server.key"), Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
        }
        Ok(authority)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn openssl(&self, arguments: &str) -> Result<()> {
        let mut command = Command::new("openssl");
        let output = command.args(arguments.split(' ')).current_dir(self.folder.path()).output().context("openssl")?;
        ensure!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// A stack whose Postgres takes nothing but TLS.
    async fn board(&self) -> Result<Board> {
        let file = |name: &str| self.path(name).to_string_lossy().into_owned();
        let board = Board::with(|builder| {
            builder
                .postgres_setting("ssl", "on")
                .postgres_setting("ssl_cert_file", file("server.pem"))
                .postgres_setting("ssl_key_file", file("server.key"))
                .postgres_setting("hba_file", file("hba"))
                .postgres_parameters(format!("sslmode=verify-full&sslrootcert={}", file("root.pem")))
        });
        board.await
    }
}

fn log(board: &Board, service: Service) -> Result<String> {
    Ok(std::fs::read_to_string(board.stack.log_path(service))?)
}

/// Waits until a service's log says something.
async fn says(board: &Board, service: Service, text: &str) -> Result<()> {
    let start = Instant::now();
    while !log(board, service)?.contains(text) {
        ensure!(start.elapsed() < PATIENCE, "{} does not say {text:?}", service.name());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// A row by SQL reaches a client, and one of the client is confirmed.
async fn works(board: &Board, name: &str) -> Result<()> {
    let (mut postgres, project) = (board.postgres().await?, Uuid::now_v7());
    sqlx::query("INSERT INTO projects (id, name) VALUES ($1, 'p')").bind(project).execute(&mut postgres).await?;
    sqlx::query("INSERT INTO members VALUES ($1, 'alice', 'owner')").bind(project).execute(&mut postgres).await?;
    let client = board.client(name, "alice").await?;
    let sql = "INSERT INTO tasks (id, project_id, title) VALUES (?, ?, 'by a client')";
    client.execute(sql, (Uuid::now_v7(), project)).await?;
    client.settled(PATIENCE).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_encrypted_where_postgres_takes_nothing_else() -> Result<()> {
    let authority = Authority::new()?;
    let board = authority.board().await?;
    let outcome = async {
        works(&board, "a").await?;
        for service in Service::OWN {
            let log = log(&board, service)?;
            ensure!(log.contains("connected to Postgres"), "{} does not say how it is connected", service.name());
            ensure!(!log.contains("plain text"), "{} is connected in plain text", service.name());
        }
        says(&board, Service::Replication, "\"postgres.connection\":\"change stream\"").await?;
        let mut postgres = board.postgres().await?;
        let plain = "SELECT count(*) FROM pg_stat_ssl s JOIN pg_stat_activity a USING (pid) WHERE NOT s.ssl AND a.client_addr IS NOT NULL";
        let plain: i64 = sqlx::query_scalar(plain).fetch_one(&mut postgres).await?;
        ensure!(plain == 0, "{plain} connections in plain text");
        let stream = "SELECT s.ssl FROM pg_stat_ssl s JOIN pg_stat_replication r USING (pid)";
        let stream: Vec<bool> = sqlx::query_scalar(stream).fetch_all(&mut postgres).await?;
        ensure!(stream == [true], "the change stream: {stream:?}");
        for service in Service::OWN {
            let log = log(&board, service)?;
            ensure!(!log.contains("postgres://"), "a URL in the log of {}", service.name());
        }
        Ok(())
    }
    .await;
    board.explain(outcome)
}

/// Runs a service with another connection URL, until it says something.
async fn service_says(
    board: &mut Board,
    service: Service,
    parameters: &str,
    environment: &[(&str, &Path)],
    text: &str,
) -> Result<()> {
    board.stack.stop_service(service).await;
    let role = match service {
        Service::Replication => Role::Replication,
        Service::Changes => Role::Changes,
        _ => Role::Edge,
    };
    let log = tempfile::NamedTempFile::new()?;
    let (args, url) = (board.stack.nats_args(role), board.stack.postgres_url_of(role));
    let url = url.split('?').next().context("a URL")?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_services"));
    command
        .arg(service.name())
        .env("DATABASE_URL", format!("{url}?{parameters}"))
        .env("NATS_URL", args.nats_url)
        .env("MILLSTREAM_NATS_SEED_FILE", args.nats_seed_file.context("a seed")?)
        .env("MILLSTREAM_CONFIG", Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/board/millstream.toml"))
        .env("MILLSTREAM_HEALTH_LISTEN", "127.0.0.1:0")
        .env("MILLSTREAM_EDGE_LISTEN", "127.0.0.1:0")
        .env("MILLSTREAM_TOKEN_SECRET", board.stack.token_secret())
        .env("MILLSTREAM_LOG_FORMAT", "json")
        .stderr(log.reopen()?);
    for (name, value) in environment {
        command.env(name, value);
    }
    let mut process = command.spawn()?;
    let start = Instant::now();
    let found = loop {
        let found = std::fs::read_to_string(log.path())?;
        if found.contains(text) || start.elapsed() > PATIENCE {
            break found;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    process.kill()?;
    process.wait()?;
    let name = service.name();
    ensure!(found.contains(text), "{name} with {parameters:?} does not say {text:?}:\n{found}");
    ensure!(!found.contains(url), "{name} repeats the URL");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_trusted_is_refused() -> Result<()> {
    let authority = Authority::new()?;
    let mut board = authority.board().await?;
    let outcome = async {
        let (root, other) = (authority.path("root.pem"), authority.path("other.pem"));
        let unknown = "name the file with the authority's certificate by sslrootcert";
        let with = |mode: &str, root: &Path| format!("sslmode={mode}&sslrootcert={}", root.display());
        let mode = Path::new("verify-full");
        for service in Service::OWN {
            let tls = match service {
                Service::Replication => "leader: replicating",
                _ => "\"postgres.encryption\":\"tls\"",
            };
            service_says(&mut board, service, "sslmode=verify-full", &[], unknown).await?;
            service_says(&mut board, service, &with("verify-full", &other), &[], unknown).await?;
            service_says(&mut board, service, &with("verify-ca", &other), &[], unknown).await?;
            service_says(&mut board, service, &with("verify-ca", &root), &[], tls).await?;
            // By the environment.
            service_says(&mut board, service, "", &[("PGSSLMODE", mode), ("PGSSLROOTCERT", root.as_path())], tls)
                .await?;
            service_says(&mut board, service, "", &[("PGSSLMODE", mode)], unknown).await?;
            // Encrypted, and not verified.
            service_says(&mut board, service, "sslmode=require", &[], tls).await?;
            service_says(&mut board, service, "sslmode=prefer", &[], tls).await?;
            service_says(&mut board, service, "", &[], tls).await?;
        }
        Ok(())
    }
    .await;
    board.explain(outcome)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_tls_is_refused_where_it_is_required() -> Result<()> {
    let mut board = Board::start().await?;
    let outcome = async {
        for service in Service::OWN {
            for mode in ["require", "verify-ca", "verify-full"] {
                let text = "the server has no TLS, and sslmode requires it";
                service_says(&mut board, service, &format!("sslmode={mode}"), &[], text).await?;
            }
            // Otherwise it is in plain text, and says so.
            for mode in ["disable", "allow", "prefer"] {
                let plain = "\"postgres.encryption\":\"plain text\"";
                service_says(&mut board, service, &format!("sslmode={mode}"), &[], plain).await?;
            }
        }
        Ok(())
    }
    .await;
    board.explain(outcome)
}
