#!/usr/bin/env python3
"""Runs the real HAProxy with haproxy.cfg before stand-ins for edges, which are killed, added and removed by DNS, as
`docker compose up --scale edge=N` does. Connections are WebSockets as far as a balancer sees them. Needs haproxy on the PATH.

    python3 deploy/balancer-test.py
"""
import os, signal, socket, struct, subprocess, sys, threading, time

HERE = os.path.dirname(os.path.abspath(__file__))
PORT, EDGE_PORT, DNS_PORT, STATE_PORT = 24800, 24801, 24853, 24804
LIMIT_S = 5  # No client may be without a server for longer.
EDGE = r"""
import socket, sys, threading
server = socket.socket(); server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind((sys.argv[1], int(sys.argv[2]))); server.listen(128)
def serve(peer):
    head = b""
    while b"\r\n\r\n" not in head:
        part = peer.recv(4096)
        if not part: return
        head += part
    if b"/readyz" in head.split(b"\r\n")[0]:
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"); peer.close(); return
    peer.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n")
    while (part := peer.recv(4096)): peer.sendall(sys.argv[1].encode() + b"\n")
while True: threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""
addresses = []


def dns():
    """Answers every question for an IPv4 address with all edges."""
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", DNS_PORT))
    while True:
        query, peer = server.recvfrom(4096)
        end = query.index(b"\0", 12) + 5
        known = list(addresses)
        answer = query[:2] + b"\x81\x80" + struct.pack(">HHHH", 1, len(known), 0, 0) + query[12:end]
        for address in known:
            answer += b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 1, 4) + socket.inet_aton(address)
        server.sendto(answer, peer)


def connect():
    client = socket.create_connection(("127.0.0.1", PORT), timeout=3)
    client.settimeout(3)
    client.sendall(b"GET / HTTP/1.1\r\nHost: edges\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                   b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
    if b" 101 " not in client.recv(4096):
        raise OSError("no edge")
    return client


def ask(client):
    client.sendall(b"?")
    said = client.recv(64)
    if not said:
        raise OSError("closed")
    return said.decode().strip()


class Client(threading.Thread):
    """Stays connected as the SDK does: connects again when the connection ends. Notes the longest time without an answer."""

    def __init__(self):
        super().__init__(daemon=True)
        self.longest, self.edge = 0.0, None

    def run(self):
        client, last = None, time.monotonic()
        while True:
            try:
                client = client or connect()
                self.edge = ask(client)
                now = time.monotonic()
                self.longest, last = max(self.longest, now - last), now
                time.sleep(0.02)
            except OSError:
                self.longest = max(self.longest, time.monotonic() - last)
                client, self.edge = None, None
                time.sleep(0.1)


def start(address):
    return subprocess.Popen([sys.executable, "-c", EDGE, address, str(EDGE_PORT)])


def until(what, holds):
    deadline = time.monotonic() + 2 * LIMIT_S
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not within {2 * LIMIT_S} s")
        time.sleep(0.05)
    print(f"ok: {what}")


def main():
    threading.Thread(target=dns, daemon=True).start()
    edges = {address: start(address) for address in ("127.0.1.1", "127.0.1.2")}
    addresses.extend(edges)
    env = dict(os.environ, MILLSTREAM_BALANCER_LISTEN=f"127.0.0.1:{PORT}", MILLSTREAM_EDGES=f"edge.test:{EDGE_PORT}",
               MILLSTREAM_DNS=f"127.0.0.1:{DNS_PORT}", MILLSTREAM_BALANCER_STATE=f"127.0.0.1:{STATE_PORT}")
    haproxy = subprocess.Popen(["haproxy", "-db", "-f", f"{HERE}/haproxy.cfg"], env=env)
    try:
        clients = [Client() for _ in range(8)]
        used = lambda: {client.edge for client in clients}
        def answered():
            try:
                return bool(ask(connect()))
            except OSError:
                return False
        until("the edges are found", answered)
        # Until both are known.
        until("both take clients", lambda: len({ask(connect()) for _ in range(4)}) == 2)
        for client in clients:
            client.start()
        until("clients are spread", lambda: used() == {"127.0.1.1", "127.0.1.2"})
        edges["127.0.1.1"].kill()
        until("killed: its clients are with the other", lambda: used() == {"127.0.1.2"})
        addresses.remove("127.0.1.1")
        for address in ("127.0.1.3", "127.0.1.4"):  # A restart under another address, and scaling up.
            edges[address] = start(address)
            addresses.append(address)
        time.sleep(3)
        until("scaled up: the new ones take clients", lambda: {"127.0.1.3", "127.0.1.4"} <= {ask(connect()) for _ in range(8)})
        addresses.remove("127.0.1.2")
        edges["127.0.1.2"].send_signal(signal.SIGTERM)
        until("scaled down: nobody is with it", lambda: used() <= {"127.0.1.3", "127.0.1.4"} and None not in used())
        longest = max(client.longest for client in clients)
        if longest > LIMIT_S:
            raise SystemExit(f"a client was without an edge for {longest:.1f} s")
        print(f"ok: no client was without an edge for longer than {longest:.2f} s")
    finally:
        haproxy.kill()
        for edge in edges.values():
            edge.kill()


main()
