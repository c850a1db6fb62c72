//! Random schemas: memberships of projects, of teams, and of projects through teams; and two to five tables of rows that
//! belong to projects, users, both, or to everybody, as databases have them: with keys and replica identities of all kinds,
//! deferrable keys, partitions, hidden columns, sums, triggers that change or leave out
//! rows, memberships that clients have or do not have as rows, and migrations meanwhile.

use std::fmt::Write;

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use uuid::Uuid;

/// The lock that makes the order of transactions the order of their first writes; see [`Schema::ddl`].
pub const SERIAL: i64 = 4711;
/// Columns that only Millstream writes: what clients have of them is not compared.
const KEPT: [&str; 3] = ["field_clocks", "updated_at", "client_id"];

/// Names of columns; true: a boolean.
pub type Columns = Vec<(String, bool)>;

/// Type of a value column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Text,
    Bigint,
    Boolean,
    Numeric,
    Jsonb,
    Enum,
    /// A `bigint` of which every change counts.
    Sum,
    /// A `bigint` of which the greatest value stays.
    Max,
}

impl Kind {
    const ALL: [Kind; 8] =
        [Kind::Text, Kind::Bigint, Kind::Boolean, Kind::Numeric, Kind::Jsonb, Kind::Enum, Kind::Sum, Kind::Max];

    fn sql(self) -> &'static str {
        match self {
            Kind::Text => "text",
            Kind::Bigint | Kind::Sum | Kind::Max => "bigint",
            Kind::Boolean => "boolean",
            Kind::Numeric => "numeric",
            Kind::Jsonb => "jsonb",
            Kind::Enum => "mood",
        }
    }

    fn merge(self) -> Option<&'static str> {
        match self {
            Kind::Sum => Some("add"),
            Kind::Max => Some("max"),
            _ => None,
        }
    }

    /// What an update sets the column to.
    fn value(self, column: &str, rng: &mut StdRng) -> String {
        match self {
            Kind::Sum if rng.random_bool(0.8) => format!("{column} + {}", rng.random_range(-9..=9)),
            _ => self.literal(rng),
        }
    }

    /// A literal that Postgres and SQLite both read.
    fn literal(self, rng: &mut StdRng) -> String {
        if rng.random_bool(0.1) {
            return "NULL".to_owned();
        }
        let n: u32 = rng.random_range(0..1_000);
        match self {
            Kind::Text if n < 20 => format!("'{}'", "long ".repeat(n as usize * 100)),
            Kind::Text => format!("'ü{n} \"quoted\" ''it''s'"),
            Kind::Bigint => (i64::from(n) * 9_007_199_254_740_993 - 4_503_599_627_370_497).to_string(),
            Kind::Boolean => if n.is_multiple_of(2) { "true" } else { "false" }.to_owned(),
            Kind::Numeric => format!("'{n}.{:03}0'", n % 7),
            Kind::Jsonb => format!("'{{\"n\": {n}, \"list\": [1, null, \"x\"]}}'"),
            Kind::Enum => (*["'sad'", "'so so'", "'Happy'"].choose(rng).unwrap_or(&"NULL")).to_owned(),
            Kind::Sum | Kind::Max => n.to_string(),
        }
    }
}

/// Type of the column `id`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    Uuid,
    Text,
    Bigint,
}

impl Key {
    fn sql(self) -> &'static str {
        match self {
            Key::Uuid => "uuid",
            Key::Text => "text",
            Key::Bigint => "bigint",
        }
    }

    /// Somewhere in the middle.
    fn middle(self) -> &'static str {
        match self {
            Key::Uuid => "80000000-0000-0000-0000-000000000000",
            Key::Text => "K",
            Key::Bigint => "0",
        }
    }

    pub fn random(self, rng: &mut StdRng) -> String {
        match self {
            Key::Uuid => Uuid::from_u128(rng.random()).to_string(),
            Key::Text => {
                let first: char = rng.random_range('A'..='Z');
                format!("{first} ü/{:x}", rng.random::<u32>())
            }
            Key::Bigint => (rng.random::<i64>() >> 8).to_string(),
        }
    }
}

/// How a partitioned table is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Parts {
    /// By `part`: 0, and the rest.
    List,
    /// By `id`: below the middle, and the rest.
    Range,
    /// By `id`, into two.
    Hash,
    /// By `part`, and the rest of that by `id`.
    Levels,
}

/// `REPLICA IDENTITY`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Identity {
    Full,
    /// An index over scopes and key.
    Index,
    /// The key; scopes are in it.
    Default,
}

/// What a table's rows belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Belongs {
    Project,
    User,
    Both,
    Everybody,
}

#[derive(Clone, Debug)]
pub struct Table {
    pub name: String,
    pub belongs: Belongs,
    pub key: Key,
    /// The key has the column `part`, too.
    pair: bool,
    /// A table that rows refer to, and what its delete does to them.
    parent: Option<(usize, &'static str)>,
    values: Vec<Kind>,
    clocks: bool,
    identity: Identity,
    deferrable: bool,
    parts: Option<Parts>,
    /// Has a column that clients never get.
    hidden: bool,
    /// Has a trigger that changes texts and leaves out rows.
    gate: bool,
}

impl Table {
    fn project(&self) -> bool {
        matches!(self.belongs, Belongs::Project | Belongs::Both)
    }

    fn owner(&self) -> bool {
        matches!(self.belongs, Belongs::User | Belongs::Both)
    }

    /// Whether the key has the project, too: what a row's project is does not change then.
    fn keyed(&self) -> bool {
        self.identity == Identity::Default && self.project()
    }

    /// Whether `id` alone is the key, at once.
    fn may_be_parent(&self) -> bool {
        !self.pair && !self.keyed() && !self.deferrable && self.parts.is_none()
    }

    /// All columns that are compared, in order.
    pub fn columns(&self) -> Columns {
        let mut columns = vec![("id".to_owned(), false)];
        let flags = [("part", self.pair), ("project", self.project()), ("owner", self.owner())];
        columns.extend(flags.iter().filter(|(_, has)| *has).map(|(name, _)| ((*name).to_owned(), false)));
        columns.extend(self.parent.map(|_| ("parent".to_owned(), false)));
        columns.extend(self.values.iter().enumerate().map(|(n, kind)| (format!("v{n}"), *kind == Kind::Boolean)));
        columns
    }

    fn ddl(&self, tables: &[Table]) -> String {
        let Table { name, .. } = self;
        // A scope in an index that is the replica identity cannot be null.
        let null = if self.identity == Identity::Full { "" } else { " NOT NULL" };
        let mut columns = vec![format!("id {} NOT NULL", self.key.sql())];
        columns.extend(self.pair.then(|| "part int NOT NULL".to_owned()));
        columns.extend(self.project().then(|| format!("project uuid{null}")));
        columns.extend(self.owner().then(|| format!("owner text{null}")));
        if let Some((parent, on_delete)) = self.parent {
            let (of, key) = (&tables[parent].name, tables[parent].key.sql());
            columns.push(format!("parent {key} REFERENCES {of} ON UPDATE CASCADE ON DELETE {on_delete}"));
        }
        columns.extend(self.values.iter().enumerate().map(|(n, kind)| format!("v{n} {}", kind.sql())));
        columns.extend(self.hidden.then(|| "secret text".to_owned()));
        if self.clocks {
            columns.push("field_clocks jsonb NOT NULL DEFAULT '{}'".to_owned());
            columns.push("updated_at timestamptz NOT NULL DEFAULT now()".to_owned());
            columns.push("client_id uuid".to_owned());
        }
        let project = if self.keyed() { "project, " } else { "" };
        let key = if self.pair { format!("{project}id, part") } else { format!("{project}id") };
        let deferrable = if self.deferrable { " DEFERRABLE INITIALLY DEFERRED" } else { "" };
        let by = match self.parts {
            None => "",
            Some(Parts::List | Parts::Levels) => " PARTITION BY LIST (part)",
            Some(Parts::Range) => " PARTITION BY RANGE (id)",
            Some(Parts::Hash) => " PARTITION BY HASH (id)",
        };
        let mut sql = format!("CREATE TABLE {name} ({}, PRIMARY KEY ({key}){deferrable}){by};\n", columns.join(", "));
        for (part, of, values) in self.partitions() {
            let _ = writeln!(sql, "CREATE TABLE {part} PARTITION OF {of} {values};");
        }
        match self.identity {
            Identity::Full => {
                for table in self.partitions().iter().map(|(part, ..)| part).chain([name]) {
                    let _ = writeln!(sql, "ALTER TABLE {table} REPLICA IDENTITY FULL;");
                }
            }
            Identity::Index => {
                let project = if self.project() { "project, " } else { "" };
                let owner = if self.owner() { "owner, " } else { "" };
                let _ = writeln!(
                    sql,
                    "CREATE UNIQUE INDEX {name}_identity ON {name} ({project}{owner}{key});\n\
                     ALTER TABLE {name} REPLICA IDENTITY USING INDEX {name}_identity;"
                );
            }
            Identity::Default => {}
        }
        if self.gate {
            let _ = writeln!(
                sql,
                "CREATE TRIGGER b_gate BEFORE INSERT OR UPDATE ON {name} FOR EACH ROW EXECUTE FUNCTION gate();"
            );
        }
        sql + &watched(name)
    }

    /// Name, what it is a part of, and which.
    fn partitions(&self) -> Vec<(String, String, String)> {
        let name = &self.name;
        let of = |suffix: &str, of: &str, values: &str| (format!("{name}_{suffix}"), of.to_owned(), values.to_owned());
        let hash = |n: u32| format!("FOR VALUES WITH (MODULUS 2, REMAINDER {n})");
        match self.parts {
            None => Vec::new(),
            Some(Parts::List) => vec![of("p0", name, "FOR VALUES IN (0)"), of("rest", name, "DEFAULT")],
            Some(Parts::Range) => {
                let low = format!("FOR VALUES FROM (MINVALUE) TO ('{}')", self.key.middle());
                vec![of("low", name, &low), of("rest", name, "DEFAULT")]
            }
            Some(Parts::Hash) => vec![of("h0", name, &hash(0)), of("h1", name, &hash(1))],
            Some(Parts::Levels) => vec![
                of("p0", name, "FOR VALUES IN (0)"),
                of("rest", name, "DEFAULT PARTITION BY HASH (id)"),
                of("h0", &format!("{name}_rest"), &hash(0)),
                of("h1", &format!("{name}_rest"), &hash(1)),
            ],
        }
    }

    fn config(&self) -> String {
        let Table { name, .. } = self;
        let project = r#"{ kind = "project", column = "project" }"#;
        let owner = r#"{ kind = "user", column = "owner" }"#;
        let scope = match self.belongs {
            Belongs::Project => project.to_owned(),
            Belongs::User => owner.to_owned(),
            Belongs::Both => format!("[{project}, {owner}]"),
            Belongs::Everybody => r#"{ kind = "global" }"#.to_owned(),
        };
        let may = |row: &str| {
            let member =
                format!("EXISTS (SELECT FROM members m WHERE m.project = {row}.project AND m.user_id = auth.user_id)");
            let mine = format!("{row}.owner = auth.user_id");
            match self.belongs {
                Belongs::Project => member,
                Belongs::User => mine,
                Belongs::Both => format!("({member} OR {mine})"),
                Belongs::Everybody => "true".to_owned(),
            }
        };
        let columns: Vec<String> = self.columns().iter().map(|(name, _)| format!("\"{name}\"")).collect();
        let merged =
            self.values.iter().enumerate().filter_map(|(n, kind)| Some(format!("v{n} = \"{}\"", kind.merge()?)));
        let merge = format!("merge = {{ {} }}\n", merged.collect::<Vec<_>>().join(", "));
        let hidden = if self.hidden { "hidden = [\"secret\"]\n" } else { "" };
        format!(
            "[tables.{name}]\nscope = {scope}\nwritable = [{}]\ndelete_missing = \"accept\"\n{merge}{hidden}\
             write.insert = \"{}\"\nwrite.update = \"{} AND {}\"\nwrite.delete = \"{}\"\n\n",
            columns.join(", "),
            may("new"),
            may("old"),
            may("new"),
            may("old")
        )
    }
}

/// Has a table's transactions take their turn, and their effects noted.
fn watched(name: &str) -> String {
    format!(
        "CREATE TRIGGER a_turn BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON {name} FOR EACH STATEMENT EXECUTE FUNCTION turn();\n\
         CREATE TRIGGER z_note AFTER INSERT OR UPDATE OR DELETE ON {name} FOR EACH ROW EXECUTE FUNCTION note('{name}');\n\
         CREATE TRIGGER z_note_truncate AFTER TRUNCATE ON {name} FOR EACH STATEMENT EXECUTE FUNCTION note('{name}');\n"
    )
}

#[derive(Clone, Debug)]
pub struct Schema {
    /// Behind [`MEMBERSHIPS`].
    pub tables: Vec<Table>,
    /// Whether clients have [`MEMBERSHIPS`] too.
    pub memberships_synced: bool,
}

/// The tables that grant memberships, which come first, with their columns: users of projects and of teams, unless they are
/// guests, and teams of projects.
pub const MEMBERSHIPS: [(&str, &[&str]); 3] = [
    ("members", &["project", "user_id", "role"]),
    ("team_members", &["team", "user_id", "role"]),
    ("plans", &["project", "team"]),
];

const MEMBERSHIPS_DDL: &str = "
CREATE TABLE members (project uuid NOT NULL, user_id text NOT NULL, role text NOT NULL, PRIMARY KEY (project, user_id));
CREATE TABLE team_members (team uuid NOT NULL, user_id text NOT NULL, role text NOT NULL, PRIMARY KEY (team, user_id));
CREATE TABLE plans (project uuid PRIMARY KEY, team uuid NOT NULL);
CREATE UNIQUE INDEX plans_identity ON plans (project, team);
ALTER TABLE plans REPLICA IDENTITY USING INDEX plans_identity;
";

const MEMBERSHIPS_CONFIG: &str = r#"
[scopes.team]
membership = { table = "team_members", user = "user_id", scope = "team", roles = { column = "role", in = ["member", "owner"] } }

[scopes.project]
membership = [
    { table = "members", user = "user_id", scope = "project", roles = { column = "role", in = ["member", "owner"] } },
    { table = "plans", scope = "project", through = "team", via = "team" },
]
"#;

const MEMBERSHIPS_SYNCED: &str = r#"
[tables.members]
scope = { kind = "project", column = "project" }
write.delete = "old.user_id = auth.user_id"

[tables.team_members]
scope = { kind = "team", column = "team" }

[tables.plans]
scope = { kind = "project", column = "project" }
"#;

/// What a history's transactions are about.
pub struct Pool {
    pub users: Vec<String>,
    pub projects: Vec<String>,
    pub teams: Vec<String>,
    /// Keys that rows may have, by table.
    pub ids: Vec<Vec<String>>,
}

impl Pool {
    fn any<'a>(list: &'a [String], rng: &mut StdRng) -> &'a str {
        list.choose(rng).map_or("", String::as_str)
    }
}

impl Schema {
    pub fn random(rng: &mut StdRng) -> Schema {
        let mut tables: Vec<Table> = Vec::new();
        for n in 0..rng.random_range(2..=5) {
            let belongs = match (n, rng.random_range(0..10)) {
                (0, _) | (_, 0..5) => Belongs::Project,
                (_, 5 | 6) => Belongs::Both,
                (_, 7 | 8) => Belongs::User,
                _ => Belongs::Everybody,
            };
            let parents: Vec<usize> = (0..tables.len()).filter(|&parent| tables[parent].may_be_parent()).collect();
            let parent = parents.choose(rng).filter(|_| rng.random_bool(0.8));
            let parts = [Parts::List, Parts::Range, Parts::Hash, Parts::Levels].choose(rng).copied();
            let parts = parts.filter(|_| rng.random_bool(0.3));
            let identity = match rng.random_range(0..10) {
                _ if parts.is_some() => Identity::Full,
                0..5 => Identity::Full,
                // The key of a project's rows has the project; of a user's, it would have to have the owner.
                5 | 6 if matches!(belongs, Belongs::Project | Belongs::Everybody) => Identity::Default,
                _ => Identity::Index,
            };
            let values: Vec<Kind> =
                (0..rng.random_range(1..=4)).map(|_| *Kind::ALL.choose(rng).unwrap_or(&Kind::Text)).collect();
            tables.push(Table {
                name: format!("t{n}"),
                belongs,
                key: *[Key::Uuid, Key::Uuid, Key::Text, Key::Bigint].choose(rng).unwrap_or(&Key::Uuid),
                pair: rng.random_bool(0.25) || matches!(parts, Some(Parts::List | Parts::Levels)),
                parent: parent.map(|&parent| (parent, if rng.random_bool(0.5) { "CASCADE" } else { "SET NULL" })),
                gate: values[0] == Kind::Text && rng.random_bool(0.5),
                values,
                clocks: rng.random_bool(0.4),
                identity,
                deferrable: identity == Identity::Full && rng.random_bool(0.3),
                parts,
                hidden: rng.random_bool(0.2),
            });
        }
        Schema { tables, memberships_synced: rng.random_bool(0.75) }
    }

    /// The app's tables, and a log of what was committed, in the order of commits: whoever writes waits for his turn first.
    pub fn ddl(&self) -> String {
        let kept: Vec<String> = KEPT.iter().map(|name| format!(" - '{name}'")).collect();
        let mut sql = format!(
            "CREATE TABLE log (n bigserial PRIMARY KEY, xid xid8 NOT NULL DEFAULT pg_current_xact_id(), tbl text NOT NULL, old jsonb, new jsonb);
             CREATE FUNCTION turn() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN PERFORM pg_advisory_xact_lock({SERIAL}); RETURN NULL; END $$;
             CREATE FUNCTION plain(r jsonb) RETURNS jsonb LANGUAGE sql AS
             $$ SELECT jsonb_object_agg(key, value) FROM jsonb_each_text(r{}) $$;
             CREATE TYPE mood AS ENUM ('sad', 'so so', 'Happy');
             CREATE FUNCTION gate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
               IF NEW.v0 LIKE 'ü99%' THEN RETURN NULL; END IF;
               NEW.v0 := replace(NEW.v0, 'ü1', 'Ü1');
               RETURN NEW;
             END $$;
             CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
               IF TG_OP = 'TRUNCATE' THEN
                 INSERT INTO log (tbl) VALUES (TG_ARGV[0]);
               ELSE
                 INSERT INTO log (tbl, old, new) VALUES (TG_ARGV[0],
                   CASE WHEN TG_OP <> 'INSERT' THEN plain(to_jsonb(OLD)) END,
                   CASE WHEN TG_OP <> 'DELETE' THEN plain(to_jsonb(NEW)) END);
               END IF;
               RETURN NULL;
             END $$;
             {MEMBERSHIPS_DDL}",
            kept.join("")
        );
        sql.extend(MEMBERSHIPS.map(|(name, _)| watched(name)));
        for table in &self.tables {
            sql += &table.ddl(&self.tables);
        }
        sql
    }

    pub fn config(&self) -> String {
        let mut text = MEMBERSHIPS_CONFIG.to_owned();
        if self.memberships_synced {
            text += MEMBERSHIPS_SYNCED;
        }
        for table in &self.tables {
            text += &table.config();
        }
        text
    }

    /// The compared columns of each table, [`MEMBERSHIPS`] first.
    pub fn columns(&self) -> Vec<(String, Columns)> {
        let texts = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), false)).collect();
        let mut all = MEMBERSHIPS.map(|(name, columns)| (name.to_owned(), texts(columns))).to_vec();
        all.extend(self.tables.iter().map(|table| (table.name.clone(), table.columns())));
        all
    }

    /// One statement on a table's row, for Postgres and SQLite alike; but Postgres knows no `ON CONFLICT` of a deferrable key.
    pub fn statement(&self, pool: &Pool, is_postgres: bool, rng: &mut StdRng) -> String {
        let n = rng.random_range(0..self.tables.len());
        let table = &self.tables[n];
        let Table { name, .. } = table;
        let id = Pool::any(&pool.ids[n], rng).to_owned();
        let mut row = format!("id = '{id}'");
        if table.pair {
            let _ = write!(row, " AND part = {}", rng.random_range(0..2));
        }
        let parent = |rng: &mut StdRng| {
            let (parent, _) = table.parent.unwrap_or_default();
            let of = &self.tables[parent].name;
            format!("(SELECT id FROM {of} WHERE id = '{}')", Pool::any(&pool.ids[parent], rng))
        };
        match rng.random_range(0..100) {
            0..40 => {
                let mut values = vec![format!("'{id}'")];
                values.extend(table.pair.then(|| rng.random_range(0..2).to_string()));
                values.extend(table.project().then(|| format!("'{}'", Pool::any(&pool.projects, rng))));
                values.extend(table.owner().then(|| format!("'{}'", Pool::any(&pool.users, rng))));
                values.extend(table.parent.map(|_| parent(rng)));
                values.extend(table.values.iter().map(|kind| kind.literal(rng)));
                let columns: Vec<String> = table.columns().into_iter().map(|(name, _)| name).collect();
                let conflict = if is_postgres && table.deferrable { "" } else { " ON CONFLICT DO NOTHING" };
                format!("INSERT INTO {name} ({}) VALUES ({}){conflict}", columns.join(", "), values.join(", "))
            }
            40..70 => {
                let count = rng.random_range(1..=table.values.len());
                let set = |n: usize| format!("v{n} = {}", table.values[n].value(&format!("v{n}"), rng));
                let sets: Vec<String> = (0..count).map(set).collect();
                format!("UPDATE {name} SET {} WHERE {row}", sets.join(", "))
            }
            70..82 => {
                let null = table.identity == Identity::Full && rng.random_bool(0.1);
                let (column, list) = if table.project() { ("project", &pool.projects) } else { ("owner", &pool.users) };
                let to = if null { "NULL".to_owned() } else { format!("'{}'", Pool::any(list, rng)) };
                match table.belongs {
                    _ if table.keyed() => format!("DELETE FROM {name} WHERE {row}"),
                    Belongs::Everybody => format!("DELETE FROM {name} WHERE {row}"),
                    _ => format!("UPDATE {name} SET {column} = {to} WHERE {row}"),
                }
            }
            82..86 if table.parent.is_some() => format!("UPDATE {name} SET parent = {} WHERE {row}", parent(rng)),
            _ => format!("DELETE FROM {name} WHERE {row}"),
        }
    }

    /// One statement that only SQL from elsewhere may give: memberships, keys, whole tables.
    pub fn foreign_statement(&self, pool: &Pool, rng: &mut StdRng) -> String {
        let (project, user) = (Pool::any(&pool.projects, rng).to_owned(), Pool::any(&pool.users, rng).to_owned());
        let team = Pool::any(&pool.teams, rng).to_owned();
        let member = format!("project = '{project}' AND user_id = '{user}'");
        match rng.random_range(0..100) {
            0..16 => format!("INSERT INTO members VALUES ('{project}', '{user}', 'member') ON CONFLICT DO NOTHING"),
            16..28 => format!("DELETE FROM members WHERE {member}"),
            28..34 => {
                let role = *["owner", "guest", "member"].choose(rng).unwrap_or(&"guest");
                format!("UPDATE members SET role = '{role}' WHERE {member}")
            }
            34..36 => {
                let to = Pool::any(&pool.users, rng);
                format!("UPDATE members SET user_id = '{to}' WHERE {member} AND user_id <> '{to}'")
            }
            36..41 => format!("INSERT INTO team_members VALUES ('{team}', '{user}', 'member') ON CONFLICT DO NOTHING"),
            41..45 => format!("DELETE FROM team_members WHERE team = '{team}' AND user_id = '{user}'"),
            45..47 => format!(
                "UPDATE team_members SET role = CASE role WHEN 'guest' THEN 'member' ELSE 'guest' END
                 WHERE team = '{team}' AND user_id = '{user}'"
            ),
            47..49 => format!(
                "INSERT INTO plans VALUES ('{project}', '{team}') ON CONFLICT (project) DO UPDATE SET team = excluded.team"
            ),
            49..51 => format!("DELETE FROM plans WHERE project = '{project}'"),
            51..57 => {
                let n = rng.random_range(0..self.tables.len());
                let (from, to) = (Pool::any(&pool.ids[n], rng).to_owned(), Pool::any(&pool.ids[n], rng));
                format!("UPDATE {} SET id = '{to}' WHERE id = '{from}'", self.tables[n].name)
            }
            57..58 => {
                let n = rng.random_range(0..self.tables.len());
                format!("TRUNCATE {} CASCADE", self.tables[n].name)
            }
            58..59 if rng.random_bool(0.2) => "TRUNCATE plans".to_owned(),
            59..63 => {
                let n = rng.random_range(0..self.tables.len());
                let Table { name, key, .. } = &self.tables[n];
                let (one, other) = (Pool::any(&pool.ids[n], rng).to_owned(), Pool::any(&pool.ids[n], rng));
                let key = key.sql();
                format!(
                    "UPDATE {name} SET id = CASE WHEN id = '{one}' THEN '{other}'::{key} ELSE '{one}'::{key} END \
                     WHERE id IN ('{one}', '{other}')"
                )
            }
            63..66 => {
                let n = rng.random_range(0..self.tables.len());
                let Table { name, hidden, .. } = &self.tables[n];
                let id = Pool::any(&pool.ids[n], rng);
                let set = if *hidden { "secret = md5(random()::text)" } else { "v0 = v0" };
                format!("UPDATE {name} SET {set} WHERE id = '{id}'")
            }
            _ => self.statement(pool, true, rng),
        }
    }

    /// A migration that leaves the values of rows as they are; it may be refused, such as a partition for which there are
    /// rows elsewhere. `extra` is a number of its own.
    pub fn migration(&self, extra: u64, rng: &mut StdRng) -> String {
        let table = self.tables.choose(rng).unwrap_or(&self.tables[0]);
        let Table { name, key, .. } = table;
        match rng.random_range(0..6) {
            0 => format!("ALTER TABLE {name} ADD COLUMN extra_{extra} int"),
            1 => format!("ALTER TABLE {name} ADD COLUMN extra_{extra} text NOT NULL DEFAULT 'none'"),
            2 => format!("ALTER TABLE {name} ADD COLUMN gone_{extra} int; ALTER TABLE {name} DROP COLUMN gone_{extra}"),
            3 => format!("VACUUM FULL {name}"),
            4 => format!("ALTER TYPE mood ADD VALUE IF NOT EXISTS 'mood {extra}'"),
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
}
