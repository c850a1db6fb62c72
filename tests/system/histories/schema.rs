//! Random schemas: memberships of projects, of teams, and of projects through teams; and two to five tables of rows that
//! belong to projects, users, both, or to everybody.

use std::fmt::Write;

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

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
}

impl Kind {
    const ALL: [Kind; 5] = [Kind::Text, Kind::Bigint, Kind::Boolean, Kind::Numeric, Kind::Jsonb];

    fn sql(self) -> &'static str {
        match self {
            Kind::Text => "text",
            Kind::Bigint => "bigint",
            Kind::Boolean => "boolean",
            Kind::Numeric => "numeric",
            Kind::Jsonb => "jsonb",
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
        }
    }
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
    /// The key has two columns.
    pair: bool,
    /// A table that rows refer to, and what its delete does to them.
    parent: Option<(usize, &'static str)>,
    values: Vec<Kind>,
    clocks: bool,
    /// `REPLICA IDENTITY FULL`, or an index over scope and key.
    full: bool,
}

impl Table {
    fn project(&self) -> bool {
        matches!(self.belongs, Belongs::Project | Belongs::Both)
    }

    fn owner(&self) -> bool {
        matches!(self.belongs, Belongs::User | Belongs::Both)
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
        let null = if self.full { "" } else { " NOT NULL" };
        let mut columns = vec!["id uuid NOT NULL".to_owned()];
        columns.extend(self.pair.then(|| "part int NOT NULL".to_owned()));
        columns.extend(self.project().then(|| format!("project uuid{null}")));
        columns.extend(self.owner().then(|| format!("owner text{null}")));
        if let Some((parent, on_delete)) = self.parent {
            columns.push(format!(
                "parent uuid REFERENCES {} ON UPDATE CASCADE ON DELETE {on_delete}",
                tables[parent].name
            ));
        }
        columns.extend(self.values.iter().enumerate().map(|(n, kind)| format!("v{n} {}", kind.sql())));
        if self.clocks {
            columns.push("field_clocks jsonb NOT NULL DEFAULT '{}'".to_owned());
            columns.push("updated_at timestamptz NOT NULL DEFAULT now()".to_owned());
            columns.push("client_id uuid".to_owned());
        }
        let key = if self.pair { "id, part" } else { "id" };
        let identity = if self.full {
            format!("ALTER TABLE {name} REPLICA IDENTITY FULL;")
        } else {
            let project = if self.project() { "project, " } else { "" };
            let owner = if self.owner() { "owner, " } else { "" };
            format!(
                "CREATE UNIQUE INDEX {name}_identity ON {name} ({project}{owner}{key});\n\
                 ALTER TABLE {name} REPLICA IDENTITY USING INDEX {name}_identity;"
            )
        };
        format!("CREATE TABLE {name} ({}, PRIMARY KEY ({key}));\n{identity}\n{}", columns.join(", "), watched(name))
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
        format!(
            "[tables.{name}]\nscope = {scope}\nwritable = [{}]\ndelete_missing = \"accept\"\n\
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
         CREATE TRIGGER z_note AFTER INSERT OR UPDATE OR DELETE ON {name} FOR EACH ROW EXECUTE FUNCTION note();\n\
         CREATE TRIGGER z_note_truncate AFTER TRUNCATE ON {name} FOR EACH STATEMENT EXECUTE FUNCTION note();\n"
    )
}

#[derive(Clone, Debug)]
pub struct Schema {
    /// Behind [`MEMBERSHIPS`].
    pub tables: Vec<Table>,
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
            let parents: Vec<usize> = (0..tables.len()).filter(|&parent| !tables[parent].pair).collect();
            let parent = parents.choose(rng).filter(|_| rng.random_bool(0.8));
            tables.push(Table {
                name: format!("t{n}"),
                belongs,
                pair: rng.random_bool(0.25),
                parent: parent.map(|&parent| (parent, if rng.random_bool(0.5) { "CASCADE" } else { "SET NULL" })),
                values: (0..rng.random_range(1..=4)).map(|_| *Kind::ALL.choose(rng).unwrap_or(&Kind::Text)).collect(),
                clocks: rng.random_bool(0.4),
                full: rng.random_bool(0.5),
            });
        }
        Schema { tables }
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
             CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
               IF TG_OP = 'TRUNCATE' THEN
                 INSERT INTO log (tbl) VALUES (TG_TABLE_NAME);
               ELSE
                 INSERT INTO log (tbl, old, new) VALUES (TG_TABLE_NAME,
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

    /// One statement on a table's row, for Postgres and SQLite alike.
    pub fn statement(&self, pool: &Pool, rng: &mut StdRng) -> String {
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
                format!(
                    "INSERT INTO {name} ({}) VALUES ({}) ON CONFLICT DO NOTHING",
                    columns.join(", "),
                    values.join(", ")
                )
            }
            40..70 => {
                let count = rng.random_range(1..=table.values.len());
                let sets: Vec<String> =
                    (0..count).map(|n| format!("v{n} = {}", table.values[n].literal(rng))).collect();
                format!("UPDATE {name} SET {} WHERE {row}", sets.join(", "))
            }
            70..82 => {
                let null = table.full && rng.random_bool(0.1);
                let (column, list) = if table.project() { ("project", &pool.projects) } else { ("owner", &pool.users) };
                let to = if null { "NULL".to_owned() } else { format!("'{}'", Pool::any(list, rng)) };
                match table.belongs {
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
            _ => self.statement(pool, rng),
        }
    }
}
