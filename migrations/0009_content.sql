-- What held the rows of synced tables when replication looked last, and what their types were made of: the files, places and
-- labels by which it finds out that values have changed without a row in the write-ahead log (ALTER TABLE … TYPE … USING, an
-- enum of the same name, a partition that was attached or truncated). Such a table is sent to clients again.
--
-- Undo: ALTER TABLE millstream.epoch DROP COLUMN content;

ALTER TABLE millstream.epoch ADD COLUMN content jsonb;
