-- Row security for the executor's role: everyone writes notes of his own. The executor has to see the others, too,
-- to tell what is not there from what may not be written.
CREATE POLICY seen ON notes FOR SELECT TO millstream_changes USING (true);
CREATE POLICY own_insert ON notes FOR INSERT TO millstream_changes
    WITH CHECK (author = current_setting('millstream.user_id', true));
CREATE POLICY own_update ON notes FOR UPDATE TO millstream_changes
    USING (author = current_setting('millstream.user_id', true));
CREATE POLICY own_delete ON notes FOR DELETE TO millstream_changes
    USING (author = current_setting('millstream.user_id', true));
