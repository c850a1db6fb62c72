"""The local database: the server's rows, the queue of local changes, and the view that an app reads.

Every synced table `tasks` is three things in SQLite: `tasks__server`, the rows as the server last told them;
`tasks__overlay`, the rows that unsettled local changes make of them; and the view `tasks`, which shows the second on top
of the first. All values are texts as Postgres writes them.
"""

import hashlib
import json
import secrets
import sqlite3
import time
import uuid
from contextlib import contextmanager

FRAME_BYTES, TRANSACTION_CHANGES = 512 * 1024, 1000
FRAME_RESERVE = 24 * 1024  # of a `submit` frame: what is not changes, and what the edge adds
SETTLED_KEPT = 1000  # settled transactions that a server restored from a backup can still be given
MANY_SCOPES_BYTES = 64 * 1024  # longer lists of scopes are not in `hello`: it has their digest
MOST_SCOPES_BYTES = 2 * 1024 * 1024  # longer ones are not named at all: everything comes as a snapshot


def digest(scopes):
    names = sorted(scope.encode() + b"\n" for scope in scopes)
    return {"count": len(names), "sha256": hashlib.sha256(b"".join(names)).hexdigest()}


class NewIdentity(Exception):
    """Another copy of this store has used its client id: the store has taken a new one, and connects again."""


class WrongUser(Exception):
    """The store belongs to another user."""


def insert(table, values):
    return {"op": "insert", "table": table, "values": values}


def update(table, key, values):
    return {"op": "update", "table": table, "key": key, "values": values}


def delete(table, key):
    return {"op": "delete", "table": table, "key": key}


def uuid7():
    """A UUIDv7, which Python's own module has from 3.14 on."""
    high = (time.time_ns() // 1_000_000) << 16 | 7 << 12 | secrets.randbits(12)
    return str(uuid.UUID(int=high << 64 | 2 << 62 | secrets.randbits(62)))


def text(value):
    """A value as Postgres reads it."""
    if isinstance(value, bool):
        return "t" if value else "f"
    if isinstance(value, bytes):
        return "\\x" + value.hex()
    return value if value is None else str(value)


def quote(name):
    return '"' + name.replace('"', '""') + '"'


def names(columns):
    return ", ".join(quote(column) for column in columns)


class Table:
    def __init__(self, schema):
        self.name = schema["name"]
        self.columns = [column["name"] for column in schema["columns"]]
        self.defaults = {column["name"]: column.get("default") for column in schema["columns"]}
        self.key = [self.columns[index] for index in schema["key"]]
        self.scopes = schema["scopes"]
        self.references = schema.get("references", [])
        self.clocks = schema.get("clocks")
        self.server, self.overlay = quote(self.name + "__server"), quote(self.name + "__overlay")
        self.by_key = " AND ".join(f"{quote(column)} = ?" for column in self.key)

    def key_of(self, row):
        """Key of a row that is a mapping."""
        return tuple(row[column] for column in self.key)

    def scopes_of(self, values):
        """Scopes of a row that is a sequence in wire order."""
        for scope in self.scopes:
            value = "all" if scope.get("column") is None else values[scope["column"]]
            if value is not None:
                yield f"{scope['kind']}:{value}"

    def refers_to(self, row):
        """Table and key of every row that a row, or the changed columns of one, refers to."""
        for reference in self.references:
            key = tuple(row.get(self.columns[index]) for index in reference["columns"])
            if None not in key:
                yield reference["table"], key


class Store:
    def __init__(self, path):
        self.db = sqlite3.connect(path, isolation_level=None)
        self.db.row_factory = sqlite3.Row
        self.db.execute("PRAGMA locking_mode = EXCLUSIVE")  # one process at a time
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = FULL")
        self.db.executescript("""
            CREATE TABLE IF NOT EXISTS millstream_meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
            CREATE TABLE IF NOT EXISTS local_changes (
                tx INTEGER PRIMARY KEY AUTOINCREMENT,
                state TEXT NOT NULL DEFAULT 'pending',  -- then 'settled' or 'failed'
                client_seq INTEGER UNIQUE,              -- null while it waits for an earlier transaction
                run_id TEXT, previous TEXT, after TEXT,
                attempt INTEGER NOT NULL DEFAULT 1,
                changes TEXT NOT NULL,
                verdict TEXT, code TEXT, rule TEXT, message TEXT);
        """)
        self.limits = {"frame_bytes": FRAME_BYTES, "transaction_changes": TRANSACTION_CHANGES}
        self.run_id = str(uuid.uuid4())  # of this run
        self.touched = {}  # tx: what its changes write, create and refer to
        self.tables = {}
        if self.get("client_id") is None:
            self.set(client_id=uuid7(), confirmed_seq=0, given_seq=0, stamp=0, scopes=[])
        self._read_schema()

    @contextmanager
    def transaction(self):
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    def get(self, name):
        row = self.db.execute("SELECT value FROM millstream_meta WHERE name = ?", [name]).fetchone()
        return row and json.loads(row[0])

    def set(self, **values):
        for name, value in values.items():
            self.db.execute("REPLACE INTO millstream_meta VALUES (?, ?)", [name, json.dumps(value)])

    def query(self, sql, parameters=()):
        return [dict(row) for row in self.db.execute(sql, parameters)]

    def hello(self, token):
        frame = {"type": "hello", "protocol": 1, "client_id": self.get("client_id"), "token": token,
                 "confirmed_seq": self.get("confirmed_seq")}
        if self.get("schema"):
            frame["schema"] = self.get("schema")["version"]
            if self.get("position"):
                scopes = self.get("scopes")
                length = sum(len(scope.encode()) + 4 for scope in scopes)
                if length > MOST_SCOPES_BYTES:
                    return frame
                many = length > MANY_SCOPES_BYTES
                frame.update(position=self.get("position"), **({"scopes_digest": digest(scopes)} if many else {"scopes": scopes}))
        return frame

    # Local writes

    def write(self, changes):
        """Record changes as one transaction. It is durable and visible when this returns its name, a number."""
        if not self.tables:
            raise RuntimeError("the store has no tables yet: connect once")
        with self.transaction():
            recorded = []
            for change in changes:
                recorded.append(self._record(change))
                self._show(recorded[-1])
            encoded = json.dumps(recorded, ensure_ascii=False)
            if not 1 <= len(recorded) <= self.limits["transaction_changes"]:
                raise ValueError(f"a transaction has 1 to {self.limits['transaction_changes']} changes")
            if len(encoded.encode()) > self.limits["frame_bytes"] - FRAME_RESERVE:
                raise ValueError("the transaction is too large")
            tx = self.db.execute("INSERT INTO local_changes (changes) VALUES (?)", [encoded]).lastrowid
            self._number()
        return tx

    def retry(self, tx):
        """Submit a rejected transaction again."""
        self._requeue("UPDATE local_changes SET state = 'pending', client_seq = NULL, attempt = attempt + 1"
                      " WHERE tx = ? AND state = 'failed'", tx)

    def discard(self, tx):
        """Forget a rejected transaction, or one that waits for a rejected one."""
        self._requeue("DELETE FROM local_changes WHERE tx = ? AND (state = 'failed' OR state = 'pending' AND client_seq IS NULL)", tx)

    def _requeue(self, sql, tx):
        with self.transaction():
            if self.db.execute(sql, [tx]).rowcount == 0:
                raise ValueError(f"transaction {tx} does not wait for a decision")
            self._number()
            self._rebuild_overlay()

    def _record(self, change):
        table = self.tables[change["table"]]
        values = {column: text(value) for column, value in change.get("values", {}).items()}
        unknown = set(values) - set(table.columns)
        if unknown:
            raise ValueError(f"{table.name} has no column {', '.join(sorted(unknown))}")
        key = change.get("key") or table.key_of(values)
        key = [text(part) for part in ([key] if isinstance(key, str) else key)]
        row = self.db.execute(f"SELECT * FROM {table.server} WHERE {table.by_key}", key).fetchone()
        clocks = json.loads(row[table.clocks] or "{}") if row and table.clocks is not None else {}
        newest = max((int(clock[:16]) for clock in clocks.values()), default=0)
        stamp = max(time.time_ns() // 1000, self.get("stamp") + 1, newest + 1)
        self.set(stamp=stamp)
        recorded = {"change_id": uuid7(), "table": table.name, "op": change["op"], "key": key, "stamp": stamp}
        if change["op"] != "delete":
            recorded.update(columns=list(values), values=list(values.values()))
        return recorded

    def _number(self):
        """Give the next numbers to pending transactions, except to those that must wait for a rejected one."""
        queue = self.db.execute("SELECT tx, state, client_seq FROM local_changes WHERE state <> 'settled' ORDER BY tx").fetchall()
        sent = [(client_seq, self._touches(tx)) for tx, state, client_seq in queue if state == "pending" and client_seq is not None]
        waiting = []
        for tx, state, client_seq in queue:
            touches = self._touches(tx)
            if state == "failed" or client_seq is None and any(follows(touches, other) for other in waiting):
                waiting.append(touches)
            elif client_seq is None:
                client_seq, previous = self.get("given_seq") + 1, self.get("given_run")
                after = [earlier for earlier, other in sent if follows(touches, other)]
                self.db.execute(
                    "UPDATE local_changes SET client_seq = ?, run_id = ?, previous = ?, after = ? WHERE tx = ?",
                    [client_seq, self.run_id, None if previous == self.run_id else previous, json.dumps(after[-1000:]), tx])
                self.set(given_seq=client_seq, given_run=self.run_id)
                sent.append((client_seq, touches))

    def _touches(self, tx):
        if tx not in self.touched:
            written, created, referred = set(), set(), set()
            encoded = self.db.execute("SELECT changes FROM local_changes WHERE tx = ?", [tx]).fetchone()[0]
            for change in json.loads(encoded):
                row = change["table"], tuple(change["key"])
                written.add(row)
                if change["op"] == "insert":
                    created.add(row)
                if change["table"] in self.tables:
                    values = dict(zip(change.get("columns", []), change.get("values", [])))
                    referred.update(self.tables[change["table"]].refers_to(values))
            self.touched[tx] = written, created, referred
        return self.touched[tx]

    # The queue, for the connection

    def submit(self, client_seq):
        """The frame of a transaction, or None if there is none to send."""
        row = self.db.execute("SELECT * FROM local_changes WHERE client_seq = ? AND state = 'pending'", [client_seq]).fetchone()
        if row is None:
            return None
        frame = {"type": "submit", "client_seq": client_seq, "attempt": row["attempt"], "run_id": row["run_id"],
                 "changes": json.loads(row["changes"])}
        if row["previous"]:
            frame["previous"] = row["previous"]
        if json.loads(row["after"]):
            frame["after"] = json.loads(row["after"])
        return frame

    def refused(self, client_seq, code, message):
        """The edge refused a transaction as a frame: its number is free, and those after it move up."""
        with self.transaction():
            self.db.execute("UPDATE local_changes SET state = 'failed', code = ?, message = ?"
                            " WHERE client_seq = ? AND state = 'pending'", [code, message, client_seq])
            same = self._renumber(client_seq - 1)
        if not same:
            raise NewIdentity

    def _renumber(self, last):
        """Number everything above `last` again in a new run. False if that took a new client id."""
        own = self.db.execute("SELECT run_id FROM local_changes WHERE client_seq = ?", [last]).fetchone()
        before = self.get("confirmed_run") if last == self.get("confirmed_seq") else own and own[0]
        if before is None and last > 0:  # the ledger would take nothing that does not name it
            return self._new_identity([], [], 0)
        self.run_id = str(uuid.uuid4())
        self.set(given_seq=last, given_run=before)
        self.db.execute("UPDATE local_changes SET state = 'pending' WHERE client_seq > ? AND state = 'settled'", [last])
        self.db.execute("UPDATE local_changes SET client_seq = NULL WHERE client_seq > ?", [last])
        self._number()
        self._rebuild_overlay()
        return True

    def welcome(self, frame):
        """Take over what `welcome` says, and compare the queue with the server's ledger."""
        if self.get("user_id") not in (None, frame["user_id"]):
            raise WrongUser(f"the store belongs to {self.get('user_id')}, the token to {frame['user_id']}")
        last, spans = frame["last_seq"], frame.get("runs", [])
        self.limits = frame["limits"]
        with self.transaction():
            self.set(user_id=frame["user_id"])
            if frame.get("schema"):
                self._install(frame["schema"])
            if frame["resume"] == "snapshot":
                self.set(position=None, scopes=[])
            own = self.db.execute("SELECT run_id FROM local_changes WHERE client_seq = ?", [last]).fetchone()
            same = True
            if last > self.get("given_seq") or own and spans and run_at(spans, last) != own[0]:
                same = self._new_identity(spans, frame.get("failed", []), last)
            elif last < self.get("confirmed_seq"):  # the server was restored from a backup
                self.set(confirmed_seq=last, confirmed_run=run_at(spans, last))
                same = self._renumber(last)
        if not same:
            raise NewIdentity

    def _new_identity(self, spans, failed, last):
        """Take a new client id. What the ledger has taken from this store is settled; the rest is numbered from 1."""
        for row in self.query("SELECT tx, client_seq, run_id FROM local_changes WHERE state = 'pending' AND client_seq <= ?", [last]):
            if row["client_seq"] not in failed and run_at(spans, row["client_seq"]) == row["run_id"]:
                self.db.execute("UPDATE local_changes SET state = 'settled', verdict = 'applied' WHERE tx = ?", [row["tx"]])
        self.run_id = str(uuid.uuid4())
        self.db.execute("UPDATE local_changes SET client_seq = NULL, run_id = NULL")
        self.set(client_id=uuid7(), confirmed_seq=0, confirmed_run=None, given_seq=0, given_run=None)
        self._number()
        self._rebuild_overlay()
        return False

    # What the server sends

    def forget_position(self):
        with self.transaction():
            self.set(position=None, scopes=[])

    def apply(self, staged, position):
        """Apply staged frames, in their order, together with the position."""
        with self.transaction():
            for frame in staged:
                if frame["type"] == "rows":
                    self.set(stamp=max(self.get("stamp"), frame["at"]))
                    for group in frame["changes"]:
                        self._apply_group(group)
                elif frame["type"] == "confirmed":
                    self._apply_confirmed(frame)
                elif frame["type"] == "scope_removed":
                    held = set(self.get("scopes")) - {frame["scope"]}
                    self.set(scopes=sorted(held))
                    self._delete_rows(lambda table, key, scopes: frame["scope"] in scopes and not scopes & held)
                elif frame["type"] == "snapshot":
                    self._apply_snapshot(frame)
            self.set(position=position)
            self._rebuild_overlay()

    def _apply_group(self, group):
        table = self.tables[group["table"]]
        columns = group.get("columns") or (table.key if group["op"] == "delete" else table.columns)
        if group["op"] == "truncate":
            self.db.execute(f"DELETE FROM {table.server}")
        elif group["op"] == "delete":
            self.db.executemany(f"DELETE FROM {table.server} WHERE {table.by_key}", group["rows"])
        elif group["op"] == "upsert":
            sets = ", ".join(f"{quote(c)} = excluded.{quote(c)}" for c in columns if c not in table.key)
            self.db.executemany(
                f"INSERT INTO {table.server} ({names(columns)}) VALUES ({', '.join('?' * len(columns))})"
                f" ON CONFLICT ({names(table.key)}) DO {'UPDATE SET ' + sets if sets else 'NOTHING'}", group["rows"])
        elif group["op"] == "update":
            sets = ", ".join(f"{quote(c)} = ?" for c in columns)
            for row in group["rows"]:
                key = table.key_of(dict(zip(columns, row)))
                self.db.execute(f"UPDATE {table.server} SET {sets} WHERE {table.by_key}", [*row, *key])

    def _apply_confirmed(self, frame):
        failed = {failure["client_seq"]: failure for failure in frame.get("failed", [])}
        lost = {loss["client_seq"]: loss["verdict"] for loss in frame.get("lost", [])}
        for row in self.query("SELECT tx, client_seq FROM local_changes WHERE state = 'pending' AND client_seq <= ?", [frame["client_seq"]]):
            failure = failed.get(row["client_seq"])
            if failure is None:
                self.db.execute("UPDATE local_changes SET state = 'settled', verdict = ? WHERE tx = ?",
                                [lost.get(row["client_seq"], "applied"), row["tx"]])
            elif failure["code"] == "predecessor_failed":  # numbered again when that one has been retried or discarded
                self.db.execute("UPDATE local_changes SET client_seq = NULL, attempt = attempt + 1 WHERE tx = ?", [row["tx"]])
            else:
                self.db.execute(
                    "UPDATE local_changes SET state = 'failed', verdict = 'rejected', code = ?, rule = ?, message = ?"
                    " WHERE tx = ?",
                    [failure["code"], failure.get("rule"), failure["message"], row["tx"]])
        self.set(confirmed_seq=max(frame["client_seq"], self.get("confirmed_seq")), confirmed_run=frame["run_id"])
        self.db.execute("DELETE FROM local_changes WHERE state = 'settled' AND client_seq <= ?", [frame["client_seq"] - SETTLED_KEPT])
        self.touched.clear()
        self._number()

    def _apply_snapshot(self, frame):
        new = set(frame["scopes"])
        held = set() if frame["full"] else set(self.get("scopes"))
        rows = {}  # the later row of a key counts
        for group in frame["changes"]:
            table = self.tables[group["table"]]
            for row in group["rows"]:
                rows[table.name, table.key_of(dict(zip(table.columns, row)))] = row
        self._delete_rows(lambda table, key, scopes: (table, key) not in rows and (
            frame["full"] or bool(scopes & new) and not scopes & (held - new)))
        for (table, _), row in rows.items():
            self._apply_group({"table": table, "op": "upsert", "rows": [row]})
        self.set(scopes=sorted(held | new))

    def _delete_rows(self, leaves):
        for table in self.tables.values():
            for row in self.db.execute(f"SELECT * FROM {table.server}").fetchall():
                key = table.key_of(row)
                if leaves(table.name, key, set(table.scopes_of(row))):
                    self.db.execute(f"DELETE FROM {table.server} WHERE {table.by_key}", key)

    # What an app sees

    def _rebuild_overlay(self):
        for table in self.tables.values():
            self.db.execute(f"DELETE FROM {table.overlay}")
        for row in self.query("SELECT changes FROM local_changes WHERE state = 'pending' ORDER BY tx"):
            for change in json.loads(row["changes"]):
                self._show(change)

    def _show(self, change):
        """Put a change on top of what is shown."""
        table = self.tables.get(change["table"])
        if table is None:
            return
        shown = self.db.execute(f"SELECT * FROM {quote(table.name)} WHERE {table.by_key}", change["key"]).fetchone()
        if shown is None and change["op"] == "update":
            return
        row = dict(shown) if shown else {**table.defaults, **dict(zip(table.key, change["key"]))}
        values = zip(change.get("columns", []), change.get("values", []))
        row.update((column, value) for column, value in values if column in row)
        self.db.execute(f"REPLACE INTO {table.overlay} VALUES ({', '.join('?' * (len(row) + 1))})",
                        [*(row[column] for column in table.columns), change["op"] == "delete"])

    def _read_schema(self):
        self.tables = {table["name"]: Table(table) for table in (self.get("schema") or {"tables": []})["tables"]}

    def _install(self, schema):
        """Make the tables of a schema. Rows of tables that stay as they are stay, too."""
        before = self.tables
        self.set(schema=schema)
        self._read_schema()
        self.touched.clear()
        for table in before.values():
            now = self.tables.get(table.name)
            if now is None or (now.columns, now.key) != (table.columns, table.key):
                self.db.execute(f"DROP VIEW {quote(table.name)}")
                self.db.execute(f"DROP TABLE {table.server}")
                self.db.execute(f"DROP TABLE {table.overlay}")
        for table in self.tables.values():
            columns, key = ", ".join(quote(c) + " TEXT" for c in table.columns), names(table.key)
            self.db.execute(f"CREATE TABLE IF NOT EXISTS {table.server} ({columns}, PRIMARY KEY ({key}))")
            self.db.execute(f"CREATE TABLE IF NOT EXISTS {table.overlay} ({columns}, __deleted INT, PRIMARY KEY ({key}))")
            same = " AND ".join(f"o.{quote(c)} = s.{quote(c)}" for c in table.key)
            self.db.execute(
                f"CREATE VIEW IF NOT EXISTS {quote(table.name)} AS"
                f" SELECT * FROM {table.server} s WHERE NOT EXISTS (SELECT 1 FROM {table.overlay} o WHERE {same})"
                f" UNION ALL SELECT {names(table.columns)} FROM {table.overlay} WHERE NOT __deleted")
        self._rebuild_overlay()


def follows(touches, earlier):
    """Whether a transaction writes a row that an earlier one writes, or refers to a row that it creates."""
    return bool(touches[0] & earlier[0] or touches[2] & earlier[1])


def run_at(spans, client_seq):
    return next((span["run_id"] for span in reversed(spans) if span["first_seq"] <= client_seq), None)
