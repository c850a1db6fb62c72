-- What: a function that says whether Postgres can write a row as text.
-- Why:  COPY fails at a row whose text is over 1 GB, or whose stored values are damaged. Snapshots leave out such rows, so that all
--       others arrive; without the function, nobody could read their table any more. It reads the row itself: a damaged value may
--       fail as soon as it is fetched.
-- Undo: drop the function.

CREATE FUNCTION millstream.has_text(of_table regclass, part oid, place tid, columns text)
RETURNS boolean LANGUAGE plpgsql STABLE COST 100000 AS $$
BEGIN
    EXECUTE format('SELECT (ROW(%s))::text FROM %s WHERE tableoid = $1 AND ctid = $2', columns, of_table) USING part, place;
    RETURN true;
EXCEPTION WHEN OTHERS THEN
    -- What passes, or what an operator can mend, says nothing about the row.
    IF left(SQLSTATE, 2) IN ('08', '25', '28', '3D', '40', '42', '53', '55', '57', '58', 'F0') THEN
        RAISE;
    END IF;
    RETURN false;
END
$$;
