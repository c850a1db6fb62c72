//! Rows of one synced table as values of the app's own type.

use std::marker::PhantomData;

use millstream_schemas::TableSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::watch::Watch;
use crate::{BoxError, Client, Error, IntoParams, IntoSql, Result, SqlValue, Write};

/// A synced table, read and written as values of `T`: a struct whose fields are named as the columns.
///
/// Fields that are `None` are left out of inserts, so that the server's defaults hold. Structs and arrays are written as
/// JSON. For everything else there is SQL.
///
/// ```
/// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
/// # local::run(async |client| {
/// use millstream_client::Uuid;
///
/// #[derive(serde::Serialize, serde::Deserialize)]
/// struct Task {
///     id: Uuid,
///     title: String,
///     done: bool,
/// }
///
/// let tasks = client.table::<Task>("tasks");
/// let task = Task { id: Uuid::now_v7(), title: "Buy milk".into(), done: false };
/// tasks.insert(&task).await?;
/// tasks.update([task.id], &serde_json::json!({"done": true})).await?;
/// assert!(tasks.get([task.id]).await?.is_some_and(|task| task.done));
/// tasks.delete([task.id]).await?;
/// assert_eq!(tasks.all().rows().await?.len(), 0);
/// # Ok(())
/// # })
/// ```
pub struct Table<T> {
    client: Client,
    name: String,
    row: PhantomData<fn() -> T>,
}

impl Client {
    /// Rows of a synced table as values of a type; see [`Table`].
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// #[derive(serde::Deserialize)]
    /// struct Task {
    ///     title: String,
    ///     done: bool,
    /// }
    /// client.execute("INSERT INTO tasks (id, title) VALUES (millstream_uuid(), 'Buy milk')", ()).await?;
    /// let open = client.table::<Task>("tasks").filter("NOT done ORDER BY title", ()).rows().await?;
    /// assert!(open[0].title == "Buy milk" && !open[0].done);
    /// # Ok(())
    /// # })
    /// ```
    pub fn table<T>(&self, name: impl Into<String>) -> Table<T> {
        Table { client: self.clone(), name: name.into(), row: PhantomData }
    }
}

impl<T> Clone for Table<T> {
    fn clone(&self) -> Self {
        Table { client: self.client.clone(), name: self.name.clone(), row: PhantomData }
    }
}

impl<T> Table<T> {
    /// Inserts a row.
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// # use millstream_client::Uuid;
    /// # #[derive(serde::Serialize, serde::Deserialize)]
    /// # struct Task { id: Uuid, title: String, done: bool }
    /// let task = Task { id: Uuid::now_v7(), title: "Buy milk".into(), done: false };
    /// let write = client.table("tasks").insert(&task).await?;
    /// assert_eq!(*write.value(), 1);
    /// # Ok(())
    /// # })
    /// ```
    ///
    /// # Errors
    /// [`Error::Encode`]: the value is not a row of the table, or no table of this name is synced. Otherwise those of
    /// [`Client::execute`].
    pub async fn insert(&self, row: &T) -> Result<Write<usize>>
    where
        T: Serialize,
    {
        let table = self.schema().await?;
        let mut fields = self.fields(row, &table)?;
        fields.retain(|(_, value)| *value != SqlValue::Null);
        let (columns, values): (Vec<String>, Vec<SqlValue>) = fields.into_iter().unzip();
        let places = vec!["?"; columns.len()].join(", ");
        let sql = format!("INSERT INTO {} ({}) VALUES ({places})", quote(&self.name), columns.join(", "));
        self.client.execute(&sql, values).await
    }

    /// Sets the fields of `patch`, a struct or `serde_json::json!({…})`, on the row with this key. The value is the number
    /// of rows changed: 0 where there is none of that key, or it has these values already.
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// # use millstream_client::Uuid;
    /// let tasks = client.table::<serde_json::Value>("tasks");
    /// let write = tasks.update([Uuid::now_v7()], &serde_json::json!({"done": true})).await?;
    /// assert_eq!(*write.value(), 0);
    /// # Ok(())
    /// # })
    /// ```
    ///
    /// # Errors
    /// [`Error::Encode`]: the table has no such column, the key has another number of parts, or no table of this name is synced.
    /// Otherwise those of [`Client::execute`].
    pub async fn update(&self, key: impl IntoParams, patch: &impl Serialize) -> Result<Write<usize>> {
        let table = self.schema().await?;
        let fields = self.fields(patch, &table)?;
        if fields.is_empty() {
            return Err(self.misfit("there is no field to set"));
        }
        let set: Vec<String> = fields.iter().map(|(column, _)| format!("{column} = ?")).collect();
        let mut params: Vec<SqlValue> = fields.into_iter().map(|(_, value)| value).collect();
        let (condition, key) = self.by_key(&table, key)?;
        params.extend(key);
        self.client
            .execute(&format!("UPDATE {} SET {} WHERE {condition}", quote(&self.name), set.join(", ")), params)
            .await
    }

    /// Deletes the row with this key. The value is the number of rows deleted.
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// # use millstream_client::Uuid;
    /// let write = client.table::<serde_json::Value>("tasks").delete([Uuid::now_v7()]).await?;
    /// assert_eq!(*write.value(), 0);
    /// # Ok(())
    /// # })
    /// ```
    ///
    /// # Errors
    /// [`Error::Encode`]: the key has another number of parts, or no table of this name is synced. Otherwise those of
    /// [`Client::execute`].
    pub async fn delete(&self, key: impl IntoParams) -> Result<Write<usize>> {
        let table = self.schema().await?;
        let (condition, key) = self.by_key(&table, key)?;
        self.client.execute(&format!("DELETE FROM {} WHERE {condition}", quote(&self.name)), key).await
    }

    /// The row with this key.
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// # use millstream_client::Uuid;
    /// # #[derive(serde::Serialize, serde::Deserialize)]
    /// # struct Task { id: Uuid, title: String, done: bool }
    /// let task: Option<Task> = client.table("tasks").get([Uuid::now_v7()]).await?;
    /// assert!(task.is_none());
    /// # Ok(())
    /// # })
    /// ```
    ///
    /// # Errors
    /// [`Error::Encode`]: the key has another number of parts, or no table of this name is synced. Otherwise those of
    /// [`Client::query_as`].
    pub async fn get(&self, key: impl IntoParams) -> Result<Option<T>>
    where
        T: DeserializeOwned,
    {
        let table = self.schema().await?;
        let (condition, key) = self.by_key(&table, key)?;
        let sql = format!("SELECT * FROM {} WHERE {condition}", quote(&self.name));
        Ok(self.client.query_as(&sql, key).await?.pop())
    }

    /// The rows for which an SQL condition holds.
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// # use millstream_client::Uuid;
    /// # #[derive(serde::Serialize, serde::Deserialize)]
    /// # struct Task { id: Uuid, title: String, done: bool }
    /// let tasks = client.table::<Task>("tasks");
    /// let found = tasks.filter("title LIKE ? ORDER BY title LIMIT 20", ["Buy %"]).rows().await?;
    /// assert_eq!(found.len(), 0);
    /// # Ok(())
    /// # })
    /// ```
    pub fn filter(&self, condition: &str, params: impl IntoParams) -> Filter<T> {
        let sql = format!("SELECT * FROM {} WHERE {condition}", quote(&self.name));
        Filter { client: self.client.clone(), sql, params: params.into_params(), row: PhantomData }
    }

    /// All rows.
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// for task in client.table::<serde_json::Value>("tasks").all().rows().await? {
    ///     println!("{task}");
    /// }
    /// # Ok(())
    /// # })
    /// ```
    pub fn all(&self) -> Filter<T> {
        self.filter("1", ())
    }

    async fn schema(&self) -> Result<TableSchema> {
        let schema = self.client.schema().await?;
        let table = schema.as_ref().and_then(|schema| schema.table(&self.name));
        table.cloned().ok_or_else(|| self.misfit("no table of this name is synced (wait for `ready`)"))
    }

    fn misfit(&self, source: impl Into<BoxError>) -> Error {
        Error::Encode { table: self.name.clone(), source: source.into() }
    }

    /// The columns, quoted, and values of a serialized struct or map.
    fn fields(&self, value: &impl Serialize, table: &TableSchema) -> Result<Vec<(String, SqlValue)>> {
        let value = serde_json::to_value(value).map_err(|error| self.misfit(error))?;
        let Value::Object(fields) = value else { return Err(self.misfit("it is not a struct or map")) };
        fields
            .into_iter()
            .map(|(name, value)| match table.column(&name) {
                Some(column) => Ok((quote(&name), sql(value, &table.columns[column].r#type))),
                None => Err(self.misfit(format!("there is no column {name}"))),
            })
            .collect()
    }

    fn by_key(&self, table: &TableSchema, key: impl IntoParams) -> Result<(String, Vec<SqlValue>)> {
        let key = key.into_params();
        if key.len() != table.key.len() {
            return Err(self.misfit(format!("the key has {} parts, {} were given", table.key.len(), key.len())));
        }
        let parts: Vec<String> =
            table.key.iter().map(|&column| format!("{} = ?", quote(&table.columns[column].name))).collect();
        Ok((parts.join(" AND "), key))
    }
}

/// Rows of a table for which a condition holds.
pub struct Filter<T> {
    client: Client,
    sql: String,
    params: Vec<SqlValue>,
    row: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Filter<T> {
    /// The rows now.
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// let open = client.table::<serde_json::Value>("tasks").filter("NOT done", ()).rows().await?;
    /// assert!(open.is_empty());
    /// # Ok(())
    /// # })
    /// ```
    ///
    /// # Errors
    /// Those of [`Client::query_as`].
    pub async fn rows(self) -> Result<Vec<T>> {
        self.client.query_as(&self.sql, self.params).await
    }

    /// The rows: at once, and again whenever they may have changed; see [`Client::watch`].
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// # use futures_util::StreamExt;
    /// let mut open = client.table::<serde_json::Value>("tasks").filter("NOT done", ()).watch();
    /// assert_eq!(open.next().await.expect("the client is open")?.len(), 0);
    /// # Ok(())
    /// # })
    /// ```
    pub fn watch(self) -> Watch<Vec<T>>
    where
        T: 'static,
    {
        self.client.watch_as(&self.sql, self.params)
    }
}

fn quote(name: &str) -> String {
    millstream_client_core::sql::quote(name)
}

/// A JSON value as SQLite stores it in a column of a Postgres type.
fn sql(value: Value, r#type: &str) -> SqlValue {
    match value {
        Value::Null => SqlValue::Null,
        // In a column of JSON these are documents like any other.
        Value::Bool(_) | Value::Number(_) | Value::String(_) if matches!(r#type, "json" | "jsonb") => value.into_sql(),
        Value::Bool(value) => value.into_sql(),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(integer), _) => SqlValue::Integer(integer),
            // Beyond 64 signed bits.
            (None, _) if number.is_u64() => SqlValue::Text(number.to_string()),
            (None, Some(real)) => SqlValue::Real(real),
            (None, None) => SqlValue::Text(number.to_string()),
        },
        Value::String(text) => SqlValue::Text(text),
        Value::Array(items) if r#type == "bytea" => {
            SqlValue::Blob(items.iter().map(|item| item.as_u64().unwrap_or_default() as u8).collect())
        }
        other => other.into_sql(),
    }
}
