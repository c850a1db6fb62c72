#!/usr/bin/env python3
"""An external validator: refuses tasks whose title holds a word of a list.

Millstream's executor asks on ms.validate.tasks before it applies a transaction, with a ValidateRequest (JSON,
schemas/json), and takes a ValidateResponse for an answer. Run as many of these as you like: a queue group shares the
questions out. While none answers, changes to tasks wait in their order; none is lost, none is waved through.
"""

import argparse
import asyncio
import json
import os
import pathlib
import re
import signal
import sys

import nats

HERE = pathlib.Path(__file__).parent


def verdict(request, words):
    """The answer to a request: the first change that sets a title with a forbidden word is refused."""
    for change in request["changes"]:
        title = dict(zip(change.get("columns", []), change.get("values", []))).get("title") or ""
        for word in re.findall(r"\w+", title.casefold()):
            if word in words:
                return {
                    "verdict": "reject",
                    "change_id": change["change_id"],
                    "code": "title_word",
                    "message": f'"{word}" may not stand in a title',
                }
    return {"verdict": "ok"}


async def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nats", default=os.environ.get("NATS_URL", "nats://127.0.0.1:4222"))
    parser.add_argument("--seed-file", default=os.environ.get("MILLSTREAM_NATS_SEED_FILE"), help="key `validator.nk`")
    parser.add_argument("--words", default=HERE / "words.txt", help="file with a word on each line")
    args = parser.parse_args()
    words = {word.strip().casefold() for word in pathlib.Path(args.words).read_text(encoding="utf-8").splitlines()} - {""}
    seed = pathlib.Path(args.seed_file).read_text().strip() if args.seed_file else None

    async def answer(message):
        try:
            reply = verdict(json.loads(message.data), words)
        except Exception as error:  # No answer: the executor waits and asks again, so nothing is decided by our fault.
            print(f"not answered: {error!r}", file=sys.stderr, flush=True)
            return
        await message.respond(json.dumps(reply).encode())

    client = await nats.connect(args.nats, nkeys_seed_str=seed, name="validator", max_reconnect_attempts=-1)
    await client.subscribe("ms.validate.tasks", queue="validators", cb=answer)
    await client.flush()
    print("ready", flush=True)

    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    await stop.wait()
    # Answers what it was asked already.
    await client.drain()


asyncio.run(main())
