-- What: the schema `millstream`: positions, ledger, failed changes, epoch.
-- Why:  each row here moves in the transaction whose effect it describes, which is what makes every change take
--       effect exactly once and in order (ARCHITECTURE.md, "Change in").
-- Undo: DROP SCHEMA millstream CASCADE. Clients then submit again what they have not seen confirmed.

CREATE SCHEMA IF NOT EXISTS millstream;

-- How far each partition of the stream of submitted changes has been executed. `epoch` is the fence: taking a
-- partition over raises it, and whoever still holds the older one changes no row any more.
CREATE TABLE millstream.partitions (
    stream_epoch text NOT NULL,
    partition smallint NOT NULL,
    epoch bigint NOT NULL DEFAULT 0,
    position bigint NOT NULL DEFAULT 0,
    owner text,
    heartbeat timestamptz,
    PRIMARY KEY (stream_epoch, partition)
) WITH (fillfactor = 50);

-- Live executors, for the assignment of partitions. A wrong row costs speed, never correctness.
CREATE TABLE millstream.members (
    member text PRIMARY KEY,
    heartbeat timestamptz NOT NULL
);

-- The ledger: up to which transaction each client's upload has been taken into account.
CREATE TABLE millstream.clients (
    client_id uuid PRIMARY KEY,
    user_id text NOT NULL,
    last_seq bigint NOT NULL,
    instance uuid,
    schema_version text,
    last_seen timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 70);

-- Failed changes, and only those: one row a rejected transaction, with everything needed to show and replay it.
CREATE TABLE millstream.changes_history (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    client_id uuid NOT NULL,
    user_id text NOT NULL,
    seq bigint NOT NULL,
    attempt int NOT NULL,
    change_id uuid NOT NULL,
    table_name text,
    key jsonb,
    operation text,
    payload jsonb NOT NULL,
    code text NOT NULL,
    message text NOT NULL,
    trace_id text,
    at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (client_id, seq)
);

-- The outbound stream's current history. Another system_identifier, or another epoch in the stream, means a new one.
CREATE TABLE millstream.epoch (
    "only" boolean PRIMARY KEY DEFAULT true CHECK ("only"),
    epoch uuid NOT NULL,
    system_identifier text NOT NULL,
    slot text NOT NULL,
    at timestamptz NOT NULL DEFAULT now()
);
