//! A table as the database has it.

use millstream_catalog::ClockNames;
use millstream_catalog::Misfit;

/// Names of the triggers: on insert, on update. The same for both policies, so that one takes the other's place.
pub const TRIGGERS: [&str; 2] = ["millstream_clocks_insert", "millstream_clocks_update"];

/// A table as the database has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// As written on the command line or in the file.
    pub name: String,
    /// Quoted for SQL.
    pub sql_name: String,
    /// `relkind`.
    pub kind: String,
    /// The table that it is a partition of, quoted.
    pub partition_of: Option<String>,
    /// Whether it has a primary key.
    pub has_key: bool,
    /// Its columns.
    pub columns: Vec<FoundColumn>,
    /// Its triggers for each row before insert or update.
    pub triggers: Vec<FoundTrigger>,
    /// Whether some row has a value in the column that is to be `client_id`.
    pub client_id_used: bool,
    /// Names of the columns that tell which change is newer.
    pub clocks: ClockNames,
    /// What `writable` declares.
    pub writable: Vec<String>,
    /// What its replica identity lacks, and the remedy.
    pub identity: Vec<Misfit>,
}

/// A column.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FoundColumn {
    /// Its name.
    pub name: String,
    /// As `format_type` writes it.
    pub sql_type: String,
    /// Whether it may not be null.
    pub not_null: bool,
    /// Whether it is computed.
    pub generated: bool,
    /// Whether a foreign key or an index names it.
    pub referenced: bool,
}

/// A trigger.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FoundTrigger {
    /// Its name.
    pub name: String,
    /// `schema.function`, quoted.
    pub function: String,
    /// The function's arguments.
    pub arguments: Vec<String>,
    /// Whether it fires.
    pub enabled: bool,
}

impl Found {
    /// Whether a trigger of ours is among them.
    pub fn has_triggers(&self) -> bool {
        self.triggers.iter().any(|trigger| TRIGGERS.contains(&trigger.name.as_str()))
    }

    /// Triggers of the application that fire after ours: Postgres goes by name.
    pub fn later_triggers(&self) -> impl Iterator<Item = &str> {
        let names = self.triggers.iter().map(|trigger| trigger.name.as_str());
        names.filter(|name| *name > TRIGGERS[0] && !TRIGGERS.contains(name))
    }
}
