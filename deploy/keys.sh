#!/bin/sh
# Makes what a deployment keeps secret, and gives each service its own part and nothing else: NATS keys, Postgres
# passwords, the secret that signs session tokens. Runs at every start of the compose project; what exists is kept.
#
# Below $MILLSTREAM_KEYS (default /run/millstream-keys), each folder a volume:
#   all                         everything; mounted by nothing but this
#   postgres                    password
#   nats                        nats-auth.conf (public keys and grants only)
#   setup                       nats.nk, operator.nk, database-url, edge-password, changes-password, replication-password
#   edge                        nats.nk, database-url, token-secret
#   changes, replication        nats.nk, database-url
#   validator                   nats.nk, for programs of one's own that answer on ms.validate.>
#
# MILLSTREAM_DATABASE           host:port/name of the database in the URLs, perhaps with ?parameters
# MILLSTREAM_OWNER_URL          URL of the database for the deploy step, where Postgres is not ours; by default, the superuser's
# MILLSTREAM_TOKEN_SECRET       the secret of session tokens, where one's own backend already has one
set -eu
umask 077
root=${MILLSTREAM_KEYS:-/run/millstream-keys}
all=$root/all
database=${MILLSTREAM_DATABASE:-postgres:5432/app}

# Appears whole or not at all: a start that was cut off leaves no half secret behind.
keep_or_make() {
    [ -s "$all/$1" ] && return
    # Hexadecimal, so that it can stand in a URL as it is.
    head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$all/$1.new"
    mv "$all/$1.new" "$all/$1"
}

# give SERVICE FILE NAME [MODE]: replaces the file in one step.
give() {
    install -m "${4:-0400}" "$2" "$root/$1/$3.new"
    mv -f "$root/$1/$3.new" "$root/$1/$3"
}

give_database_url() {
    printf 'postgres://%s:%s@%s\n' "$2" "$(cat "$all/$3-password")" "$database" > "$all/database-url.new"
    give "$1" "$all/database-url.new" database-url
    rm "$all/database-url.new"
}

millstream keys "$all"
for name in postgres edge changes replication; do
    keep_or_make "$name-password"
done
if [ -n "${MILLSTREAM_TOKEN_SECRET:-}" ]; then
    printf '%s' "$MILLSTREAM_TOKEN_SECRET" > "$all/token-secret.new"
    mv "$all/token-secret.new" "$all/token-secret"
fi
keep_or_make token-secret

# Postgres and NATS run as other users; theirs are the only eyes on these volumes.
give postgres "$all/postgres-password" password 0444
give nats "$all/nats-auth.conf" nats-auth.conf 0444
# nats.conf includes nats-auth.conf from its own folder, so compose mounts it there: a mount needs a file to cover.
: > "$root/nats/nats.conf"

give setup "$all/setup.nk" nats.nk
# `millstream history replay` is run by whoever owns the database, as `setup` is.
give setup "$all/operator.nk" operator.nk
if [ -n "${MILLSTREAM_OWNER_URL:-}" ]; then
    printf '%s\n' "$MILLSTREAM_OWNER_URL" > "$all/owner-url.new"
    give setup "$all/owner-url.new" database-url
    rm "$all/owner-url.new"
else
    give_database_url setup postgres postgres
fi
for service in edge changes replication; do
    give setup "$all/$service-password" "$service-password"
    give "$service" "$all/$service.nk" nats.nk
    give_database_url "$service" "millstream_$service" "$service"
done
give edge "$all/token-secret" token-secret
give validator "$all/validator.nk" nats.nk
echo "secrets are in place" >&2
