//! Values that change without a row in the write-ahead log: `ALTER TABLE … TYPE … USING` with the same type, a column dropped
//! and made again, an enum of the same name or with a renamed label, a partition that is attached, detached or truncated. What
//! tables consist of is kept beside the epoch, and compared with what they consist of now.
//!
//! Files alone do not tell: `VACUUM FULL` and `CLUSTER` write a table's rows into another one, as they are. Where values were
//! rewritten, the description of a column was written again, too. Partitions are truncated without a message for their root,
//! so that another file is reason enough there.

use std::collections::{BTreeMap, BTreeSet};

use millstream_catalog::{Catalog, Shape};
use serde::{Deserialize, Serialize};
use sqlx::{PgConnection, PgPool};

use crate::assemble::AGAIN_PREFIX;
use crate::error::Error;

/// What synced tables consist of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content(BTreeMap<String, TableContent>);

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct TableContent {
    /// For each column: its number, and the object id of its type.
    columns: BTreeMap<String, (i16, i64)>,
    /// What holds rows, by object id: the table, or its partitions.
    holders: BTreeMap<String, HolderContent>,
    /// What the columns' types are made of, by object id.
    types: BTreeMap<String, Type>,
    /// Whether all its changes can be routed.
    #[serde(default)]
    routable: bool,
    /// Whether two rows may have one key within a transaction.
    #[serde(default)]
    loose_key: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct HolderContent {
    name: String,
    /// The file.
    file: i64,
    /// Hash of when its columns' descriptions were written.
    columns: Option<String>,
    /// It is a partition.
    partition: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Type {
    /// Of an enum: its labels, by object id, and when they were written: one may have had another name for a moment.
    labels: Option<BTreeMap<String, String>>,
    /// Of a composite: numbers and types of its attributes.
    attributes: Option<Vec<(i16, i64)>>,
}

/// What tables consist of now, and which of their partitions are empty.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    /// To be kept.
    pub content: Content,
    empty: BTreeSet<String>,
}

/// Reads what tables consist of.
pub async fn read(connection: &mut PgConnection, catalog: &Catalog, shapes: &[Shape]) -> Result<Contents, Error> {
    let mut found = Contents::default();
    for (table, shape) in catalog.tables.iter().zip(shapes) {
        let (text, empty): (String, Vec<String>) = sqlx::query_as(
            "WITH RECURSIVE holder AS ( \
               SELECT c.* FROM pg_class c WHERE c.oid = $1::int8::oid OR c.oid IN (SELECT relid FROM pg_partition_tree($1::int8::oid::regclass))), \
             used(oid) AS ( \
               SELECT a.atttypid FROM pg_attribute a WHERE a.attrelid = $1::int8::oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' \
               UNION SELECT part.oid FROM used JOIN pg_type t ON t.oid = used.oid CROSS JOIN LATERAL ( \
                 SELECT t.typbasetype UNION ALL SELECT t.typelem WHERE t.typcategory = 'A' \
                 UNION ALL SELECT r.rngsubtype FROM pg_range r WHERE t.oid IN (r.rngtypid, r.rngmultitypid) \
                 UNION ALL SELECT a.atttypid FROM pg_attribute a WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped \
               ) AS part(oid) WHERE part.oid <> 0) \
             SELECT json_build_object( \
               'columns', (SELECT json_object_agg(a.attname, json_build_array(a.attnum, a.atttypid::int8)) FROM pg_attribute a \
                 WHERE a.attrelid = $1::int8::oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''), \
               'holders', (SELECT json_object_agg(h.oid::text, json_build_object('name', h.oid::regclass::text, 'file', h.relfilenode::int8, \
                 'columns', (SELECT md5(string_agg(a.attnum || ' ' || a.xmin::text, ',' ORDER BY a.attnum)) FROM pg_attribute a WHERE a.attrelid = h.oid AND a.attnum > 0), \
                 'partition', h.relispartition AND h.oid <> $1::int8::oid)) \
                 FROM holder h WHERE h.relkind = 'r'), \
               'types', (SELECT json_object_agg(t.oid::text, json_build_object( \
                 'labels', (SELECT json_object_agg(e.oid::text, e.enumlabel || ' ' || e.xmin::text) FROM pg_enum e WHERE e.enumtypid = t.oid), \
                 'attributes', (SELECT json_agg(json_build_array(a.attnum, a.atttypid::int8) ORDER BY a.attnum) FROM pg_attribute a \
                   WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped))) \
                 FROM used JOIN pg_type t USING (oid) WHERE t.typtype IN ('e', 'c')))::text, \
             ARRAY(SELECT h.oid::text FROM holder h WHERE h.relkind = 'r' AND pg_relation_size(h.oid) = 0)",
        )
        .bind(i64::from(table.oid))
        .fetch_one(&mut *connection)
        .await
        .map_err(Error::postgres("read what synced tables consist of"))?;
        // A table that is gone by now has nothing: the catalog tells of it.
        let read = serde_json::from_str::<Read>(&text).unwrap_or_default();
        found.content.0.insert(table.name.clone(), read.content(shape));
        found.empty.extend(empty);
    }
    Ok(found)
}

#[derive(Default, Deserialize)]
struct Read {
    columns: Option<BTreeMap<String, (i16, i64)>>,
    holders: Option<BTreeMap<String, HolderContent>>,
    types: Option<BTreeMap<String, Type>>,
}

impl Read {
    fn content(self, shape: &Shape) -> TableContent {
        TableContent {
            columns: self.columns.unwrap_or_default(),
            holders: self.holders.unwrap_or_default(),
            types: self.types.unwrap_or_default(),
            routable: shape.is_routable(),
            loose_key: shape.loose_key,
        }
    }
}

/// What was kept; none if nothing was, or it cannot be read any more.
pub async fn kept(connection: &mut PgConnection) -> Result<Option<Content>, Error> {
    let text: Option<Option<String>> = sqlx::query_scalar("SELECT to_jsonb(e) ->> 'content' FROM millstream.epoch e")
        .fetch_optional(connection)
        .await
        .map_err(Error::postgres("read what synced tables consisted of"))?;
    Ok(text.flatten().and_then(|text| serde_json::from_str(&text).ok()))
}

/// Keeps what tables consist of now; and in the same transaction asks for these to be sent again.
pub async fn keep(connection: &mut PgConnection, content: &Content, again: &BTreeSet<&str>) -> Result<(), Error> {
    let names: Vec<&str> = again.iter().copied().collect();
    // The message is written where the row is.
    let sql = "WITH kept AS (UPDATE millstream.epoch SET content = $1::text::jsonb RETURNING 1) \
               SELECT CASE WHEN $3 <> '' THEN pg_logical_emit_message(true, $2, $3) END::text FROM kept";
    sqlx::query(sql)
        .bind(serde_json::to_string(content).unwrap_or_default())
        .bind(AGAIN_PREFIX)
        .bind(names.join("\n"))
        .execute(connection)
        .await
        .map_err(Error::postgres("keep what synced tables consist of"))?;
    Ok(())
}

/// Asks for tables to be sent again.
pub async fn ask(pool: &PgPool, tables: &BTreeSet<String>) -> Result<(), Error> {
    let names: Vec<&str> = tables.iter().map(String::as_str).collect();
    // The reader of the change stream asks: the commit must not wait for a standby that is this reader.
    sqlx::query("SELECT set_config('synchronous_commit', 'local', true), pg_logical_emit_message(true, $1, $2)::text")
        .bind(AGAIN_PREFIX)
        .bind(names.join("\n"))
        .execute(pool)
        .await
        .map_err(Error::postgres("ask for tables to be sent again"))?;
    Ok(())
}

impl Contents {
    /// The tables of which rows have changed, or may have, without a row in the write-ahead log, and how: as compared with what
    /// was kept.
    pub fn changed<'f>(&'f self, before: &Content) -> BTreeMap<&'f str, String> {
        let changed = |(name, now): (&'f String, &TableContent)| {
            let was = before.0.get(name)?;
            Some((name.as_str(), self.how(was, now)?))
        };
        self.content.0.iter().filter_map(changed).collect()
    }

    /// Whether what was kept differs in nothing that matters for how rows are read, and no values have changed.
    pub fn reads_as(&self, before: &Content) -> bool {
        let alike = |(name, now): (&String, &TableContent)| {
            before.0.get(name).is_some_and(|was| {
                was.routable == now.routable
                    && was.loose_key == now.loose_key
                    && was.columns == now.columns
                    && was.holders.keys().eq(now.holders.keys())
                    && self.how(was, now).is_none()
            })
        };
        self.content.0.len() == before.0.len() && self.content.0.iter().all(alike)
    }

    fn how(&self, was: &TableContent, now: &TableContent) -> Option<String> {
        for (name, column) in &now.columns {
            if was.columns.get(name).is_some_and(|was| was != column) {
                return Some(format!("column {name} is another one, or of another type, than before"));
            }
        }
        for (oid, kind) in &now.types {
            let Some(before) = was.types.get(oid) else { continue };
            // One that is gone has no values.
            let label = |(oid, label)| kind.labels.iter().flat_map(|labels| labels.get(oid)).all(|now| now == label);
            if !before.labels.iter().flatten().all(label) {
                return Some("a label of an enum has another name".to_owned());
            }
            if before.attributes != kind.attributes {
                return Some("a composite type has other attributes".to_owned());
            }
        }
        for (oid, holder) in &now.holders {
            let name = &holder.name;
            match was.holders.get(oid) {
                Some(before) if before.file == holder.file => {}
                Some(_) if holder.partition => return Some(format!("partition {name} was written anew or truncated")),
                Some(before) if before.columns != holder.columns => {
                    return Some("its rows were written anew".to_owned());
                }
                Some(_) => {}
                // Its rows may be from before it became one.
                None if holder.partition && !self.empty.contains(oid) => {
                    return Some(format!("partition {name} is new, and has rows"));
                }
                None => {}
            }
        }
        if let Some((_, gone)) = was.holders.iter().find(|(oid, _)| !now.holders.contains_key(*oid)) {
            return Some(format!("partition {} was detached or dropped", gone.name));
        }
        if was.routable != now.routable {
            return Some("replica identities do not, or did not, cover what deletes and moves need".to_owned());
        }
        (now.loose_key && !was.loose_key).then(|| "its key has become deferrable".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> TableContent {
        let holder = |name: &str, file, partition| HolderContent {
            name: name.into(),
            file,
            columns: Some("a".into()),
            partition,
        };
        TableContent {
            columns: BTreeMap::from([("id".into(), (1, 23)), ("mood".into(), (2, 900))]),
            holders: BTreeMap::from([("50".into(), holder("t", 7, false)), ("51".into(), holder("p", 8, true))]),
            types: BTreeMap::from([
                ("900".into(), Type { labels: Some(BTreeMap::from([("1".into(), "fine".into())])), attributes: None }),
                ("901".into(), Type { labels: None, attributes: Some(vec![(1, 23)]) }),
            ]),
            routable: true,
            loose_key: false,
        }
    }

    #[track_caller]
    fn check(change: impl Fn(&mut TableContent), empty: &[&str], says: &str) {
        let mut now = table();
        change(&mut now);
        let found = Contents {
            content: Content(BTreeMap::from([("t".into(), now)])),
            empty: empty.iter().map(|oid| (*oid).to_owned()).collect(),
        };
        let before = Content(BTreeMap::from([("t".into(), table())]));
        let text = serde_json::to_string(&before).unwrap();
        assert_eq!(serde_json::from_str::<Content>(&text).unwrap(), before);
        let how = found.changed(&before).into_values().next().unwrap_or_default();
        assert!(!found.reads_as(&before) || how.is_empty(), "{how}");
        assert!(how.contains(says) && how.is_empty() == says.is_empty(), "{how}");
    }

    #[test]
    fn rewritten_values_are_told_from_rows_that_only_moved() {
        let holder = |table: &mut TableContent, oid: &str, change: fn(&mut HolderContent)| {
            change(table.holders.get_mut(oid).unwrap());
        };
        check(|_| {}, &[], "");
        let moved = Contents {
            content: Content(BTreeMap::from([("t".into(), {
                let mut now = table();
                holder(&mut now, "50", |h| h.file = 9);
                now
            })])),
            ..Contents::default()
        };
        assert!(moved.reads_as(&Content(BTreeMap::from([("t".into(), table())]))));
        // VACUUM FULL, then SET NOT NULL.
        check(|now| holder(now, "50", |h| h.file = 9), &[], "");
        check(|now| holder(now, "50", |h| h.columns = Some("b".into())), &[], "");
        check(|now| holder(now, "50", |h| (h.file, h.columns) = (9, Some("b".into()))), &[], "written anew");
        check(|now| holder(now, "51", |h| h.file = 9), &[], "partition p was written anew");
        check(|now| drop(now.holders.remove("51")), &[], "p was detached");
        let add = |partition| {
            move |now: &mut TableContent| {
                let holder = HolderContent { name: "q".into(), partition, ..HolderContent::default() };
                now.holders.insert("52".into(), holder);
            }
        };
        check(add(false), &[], "");
        check(add(true), &["52"], "");
        check(add(true), &[], "q is new");
    }

    #[test]
    fn other_columns_and_types_of_the_same_name_are_noticed() {
        let mood = |column| {
            move |now: &mut TableContent| {
                now.columns.insert("mood".into(), column);
            }
        };
        check(mood((3, 900)), &[], "column mood");
        check(mood((2, 950)), &[], "column mood");
        let labels = |now: &mut TableContent, oid: &str, label: &str| {
            let labels = now.types.get_mut("900").unwrap().labels.as_mut().unwrap();
            labels.insert(oid.into(), label.into());
        };
        check(|now| labels(now, "2", "good"), &[], "");
        check(|now| labels(now, "1", "good"), &[], "label");
        check(|now| now.types.get_mut("901").unwrap().attributes = Some(vec![(2, 23)]), &[], "composite");
        check(|now| now.routable = false, &[], "replica identities");
        check(|now| now.loose_key = true, &[], "deferrable");
    }
}
