#!/usr/bin/env python3
"""Puts a client program to a running Millstream and holds it against Postgres. README.md says how."""

import argparse
import contextlib
import csv
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from queue import Empty, Queue

KITCHEN, GARDEN = "0190f3c2-0000-7000-8000-000000000001", "0190f3c2-0000-7000-8000-000000000002"
MILK, GARLIC = "0190f3c2-0000-7000-8000-000000000101", "0190f3c2-0000-7000-8000-000000000201"
TABLES = ["projects", "members", "tasks", "comments"]
READY_S, ANSWER_S, CONVERGED_S, REVOKED_S = 120, 30, 60, 5
HERE = os.path.dirname(os.path.abspath(__file__))
BOARD = os.path.join(HERE, "..", "..", "examples", "board", "millstream.toml")

# Every write of a task by a client leaves its title here when it takes effect. The table is not synced.
AUDIT = """
CREATE TABLE conformance_audit (n bigserial, task uuid, title text);
CREATE FUNCTION conformance_audit() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = public AS $$
BEGIN
    IF coalesce(current_setting('millstream.user_id', true), '') <> '' THEN
        INSERT INTO conformance_audit (task, title) VALUES (NEW.id, NEW.title);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER conformance_audit AFTER INSERT OR UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION conformance_audit();
"""


class Difference(Exception):
    """The client or the server is not as it must be."""


class Stack:
    def __init__(self, command, psql, folder):
        self.command, self.psql_program, self.folder = shlex.split(command), psql, folder
        self.data = os.path.join(folder, "stack")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"ws://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        self.log = os.path.join(self.folder, "stack.log")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*self.command, "--data", self.data, "--port", str(self.port), "--config", BOARD],
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + READY_S
        while True:
            with open(self.log) as log:
                text = log.read()
            if re.search(r"^ready in", text, re.M) and (found := re.search(r"postgres://\S+", text)):
                self.database = found[0]
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Difference(f"the stack did not start:\n{text[-2000:]}")
            time.sleep(0.2)

    def kill_edge(self):
        """Kill the process of the edge, and start the stack again if it does not do so itself."""
        listing = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
        edges = [int(pid) for pid, parent, *args in map(str.split, listing.splitlines()[1:])
                 if parent == str(self.process.pid) and args[-1] == "edge"]
        if not edges:
            return False
        for pid in edges:
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + READY_S
        time.sleep(1)
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                self.start()
                return True
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return True
            time.sleep(0.5)
        raise Difference("the edge did not come back")

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)

    def token(self, user):
        command = [self.command[0], "token", "--user", user, "--data", self.data]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def sql(self, sql):
        environment = {**os.environ, "PGTZ": "UTC", "PGDATESTYLE": "ISO"}
        done = subprocess.run([self.psql_program, "-X", "-q", "-v", "ON_ERROR_STOP=1", self.database, "-c", sql],
                              capture_output=True, text=True, env=environment)
        if done.returncode:
            raise Difference(f"psql: {done.stderr}")
        return done.stdout

    def select(self, query):
        lines = csv.DictReader(io.StringIO(self.sql(f"COPY ({query}) TO STDOUT WITH (FORMAT csv, HEADER, NULL '<null>')")))
        return [{name: None if value == "<null>" else value for name, value in line.items()} for line in lines]

    def readable(self, user):
        """What a user may read: the rows of their projects, and their own memberships."""
        mine = f"(SELECT project_id FROM members WHERE user_id = '{user}')"
        where = {"projects": f"id IN {mine}", "members": f"project_id IN {mine} OR user_id = '{user}'",
                 "tasks": f"project_id IN {mine}", "comments": f"project_id IN {mine}"}
        return {table: ordered(self.select(f"SELECT * FROM {table} WHERE {where[table]}")) for table in TABLES}

    def audit(self, task):
        return [row["title"] for row in self.select(f"SELECT title FROM conformance_audit WHERE task = '{task}' ORDER BY n")]


class Client:
    """A client under test: its process, its folder and its user."""

    def __init__(self, suite, user, folder=None):
        self.suite, self.user = suite, user
        self.folder = folder or tempfile.mkdtemp(prefix=user, dir=suite.stack.folder)
        self.start()

    def start(self, online=True):
        self.process = subprocess.Popen(self.suite.client, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.answers = Queue()
        threading.Thread(target=self._read, args=[self.process, self.answers], daemon=True).start()
        self.ask("open", folder=self.folder, url=self.suite.stack.url, token=self.suite.stack.token(self.user), online=online)

    @staticmethod
    def _read(process, answers):
        for line in process.stdout:
            answers.put(line)
        answers.put("")

    def ask(self, do, **arguments):
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        try:
            line = self.answers.get(timeout=ANSWER_S)
        except Empty:
            raise Difference(f"{self.user}'s client did not answer `{do}` within {ANSWER_S} s") from None
        if not line:
            raise Difference(f"{self.user}'s client ended during `{do}`")
        answer = json.loads(line)
        if "error" in answer:
            raise Difference(f"{self.user}'s client answered `{do}`: {answer['error']}")
        return answer

    def kill(self):
        self.process.kill()
        self.process.wait()

    def rows(self):
        return {table: ordered(self.ask("rows", table=table)["rows"]) for table in TABLES}

    def titles(self):
        return {row["id"]: row["title"] for row in self.ask("rows", table="tasks")["rows"]}

    def status(self):
        return self.ask("status")

    def insert(self, table, **values):
        return self.ask("write", changes=[{"op": "insert", "table": table, "values": values}])["tx"]

    def update(self, table, key, **values):
        return self.ask("write", changes=[{"op": "update", "table": table, "key": key, "values": values}])["tx"]

    def delete(self, table, *key):
        return self.ask("write", changes=[{"op": "delete", "table": table, "key": list(key)}])["tx"]

    def add_task(self, title, project=KITCHEN):
        task = str(uuid.uuid4())
        self.insert("tasks", id=task, project_id=project, title=title)
        return task


def ordered(rows):
    return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))


def difference(wanted, found):
    for table in TABLES:
        missing = [row for row in wanted[table] if row not in found[table]]
        extra = [row for row in found[table] if row not in wanted[table]]
        if missing or extra or len(wanted[table]) != len(found[table]):
            counts = f"{len(wanted[table])} and {len(found[table])} rows"
            return f"{table}: Postgres has {missing[:3]}, the client has {extra[:3]} ({counts})"
    return None


def equal(what, wanted, found):
    if wanted != found:
        raise Difference(f"{what}: expected {wanted!r}, found {found!r}")


def until(what, condition, seconds=CONVERGED_S):
    """Wait for a condition: a function that returns None when it holds, or says what is amiss."""
    deadline = time.monotonic() + seconds
    while (amiss := condition()) is not None:
        if time.monotonic() > deadline:
            raise Difference(f"{what}, after {seconds} s: {amiss}")
        time.sleep(0.1)


class Suite:
    def __init__(self, stack, client, seed, steps):
        self.stack, self.client, self.steps = stack, client, steps
        self.random, self.clients = random.Random(seed), {}

    def user(self, name):
        if name not in self.clients:
            self.clients[name] = Client(self, name)
            self.converged(name)
        return self.clients[name]

    def converged(self, *users):
        """The queues are empty but for failures, and everybody has the rows that Postgres has for them."""
        for client in (self.clients[user] for user in users or list(self.clients)):
            def amiss():
                status = client.status()
                if not status["loaded"] or status["pending"]:
                    return f"status {status}"
                return difference(self.stack.readable(client.user), client.rows())
            until(f"{client.user}'s rows differ", amiss)

    def failed(self, client, tx):
        def amiss():
            return None if any(entry["tx"] == tx for entry in client.status()["failed"]) else f"status {client.status()}"
        until(f"transaction {tx} is not rejected", amiss)
        return next(entry for entry in client.status()["failed"] if entry["tx"] == tx)

    # The cases, in the order in which they run

    def first_snapshot(self):
        for name in ["alice", "bob", "carol"]:
            self.user(name)
        equal("carol's projects", [GARDEN], [row["id"] for row in self.clients["carol"].rows()["projects"]])

    def caught_up(self):
        """A client that says that it is caught up has everything that was committed before it connected."""
        bob = self.user("bob")
        for rows in [0, 1, 500]:
            bob.ask("offline")
            equal("`caught_up` without a connection", False, bob.status()["caught_up"])
            self.stack.sql(f"INSERT INTO tasks (id, project_id, title) SELECT gen_random_uuid(), '{KITCHEN}', 'Task ' || n"
                           f" FROM generate_series(1, {rows}) AS n")
            bob.ask("online")
            self.whole(bob)
        new = Client(self, "bob")
        self.whole(new)
        new.kill()

    def whole(self, client):
        until(f"{client.user} is not caught up", lambda: None if client.status()["caught_up"] else f"status {client.status()}")
        if amiss := difference(self.stack.readable(client.user), client.rows()):
            raise Difference(f"{client.user} is caught up, but {amiss}")

    def writes_in_order(self):
        alice = self.user("alice")
        task = alice.add_task("0")
        for n in range(1, 40):
            alice.update("tasks", [task], title=str(n))
        equal("a row that is just written", "39", alice.titles()[task])
        self.converged()
        equal("writes of one row that took effect", [str(n) for n in range(40)], self.stack.audit(task))

    def one_transaction(self):
        alice, tasks = self.user("alice"), [str(uuid.uuid4()) for _ in range(3)]
        good = [{"op": "insert", "table": "tasks", "values": {"id": task, "project_id": KITCHEN, "title": "whole"}} for task in tasks]
        bad = {"op": "update", "table": "tasks", "key": [MILK], "values": {"title": " "}}
        tx = alice.ask("write", changes=[*good, bad])["tx"]
        self.failed(alice, tx)
        equal("rows of a rejected transaction", [], [task for task in tasks if task in alice.titles() or self.stack.audit(task)])
        alice.ask("discard", tx=tx)
        alice.ask("write", changes=good)
        self.converged()
        equal("rows of an applied transaction", [["whole"]] * 3, [self.stack.audit(task) for task in tasks])

    def cuts(self):
        bob = self.user("bob")
        task = bob.add_task("0")
        for n in range(1, 60):
            bob.update("tasks", [task], title=str(n))
            if self.random.random() < 0.15:
                bob.ask("cut")
            time.sleep(self.random.random() * 0.05)
        self.converged()
        equal("writes that took effect, over cut connections", [str(n) for n in range(60)], self.stack.audit(task))

    def killed_client(self):
        bob = self.user("bob")
        task = bob.add_task("0")
        for n in range(1, 30):
            bob.update("tasks", [task], title=str(n))
            if n % 10 == 5:
                time.sleep(self.random.random() * 0.3)
                bob.kill()
                bob.start()
                equal("a write after the client was killed", str(n), bob.titles().get(task))
        self.converged()
        equal("writes that took effect, of a client that was killed", [str(n) for n in range(30)], self.stack.audit(task))

    def offline_writes(self):
        alice, bob = self.user("alice"), self.user("bob")
        alice.ask("offline")
        task = alice.add_task("0")
        for n in range(1, 20):
            alice.update("tasks", [task], title=str(n))
        alice.kill()
        alice.start(online=False)
        bob.update("tasks", [MILK], title="Buy oat milk")
        self.converged("bob")
        alice.update("tasks", [MILK], done="t")
        equal("an offline write is shown", "19", alice.titles()[task])
        alice.ask("online")
        self.converged()
        equal("offline writes that took effect", [str(n) for n in range(20)], self.stack.audit(task))
        milk = self.stack.select(f"SELECT title, done FROM tasks WHERE id = '{MILK}'")
        equal("columns of one row, changed by two users", [{"title": "Buy oat milk", "done": "t"}], milk)

    def grant_and_revoke(self):
        carol = self.user("carol")
        for offline in [False, True]:
            if offline:
                carol.ask("offline")
            self.stack.sql(f"INSERT INTO members VALUES ('{KITCHEN}', 'carol', 'member')")
            if offline:
                carol.ask("online")
            self.converged()
            if MILK not in carol.titles():
                raise Difference("a grant brought no rows")
            if offline:
                carol.ask("offline")
            self.stack.sql(f"DELETE FROM members WHERE project_id = '{KITCHEN}' AND user_id = 'carol'")
            if offline:
                carol.ask("online")
            until("rows stay after a revocation", lambda: "tasks" if MILK in carol.titles() else None,
                  CONVERGED_S if offline else REVOKED_S)
            self.converged()

    def rejections(self):
        alice, bob, carol = self.user("alice"), self.user("bob"), self.user("carol")
        before = alice.titles()[MILK]
        tx = alice.update("tasks", [MILK], title="  ")
        entry = self.failed(alice, tx)
        equal("code of a broken rule", ("business_rule", "blank_title"), (entry["code"], entry["rule"]))
        equal("the row after a rejection", before, alice.titles()[MILK])
        later = alice.update("tasks", [MILK], title="after a rejected change")
        other = alice.add_task("beside a rejected change")
        until("a change of another row waits", lambda: None if self.stack.audit(other) else "not in Postgres")
        equal("a later change of the row is held back", [later], alice.status()["pending"])
        alice.ask("discard", tx=tx)
        self.converged()
        equal("the change that was held back", "after a rejected change", alice.titles()[MILK])
        for client, write, code in [
            (bob, lambda: bob.delete("projects", KITCHEN), "permission_denied"),
            (carol, lambda: carol.insert("tasks", id=str(uuid.uuid4()), project_id=KITCHEN, title="not mine"), "permission_denied"),
            (carol, lambda: carol.update("tasks", [MILK], title="not mine"), "entity_missing"),
            (carol, lambda: carol.update("tasks", [GARLIC], position="much"), "invalid_value"),
            (carol, lambda: carol.update("tasks", [GARLIC], created_at="2026-11-29"), "column_not_writable"),
            (carol, lambda: carol.update("tasks", [str(uuid.uuid4())], title="nowhere"), "entity_missing"),
        ]:
            tx = write()
            equal("code of a rejection", code, self.failed(client, tx)["code"])
            client.ask("discard", tx=tx)
            self.converged(client.user)

    def two_users_at_once(self):
        clients = [self.user("alice"), self.user("bob")]
        shared = clients[0].add_task("shared", GARDEN)
        self.converged()
        own = [client.add_task("0", GARDEN) for client in clients]
        for n in range(1, 25):
            for client, task in zip(clients, own):
                client.update("tasks", [task], title=str(n))
                client.update("tasks", [shared], title=f"{client.user} {n}")
        self.converged()
        for client, task in zip(clients, own):
            equal(f"{client.user}'s writes that took effect", [str(n) for n in range(25)], self.stack.audit(task))

    def copied_store(self):
        """Two copies of a store, in use at the same time: every write takes effect once."""
        original = Client(self, "bob")
        self.clients["bob, original"] = original
        self.converged("bob, original")
        task = original.add_task("before")
        self.converged("bob, original")
        original.ask("offline")
        pending = original.add_task("pending when it was copied")
        original.kill()
        folder = original.folder + "-copy"
        shutil.copytree(original.folder, folder)
        original.start()
        self.converged("bob, original")
        tasks = [original.add_task("by the original")]
        self.converged("bob, original")
        copy = self.clients["bob, copy"] = Client(self, "bob", folder)
        for client in [copy, original] * 3:
            tasks.append(client.add_task("by one of them"))
        self.converged()
        for row in [task, pending, *tasks]:
            equal("effects of a write of a store that was copied", 1, len(self.stack.audit(row)))
        for name in ["bob, original", "bob, copy"]:
            self.clients.pop(name).kill()

    def truncate(self):
        for name in ["alice", "carol"]:
            self.user(name)
        self.stack.sql("TRUNCATE comments")
        self.converged()
        equal("comments after TRUNCATE", [], self.clients["carol"].rows()["comments"])
        self.clients["alice"].insert("comments", id=str(uuid.uuid4()), project_id=KITCHEN, task_id=MILK, body="the first one again")
        self.converged()

    def edge_killed(self):
        alice = self.user("alice")
        task = alice.add_task("0")
        for n in range(1, 30):
            alice.update("tasks", [task], title=str(n))
            if n == 15 and not self.stack.kill_edge():
                print("    the stack has no process of an edge to kill: passed over")
        self.converged()
        equal("writes that took effect over a killed edge", [str(n) for n in range(30)], self.stack.audit(task))

    def random_run(self):
        users = [self.user(name) for name in ["alice", "bob", "carol"]]
        away, written = set(), {}
        for step in range(self.steps):
            client, dice = self.random.choice(users), self.random.random()
            tasks = sorted(row["id"] for row in client.ask("rows", table="tasks")["rows"])
            if dice < 0.35 or not tasks:
                projects = sorted(row["id"] for row in client.ask("rows", table="projects")["rows"])
                written[client.add_task(f"step {step}", self.random.choice(projects))] = f"step {step}"
            elif dice < 0.6:
                client.update("tasks", [self.random.choice(tasks)], title=f"step {step}")
            elif dice < 0.65:
                client.delete("tasks", self.random.choice(tasks))
            elif dice < 0.75:
                client.insert("comments", id=str(uuid.uuid4()), project_id=GARDEN, task_id=self.random.choice(tasks),
                              body=f"step {step}")
            elif dice < 0.8:
                self.stack.sql(self.random.choice([
                    f"INSERT INTO members VALUES ('{KITCHEN}', 'carol') ON CONFLICT DO NOTHING",
                    f"DELETE FROM members WHERE project_id = '{KITCHEN}' AND user_id = 'carol'",
                    f"UPDATE tasks SET project_id = '{GARDEN}' WHERE id ="
                    f" (SELECT id FROM tasks WHERE project_id = '{KITCHEN}' ORDER BY id DESC LIMIT 1)",
                    f"UPDATE tasks SET done = NOT done WHERE project_id = '{GARDEN}'"]))
            elif dice < 0.9:
                client.ask("cut")
            elif client.user in away:
                away.remove(client.user)
                client.ask("online")
            else:
                away.add(client.user)
                client.ask("offline")
            if dice > 0.95:
                client.kill()
                client.start()
                away.discard(client.user)
        for client in users:
            if client.user in away:
                client.ask("online")

        def amiss():
            for client in users:
                for entry in client.status()["failed"]:
                    if entry["code"] not in ("entity_missing", "permission_denied", "business_rule"):
                        raise Difference(f"{client.user}'s client has an unexpected rejection: {entry}")
                    client.ask("discard", tx=entry["tx"])
            waiting = [client.user for client in users if client.status()["pending"] or client.status()["failed"]]
            return f"{waiting} have unsettled changes" if waiting else None
        until("the queues do not empty", amiss)
        self.converged()
        for task, title in written.items():
            if (count := self.stack.audit(task).count(title)) > 1:
                raise Difference(f"the insert of task {task} took effect {count} times")

    CASES = [first_snapshot, caught_up, writes_in_order, one_transaction, cuts, killed_client, offline_writes, grant_and_revoke, rejections,
             two_users_at_once, copied_store, truncate, edge_killed, random_run]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--client", required=True, help="command that runs the client under test")
    parser.add_argument("--stack", default="millstream dev", help="command that runs a stack; --data, --port and --config are added")
    parser.add_argument("--psql", default=shutil.which("psql"), help="the psql program")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="of the random choices")
    parser.add_argument("--steps", type=int, default=150, help="of the random run")
    parser.add_argument("--case", action="append", choices=[case.__name__ for case in Suite.CASES], help="only this one")
    args = parser.parse_args()
    if not args.psql:
        parser.error("psql is not on the PATH: name it with --psql")
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        stack, suite = Stack(args.stack, args.psql, folder), None
        try:
            stack.start()
            stack.sql(AUDIT)
            suite = Suite(stack, shlex.split(args.client), args.seed, args.steps)
            for case in Suite.CASES:
                if args.case and case.__name__ not in args.case:
                    continue
                began = time.monotonic()
                print(f"{case.__name__} …", flush=True)
                case(suite)
                print(f"    passed, {time.monotonic() - began:.1f} s", flush=True)
        except Difference as found:
            print(f"    FAILED: {found}\nrun again with --seed {args.seed}", flush=True)
            return 1
        finally:
            for client in suite.clients.values() if suite else []:
                client.kill()
            stack.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
