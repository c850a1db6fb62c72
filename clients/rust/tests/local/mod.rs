// A client on a store of its own, without an edge. The runnable examples of the documentation include this file.

use millstream_client::Client;

const SCHEMA: &str = r#"{
    "version": "1",
    "tables": [{
        "name": "tasks",
        "columns": [
            {"name": "id", "type": "uuid", "nullable": false, "writable": true},
            {"name": "title", "type": "text", "nullable": false, "writable": true},
            {"name": "done", "type": "boolean", "nullable": false, "writable": true, "default": "false"}
        ],
        "key": [0],
        "scopes": [{"kind": "global"}]
    }]
}"#;

/// Runs an example with a client that has an empty table `tasks`.
pub fn run(example: impl AsyncFnOnce(Client) -> Result<(), Box<dyn std::error::Error>>) {
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let schema = serde_json::from_str(SCHEMA).unwrap();
        let client = Client::builder(directory.path().join("app.db")).schema(schema).open().await.unwrap();
        example(client.clone()).await.unwrap();
        client.close().await.unwrap();
    });
}
