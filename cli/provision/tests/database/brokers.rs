//! NATS as a cluster: a list of servers of which some are away, and streams that keep their copies at every deployment.

use std::error::Error as _;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use millstream_provision::setup;
use millstream_runtime::nats::{self, StreamArgs};
use millstream_schemas::subject::{CHANGES_STREAM, RESULTS_STREAM, WAL_STREAM};
use millstream_stack::binaries;

/// How long a cluster may take to elect leaders.
const PATIENCE: Duration = Duration::from_secs(30);

/// Servers of one cluster; killed when it is dropped.
struct Cluster {
    servers: Vec<Child>,
    ports: Vec<u16>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for server in &mut self.servers {
            let _gone = server.kill().and_then(|()| server.wait());
        }
    }
}

fn free_ports(count: usize) -> Vec<u16> {
    let listeners: Vec<TcpListener> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").expect("it works")).collect();
    listeners.iter().map(|listener| listener.local_addr().expect("it works").port()).collect()
}

impl Cluster {
    fn start(dir: &Path, size: usize) -> Cluster {
        let program = binaries::nats_server(&mut |line| eprintln!("{line}")).expect("nats-server is there");
        let (ports, routes) = (free_ports(size), free_ports(size));
        let all: Vec<String> = routes.iter().map(|port| format!("nats-route://127.0.0.1:{port}")).collect();
        let start = |number: usize| {
            let conf = dir.join(format!("{number}.conf"));
            let text = format!(
                "server_name: n{number}\nlisten: 127.0.0.1:{}\nmax_payload: 8MB\njetstream {{ store_dir: \"{}\", max_file_store: 20GB, max_memory_store: 256MB }}\n\
                 cluster {{ name: test, listen: 127.0.0.1:{}, routes: [{}] }}\n",
                ports[number],
                dir.join(number.to_string()).display(),
                routes[number],
                all.join(", ")
            );
            std::fs::write(&conf, text).expect("it works");
            Command::new(&program).arg("-c").arg(conf).stderr(Stdio::null()).spawn().expect("it works")
        };
        Cluster { servers: (0..size).map(start).collect(), ports }
    }

    /// All servers as one list, with spaces as people write them.
    fn args(&self) -> nats::Args {
        let urls: Vec<String> = self.ports.iter().map(|port| format!("nats://127.0.0.1:{port}")).collect();
        nats::Args { nats_url: urls.join(", "), nats_seed_file: None }
    }

    async fn declare(&self, streams: StreamArgs) -> Result<(), setup::Error> {
        setup::streams(&self.args(), &streams, PATIENCE).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_with_too_little_room_is_told_of_with_the_settings() {
    let dir = tempfile::tempdir().expect("it works");
    let (program, ports) =
        (binaries::nats_server(&mut |line| eprintln!("{line}")).expect("it is there"), free_ports(1));
    let jetstream = format!(
        "jetstream {{ store_dir: \"{}\", max_file_store: 2GB, max_memory_store: 256MB }}",
        dir.path().display()
    );
    let conf = dir.path().join("nats.conf");
    std::fs::write(&conf, format!("listen: 127.0.0.1:{}\nmax_payload: 8MB\n{jetstream}\n", ports[0]))
        .expect("it works");
    let server = Command::new(&program).arg("-c").arg(conf).stderr(Stdio::null()).spawn().expect("it works");
    let broker = Cluster { servers: vec![server], ports };
    let refused = broker.declare(StreamArgs::default()).await.expect_err("the stream of 4 GiB does not fit");
    let said = format!("{:?}", refused.source().map(ToString::to_string));
    for part in ["MS_WAL may take 4294967296 bytes", "max_file_store", "MILLSTREAM_WAL_MAX_BYTES"] {
        assert!(said.contains(part), "{said}");
    }
    let less = StreamArgs { wal_max_bytes: Some(256 << 20), ..StreamArgs::default() };
    broker.declare(less).await.expect("it fits");
}

/// The copies of the three streams.
async fn copies(args: &nats::Args) -> [usize; 3] {
    let nats = nats::connect(args, "test").await.expect("a server answers");
    let mut copies = [0; 3];
    for (copies, name) in copies.iter_mut().zip([CHANGES_STREAM, WAL_STREAM, RESULTS_STREAM]) {
        *copies =
            nats::stream(&nats.jetstream, name).await.expect("the stream is there").cached_info().config.num_replicas;
    }
    copies
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_is_reached_while_a_server_is_away_and_keeps_its_copies() {
    let dir = tempfile::tempdir().expect("it works");
    let mut cluster = Cluster::start(dir.path(), 3);
    let three = StreamArgs { replicas: Some(3), wal_max_hours: Some(5), ..StreamArgs::default() };
    let deadline = Instant::now() + PATIENCE;
    // Until the cluster has a leader for its streams, it refuses to make any.
    while let Err(error) = cluster.declare(three).await {
        assert!(Instant::now() < deadline, "{error:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(copies(&cluster.args()).await, [3, 3, 3]);
    cluster.declare(StreamArgs::default()).await.expect("a second deployment");
    assert_eq!(copies(&cluster.args()).await, [3, 3, 3], "a deployment without --replicas");

    // New connections find the first server of the list down; connections that exist move to another server.
    let connected = nats::connect(&cluster.args(), "test").await.expect("a server answers");
    cluster.servers[0].kill().and_then(|()| cluster.servers[0].wait()).expect("it works");
    for _ in 0..3 {
        let found = tokio::time::timeout(PATIENCE, nats::connect(&cluster.args(), "test")).await;
        found.expect("it connects").expect("a server answers");
    }
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = nats::stream(&connected.jetstream, WAL_STREAM).await {
        assert!(Instant::now() < deadline, "{error:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
