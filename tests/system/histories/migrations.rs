//! What a migrator does to tables under clients: columns, partitions, replica identities, and values that change without a row
//! in the log.

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use super::schema::{Identity, Key, Kind, ODD, Parts, SERIAL, Schema, Table, object};

impl Kind {
    /// `ALTER … USING` this gives every value another one of the same type.
    fn rewritten(self, column: &str) -> String {
        match self {
            Kind::Text => format!("reverse({column})"),
            Kind::Bigint | Kind::Sum | Kind::Max | Kind::Float => format!("-{column}"),
            Kind::Boolean => format!("NOT {column}"),
            Kind::Numeric => format!("{column} - 0.5"),
            Kind::Jsonb => format!("jsonb_build_object('was', {column} -> 'n')"),
            Kind::Enum => format!("CASE {column} WHEN 'so so' THEN 'Happy'::mood ELSE 'so so' END"),
            Kind::Composite => format!("translate({column}::text, 'ab', 'ba')::spot"),
        }
    }

    /// A default that is another one for each row.
    fn volatile(self) -> &'static str {
        match self {
            Kind::Text => "md5(random()::text)",
            Kind::Boolean => "random() < 0.5",
            Kind::Jsonb => "jsonb_build_object('n', random())",
            Kind::Enum => "(enum_range(NULL::mood))[1 + (random() * 2)::int]",
            Kind::Composite => "('(' || (random() * 99)::int || ',\"a b\")')::spot",
            Kind::Bigint | Kind::Numeric | Kind::Float | Kind::Sum | Kind::Max => "(random() * 1000)::int",
        }
    }
}

impl Schema {
    /// Statements, one after the other. They may be refused, such as a partition for which there are rows elsewhere. `extra` is a
    /// number of its own.
    pub fn migration(&self, extra: u64, rng: &mut StdRng) -> Vec<String> {
        let table = self.tables.choose(rng).unwrap_or(&self.tables[0]);
        match rng.random_range(0..12) {
            0..2 => identity(table, rng),
            2 | 3 if self.odd => vec![format!(
                "DO $$ BEGIN IF (SELECT atttypid FROM pg_attribute WHERE attrelid = '{ODD}'::regclass AND attname = 'id') = 'numeric'::regtype
                   THEN ALTER TABLE {ODD} ALTER id TYPE double precision; ELSE ALTER TABLE {ODD} ALTER id TYPE numeric; END IF; END $$"
            )],
            _ => vec![self.one_step(table, extra, rng)],
        }
    }

    fn one_step(&self, table: &Table, extra: u64, rng: &mut StdRng) -> String {
        let Table { name, key, .. } = table;
        match rng.random_range(0..10) {
            0 => format!("ALTER TABLE {name} ADD COLUMN extra_{extra} int"),
            1 => format!("ALTER TABLE {name} ADD COLUMN extra_{extra} text NOT NULL DEFAULT 'none'"),
            2 => format!("ALTER TABLE {name} ADD COLUMN gone_{extra} int; ALTER TABLE {name} DROP COLUMN gone_{extra}"),
            3 => format!("VACUUM FULL {name}"),
            4 => format!("ALTER TYPE mood ADD VALUE IF NOT EXISTS 'mood {extra}'"),
            5 => {
                let n = rng.random_range(0..table.values.len());
                let kind = table.values[n];
                let using = kind.rewritten(&format!("v{n}"));
                let of = if table.heir && n == 0 { format!("{name}_base") } else { name.clone() };
                let sql = format!("ALTER TABLE {of} ALTER COLUMN v{n} TYPE {} USING {using}", kind.sql());
                rewriting(&sql, &[table])
            }
            // A column that is inherited goes with that of the other table.
            6 if !table.heir => {
                let n = rng.random_range(0..table.values.len());
                let (kind, default) = (table.values[n].sql(), table.values[n].volatile());
                let sql = format!(
                    "ALTER TABLE {name} DROP COLUMN v{n}; ALTER TABLE {name} ADD COLUMN v{n} {kind} DEFAULT {default}"
                );
                rewriting(&sql, &[table])
            }
            6 | 7 => self.of_type(
                Kind::Enum,
                "IF 'sad'::text = ANY (enum_range(NULL::mood)::text[]) THEN ALTER TYPE mood RENAME VALUE 'sad' TO 'Sad';
                 ELSE ALTER TYPE mood RENAME VALUE 'Sad' TO 'sad'; END IF",
            ),
            8 => self.of_type(
                Kind::Composite,
                "IF EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'spot'::regclass AND attname = 'more')
                 THEN ALTER TYPE spot DROP ATTRIBUTE more; ELSE ALTER TYPE spot ADD ATTRIBUTE more int; END IF",
            ),
            _ => {
                let values = match table.parts {
                    Some(Parts::List) => "FOR VALUES IN (1)".to_owned(),
                    Some(Parts::Range) => {
                        let (from, to) = match key {
                            Key::Uuid => {
                                ("a0000000-0000-0000-0000-000000000000", "c0000000-0000-0000-0000-000000000000")
                            }
                            Key::Text => ("M", "P"),
                            Key::Bigint => ("9000000000000000", "18000000000000000"),
                        };
                        format!("FOR VALUES FROM ('{from}') TO ('{to}')")
                    }
                    _ => return format!("CREATE INDEX ON {name} (v0)"),
                };
                format!(
                    "CREATE TABLE {name}_new PARTITION OF {name} {values}; ALTER TABLE {name}_new REPLICA IDENTITY FULL"
                )
            }
        }
    }

    /// Changes a type, and with it the values of all its columns.
    fn of_type(&self, kind: Kind, sql: &str) -> String {
        let tables: Vec<&Table> = self.tables.iter().filter(|table| table.values.contains(&kind)).collect();
        rewriting(&format!("DO $$ BEGIN {sql}; END $$"), &tables)
    }
}

/// Gives a table another replica identity, for good or for a moment; some do not cover the columns that name scopes.
fn identity(table: &Table, rng: &mut StdRng) -> Vec<String> {
    let name = &table.name;
    let holders: Vec<String> = table.holders();
    let set = |holder: &str, identity: Identity| match identity {
        Identity::Full => format!("ALTER TABLE {holder} REPLICA IDENTITY FULL"),
        Identity::Default => format!("ALTER TABLE {holder} REPLICA IDENTITY DEFAULT"),
        Identity::Index => format!("ALTER TABLE {holder} REPLICA IDENTITY USING INDEX {name}_identity"),
    };
    let to = *[Identity::Full, Identity::Default, Identity::Index].choose(rng).unwrap_or(&Identity::Full);
    // Partitions have no such index, and a deferrable key is no identity.
    let fits = match to {
        Identity::Full => true,
        Identity::Default => !table.deferrable,
        Identity::Index => table.identity == Identity::Index,
    };
    if !fits {
        return vec![set(holders.choose(rng).unwrap_or(name), Identity::Full)];
    }
    let holder = holders.choose(rng).unwrap_or(name).clone();
    let covers = to != Identity::Default || table.key_covers();
    let mut back: Vec<String> = holders.iter().map(|holder| set(holder, table.identity)).collect();
    if covers {
        return if rng.random_bool(0.5) { vec![set(&holder, to)] } else { back };
    }
    let told = format!("INSERT INTO log (tbl, what) VALUES ('{name}', 'loose')");
    let steps = [
        format!("SELECT pg_advisory_xact_lock({SERIAL}); {}; {told}", set(&holder, to)),
        format!("SELECT pg_sleep({} / 1000.0)", rng.random_range(0..600)),
    ];
    back.splice(0..0, steps);
    back
}

/// A change of what tables hold that the write-ahead log does not tell, told to the truth.
fn rewriting(sql: &str, tables: &[&Table]) -> String {
    let rows = tables.iter().map(|table| {
        let rows = object(&table.columns(), "r");
        format!(
            "; INSERT INTO log (tbl, what, new) SELECT '{}', 'rewritten', coalesce(jsonb_agg({rows}), '[]') FROM {} r",
            table.name,
            table.own_rows()
        )
    });
    // One transaction, as all that is sent at once.
    format!("SELECT pg_advisory_xact_lock({SERIAL}); {sql}{}", rows.collect::<String>())
}
