"""The command line: read, watch and write a store."""

import argparse
import asyncio
import contextlib
import json
import logging
import sys

from . import Client, delete, insert, update


def arguments():
    parser = argparse.ArgumentParser(prog="python -m millstream", description=__doc__)
    parser.add_argument("--store", required=True, help="the local SQLite file; made when missing")
    parser.add_argument("--edge", default="ws://127.0.0.1:4800", help="URL of the edge")
    parser.add_argument("--token-file", required=True, help="file with a token, read again for each connection")
    parser.add_argument("--wait", type=float, default=5, help="seconds to wait for the rows, and for the verdict on a write")
    parser.add_argument("--verbose", action="store_true")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in [("sql", "print the rows of a SELECT"), ("watch", "print them whenever they change")]:
        commands.add_parser(name, help=help).add_argument("query")
    for name in ["insert", "update", "delete"]:
        command = commands.add_parser(name)
        command.add_argument("table")
        if name != "insert":
            command.add_argument("--key", required=True, action="append", help="once for each column of the key")
        if name != "delete":
            command.add_argument("values", nargs="+", metavar="COLUMN=VALUE")
    commands.add_parser("queue", help="print the changes that are not settled")
    for name in ["retry", "discard"]:
        commands.add_parser(name, help=f"{name} a rejected transaction").add_argument("tx", type=int)
    return parser.parse_args()


def change(args):
    values = dict(pair.split("=", 1) for pair in getattr(args, "values", []))
    return {"insert": lambda: insert(args.table, values), "update": lambda: update(args.table, args.key, values),
            "delete": lambda: delete(args.table, args.key)}[args.command]()


def show(rows):
    for row in rows:
        print(json.dumps(row, ensure_ascii=False), flush=True)


async def until(client, wait, condition):
    async def reached():
        while not condition():
            await client.changed()

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(reached(), wait)


async def main(args):
    def token():
        with open(args.token_file) as file:
            return file.read().strip()

    client = Client(args.store, args.edge, token)
    connection = asyncio.create_task(client.run())
    await until(client, args.wait, lambda: client.caught_up or client.state == "stopped")
    if client.state != "online":
        print(f"{client.state}: {client.error}", file=sys.stderr)
    if args.command == "sql":
        show(client.query(args.query))
    elif args.command == "watch":
        shown = None
        while True:
            rows = client.query(args.query)
            if rows != shown:
                show(rows)
                print("--", flush=True)
            shown = rows
            await client.changed()
    elif args.command == "queue":
        show(client.query("SELECT tx, state, client_seq, code, message, changes FROM local_changes WHERE state <> 'settled'"))
    else:
        if args.command in ("retry", "discard"):
            getattr(client, args.command)(args.tx)
            tx = args.tx
        else:
            tx = client.write(change(args))
        try:
            entry = await asyncio.wait_for(client.outcome(tx), args.wait)
        except asyncio.TimeoutError:
            entry = {"verdict": "queued", "code": None, "message": None}
        if entry:
            print(f"{tx}: {entry['verdict']}", *filter(None, [entry["code"], entry["message"]]))
    connection.cancel()


if __name__ == "__main__":
    options = arguments()
    logging.basicConfig(level=logging.INFO if options.verbose else logging.ERROR)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(options))
