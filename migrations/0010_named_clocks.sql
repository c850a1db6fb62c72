-- What: triggers that keep clocks in columns of other names, and a view of the sessions that a slot waits for.
-- Why:  an application may have columns `updated_at` or `client_id` of its own (`clocks` in millstream.toml). And a replication slot
--       that is made waits for open transactions, which its maker may not look at.
-- Undo: drop the functions, with the triggers that call them.
--
-- The arguments of a trigger are the names of its columns: for keep_named_clocks of `field_clocks`, `updated_at` and `client_id`,
-- for keep_named_updated_at of the latter two. The bodies are those of keep_clocks and keep_updated_at (0007_side_effects.sql),
-- which are cheaper, since their names are fixed.

CREATE FUNCTION millstream.keep_named_clocks() RETURNS trigger LANGUAGE plpgsql AS $$
<<this>>
DECLARE
    -- What `millstream.clock` appends for writers that are no clients.
    nobody CONSTANT text := '-00000000000000000000000000000000-000000000000-0000';
    cause CONSTANT text := nullif(current_setting('millstream.clock', true), '');
    stamp bigint := coalesce(left(cause, 16)::bigint, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint);
    at timestamptz;
    before jsonb;
    held jsonb;
    changed jsonb;
    kept jsonb;
BEGIN
    IF TG_OP = 'INSERT' THEN
        kept := jsonb_build_object(TG_ARGV[0], jsonb_build_object('', coalesce(cause, lpad(stamp::text, 16, '0') || nobody)));
    ELSE
        before := to_jsonb(OLD);
        -- A column of the application's may be null.
        held := coalesce(nullif(before -> TG_ARGV[0], 'null'), '{}');
        -- Of a writer that is no client: newer than all that the row holds.
        SELECT max(newer.stamp), jsonb_object_agg(written.key, CASE
            WHEN cause IS NULL THEN lpad(newer.stamp::text, 16, '0') || nobody
            ELSE greatest(cause COLLATE "C", coalesce(held->>written.key, held->>'') COLLATE "C") END)
        INTO stamp, changed
        FROM (SELECT CASE
                WHEN cause IS NULL THEN greatest(this.stamp, coalesce(nullif(left(max(value COLLATE "C"), 16), ''), '0')::bigint + 1)
                ELSE this.stamp END AS stamp
              FROM jsonb_each_text(held)) AS newer
            CROSS JOIN jsonb_each(to_jsonb(NEW)) AS written
        WHERE written.value IS DISTINCT FROM before -> written.key
          AND written.key <> ALL (TG_ARGV)
          -- Generated columns are not computed yet, so they look changed.
          AND (SELECT attgenerated FROM pg_attribute WHERE attrelid = TG_RELID AND attname = written.key) = '';
        IF changed IS NULL THEN RETURN NEW; END IF;
        kept := jsonb_build_object(TG_ARGV[0], held || changed);
    END IF;
    at := timestamptz 'epoch' + stamp * interval '1 microsecond';
    IF cause IS NULL THEN
        kept := kept || jsonb_build_object(TG_ARGV[1], at, TG_ARGV[2], NULL);
    ELSIF TG_OP = 'INSERT' OR at >= (before ->> TG_ARGV[1])::timestamptz IS NOT FALSE THEN
        kept := kept || jsonb_build_object(TG_ARGV[1], at, TG_ARGV[2], substr(cause, 18, 32)::uuid);
    END IF;
    -- What the object does not name stays as it is.
    RETURN jsonb_populate_record(NEW, kept);
END $$;

CREATE FUNCTION millstream.keep_named_updated_at() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    cause CONSTANT text := nullif(current_setting('millstream.clock', true), '');
    at timestamptz := timestamptz 'epoch' + left(cause, 16)::bigint * interval '1 microsecond';
    author CONSTANT uuid := substr(cause, 18, 32)::uuid;
    old_at timestamptz;
    old_author uuid;
BEGIN
    IF TG_OP = 'UPDATE' THEN
        old_at := (to_jsonb(OLD) ->> TG_ARGV[0])::timestamptz;
        old_author := coalesce((to_jsonb(OLD) ->> TG_ARGV[1])::uuid, '00000000-0000-0000-0000-000000000000');
        IF cause IS NOT NULL AND ((at, author) >= (old_at, old_author)) IS NOT TRUE THEN
            RETURN NEW;
        END IF;
    END IF;
    IF cause IS NULL THEN
        at := greatest(clock_timestamp(), old_at + interval '1 microsecond');
    END IF;
    RETURN jsonb_populate_record(NEW, jsonb_build_object(TG_ARGV[0], at, TG_ARGV[1], author));
END $$;

-- Who holds up a session, without what they do: pg_stat_activity hides even the time from other roles.
CREATE FUNCTION millstream.held_up_by(waiting int)
RETURNS TABLE (pid int, application_name text, user_name text, xact_start timestamptz, state text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT a.pid, a.application_name, a.usename::text, a.xact_start, a.state
    FROM pg_stat_activity a WHERE a.pid = ANY (pg_blocking_pids(waiting))
    UNION ALL
    -- A prepared transaction has no session.
    SELECT 0, 'prepared transaction ' || p.gid, p.owner::text, p.prepared, 'prepared'
    FROM pg_locks w JOIN pg_prepared_xacts p ON p.transaction = w.transactionid
    WHERE w.pid = waiting AND NOT w.granted AND w.locktype = 'transactionid'
$$;
REVOKE EXECUTE ON FUNCTION millstream.held_up_by(int) FROM PUBLIC;
