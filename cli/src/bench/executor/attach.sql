-- What `millstream attach` adds to tables with clocks.
CREATE TRIGGER millstream_clocks_insert BEFORE INSERT ON tasks FOR EACH ROW
    WHEN (NEW.field_clocks IS NULL OR NEW.field_clocks = '{}') EXECUTE FUNCTION millstream.keep_clocks();
CREATE TRIGGER millstream_clocks_update BEFORE UPDATE ON tasks FOR EACH ROW
    WHEN (NEW.field_clocks IS NOT DISTINCT FROM OLD.field_clocks) EXECUTE FUNCTION millstream.keep_clocks();
