-- What: clocks for merging by column, the instances of a client's store, what lost to newer changes, names of rules.
-- Why:  concurrent edits to one row merge by column (schemas/src/clock.rs); two copies of a store are told apart by the
--       instance that submitted a number; verdicts other than "applied" survive a missed message.
-- Undo: drop the functions (with the triggers that `millstream attach` made), the table and the columns.

-- Which run of a client's store submitted what, from `first_seq` on to the next row's.
CREATE TABLE millstream.instances (
    client_id uuid NOT NULL,
    first_seq bigint NOT NULL,
    instance uuid NOT NULL,
    PRIMARY KEY (client_id, first_seq)
);
-- Until now an instance was the store itself.
INSERT INTO millstream.instances (client_id, first_seq, instance)
SELECT client_id, 1, instance FROM millstream.clients WHERE instance IS NOT NULL AND last_seq > 0;

-- Newest transactions that lost to newer changes: [{"client_seq", "verdict", "change_id"}, …], a bounded number.
ALTER TABLE millstream.clients ADD COLUMN lost jsonb NOT NULL DEFAULT '[]';

-- The constraint, declared rule or external validator that refused.
ALTER TABLE millstream.changes_history ADD COLUMN rule text;
CREATE INDEX changes_history_by_time ON millstream.changes_history (at);

-- A clock as text: stamp, client, sequence, index, with fixed widths, so that texts sort as clocks compare.
CREATE FUNCTION millstream.clock(stamp bigint, client uuid DEFAULT '00000000-0000-0000-0000-000000000000', seq bigint DEFAULT 0, index int DEFAULT 0)
RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT lpad(stamp::text, 16, '0') || '-' || replace(client::text, '-', '') || '-' || lpad(seq::text, 12, '0') || '-' || lpad(index::text, 4, '0')
$$;

-- The newest clock of a row.
CREATE FUNCTION millstream.newest(clocks jsonb)
RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT coalesce(max(value COLLATE "C"), '') FROM jsonb_each_text(clocks)
$$;

-- For writers other than clients, who know nothing of clocks: their statement is newer than all that the row holds.
-- `millstream attach` fires it only where the statement has not set the clocks itself, as the executor does. It runs as its
-- owner, since those writers have no rights on this schema.
CREATE FUNCTION millstream.keep_clocks() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    now_micros bigint := (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;
    stamp bigint;
    written text;
    changed jsonb;
BEGIN
    IF TG_OP = 'INSERT' THEN
        stamp := now_micros;
        NEW.field_clocks := jsonb_build_object('', millstream.clock(stamp));
    ELSE
        stamp := greatest(now_micros, coalesce(nullif(left(millstream.newest(OLD.field_clocks), 16), ''), '0')::bigint + 1);
        written := millstream.clock(stamp);
        SELECT jsonb_object_agg(n.key, written) INTO changed
        FROM jsonb_each(to_jsonb(NEW)) n JOIN jsonb_each(to_jsonb(OLD)) o USING (key)
        WHERE n.value IS DISTINCT FROM o.value AND n.key NOT IN ('field_clocks', 'updated_at', 'client_id')
          -- Generated columns are not computed yet, so they look changed.
          AND NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = TG_RELID AND attname = n.key AND attgenerated <> '');
        IF changed IS NULL THEN RETURN NEW; END IF;
        NEW.field_clocks := OLD.field_clocks || changed;
    END IF;
    NEW.updated_at := timestamptz 'epoch' + stamp * interval '1 microsecond';
    NEW.client_id := NULL;
    RETURN NEW;
END $$;

-- The same for tables that merge by row.
CREATE FUNCTION millstream.keep_updated_at() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        NEW.updated_at := clock_timestamp();
    ELSE
        NEW.updated_at := greatest(clock_timestamp(), OLD.updated_at + interval '1 microsecond');
    END IF;
    NEW.client_id := NULL;
    RETURN NEW;
END $$;
