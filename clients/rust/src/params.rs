//! Parameters of statements.

use crate::SqlValue;

/// Something that a statement takes as a parameter.
pub trait IntoSql {
    /// The value as SQLite stores it.
    fn into_sql(self) -> SqlValue;
}

macro_rules! into_sql {
    ($($type:ty: $value:ident => $sql:expr;)+) => {
        $(impl IntoSql for $type {
            fn into_sql(self) -> SqlValue {
                let $value = self;
                $sql
            }
        })+
    };
}

into_sql! {
    SqlValue: value => value;
    bool: value => SqlValue::Integer(value.into());
    i64: value => SqlValue::Integer(value);
    i32: value => SqlValue::Integer(value.into());
    i16: value => SqlValue::Integer(value.into());
    u32: value => SqlValue::Integer(value.into());
    u16: value => SqlValue::Integer(value.into());
    u8: value => SqlValue::Integer(value.into());
    // Numbers beyond SQLite's 64 signed bits stay exact as text.
    u64: value => i64::try_from(value).map_or_else(|_| SqlValue::Text(value.to_string()), SqlValue::Integer);
    usize: value => (value as u64).into_sql();
    f64: value => SqlValue::Real(value);
    f32: value => SqlValue::Real(value.into());
    &str: value => SqlValue::Text(value.to_owned());
    String: value => SqlValue::Text(value);
    &String: value => SqlValue::Text(value.clone());
    Vec<u8>: value => SqlValue::Blob(value);
    &[u8]: value => SqlValue::Blob(value.to_vec());
    uuid::Uuid: value => SqlValue::Text(value.to_string());
    &uuid::Uuid: value => SqlValue::Text(value.to_string());
    serde_json::Value: value => SqlValue::Text(value.to_string());
}

impl<T: IntoSql> IntoSql for Option<T> {
    fn into_sql(self) -> SqlValue {
        self.map_or(SqlValue::Null, T::into_sql)
    }
}

/// The parameters of a statement: `()`, a tuple, an array, a `Vec<SqlValue>` or [`params!`](crate::params).
pub trait IntoParams {
    /// The values, in order.
    fn into_params(self) -> Vec<SqlValue>;
}

impl IntoParams for () {
    fn into_params(self) -> Vec<SqlValue> {
        Vec::new()
    }
}

impl IntoParams for Vec<SqlValue> {
    fn into_params(self) -> Vec<SqlValue> {
        self
    }
}

impl<T: IntoSql, const N: usize> IntoParams for [T; N] {
    fn into_params(self) -> Vec<SqlValue> {
        self.into_iter().map(T::into_sql).collect()
    }
}

macro_rules! tuples {
    ($($($name:ident)+;)+) => {
        $(impl<$($name: IntoSql),+> IntoParams for ($($name,)+) {
            #[expect(non_snake_case, reason = "the type parameters name the tuple's parts")]
            fn into_params(self) -> Vec<SqlValue> {
                let ($($name,)+) = self;
                vec![$($name.into_sql()),+]
            }
        })+
    };
}

tuples! {
    A;
    A B;
    A B C;
    A B C D;
    A B C D E;
    A B C D E F;
    A B C D E F G;
    A B C D E F G H;
    A B C D E F G H I;
    A B C D E F G H I J;
    A B C D E F G H I J K;
    A B C D E F G H I J K L;
}

/// Parameters of different types: `params![id, "title", true]`.
#[macro_export]
macro_rules! params {
    ($($value:expr),* $(,)?) => {
        ::std::vec![$($crate::IntoSql::into_sql($value)),*] as ::std::vec::Vec<$crate::SqlValue>
    };
}
