"""The connection: one WebSocket to an edge, made again with back-off whenever it breaks."""

import asyncio
import inspect
import json
import logging
import random
import time

from websockets.asyncio.client import connect
from websockets.exceptions import InvalidHandshake, WebSocketException

from .store import NewIdentity, Store, WrongUser

log = logging.getLogger("millstream")

MESSAGE_BYTES = 16 * 1024 * 1024
WELCOME_S, PING_S, SILENCE_S = 20, 15, 30
SCOPES_A_FRAME = 2000
NOT_ACCEPTED_S, NOT_CONFIRMED_S, NOT_CONFIRMED_MOST_S = 15, 30, 480
BACKOFF_LEAST_S, BACKOFF_MOST_S, GOOD_SESSION_S = 0.5, 60, 30

SIGN_IN = {"bad_token", "token_expired", "needs_auth"}
STOP = {"identity_mismatch", "upgrade_required"}


class SessionEnded(Exception):
    def __init__(self, code, message="", retry_after=0.0):
        super().__init__(f"{code}: {message}")
        self.code, self.retry_after = code, retry_after


class Client:
    """A store that is kept in step with the server while `run` runs.

    `token` is a function, plain or async, that gives a token for each connection. `state` is `offline`, `online`,
    `needs_auth` (trying on with whatever `token` gives) or `stopped`. `loaded` says that there are rows, and `caught_up`
    that everything is there which was committed before this connection.
    """

    def __init__(self, path, url, token):
        self.store, self.url, self.token = Store(path), url, token
        self.state, self.error, self.loaded = "offline", None, self.store.get("position") is not None
        self.caught_up = False
        self._socket, self._changed, self._queued = None, asyncio.Event(), asyncio.Event()

    # For the app

    def write(self, *changes):
        """Make changes (`insert`, `update`, `delete`) in one transaction, and return its name."""
        tx = self.store.write(changes)
        self._queued.set()
        self._notify()
        return tx

    def retry(self, tx):
        self.store.retry(tx)
        self._queued.set()
        self._notify()

    def discard(self, tx):
        self.store.discard(tx)
        self._queued.set()
        self._notify()

    def query(self, sql, parameters=()):
        return self.store.query(sql, parameters)

    async def changed(self):
        """Wait for the next change of rows, queue or state."""
        await self._changed.wait()

    async def outcome(self, tx):
        """Wait until a transaction is settled or rejected, and return its entry of the queue."""
        while True:
            entry = self.query("SELECT * FROM local_changes WHERE tx = ?", [tx])
            if not entry or entry[0]["state"] != "pending":
                return entry[0] if entry else None
            await self.changed()

    def cut(self):
        """Break the connection as a lost network does."""
        if self._socket:
            self._socket.transport.abort()

    def _notify(self):
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _enter(self, state, error=None):
        self.state, self.error = state, error and str(error)
        self._notify()

    # Connecting

    async def run(self):
        """Stay connected until cancelled, or until the server refuses this store for good."""
        tries = refused_tokens = 0
        while True:
            began, least = time.monotonic(), 0.0
            self._welcomed = False
            try:
                await self._connect()
            except NewIdentity:
                log.warning("another copy of the store uses its client id; it has a new one")
                continue
            except WrongUser as error:
                return self._enter("stopped", error)
            except SessionEnded as ended:
                log.info("%s", ended)
                least = ended.retry_after
                if ended.code in STOP:
                    return self._enter("stopped", ended)
                if ended.code == "epoch_changed":
                    self.store.forget_position()
                refused_tokens = refused_tokens + 1 if ended.code in SIGN_IN else 0
                self._enter("needs_auth" if refused_tokens > 1 else "offline", ended)
            except (OSError, asyncio.TimeoutError, WebSocketException, InvalidHandshake) as error:
                log.info("connection lost: %s", error)
                self._enter("offline", error)
            finally:
                self._socket = None
            if self._welcomed:
                refused_tokens = 0
                tries = 0 if time.monotonic() - began >= GOOD_SESSION_S else min(tries, 1)
            wait = min(BACKOFF_LEAST_S * 2 ** min(tries, 10), BACKOFF_MOST_S)
            await asyncio.sleep(least + random.uniform(0, wait))
            tries += 1

    async def _connect(self):
        token = self.token()
        if inspect.isawaitable(token):
            token = await token
        # The pings keep the session alive, and find out that the edge is gone.
        async with connect(self.url, max_size=MESSAGE_BYTES, compression=None,
                           ping_interval=PING_S, ping_timeout=SILENCE_S) as socket:
            self._socket = socket
            await socket.send(json.dumps(self.store.hello(token)))
            welcome = json.loads(await asyncio.wait_for(socket.recv(), WELCOME_S))
            if welcome["type"] == "scopes_wanted":
                scopes = self.store.get("scopes")
                for start in range(0, len(scopes), SCOPES_A_FRAME):
                    some, last = scopes[start:start + SCOPES_A_FRAME], start + SCOPES_A_FRAME >= len(scopes)
                    await socket.send(json.dumps({"type": "scopes", "scopes": some, "last": last}, ensure_ascii=False))
                welcome = json.loads(await asyncio.wait_for(socket.recv(), WELCOME_S))
            if welcome["type"] == "error":
                raise ended(welcome)
            self.store.welcome(welcome)
            self._welcomed = True
            self._full = welcome["resume"] == "snapshot"
            self._window, self._accepted, self._next = welcome["limits"]["window"], welcome["last_seq"], welcome["last_seq"] + 1
            self._hold = 0.0
            self._enter("online")
            sender = asyncio.create_task(self._send(socket))
            try:
                await self._receive(socket)
            finally:
                self.caught_up = False
                sender.cancel()
                await asyncio.gather(sender, return_exceptions=True)

    # The way up

    async def _send(self, socket):
        accept_by = time.monotonic() + NOT_ACCEPTED_S
        patience = NOT_CONFIRMED_S
        confirm_by = time.monotonic() + patience
        accepted, confirmed = self._accepted, self.store.get("confirmed_seq")
        while True:
            self._queued.clear()
            now = time.monotonic()
            if self._accepted != accepted or self._next <= self._accepted + 1:
                accepted, accept_by = self._accepted, now + NOT_ACCEPTED_S
            if self.store.get("confirmed_seq") != confirmed or self._accepted <= confirmed:
                confirmed, patience = self.store.get("confirmed_seq"), NOT_CONFIRMED_S
                confirm_by = now + patience
            if now >= accept_by:
                self._next, accept_by = self._accepted + 1, now + NOT_ACCEPTED_S
            if now >= confirm_by:
                self._next, patience = confirmed + 1, min(patience * 2, NOT_CONFIRMED_MOST_S)
                confirm_by = now + patience
            while self._next <= self._accepted + self._window and time.monotonic() >= self._hold:
                frame = self.store.submit(self._next)
                if frame is None:
                    break
                self._next += 1
                await socket.send(json.dumps(frame, ensure_ascii=False))
            wait = min(accept_by, confirm_by) if self._hold <= now else self._hold
            await pause(self._queued, max(wait - time.monotonic(), 0.05))

    # The way down

    async def _receive(self, socket):
        staged, snapshot = [], None
        async for message in socket:
            frame = json.loads(message)
            kind = frame["type"]
            if kind == "rows":
                staged = restarted(staged, frame) + [frame]
                if frame["last"] and snapshot is None:
                    staged = self._apply(staged, {"epoch": frame["epoch"], "stream_seq": frame["stream_seq"], "lsn": frame["lsn"]})
            elif kind in ("confirmed", "scope_removed"):
                if kind == "confirmed":
                    self._check_run(frame)
                staged.append(frame)
            elif kind in ("commit", "caught_up"):
                if snapshot is None:
                    staged = self._apply(staged, frame["position"], kind == "caught_up")
            elif kind == "snapshot_begin":
                snapshot = {"type": "snapshot", "scopes": frame["scopes"], "changes": [], "full": self._full}
            elif kind == "snapshot_rows":
                snapshot["changes"] += frame["changes"]
            elif kind == "snapshot_apply":
                staged.append(snapshot)
                self._full = False
            elif kind == "snapshot_end":
                snapshot = None
                self.loaded = True
                staged = self._apply(staged, frame["position"])
            elif kind == "accepted":
                self._accepted = max(self._accepted, frame["client_seq"])
                self._queued.set()
            elif kind == "error":
                if frame["fatal"]:
                    raise ended(frame)
                self._refused(frame)
        raise SessionEnded(socket.close_reason or "closed")

    def _apply(self, staged, position, caught_up=False):
        self.store.apply(staged, position)
        self.caught_up = self.caught_up or caught_up
        self._queued.set()
        self._notify()
        return []

    def _check_run(self, frame):
        own = self.query("SELECT run_id FROM local_changes WHERE client_seq = ? AND run_id <> ?", [frame["client_seq"], frame["run_id"]])
        if own:
            raise SessionEnded("copied", "another copy of this store has submitted under its client id")

    def _refused(self, frame):
        log.info("%s: %s", frame["code"], frame["message"])
        self._hold = time.monotonic() + (frame.get("retry_after_ms") or 0) / 1000
        if frame.get("client_seq") is None:
            return
        if frame["code"] in ("too_large", "bad_frame"):
            self.store.refused(frame["client_seq"], frame["code"], frame["message"])
        self._next = frame["client_seq"]
        self._queued.set()


def ended(frame):
    return SessionEnded(frame["code"], frame["message"], (frame.get("retry_after_ms") or 0) / 1000)


def restarted(staged, frame):
    """What stays of the staged frames when a transaction starts from its beginning."""
    same = [other for other in staged if other["type"] == "rows" and other["lsn"] == frame["lsn"]]
    if same and not same[-1]["last"] and frame["index"] <= same[-1]["index"]:
        return [other for other in staged if other not in same]
    return staged


async def pause(event, seconds):
    """Wait for an event, at most this long. (Before Python 3.12 `wait_for` may swallow a cancellation.)"""
    waiter = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({waiter}, timeout=seconds)
    finally:
        waiter.cancel()
