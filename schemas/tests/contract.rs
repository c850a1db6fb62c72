//! The contract holds together: Rust types, JSON Schemas, example vectors and the protocol version.
//!
//! `MILLSTREAM_UPDATE=1 cargo test -p millstream-schemas` writes the JSON Schemas anew.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use millstream_schemas::frame::{ClientFrame, ScopesDigest, ServerFrame};
use millstream_schemas::stream::{
    ChangesMessage, OriginRecord, ResultsMessage, ValidateRequest, ValidateResponse, WalPayload, Watermark,
};
use millstream_schemas::{Code, PROTOCOL_VERSION, Scope};
use schemars::{JsonSchema, schema_for};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Hash of the JSON Schemas for each protocol version. A change of the schemas is a change of the protocol: raise
/// [`PROTOCOL_VERSION`] and add a line, or, before the first release, replace the last one.
const HASHES: &[(u32, &str)] = &[(1, "a8e10f35763ff863")];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The documents of the contract: name, schema, and a check that a text survives its Rust type.
struct Document {
    name: &'static str,
    schema: Value,
    round_trip: fn(&str) -> Result<Value, serde_json::Error>,
}

fn document<T: JsonSchema + DeserializeOwned + Serialize>(name: &'static str) -> Document {
    Document {
        name,
        schema: schema_for!(T).to_value(),
        round_trip: |text| serde_json::to_value(serde_json::from_str::<T>(text)?),
    }
}

fn documents() -> Vec<Document> {
    vec![
        document::<ClientFrame>("client-frame"),
        document::<ServerFrame>("server-frame"),
        document::<ChangesMessage>("changes-message"),
        document::<WalPayload>("wal-payload"),
        document::<ResultsMessage>("results-message"),
        document::<OriginRecord>("origin-record"),
        document::<Watermark>("watermark"),
        document::<ValidateRequest>("validate-request"),
        document::<ValidateResponse>("validate-response"),
    ]
}

#[test]
fn json_schemas_are_those_of_the_types() {
    for document in documents() {
        let path = folder("json").join(format!("{}.schema.json", document.name));
        let text = format!("{:#}\n", document.schema);
        if std::env::var_os("MILLSTREAM_UPDATE").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            committed == text,
            "{} differs from the Rust types; run: MILLSTREAM_UPDATE=1 cargo test -p millstream-schemas",
            path.display()
        );
    }
}

#[test]
fn protocol_version_is_pinned_by_the_schemas() {
    let mut hash = Sha256::new();
    for document in documents() {
        hash.update(document.name);
        hash.update(document.schema.to_string());
    }
    let hash: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let (version, pinned) = HASHES.last().unwrap();
    assert_eq!(*version, PROTOCOL_VERSION);
    assert_eq!(*pinned, hash, "the schemas changed: raise PROTOCOL_VERSION, tell its history, and pin this hash");
}

/// Each vector file holds valid documents under `valid` and invalid ones under `invalid`, by name.
#[test]
fn vectors_hold_for_schemas_and_types() {
    for document in documents() {
        let path = folder("vectors").join(format!("{}.json", document.name));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|_| panic!("no vectors in {}", path.display()));
        let vectors: BTreeMap<String, BTreeMap<String, Value>> = serde_json::from_str(&text).unwrap();
        let schema = jsonschema::validator_for(&document.schema).unwrap();
        for (name, value) in &vectors["valid"] {
            if let Err(error) = schema.validate(value) {
                panic!("{}/{name}: the schema refuses a valid vector: {error}", document.name);
            }
            let back = (document.round_trip)(&value.to_string());
            assert_eq!(back.as_ref().ok(), Some(value), "{}/{name} does not survive its type: {back:?}", document.name);
        }
        for (name, value) in &vectors["invalid"] {
            assert!(!schema.is_valid(value), "{}/{name}: the schema takes an invalid vector", document.name);
            assert!((document.round_trip)(&value.to_string()).is_err(), "{}/{name}: the type takes it", document.name);
        }
    }
}

/// They are read by those who write clients in other languages.
#[test]
fn descriptions_name_nothing_of_rust() {
    fn check(document: &str, value: &Value) {
        match value {
            Value::Object(fields) => {
                if let Some(Value::String(text)) = fields.get("description") {
                    let is_rust = ["::", "[`", "`Display`", "`None`", "`Some`"].iter().any(|word| text.contains(word));
                    assert!(!is_rust, "{document}: {text}");
                }
                fields.values().for_each(|field| check(document, field));
            }
            Value::Array(items) => items.iter().for_each(|item| check(document, item)),
            _ => {}
        }
    }
    for document in documents() {
        check(document.name, &document.schema);
    }
}

#[test]
fn every_frame_type_has_a_vector() {
    for document in documents() {
        let Some(variants) = document.schema["oneOf"].as_array() else { continue };
        let text = std::fs::read_to_string(folder("vectors").join(format!("{}.json", document.name))).unwrap();
        for variant in variants {
            let properties = variant["properties"].as_object().unwrap();
            let (tag, kind) = properties.iter().find(|(_, property)| property["const"].is_string()).unwrap();
            let kind = &kind["const"];
            assert!(text.contains(&format!("\"{tag}\": {kind}")), "{}: no vector of {kind}", document.name);
        }
    }
}

#[test]
fn asyncapi_names_every_schema_and_subject() {
    let text = std::fs::read_to_string(folder("asyncapi.yaml")).unwrap();
    for document in documents() {
        assert!(text.contains(&format!("json/{}.schema.json", document.name)), "{} is missing", document.name);
    }
    for address in [
        "ms.changes.{partition}",
        "ms.wal.{kind}.{id}",
        "ms.wal.origin",
        "ms.results.{client_id}",
        "ms.replication.watermark",
        "ms.validate.{table}",
    ] {
        assert!(text.contains(address), "{address} is missing");
    }
}

#[test]
fn codes_are_words_that_come_back() {
    for code in Code::ALL {
        assert_eq!(code.as_str().parse::<Code>().unwrap(), *code);
        assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
    }
}

/// A client in another language makes the same digest, in whatever order it has the scopes.
#[test]
fn a_digest_of_scopes_is_that_of_the_vector() {
    let text = std::fs::read_to_string(folder("vectors").join("client-frame.json")).unwrap();
    let vectors: Value = serde_json::from_str(&text).unwrap();
    let told = &vectors["valid"]["hello_of_many_scopes"]["scopes_digest"];
    let mut scopes: Vec<Scope> =
        vec!["user:alice".parse().unwrap(), "project:0190f3c2-7d1e-7000-8000-000000000005".parse().unwrap()];
    for _ in 0..2 {
        assert_eq!(&serde_json::to_value(ScopesDigest::of(&scopes)).unwrap(), told);
        scopes.reverse();
    }
    scopes.pop();
    assert_ne!(&serde_json::to_value(ScopesDigest::of(&scopes)).unwrap(), told);
}
