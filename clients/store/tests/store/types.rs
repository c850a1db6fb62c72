//! Values compare the same before and after their confirmation: times in one spelling, numbers as they are declared.

use millstream_client_core::replica::Step;
use millstream_client_store::{Edit, StoreError};
use millstream_schemas::{Code, ColumnSchema, Numeric, Schema, TableChanges, TableOp, TableSchema};
use rusqlite::types::Value;

use super::fixture::{Fixture, column, confirmed, failed};
use super::wide::with_schema;

fn table(columns: Vec<ColumnSchema>) -> Fixture {
    let table = TableSchema {
        name: "t".into(),
        columns,
        key: vec![0],
        scopes: Vec::new(),
        references: Vec::new(),
        clocks: None,
    };
    with_schema(&Schema { version: "1".into(), tables: vec![table] })
}

/// A column's type, a value as SQL, and the value that the row has at once.
const SPELT: [(&str, &str, &str); 61] = [
    ("timestamp with time zone", "'2026-01-02T03:04:05Z'", "2026-01-02 03:04:05+00"),
    ("timestamp with time zone", "'2026-01-02 03:04'", "2026-01-02 03:04:00+00"),
    ("timestamp with time zone", "'2026-01-02T03:04:05.120+01:00'", "2026-01-02 02:04:05.12+00"),
    ("timestamp with time zone", "'2026-01-02T00:04:05.123456789+0530'", "2026-01-01 18:34:05.123457+00"),
    ("timestamp with time zone", "'2026-01-02 03:04:05 UTC'", "2026-01-02 03:04:05+00"),
    ("timestamp with time zone", "'2026-01-02'", "2026-01-02 00:00:00+00"),
    ("timestamp with time zone", "datetime('2026-01-02 03:04:05')", "2026-01-02 03:04:05+00"),
    ("timestamp with time zone", "strftime('%Y-%m-%dT%H:%M:%fZ', '2026-01-02 03:04:05')", "2026-01-02 03:04:05+00"),
    ("timestamp with time zone", "json_extract('{\"at\":\"2026-01-02T03:04:05Z\"}', '$.at')", "2026-01-02 03:04:05+00"),
    ("timestamp(0) with time zone", "'2026-12-31T23:59:59.5Z'", "2027-01-01 00:00:00+00"),
    ("timestamp without time zone", "'2026-01-02T03:04:05+02'", "2026-01-02 03:04:05"),
    ("timestamp without time zone", "CAST('2026-01-02T03:04' AS BLOB)", "2026-01-02T03:04"),
    ("date", "'2026-1-2'", "2026-01-02"),
    ("date", "'2026-01-02T23:04:05-05:00'", "2026-01-02"),
    ("date", "date('2026-01-02', '+1 day')", "2026-01-03"),
    ("time without time zone", "'3:04'", "03:04:00"),
    ("time without time zone", "time('2026-01-02 03:04:05')", "03:04:05"),
    ("uuid", "'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
    ("time without time zone", "'24:00'", "24:00:00"),
    ("time(0) without time zone", "'23:59:59.5'", "24:00:00"),
    ("time with time zone", "'8:00'", "08:00:00+00"),
    ("time with time zone", "'2026-01-02 08:00:30.50Z'", "08:00:30.5+00"),
    ("time with time zone", "'08:00 -130'", "08:00:00-01:30"),
    ("time(1) with time zone", "'08:00:00.25+05:30:15'", "08:00:00.3+05:30:15"),
    ("timestamp(3) with time zone", "'2026-01-02T03:04:05.0005+01:30'", "2026-01-02 01:34:05.001+00"),
    ("timestamp with time zone", "'2026-01-02T24:00Z'", "2026-01-03 00:00:00+00"),
    ("numeric(6,2)", "1.5", "1.50"),
    // Rounded away from zero in the middle.
    ("numeric(6,2)", "1.005", "1.01"),
    ("numeric(6,2)", "'-1.005'", "-1.01"),
    ("numeric(6,2)", "'9999.995'", "10000.00"),
    ("numeric(6,2)", "'-0.004'", "0.00"),
    ("numeric(6,2)", "'.5'", "0.50"),
    ("numeric(6,2)", "'+007.'", "7.00"),
    ("numeric(6,2)", "'12345e-4'", "1.23"),
    ("numeric(6,2)", "'nan'", "NaN"),
    ("numeric(3,-2)", "'12350'", "12400"),
    ("numeric(3,-2)", "49", "0"),
    ("numeric(2,4)", "'1.00049e-2'", "0.0100"),
    ("numeric", "'-INF'", "-Infinity"),
    ("numeric", "'-0.00'", "0.00"),
    ("numeric", "'1.2345678901234567890e2'", "123.45678901234567890"),
    ("character(3)", "'a'", "a  "),
    ("character(3)", "'ab    '", "ab "),
    // Numbers of SQLite's.
    ("real", "0.1", "0.1"),
    ("real", "1.23456789", "1.2345679"),
    ("real", "16777217", "16777216.0"),
    ("real", "'Infinity'", "Inf"),
    ("double precision", "1", "1.0"),
    ("double precision", "' 1E5 '", "100000.0"),
    ("double precision", "'-inf'", "-Inf"),
    ("double precision", "'nan'", "NaN"),
    ("boolean", "'yes'", "1"),
    ("boolean", "' FALSE '", "0"),
    ("boolean", "true", "1"),
    ("boolean", "'perhaps'", "perhaps"),
    ("bytea", "'ab'", "ab"),
    ("bytea", "x'6162'", "ab"),
    // What Postgres does with these is not known here, or is nothing.
    ("timestamp with time zone", "'tomorrow'", "tomorrow"),
    ("timestamp with time zone", "NULL", "-"),
    ("timestamp with time zone", "'infinity'", "infinity"),
    ("text", "'2026-01-02T03:04:05Z'", "2026-01-02T03:04:05Z"),
];

#[test]
fn values_have_one_spelling_before_and_after_their_confirmation() {
    for (sql_type, value, expected) in SPELT {
        let mut f = table(vec![column("id", "text", true), column("c", sql_type, true), column("n", "integer", true)]);
        f.write(&["CREATE TABLE drafts (id, c)"]).unwrap();
        f.write(&[
            "CREATE TRIGGER publish AFTER INSERT ON drafts BEGIN INSERT INTO t (id, c) VALUES (NEW.id, NEW.c); END",
        ])
        .unwrap();
        for statement in [
            format!("INSERT INTO t (id, c) VALUES ('a', {value})"),
            format!("INSERT INTO t (id, c) VALUES ('a', {value}) ON CONFLICT DO UPDATE SET n = 1"),
            format!("INSERT INTO t (id, c) VALUES ('a', 'none') ON CONFLICT DO UPDATE SET c = {value}, n = 2"),
            format!("INSERT INTO t (id) VALUES ('b'); UPDATE t SET c = {value} WHERE id = 'b'"),
            format!("INSERT INTO t (id, c) VALUES ('c', 'none'); REPLACE INTO t (id, c) VALUES ('c', {value})"),
            format!("UPDATE OR IGNORE t SET (c, n) = ({value}, 3) WHERE id = 'a'"),
            format!("INSERT INTO drafts VALUES ('d', {value})"),
        ] {
            f.write(&statement.split("; ").collect::<Vec<_>>()).unwrap();
            let shown = f.read("SELECT DISTINCT CAST(c AS TEXT) FROM t WHERE c IS NOT NULL");
            assert_eq!(shown, if expected == "-" { "" } else { expected }, "{sql_type}: {statement}");
        }
        let recorded = f.read(
            "SELECT DISTINCT v.value FROM local_changes, json_each(columns) c, json_each(vals) v \
             WHERE c.key = v.key AND c.value = 'c' AND v.value IS NOT 'none' AND v.value IS NOT '\\x6e6f6e65'",
        );
        let text = match (sql_type, expected) {
            ("boolean", "1") => "t",
            ("boolean", "0") => "f",
            ("bytea", _) => "\\x6162",
            ("real" | "double precision", "Inf") => "Infinity",
            ("real" | "double precision", "-Inf") => "-Infinity",
            ("real" | "double precision", "16777216.0") => "1.6777216e+07",
            ("real" | "double precision", _) => expected.strip_suffix(".0").unwrap_or(expected),
            _ => expected,
        };
        assert_eq!(recorded, text, "{sql_type} {value}");
        // Another spelling of what is there is no change, and is not shown.
        let before = f.changes();
        f.write(&[&format!("UPDATE t SET c = {value}")]).unwrap();
        assert_eq!(f.changes(), before, "{sql_type} {value}");
        assert_eq!(f.read("SELECT count(DISTINCT coalesce(c, '-')) FROM t"), "1");
    }
}

/// In the order of the values, whoever wrote them, and the server's word for them changes nothing.
#[test]
fn times_are_in_order_before_and_after_their_confirmation() {
    let mut f = table(vec![column("id", "text", true), column("at", "timestamp with time zone", true)]);
    f.write(&[
        "INSERT INTO t VALUES ('1', '2026-11-29T08:00Z')",
        "INSERT INTO t VALUES ('2', '2026-11-29 09:00:00.5+00')",
        "INSERT INTO t VALUES ('3', '2026-11-29T05:00:01-04:00')",
        "INSERT INTO t VALUES ('4', '2026-11-29 10:00')",
        "INSERT INTO t VALUES ('5', 'infinity')",
    ])
    .unwrap();
    let row = |id: &str, at: &str| vec![Some(id.to_owned()), Some(at.to_owned())];
    let upsert = |rows| Step::Rows(vec![TableChanges { table: "t".into(), op: TableOp::Upsert, columns: None, rows }]);
    f.apply(vec![upsert(vec![row("0", "2026-11-29 07:59:59+00"), row("6", "2026-11-29 09:00:00.25+00")])]);
    let order = "SELECT group_concat(id, '') FROM (SELECT id FROM t ORDER BY at)";
    let all = "SELECT id, at FROM t ORDER BY id";
    assert_eq!(f.read(order), "0162345");
    let before = f.read(all);
    let mine = [
        ("1", "2026-11-29 08:00:00+00"),
        ("2", "2026-11-29 09:00:00.5+00"),
        ("3", "2026-11-29 09:00:01+00"),
        ("4", "2026-11-29 10:00:00+00"),
        ("5", "infinity"),
    ];
    f.apply(vec![upsert(mine.map(|(id, at)| row(id, at)).to_vec()), confirmed(1)]);
    assert_eq!(f.read(all), before);
    assert_eq!(
        f.read("SELECT count(*) FROM t WHERE at > '2026-11-29 08:00:00+00' AND at <= '2026-11-29 09:00:01+00'"),
        "3"
    );
}

/// What a person corrects a rejected change to is in the same spelling.
#[test]
fn an_edit_is_spelt_as_the_server_spells_it() {
    let price = |declared| ColumnSchema { numeric: declared, ..column("c", "numeric(6,2)", true) };
    for (of, given, recorded, shown) in [
        (column("c", "timestamp with time zone", true), "2026-11-29T08:00Z", "2026-11-29 08:00:00+00", None),
        (price(None), "1.005", "1.01", None),
        (price(Some(Numeric::Integer)), "-1.005", "-1.01", Some("-101")),
        (price(Some(Numeric::Real)), "1.005", "1.01", None),
        (column("c", "real", true), "1.23456789", "1.2345679", None),
        (column("c", "time with time zone", true), "8:00Z", "08:00:00+00", None),
        (column("c", "character(3)", true), "a", "a  ", None),
    ] {
        let sql_type = of.r#type.clone();
        let mut f = table(vec![column("id", "text", true), of]);
        f.write(&["INSERT INTO t VALUES ('a', 7)"]).unwrap();
        f.apply(vec![failed(1, Code::InvalidValue)]);
        f.store.edit(1, &[Edit { change_id: None, column: "c".into(), value: Some(given.into()) }]).unwrap();
        assert_eq!(f.read("SELECT vals ->> 1 FROM local_changes"), recorded, "{sql_type}");
        assert_eq!(f.read("SELECT c FROM t"), shown.unwrap_or(recorded), "{sql_type}");
    }
}

/// The number that SQLite has is sent, to the last bit.
#[test]
fn floating_point_numbers_leave_as_they_are() {
    let mut f = table(vec![
        column("id", "text", true),
        column("c", "double precision", true),
        numeric("w", "numeric", Numeric::Real),
    ]);
    for (index, number) in [
        f64::MAX,
        f64::MIN_POSITIVE,
        5e-324,
        -1e308,
        1.234_567_890_123_456_7e-200,
        6.543_210_987_654_321e256,
        1e15,
        1e16,
        123_456_789_012_345_680.0,
        1e23,
        9_007_199_254_740_993.0,
        0.1 + 0.2,
        f64::INFINITY,
    ]
    .into_iter()
    .enumerate()
    {
        let values = [Value::Text(index.to_string()), Value::Real(number)];
        f.store.write(None, |tx| tx.execute("INSERT INTO t VALUES (?1, ?2, ?2)", &values)).unwrap();
        let sent = f.read(&format!("SELECT vals ->> 1 FROM local_changes WHERE tbl = 't' AND key = '[\"{index}\"]'"));
        assert_eq!(sent.parse::<f64>().unwrap().to_bits(), number.to_bits(), "{sent}");
        // And of a row of the server, which is kept beside a change of it.
        let row = vec![Some(format!("s{index}")), Some(sent.clone()), Some(sent)];
        f.apply(vec![Step::Rows(vec![TableChanges {
            table: "t".into(),
            op: TableOp::Upsert,
            columns: None,
            rows: vec![row],
        }])]);
        f.write(&[&format!("UPDATE t SET w = 2.5 WHERE id = 's{index}'")]).unwrap();
        let kept = f.read(&format!("SELECT row ->> 'c' FROM millstream_base WHERE key = '[\"s{index}\"]'"));
        assert_eq!(kept.parse::<f64>().unwrap().to_bits(), number.to_bits(), "{kept}");
    }
}

/// A trigger on a synced table fires once for a respelling, as an update of the row, so that a trigger which keeps `NEW` ends with the
/// value that stays. It does not fire where there was nothing to respell.
#[test]
fn triggers_of_the_app_hear_of_respellings() {
    let mut f = table(vec![
        column("id", "text", true),
        column("at", "timestamp with time zone", true),
        column("price", "numeric(6,2)", true),
        column("title", "text", true),
    ]);
    f.write(&["CREATE TABLE seen (id PRIMARY KEY, at)", "CREATE TABLE heard (op, old, new)"]).unwrap();
    for (event, old) in [("INSERT", "'-'"), ("UPDATE", "OLD.at"), ("UPDATE OF title", "OLD.title")] {
        let new = if event == "UPDATE OF title" { "title" } else { "at" };
        let sql = format!(
            "CREATE TRIGGER \"see {event}\" AFTER {event} ON t BEGIN INSERT OR REPLACE INTO seen SELECT id, at FROM t WHERE id = NEW.id; \
             INSERT INTO heard VALUES ('{event}', {old}, NEW.{new}); END"
        );
        f.write(&[&sql]).unwrap();
    }
    let mut heard = |sql: &str| {
        f.write(&[sql]).unwrap();
        let heard = f.read("SELECT * FROM heard ORDER BY rowid");
        f.write(&["DELETE FROM heard"]).unwrap();
        (heard, f.read("SELECT at FROM seen"))
    };
    let stored = |text: &str| text.to_owned();
    let (events, seen) = heard("INSERT INTO t VALUES ('a', '2026-11-29T08:00Z', '1.005', 'x')");
    let mut lines: Vec<&str> = events.lines().collect();
    lines.sort_unstable();
    let expected = ["INSERT|-|2026-11-29T08:00Z", "UPDATE|2026-11-29T08:00Z|2026-11-29 08:00:00+00"];
    assert_eq!((lines, seen), (expected.to_vec(), stored("2026-11-29 08:00:00+00")));
    let (events, seen) = heard("UPDATE t SET at = '2026-11-29T09:00Z'");
    let mut lines: Vec<&str> = events.lines().collect();
    lines.sort_unstable();
    let expected =
        ["UPDATE|2026-11-29 08:00:00+00|2026-11-29T09:00Z", "UPDATE|2026-11-29T09:00Z|2026-11-29 09:00:00+00"];
    assert_eq!((lines, seen), (expected.to_vec(), stored("2026-11-29 09:00:00+00")));
    let (events, _) = heard("UPDATE t SET at = '2026-11-29 10:00:00+00', price = '2.50'");
    assert_eq!(events, "UPDATE|2026-11-29 09:00:00+00|2026-11-29 10:00:00+00");
    assert_eq!(f.read("SELECT count(*) FROM local_changes"), "3");
}

/// The statement has not been carried out when SQLite makes its rows: they are as the app wrote them.
#[test]
fn returning_gives_values_as_they_were_written() {
    let mut f = table(vec![column("id", "text", true), column("at", "timestamp with time zone", true)]);
    let mut returned = |sql: &str| {
        let rows = f.store.write(None, |tx| tx.query(sql, &[])).unwrap().value.rows;
        (rows, f.read("SELECT at FROM t"))
    };
    for sql in [
        "INSERT INTO t VALUES ('a', '2026-11-29T08:00Z') RETURNING at",
        "UPDATE t SET at = '2026-11-29T08:00Z' RETURNING at",
    ] {
        let (rows, stored) = returned(sql);
        assert_eq!(rows, [[Value::Text("2026-11-29T08:00Z".into())]]);
        assert_eq!(stored, "2026-11-29 08:00:00+00");
    }
}

fn numeric(name: &str, sql_type: &str, numeric: Numeric) -> ColumnSchema {
    ColumnSchema { numeric: Some(numeric), ..column(name, sql_type, true) }
}

#[test]
fn numbers_are_what_is_declared_for_them() {
    let mut f = table(vec![
        column("id", "text", true),
        ColumnSchema { default: Some("0.50".into()), ..numeric("price", "numeric(10,2)", Numeric::Integer) },
        numeric("weight", "numeric", Numeric::Real),
        numeric("exact", "numeric(10,2)", Numeric::Text),
        numeric("large", "numeric(20,2)", Numeric::Integer),
    ]);
    let row = |values: [&str; 5]| values.map(|value| Some(value.to_owned())).to_vec();
    let upsert = |rows| Step::Rows(vec![TableChanges { table: "t".into(), op: TableOp::Upsert, columns: None, rows }]);
    f.apply(vec![upsert(vec![
        row(["a", "9.00", "9", "9.00", "9.00"]),
        row(["b", "10.05", "10.5", "10.00", "10.00"]),
        row(["c", "-0.07", "-1e-3", "1.00", "999999999999999999.00"]),
        row(["d", "NaN", "NaN", "NaN", "NaN"]),
    ])]);
    let all = "SELECT id, price, weight, exact, large FROM t ORDER BY id";
    assert_eq!(
        f.read(all),
        "a|900|9|9.00|900\nb|1005|10.5|10.00|1000\nc|-7|-0.001|1.00|999999999999999999.00\nd|NaN|NaN|NaN|NaN"
    );
    assert_eq!(f.read("SELECT group_concat(id, '') FROM (SELECT id FROM t WHERE id < 'd' ORDER BY price)"), "cab");
    // Sums are sums, and travel as decimals.
    f.write(&[
        "UPDATE t SET price = price + 5, weight = weight * 2, exact = exact + 0.5, large = large - 1000 WHERE id = 'b'",
        "UPDATE t SET price = price + 5 WHERE id = 'c'",
        "INSERT INTO t (id, weight, large) VALUES ('e', 0.1 + 0.2, -92233720368547758)",
        "UPDATE t SET price = NULL, weight = 'NaN' WHERE id = 'a'",
    ])
    .unwrap();
    let recorded = r#"["price","weight","exact","large"]|["10.10","21","10.50","0.00"]
["price"]|["-0.02"]
["id","price","weight","large"]|["e","0.50","0.30000000000000004","-922337203685477.58"]
["price","weight"]|[null,"NaN"]"#;
    assert_eq!(f.read("SELECT columns, vals FROM local_changes ORDER BY id"), recorded);
    let shown = "a|-|NaN|9.00|900\nb|1010|21|10.50|0\nc|-2|-0.001|1.00|999999999999999999.00\nd|NaN|NaN|NaN|NaN\n\
                 e|50|0.30000000000000004|-|-92233720368547758";
    assert_eq!(f.read(all), shown);
    // A rejection and what the server has meanwhile: the row is made anew from texts.
    f.apply(vec![upsert(vec![row(["b", "11.00", "1", "1.00", "1.00"])]), confirmed(1)]);
    assert_eq!(f.read("SELECT price, weight, exact, large FROM t WHERE id = 'b'"), "1100|1|1.00|100");
}

/// As Postgres keeps them, from the start: sums and comparisons are the same before and after the confirmation.
#[test]
fn numbers_are_rounded_where_they_are_written() {
    let mut f = table(vec![
        column("id", "text", true),
        numeric("weight", "numeric(6,2)", Numeric::Real),
        column("exact", "numeric(6,2)", true),
        column("single", "real", true),
    ]);
    f.write(&["INSERT INTO t VALUES ('a', 1.005, 1.005, 0.1 + 0.2), ('b', 2.345, 2.345, 16777217)"]).unwrap();
    let all = "SELECT * FROM t ORDER BY id";
    let shown = "a|1.01|1.01|0.3\nb|2.35|2.35|16777216";
    assert_eq!(f.read(all), shown);
    assert_eq!(f.read("SELECT sum(weight) FROM t WHERE weight = 1.01 OR exact = '2.35'"), "3.3600000000000003");
    let before = f.changes();
    f.write(&["UPDATE t SET weight = 1.0149, single = 0.30000001 WHERE id = 'a'"]).unwrap();
    assert_eq!((f.read(all), f.changes()), (shown.to_owned(), before), "no change");
}

/// What is no whole number of units, or none that the column holds, is refused by name, at once.
#[test]
fn numbers_that_do_not_fit_their_units_are_refused() {
    let columns = |sql_type| vec![column("id", "text", true), numeric("n", sql_type, Numeric::Integer)];
    for (sql_type, taken, refused) in [
        (
            "numeric(10,2)",
            &["9999999999", "-9999999999", "1.0", "'12'", "NULL", "'NaN'"][..],
            &["10000000000", "-10000000000"][..],
        ),
        ("numeric(18,0)", &["999999999999999999"], &["1000000000000000000"]),
        (
            "numeric(19,4)",
            &["9223372036854775807", "-9223372036854775808", "0"],
            &["9223372036854775808", "-9223372036854775809", "'12'"],
        ),
    ] {
        let mut f = table(columns(sql_type));
        f.write(&["INSERT INTO t VALUES ('a', 1)"]).unwrap();
        for value in taken {
            f.write(&[&format!("UPDATE t SET n = {value}")]).unwrap();
            f.write(&[&format!("REPLACE INTO t VALUES ('b', {value})")]).unwrap();
        }
        for value in refused.iter().chain(&["1.5", "'12.50'", "'x'", "x'00'", "9e99"]) {
            for statement in
                [format!("UPDATE t SET n = {value} WHERE id = 'a'"), format!("INSERT INTO t VALUES ('c', {value})")]
            {
                let error = f.write(&[&statement]).unwrap_err();
                let StoreError::NotWritable(message) = &error else { panic!("{statement}: {error}") };
                let named =
                    message.contains("\"n\" of \"t\"") && message.contains(sql_type) && message.contains("units");
                assert!(named, "{message}");
            }
        }
    }
}

/// Another declaration is another representation: the rows come again.
#[test]
fn another_declaration_makes_the_column_from_the_start() {
    let columns =
        |numeric| vec![column("id", "text", true), ColumnSchema { numeric, ..column("n", "numeric(10,2)", true) }];
    let schema = |version: &str, numeric| Schema {
        version: version.into(),
        tables: vec![TableSchema {
            name: "t".into(),
            columns: columns(numeric),
            key: vec![0],
            scopes: Vec::new(),
            references: Vec::new(),
            clocks: None,
        }],
    };
    let mut f = with_schema(&schema("1", None));
    f.write(&["INSERT INTO t VALUES ('a', 12.5)"]).unwrap();
    assert_eq!(f.read("SELECT n, typeof(n) FROM t"), "12.50|text");
    assert!(f.store.install(&schema("2", Some(Numeric::Integer))).unwrap());
    let upsert = vec![vec![Some("a".into()), Some("12.50".into())]];
    f.apply(vec![
        Step::Rows(vec![TableChanges { table: "t".into(), op: TableOp::Upsert, columns: None, rows: upsert }]),
        confirmed(1),
    ]);
    assert_eq!(f.read("SELECT n, typeof(n) FROM t"), "1250|integer");
    assert!(!f.store.install(&schema("3", Some(Numeric::Integer))).unwrap());
    assert!(f.store.install(&schema("4", Some(Numeric::Real))).unwrap());
}
