-- What: a function by which a statement takes itself back.
-- Why:  the executor applies a batch as one statement, which has to undo itself where something is not as foreseen.
-- Undo: drop the function.

CREATE FUNCTION millstream.take_back(reason text)
RETURNS pg_lsn LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = 'MS001', MESSAGE = reason;
END
$$;
