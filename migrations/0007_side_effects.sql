-- What: rows that triggers and foreign keys write within a client's change carry the clock of that change.
-- Why:  they had the time of day, so that what the same author had done since, offline or in the same transaction, lost to them:
--       a task deleted after its comment came back, since a trigger had counted the comment on it.
-- Undo: take the body of keep_clocks from 0004_cheaper_clocks.sql, that of keep_updated_at from 0002_conflicts.sql.
--
-- The executor names the clock in the setting `millstream.clock` (services/changes/src/statement.rs). A column keeps the newer of
-- its clock and this one.

CREATE OR REPLACE FUNCTION millstream.keep_clocks() RETURNS trigger LANGUAGE plpgsql AS $$
<<this>>
DECLARE
    -- What `millstream.clock` appends for writers that are no clients.
    nobody CONSTANT text := '-00000000000000000000000000000000-000000000000-0000';
    cause CONSTANT text := nullif(current_setting('millstream.clock', true), '');
    stamp bigint := coalesce(left(cause, 16)::bigint, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint);
    at timestamptz;
    before jsonb;
    changed jsonb;
BEGIN
    IF TG_OP = 'INSERT' THEN
        NEW.field_clocks := jsonb_build_object('', coalesce(cause, lpad(stamp::text, 16, '0') || nobody));
    ELSE
        before := to_jsonb(OLD);
        -- Of a writer that is no client: newer than all that the row holds.
        SELECT max(newer.stamp), jsonb_object_agg(written.key, CASE
            WHEN cause IS NULL THEN lpad(newer.stamp::text, 16, '0') || nobody
            ELSE greatest(cause COLLATE "C", coalesce(OLD.field_clocks->>written.key, OLD.field_clocks->>'') COLLATE "C") END)
        INTO stamp, changed
        FROM (SELECT CASE
                WHEN cause IS NULL THEN greatest(this.stamp, coalesce(nullif(left(max(value COLLATE "C"), 16), ''), '0')::bigint + 1)
                ELSE this.stamp END AS stamp
              FROM jsonb_each_text(OLD.field_clocks)) AS newer
            CROSS JOIN jsonb_each(to_jsonb(NEW)) AS written
        WHERE written.value IS DISTINCT FROM before -> written.key
          AND written.key NOT IN ('field_clocks', 'updated_at', 'client_id')
          -- Generated columns are not computed yet, so they look changed.
          AND (SELECT attgenerated FROM pg_attribute WHERE attrelid = TG_RELID AND attname = written.key) = '';
        IF changed IS NULL THEN RETURN NEW; END IF;
        NEW.field_clocks := OLD.field_clocks || changed;
    END IF;
    at := timestamptz 'epoch' + stamp * interval '1 microsecond';
    IF cause IS NULL THEN
        NEW.updated_at := at;
        NEW.client_id := NULL;
    ELSIF TG_OP = 'INSERT' OR at >= OLD.updated_at IS NOT FALSE THEN
        NEW.updated_at := at;
        NEW.client_id := substr(cause, 18, 32)::uuid;
    END IF;
    RETURN NEW;
END $$;

CREATE OR REPLACE FUNCTION millstream.keep_updated_at() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    cause CONSTANT text := nullif(current_setting('millstream.clock', true), '');
    at CONSTANT timestamptz := timestamptz 'epoch' + left(cause, 16)::bigint * interval '1 microsecond';
    author CONSTANT uuid := substr(cause, 18, 32)::uuid;
BEGIN
    IF cause IS NOT NULL THEN
        IF TG_OP = 'INSERT' OR (at, author) >= (OLD.updated_at, coalesce(OLD.client_id, '00000000-0000-0000-0000-000000000000')) THEN
            NEW.updated_at := at;
            NEW.client_id := author;
        END IF;
        RETURN NEW;
    END IF;
    IF TG_OP = 'INSERT' THEN
        NEW.updated_at := clock_timestamp();
    ELSE
        NEW.updated_at := greatest(clock_timestamp(), OLD.updated_at + interval '1 microsecond');
    END IF;
    NEW.client_id := NULL;
    RETURN NEW;
END $$;
