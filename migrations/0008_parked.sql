-- What: the transactions that executors cannot apply now, and why, for the operator.
-- Why:  a change that waits for a lock, or fails in a way that nobody understands, was a number in /readyz and lines in a log.
-- Undo: DROP TABLE millstream.parked;

CREATE TABLE millstream.parked (
    client_id uuid NOT NULL,
    seq bigint NOT NULL,
    user_id text NOT NULL,
    table_name text,
    tries integer NOT NULL,
    reason text NOT NULL,
    since timestamptz NOT NULL DEFAULT now(),
    seen_at timestamptz NOT NULL DEFAULT now(),
    -- What the author is told; set by the operator.
    rejection text,
    PRIMARY KEY (client_id, seq)
);
