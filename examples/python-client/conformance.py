"""Puts the client to the conformance script; the protocol of its stdin and stdout is in tests/conformance/README.md."""

import asyncio
import json
import os
import sys

from millstream import Client, delete, insert, update


class Driver:
    client = connection = None

    def open(self, folder, url, token, online):
        os.makedirs(folder, exist_ok=True)
        self.client = Client(os.path.join(folder, "store.db"), url, lambda: token)
        if online:
            self.online()

    def write(self, changes):
        make = {"insert": lambda change: insert(change["table"], change["values"]),
                "update": lambda change: update(change["table"], change["key"], change["values"]),
                "delete": lambda change: delete(change["table"], change["key"])}
        return {"tx": self.client.write(*(make[change["op"]](change) for change in changes))}

    def rows(self, table):
        return {"rows": self.client.query(f'SELECT * FROM "{table}"') if self.client.store.tables else []}

    def status(self):
        queue = self.client.query("SELECT tx, state, code, rule, message FROM local_changes WHERE state <> 'settled' ORDER BY tx")
        return {"state": self.client.state, "loaded": self.client.loaded, "caught_up": self.client.caught_up,
                "pending": [entry["tx"] for entry in queue if entry["state"] == "pending"],
                "failed": [entry for entry in queue if entry["state"] == "failed"]}

    def retry(self, tx):
        self.client.retry(tx)

    def discard(self, tx):
        self.client.discard(tx)

    def cut(self):
        self.client.cut()

    def online(self):
        self.connection = asyncio.ensure_future(self.client.run())

    async def offline(self):
        self.connection.cancel()
        await asyncio.gather(self.connection, return_exceptions=True)


async def main():
    driver, loop = Driver(), asyncio.get_running_loop()
    while True:
        line = await loop.run_in_executor(None, sys.stdin.readline)
        if not line:
            os._exit(0)
        request = json.loads(line)
        try:
            answer = getattr(driver, request.pop("do"))(**request)
            if asyncio.iscoroutine(answer):
                answer = await answer
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer or {}), flush=True)


asyncio.run(main())
