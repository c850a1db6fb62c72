#!/bin/sh
# Starts `millstream` with DATABASE_URL from the file that DATABASE_URL_FILE names: the password is then neither in the
# container's configuration, which `docker inspect` shows, nor in an argument, which `ps` shows.
set -eu
if [ -n "${DATABASE_URL_FILE:-}" ]; then
    DATABASE_URL=$(cat "$DATABASE_URL_FILE")
    export DATABASE_URL
fi
exec millstream "$@"
