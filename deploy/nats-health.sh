#!/bin/sh
# Health of nats-server, for a container's healthcheck: asks the page and ends the server when it stays unhealthy.
#
#   nats-health.sh [URL [PID [FILE [FAILURES]]]]
#
# A broker whose disk was full stays "unavailable" when there is room again, until it is started anew; and docker compose
# does not restart what is unhealthy. So after FAILURES answers in a row that are not "ok" the server is told to end, and
# the container's restart policy starts it. Only a server that was healthy before: reading large streams at the start takes
# as long as it takes. FILE, on a tmpfs that a restart empties, remembers both: it is there once the server was healthy,
# and has a line for each failure since.
url=${1:-http://127.0.0.1:8222/healthz}
pid=${2:-1}
file=${3:-/tmp/nats-health}
failures=${4:-15}

if wget -q -T 2 -O /dev/null "$url"; then
    : > "$file"
    exit 0
fi
if [ -e "$file" ]; then
    echo unhealthy >> "$file"
    if [ "$(wc -l < "$file")" -ge "$failures" ]; then
        rm "$file"
        kill -TERM "$pid"
    fi
fi
exit 1
