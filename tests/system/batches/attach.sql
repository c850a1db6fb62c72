-- What `millstream attach` adds, and row security for the executor's role.
CREATE TRIGGER millstream_clocks_insert BEFORE INSERT ON tasks FOR EACH ROW
    WHEN (NEW.field_clocks IS NULL OR NEW.field_clocks = '{}') EXECUTE FUNCTION millstream.keep_clocks();
CREATE TRIGGER millstream_clocks_update BEFORE UPDATE ON tasks FOR EACH ROW
    WHEN (NEW.field_clocks IS NOT DISTINCT FROM OLD.field_clocks) EXECUTE FUNCTION millstream.keep_clocks();
CREATE TRIGGER millstream_clocks_insert BEFORE INSERT ON notes FOR EACH ROW
    WHEN (NEW.field_clocks IS NULL OR NEW.field_clocks = '{}') EXECUTE FUNCTION millstream.keep_clocks();
CREATE TRIGGER millstream_clocks_update BEFORE UPDATE ON notes FOR EACH ROW
    WHEN (NEW.field_clocks IS NOT DISTINCT FROM OLD.field_clocks) EXECUTE FUNCTION millstream.keep_clocks();
CREATE TRIGGER millstream_updated_at BEFORE UPDATE ON labels FOR EACH ROW
    WHEN (NEW.updated_at IS NOT DISTINCT FROM OLD.updated_at) EXECUTE FUNCTION millstream.keep_updated_at();

ALTER TABLE notes ENABLE ROW LEVEL SECURITY;
CREATE POLICY seen ON notes FOR SELECT TO millstream_changes USING (true);
CREATE POLICY own_insert ON notes FOR INSERT TO millstream_changes
    WITH CHECK (author = current_setting('millstream.user_id', true));
CREATE POLICY own_update ON notes FOR UPDATE TO millstream_changes
    USING (author = current_setting('millstream.user_id', true));
CREATE POLICY own_delete ON notes FOR DELETE TO millstream_changes
    USING (author = current_setting('millstream.user_id', true));
