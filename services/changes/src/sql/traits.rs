//! What the database says of a table beyond the catalog: everything that bounds how far changes may share a statement, or
//! change places with others.

use std::collections::BTreeMap;

use millstream_catalog::Table;
use serde::Deserialize;
use sqlx::{PgConnection, Row};

/// One JSON object a table, as [`Traits`]. Dependencies on functions are recorded for those that are not Postgres' own. Millstream's own triggers (`millstream attach`) depend on the row alone.
const TRAITS: &str = "\
SELECT jsonb_build_object(
    'oid', c.oid::bigint,
    'root', coalesce(pg_partition_root(c.oid)::oid, c.oid)::bigint,
    'partitions', (
        SELECT coalesce(jsonb_agg(lower(k.relname)), '[]') FROM pg_class k WHERE k.oid = ANY (tree.oids) AND k.oid <> c.oid),
    'row_security', c.relrowsecurity,
    'rules', c.relhasrules,
    'triggers', c.relhasrules
        OR EXISTS (SELECT FROM foreign_triggers t WHERE t.tgrelid = ANY (tree.oids)),
    'functions', EXISTS (
            SELECT FROM pg_attrdef d JOIN pg_depend p ON p.classid = 'pg_attrdef'::regclass AND p.objid = d.oid
            WHERE d.adrelid = ANY (tree.oids) AND p.refclassid = 'pg_proc'::regclass)
        OR EXISTS (
            SELECT FROM pg_constraint k JOIN pg_depend p ON p.classid = 'pg_constraint'::regclass AND p.objid = k.oid
            WHERE k.contype = 'c' AND k.conrelid = ANY (tree.oids) AND p.refclassid = 'pg_proc'::regclass)
        OR EXISTS (
            SELECT FROM pg_attribute a JOIN pg_constraint k ON k.contypid = a.atttypid
            JOIN pg_depend p ON p.classid = 'pg_constraint'::regclass AND p.objid = k.oid
            WHERE a.attrelid = c.oid AND p.refclassid = 'pg_proc'::regclass),
    'settings', EXISTS (
            SELECT FROM pg_attrdef d
            WHERE d.adrelid = ANY (tree.oids) AND pg_get_expr(d.adbin, d.adrelid) LIKE '%current_setting%')
        OR EXISTS (
            SELECT FROM pg_constraint k
            WHERE (k.conrelid = ANY (tree.oids) OR k.contypid IN (SELECT atttypid FROM pg_attribute WHERE attrelid = c.oid))
              AND k.contype = 'c' AND pg_get_constraintdef(k.oid) LIKE '%current_setting%'),
    'sequences', EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attidentity <> '')
        OR EXISTS (
            SELECT FROM pg_attrdef d
            WHERE d.adrelid = ANY (tree.oids) AND pg_get_expr(d.adbin, d.adrelid) LIKE '%nextval(%'),
    'unique_columns', (
        SELECT coalesce(jsonb_agg(DISTINCT a.attname), '[]')
        FROM pg_index x JOIN pg_attribute a ON a.attrelid = x.indrelid AND a.attnum > 0
        WHERE x.indrelid = ANY (tree.oids) AND (x.indisunique OR x.indisexclusion) AND NOT x.indisprimary
          AND NOT EXISTS (
            SELECT FROM pg_index k
            WHERE k.indrelid = x.indrelid AND k.indisprimary AND x.indisunique
              AND k.indkey::int2[] <@ (x.indkey::int2[])[0:x.indnkeyatts - 1])
          AND (a.attnum = ANY (x.indkey::int2[]) OR EXISTS (
            SELECT FROM pg_depend d
            WHERE d.classid = 'pg_class'::regclass AND d.objid = x.indexrelid AND d.refclassid = 'pg_class'::regclass
              AND d.refobjid = x.indrelid AND d.refobjsubid = a.attnum))),
    'primary_keys', (
        SELECT coalesce(jsonb_agg(jsonb_build_array(n.nspname, k.relname, i.relname)), '[]')
        FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid JOIN pg_class k ON k.oid = x.indrelid JOIN pg_namespace n ON n.oid = k.relnamespace
        WHERE x.indrelid = ANY (tree.oids) AND (x.indisprimary OR (
            x.indisunique AND x.indpred IS NULL AND x.indexprs IS NULL
            AND NOT EXISTS (SELECT FROM pg_index p WHERE p.indrelid = x.indrelid AND p.indisprimary)
            AND (SELECT jsonb_object_agg(a.attname, '') FROM pg_attribute a
                 WHERE a.attrelid = x.indrelid AND a.attnum = ANY ((x.indkey::int2[])[0:x.indnkeyatts - 1]))
                = (SELECT jsonb_object_agg(part, '') FROM jsonb_array_elements_text($2::jsonb -> c.oid::bigint::text) AS part)))),
    'parents', (
        SELECT coalesce(jsonb_agg(jsonb_build_object('oid', coalesce(pg_partition_root(f.confrelid)::oid, f.confrelid)::bigint, 'to_key', EXISTS (
            SELECT FROM pg_index k WHERE k.indexrelid = f.conindid AND k.indisprimary), 'columns', (
            SELECT jsonb_agg(a.attname) FROM pg_attribute a WHERE a.attrelid = f.conrelid AND a.attnum = ANY (f.conkey)))), '[]')
        FROM pg_constraint f WHERE f.contype = 'f' AND f.conrelid = ANY (tree.oids)),
    'cascades', (
        SELECT coalesce(jsonb_agg(DISTINCT jsonb_build_object('oid', coalesce(pg_partition_root(w.oid)::oid, w.oid)::bigint, 'name', lower(k.relname))), '[]')
        FROM unnest(cascade.oids) AS w(oid) JOIN pg_class k ON k.oid = w.oid OR k.oid = pg_partition_root(w.oid)::oid
        WHERE w.oid <> ALL (tree.oids)),
    'moves', EXISTS (
        SELECT FROM pg_constraint f
        WHERE f.contype = 'f' AND f.confrelid = ANY (tree.oids) AND f.confupdtype IN ('c', 'n', 'd') AND NOT EXISTS (
            SELECT FROM pg_index k WHERE k.indrelid = f.confrelid AND k.indisprimary AND f.confkey <@ k.indkey::int2[])),
    'takes', (
        WITH RECURSIVE taken(oid) AS (
            SELECT f.conrelid FROM pg_constraint f WHERE f.contype = 'f' AND f.confdeltype = 'c' AND f.confrelid = ANY (tree.oids)
            UNION
            SELECT f.conrelid FROM pg_constraint f JOIN taken t ON f.confrelid = t.oid WHERE f.contype = 'f' AND f.confdeltype = 'c')
        SELECT coalesce(jsonb_agg(DISTINCT coalesce(pg_partition_root(t.oid)::oid, t.oid)::bigint), '[]') FROM taken t),
    'sets', EXISTS (
        SELECT FROM pg_constraint f WHERE f.contype = 'f' AND f.confrelid = ANY (cascade.oids) AND f.confdeltype IN ('n', 'd')),
    'cascade_triggers', EXISTS (
        SELECT FROM foreign_triggers t WHERE t.tgrelid = ANY (cascade.oids) AND t.tgrelid <> ALL (tree.oids)),
    'deferred', EXISTS (
        SELECT FROM pg_constraint k
        WHERE k.condeferred AND (k.conrelid = ANY (cascade.oids) OR k.confrelid = ANY (cascade.oids)))
)::text AS traits
FROM pg_class c,
     LATERAL (SELECT array_agg(relid::oid) || c.oid AS oids FROM pg_partition_tree(c.oid)) AS tree,
     LATERAL (
        WITH RECURSIVE written(oid) AS (
            SELECT unnest(tree.oids)
            UNION
            SELECT f.conrelid FROM pg_constraint f JOIN written w ON f.confrelid = w.oid
            WHERE f.contype = 'f' AND f.confdeltype IN ('c', 'n', 'd'))
        SELECT array_agg(oid) AS oids FROM written) AS cascade
WHERE c.oid::bigint = ANY ($1)";

const FOREIGN_TRIGGERS: &str = "\
WITH foreign_triggers AS (
    SELECT t.tgrelid FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
    WHERE NOT t.tgisinternal AND t.tgenabled <> 'D'
      AND p.pronamespace IS DISTINCT FROM to_regnamespace('millstream')::oid)";

/// Views, by name: a rule that reads one reads tables that it does not name.
const VIEWS: &str = "\
SELECT lower(c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('v', 'm', 'f') AND n.nspname NOT IN ('pg_catalog', 'information_schema')";

/// What the database says of a table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct Traits {
    pub oid: u32,
    /// The partitioned table that it is a part of; else itself.
    pub root: u32,
    /// Names of its partitions, in lower case.
    pub partitions: Vec<String>,
    pub row_security: bool,
    /// It has rewrite rules.
    pub rules: bool,
    /// It has triggers of the application, or rewrite rules.
    pub triggers: bool,
    /// Defaults or checks call functions of the application.
    pub functions: bool,
    /// Defaults or checks read settings, `millstream.user_id` perhaps.
    pub settings: bool,
    /// Defaults are numbered in the order of the inserts.
    pub sequences: bool,
    /// Columns under unique or exclusion constraints by which rows with different keys can be in each other's way.
    pub unique_columns: Vec<String>,
    /// Its key (the primary key, or the unique index that stands in for it) and those of its partitions, as an error names them.
    pub primary_keys: Vec<PrimaryKey>,
    pub parents: Vec<Parent>,
    /// Other tables that a delete writes, directly or not.
    pub cascades: Vec<WrittenTable>,
    /// In some of them it sets columns (`SET NULL`, `SET DEFAULT`).
    pub sets: bool,
    /// Tables, perhaps its own, from which a delete takes rows away.
    pub takes: Vec<u32>,
    /// An update of columns that are not its key sets columns of other tables.
    pub moves: bool,
    /// They have triggers of the application.
    pub cascade_triggers: bool,
    /// A constraint that concerns its rows is looked at by COMMIT only.
    pub deferred: bool,
}

/// Schema, table and index.
pub(crate) type PrimaryKey = (String, String, String);

/// A foreign key. Tables stand for their partitions.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Parent {
    /// Table that it refers to; of partitions the root.
    pub oid: u32,
    /// Columns that refer.
    pub columns: Vec<String>,
    /// They refer to its primary key.
    pub to_key: bool,
}

/// A table that is written; partitions of one table have its oid, each with its name.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct WrittenTable {
    pub oid: u32,
    /// Without its schema, in lower case.
    pub name: String,
}

impl Traits {
    /// Of a table that is not known: changes one by one, in their order.
    pub fn unknown(oid: u32) -> Traits {
        Traits { oid, root: oid, row_security: true, triggers: true, ..Traits::default() }
    }
}

/// Reads the traits of tables, and the names of views.
pub(crate) async fn load(
    connection: &mut PgConnection,
    tables: &[Table],
) -> Result<(Vec<Traits>, Vec<String>), sqlx::Error> {
    let oids: Vec<i64> = tables.iter().map(|table| i64::from(table.oid)).collect();
    let key = |table: &Table| table.key.iter().map(|&column| table.columns[column].name.clone()).collect();
    let keys: BTreeMap<u32, Vec<String>> = tables.iter().map(|table| (table.oid, key(table))).collect();
    let keys = serde_json::to_string(&keys).map_err(|error| sqlx::Error::Encode(Box::new(error)))?;
    let sql = sqlx::AssertSqlSafe(format!("{FOREIGN_TRIGGERS}\n{TRAITS}"));
    let rows = sqlx::query(sql).bind(oids).bind(keys).fetch_all(&mut *connection).await?;
    let traits = rows.iter().map(|row| {
        let text: &str = row.try_get("traits")?;
        serde_json::from_str(text).map_err(|error| sqlx::Error::Decode(Box::new(error)))
    });
    let traits = traits.collect::<Result<_, _>>()?;
    Ok((traits, sqlx::query_scalar(VIEWS).fetch_all(connection).await?))
}
