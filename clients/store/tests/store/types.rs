//! Values compare the same before and after their confirmation: times in one spelling, numbers as they are declared.

use millstream_client_core::replica::Step;
use millstream_client_store::{Edit, StoreError};
use millstream_schemas::{Code, ColumnSchema, Numeric, Schema, TableChanges, TableOp, TableSchema};

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
const SPELT: [(&str, &str, &str); 24] = [
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
    ("numeric(6,2)", "1.5", "1.50"),
    ("character(3)", "'a'", "a  "),
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
             WHERE c.key = v.key AND c.value = 'c' AND v.value IS NOT 'none'",
        );
        assert_eq!(recorded, expected, "{sql_type} {value}");
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
    let mut f = table(vec![column("id", "text", true), column("at", "timestamp with time zone", true)]);
    f.write(&["INSERT INTO t VALUES ('a', 'never')"]).unwrap();
    f.apply(vec![failed(1, Code::InvalidValue)]);
    let edit = Edit { change_id: None, column: "at".into(), value: Some("2026-11-29T08:00Z".into()) };
    f.store.edit(1, &[edit]).unwrap();
    assert_eq!(f.read("SELECT vals FROM local_changes"), r#"["a","2026-11-29 08:00:00+00"]"#);
    assert_eq!(f.read("SELECT at FROM t"), "2026-11-29 08:00:00+00");
}

/// A search index of the app's hears of the value that the row ends up with.
#[test]
fn triggers_of_the_app_end_up_with_the_spelling_too() {
    let mut f = table(vec![column("id", "text", true), column("at", "timestamp with time zone", true)]);
    f.write(&["CREATE TABLE seen (id PRIMARY KEY, at)"]).unwrap();
    for event in ["INSERT", "UPDATE OF at"] {
        let sql = format!(
            "CREATE TRIGGER \"see {event}\" AFTER {event} ON t BEGIN INSERT OR REPLACE INTO seen SELECT id, at FROM t WHERE id = NEW.id; END"
        );
        f.write(&[&sql]).unwrap();
    }
    f.write(&["INSERT INTO t VALUES ('a', '2026-11-29T08:00Z')"]).unwrap();
    assert_eq!(f.read("SELECT at FROM seen"), "2026-11-29 08:00:00+00");
    f.write(&["UPDATE t SET at = '2026-11-29T09:00Z'"]).unwrap();
    assert_eq!(f.read("SELECT at FROM seen"), "2026-11-29 09:00:00+00");
    assert_eq!(f.read("SELECT count(*) FROM local_changes"), "2");
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
