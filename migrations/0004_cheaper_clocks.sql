-- What: another body for the trigger that keeps clocks, with the same outcome.
-- Why:  it was half of what a short statement of plain SQL cost. SQL functions are parsed at each call, and running as the owner
--       changes the search path to and fro; with neither, the writer needs no rights on this schema either.
-- Undo: take the body from 0002_conflicts.sql.

CREATE OR REPLACE FUNCTION millstream.keep_clocks() RETURNS trigger LANGUAGE plpgsql AS $$
<<this>>
DECLARE
    -- What `millstream.clock` appends for writers that are no clients.
    nobody CONSTANT text := '-00000000000000000000000000000000-000000000000-0000';
    stamp bigint := (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;
    before jsonb;
    changed jsonb;
BEGIN
    IF TG_OP = 'INSERT' THEN
        NEW.field_clocks := jsonb_build_object('', lpad(stamp::text, 16, '0') || nobody);
    ELSE
        before := to_jsonb(OLD);
        -- Newer than all that the row holds.
        SELECT max(newer.stamp), jsonb_object_agg(written.key, lpad(newer.stamp::text, 16, '0') || nobody)
        INTO stamp, changed
        FROM (SELECT greatest(this.stamp, coalesce(nullif(left(max(value COLLATE "C"), 16), ''), '0')::bigint + 1) AS stamp
              FROM jsonb_each_text(OLD.field_clocks)) AS newer
            CROSS JOIN jsonb_each(to_jsonb(NEW)) AS written
        WHERE written.value IS DISTINCT FROM before -> written.key
          AND written.key NOT IN ('field_clocks', 'updated_at', 'client_id')
          -- Generated columns are not computed yet, so they look changed.
          AND (SELECT attgenerated FROM pg_attribute WHERE attrelid = TG_RELID AND attname = written.key) = '';
        IF changed IS NULL THEN RETURN NEW; END IF;
        NEW.field_clocks := OLD.field_clocks || changed;
    END IF;
    NEW.updated_at := timestamptz 'epoch' + stamp * interval '1 microsecond';
    NEW.client_id := NULL;
    RETURN NEW;
END $$;
