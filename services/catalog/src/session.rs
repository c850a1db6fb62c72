//! `[session]` of the file: what the executor's sessions share with the application's.

use std::collections::BTreeMap;

use serde::Deserialize;
use sqlx::PgConnection;

/// The search path and settings that the application's triggers, policies and predicates see when a client's change is applied.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SessionConfig {
    /// Where names without a schema are looked for. Absent: as the database has it for everybody.
    pub search_path: Option<String>,
    /// Settings of the application's own, each by an SQL expression over `auth.user_id`.
    pub settings: BTreeMap<String, String>,
}

impl SessionConfig {
    /// Has a session look for names without a schema as the application does.
    ///
    /// # Errors
    /// Postgres cannot be asked, or takes the path for none.
    pub async fn set_search_path(&self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        sqlx::query(
            "SELECT set_config('search_path', coalesce($1, ( \
               SELECT substr(setting, length('search_path=') + 1) FROM pg_db_role_setting, unnest(setconfig) AS setting \
               WHERE setrole = 0 AND setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database()) \
               AND starts_with(setting, 'search_path=')), 'public'), false)",
        )
        .bind(&self.search_path)
        .execute(connection)
        .await
        .map(drop)
    }

    /// SQL that makes the settings for the author `$1` in the transaction at hand; none if there are none.
    pub fn settings_sql(&self) -> Option<String> {
        let set =
            |(name, sql): (&String, &String)| format!("set_config('{name}', coalesce((\n{sql}\n)::text, ''), true)");
        let all: Vec<String> = self.settings.iter().map(set).collect();
        (!all.is_empty())
            .then(|| format!("SELECT {} FROM (SELECT $1::text AS user_id OFFSET 0) AS auth", all.join(", ")))
    }
}
