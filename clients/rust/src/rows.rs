//! Query results, and reading them as the app's own types.

use millstream_client_store::Table;
use serde::de::value::StrDeserializer;
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use crate::{Error, Result, SqlValue};

/// The result of a query.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows {
    /// Names of the columns.
    pub columns: Vec<String>,
    /// The rows, each with one value a column.
    pub rows: Vec<Vec<SqlValue>>,
}

impl From<Table> for Rows {
    fn from(Table { columns, rows }: Table) -> Self {
        Rows { columns, rows }
    }
}

impl Rows {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The rows as values of a type: structs by column name, tuples by place, a single column as itself. Integers 0 and
    /// 1 also read as `bool`; JSON columns read as text.
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |client| {
    /// client.execute("INSERT INTO tasks (id, title) VALUES (millstream_uuid(), 'Buy milk')", ()).await?;
    /// let rows = client.query("SELECT title, done FROM tasks", ()).await?;
    /// assert_eq!(rows.deserialize::<(String, bool)>()?, [("Buy milk".to_owned(), false)]);
    /// # Ok(())
    /// # })
    /// ```
    ///
    /// # Errors
    /// [`Error::Decode`]: a row does not fit the type; its source names the column.
    pub fn deserialize<T: DeserializeOwned>(&self) -> Result<Vec<T>> {
        self.rows
            .iter()
            .map(|values| {
                T::deserialize(Row { columns: &self.columns, values }).map_err(|error| Error::Decode(error.into()))
            })
            .collect()
    }
}

#[derive(Debug)]
struct RowError(String);

impl std::fmt::Display for RowError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for RowError {}

impl serde::de::Error for RowError {
    fn custom<T: std::fmt::Display>(message: T) -> Self {
        RowError(message.to_string())
    }
}

struct Row<'a> {
    columns: &'a [String],
    values: &'a [SqlValue],
}

impl<'a> Row<'a> {
    /// The one column of the row.
    fn single(&self) -> std::result::Result<Cell<'a>, RowError> {
        match self.values {
            [value] => Ok(Cell(value)),
            values => Err(RowError(format!("expected one column, found {}", values.len()))),
        }
    }
}

macro_rules! single {
    ($($method:ident)+) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> std::result::Result<V::Value, RowError> {
            self.single()?.$method(visitor)
        })+
    };
}

impl<'de> Deserializer<'de> for Row<'_> {
    type Error = RowError;

    single! { deserialize_bool deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_u8 deserialize_u16
    deserialize_u32 deserialize_u64 deserialize_f32 deserialize_f64 deserialize_char deserialize_str deserialize_string
    deserialize_bytes deserialize_byte_buf deserialize_option deserialize_identifier }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> std::result::Result<V::Value, RowError> {
        self.deserialize_map(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> std::result::Result<V::Value, RowError> {
        visitor.visit_map(Cells { row: self, place: 0 })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> std::result::Result<V::Value, RowError> {
        self.deserialize_map(visitor)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> std::result::Result<V::Value, RowError> {
        visitor.visit_seq(Cells { row: self, place: 0 })
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _: usize, visitor: V) -> std::result::Result<V::Value, RowError> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: usize,
        visitor: V,
    ) -> std::result::Result<V::Value, RowError> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> std::result::Result<V::Value, RowError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> std::result::Result<V::Value, RowError> {
        self.single()?.deserialize_enum(name, variants, visitor)
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> std::result::Result<V::Value, RowError> {
        visitor.visit_unit()
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> std::result::Result<V::Value, RowError> {
        visitor.visit_unit()
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> std::result::Result<V::Value, RowError> {
        visitor.visit_unit()
    }
}

struct Cells<'a> {
    row: Row<'a>,
    place: usize,
}

impl<'de> MapAccess<'de> for Cells<'_> {
    type Error = RowError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> std::result::Result<Option<K::Value>, RowError> {
        match self.row.columns.get(self.place) {
            Some(name) => seed.deserialize(StrDeserializer::new(name)).map(Some),
            None => Ok(None),
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> std::result::Result<V::Value, RowError> {
        let place = self.place;
        self.place += 1;
        let value = self.row.values.get(place).ok_or_else(|| RowError("a row is too short".into()))?;
        seed.deserialize(Cell(value))
            .map_err(|error| RowError(format!("column \"{}\": {error}", self.row.columns[place])))
    }
}

impl<'de> SeqAccess<'de> for Cells<'_> {
    type Error = RowError;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> std::result::Result<Option<T::Value>, RowError> {
        let value = self.row.values.get(self.place);
        self.place += 1;
        value.map(|value| seed.deserialize(Cell(value))).transpose()
    }
}

struct Cell<'a>(&'a SqlValue);

impl<'de> Deserializer<'de> for Cell<'_> {
    type Error = RowError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> std::result::Result<V::Value, RowError> {
        match self.0 {
            SqlValue::Null => visitor.visit_unit(),
            SqlValue::Integer(value) => visitor.visit_i64(*value),
            SqlValue::Real(value) => visitor.visit_f64(*value),
            SqlValue::Text(value) => visitor.visit_str(value),
            SqlValue::Blob(value) => visitor.visit_bytes(value),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> std::result::Result<V::Value, RowError> {
        match self.0 {
            SqlValue::Integer(value @ (0 | 1)) => visitor.visit_bool(*value == 1),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> std::result::Result<V::Value, RowError> {
        match self.0 {
            SqlValue::Integer(value) => visitor.visit_f64(*value as f64),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> std::result::Result<V::Value, RowError> {
        match self.0 {
            SqlValue::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> std::result::Result<V::Value, RowError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> std::result::Result<V::Value, RowError> {
        match self.0 {
            SqlValue::Blob(value) => visitor.visit_seq(serde::de::value::SeqDeserializer::new(value.iter().copied())),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> std::result::Result<V::Value, RowError> {
        match self.0 {
            SqlValue::Text(value) => {
                visitor.visit_enum(serde::de::IntoDeserializer::<RowError>::into_deserializer(value.as_str()))
            }
            other => Err(RowError(format!("expected text for an enum, found {}", other.data_type()))),
        }
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 char str string bytes byte_buf unit unit_struct tuple tuple_struct
        map struct identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, serde::Deserialize)]
    struct Task {
        id: uuid::Uuid,
        title: String,
        done: bool,
        note: Option<String>,
        weight: f64,
    }

    fn rows() -> Rows {
        Rows {
            columns: ["id", "title", "done", "note", "weight", "extra"].map(str::to_owned).to_vec(),
            rows: vec![vec![
                SqlValue::Text(uuid::Uuid::nil().to_string()),
                SqlValue::Text("milk".into()),
                SqlValue::Integer(1),
                SqlValue::Null,
                SqlValue::Integer(2),
                SqlValue::Blob(vec![1]),
            ]],
        }
    }

    #[test]
    fn rows_become_structs_tuples_and_values() {
        let task = Task { id: uuid::Uuid::nil(), title: "milk".into(), done: true, note: None, weight: 2.0 };
        assert_eq!(rows().deserialize::<Task>().unwrap(), [task]);
        let pair =
            Rows { columns: vec!["a".into(), "b".into()], rows: vec![vec![SqlValue::Integer(1), SqlValue::Null]] };
        assert_eq!(pair.deserialize::<(i64, Option<String>)>().unwrap(), [(1, None)]);
        let count = Rows { columns: vec!["n".into()], rows: vec![vec![SqlValue::Integer(7)]] };
        assert_eq!(count.deserialize::<u32>().unwrap(), [7]);
        assert_eq!(count.deserialize::<Option<i64>>().unwrap(), [Some(7)]);
    }

    #[test]
    fn what_does_not_fit_names_the_column() {
        #[derive(Debug, serde::Deserialize)]
        #[expect(dead_code, reason = "only read by the deserializer")]
        struct Wrong {
            title: i64,
        }
        let error = rows().deserialize::<Wrong>().unwrap_err();
        assert_eq!(error.code(), "decode");
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains("\"title\""), "{cause}");
    }
}
