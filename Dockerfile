# One image for every Millstream process: the program `millstream`, whose subcommands are the services and the deploy
# steps. compose.yaml builds and runs it.
#
#   docker build -t millstream .
#
# It needs nothing of BuildKit, so that any builder can make it. The base images are arguments for those who keep
# their own copies.
ARG RUST_IMAGE=rust:1.95-bookworm
ARG RUNTIME_IMAGE=debian:bookworm-slim

FROM ${RUST_IMAGE} AS build
WORKDIR /src
COPY . .
# `dist`: optimised across crates, without debugging information. rust-toolchain.toml stays outside (.dockerignore):
# the base image decides the compiler, so nothing more is downloaded.
RUN cargo build --locked --profile dist --package millstream --bin millstream \
    && install -D -m 0755 target/dist/millstream /out/millstream \
    && rm -rf target

FROM ${RUNTIME_IMAGE}
# Certificates for Postgres and OTLP over TLS, from the build image: no package installation here.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /out/millstream /usr/local/bin/millstream
COPY deploy/entrypoint.sh /usr/local/bin/millstream-entrypoint
COPY deploy/keys.sh /usr/local/bin/millstream-keys
# A volume that is mounted on one of these folders for the first time gets the folder's owner: so secrets can be written
# and read without root. /run/millstream is where a service finds its own, the others are where `millstream-keys`
# puts each service's.
RUN groupadd --gid 10001 millstream \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin millstream \
    && chmod 0755 /usr/local/bin/millstream-entrypoint /usr/local/bin/millstream-keys \
    && install -d -o millstream -g millstream -m 0755 /run/millstream \
    && install -d -o millstream -g millstream -m 0700 /var/spool/millstream \
    && mkdir /run/millstream-keys && cd /run/millstream-keys \
    && install -d -o millstream -g millstream -m 0755 all postgres nats setup edge changes replication validator
USER 10001:10001
# Logs are read by machines here; MILLSTREAM_LOG_FORMAT=text makes them fit for people.
ENV MILLSTREAM_LOG_FORMAT=json \
    MILLSTREAM_EDGE_LISTEN=0.0.0.0:4800 \
    MILLSTREAM_SPOOL_DIR=/var/spool/millstream \
    MILLSTREAM_HEALTH_LISTEN=127.0.0.1:4800
# Clients' WebSockets, of the subcommand `edge`.
EXPOSE 4800
# Ready: everything that the process needs is there. The edge answers where its clients connect, the other services on
# the same port of their own container. Switch it off for subcommands that are no service.
HEALTHCHECK --interval=5s --timeout=4s --start-period=60s --retries=3 \
    CMD ["millstream", "healthcheck", "http://127.0.0.1:4800/readyz"]
ENTRYPOINT ["millstream-entrypoint"]
CMD ["--help"]
