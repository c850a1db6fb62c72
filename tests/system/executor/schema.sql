-- Tables of every kind that the executor tells apart.
CREATE TYPE kind AS ENUM ('good', 'bad');

CREATE TABLE members (project_id int, user_id text, PRIMARY KEY (project_id, user_id));

-- By arrival; refers to itself; a trigger of the application.
CREATE TABLE projects (
    id int PRIMARY KEY,
    name varchar(20) NOT NULL CHECK (name <> 'forbidden'),
    parent int REFERENCES projects
);
CREATE FUNCTION project_member() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF coalesce(current_setting('millstream.user_id', true), '') <> '' THEN
        INSERT INTO members VALUES (NEW.id, current_setting('millstream.user_id', true)) ON CONFLICT DO NOTHING;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER project_member AFTER INSERT ON projects FOR EACH ROW EXECUTE FUNCTION project_member();

-- By column; unique columns; parent that cascades.
CREATE TABLE tasks (
    id int PRIMARY KEY,
    project_id int NOT NULL REFERENCES projects ON DELETE CASCADE,
    title varchar(20) NOT NULL,
    rank int,
    slug text UNIQUE,
    code int UNIQUE,
    field_clocks jsonb NOT NULL DEFAULT '{}',
    updated_at timestamptz NOT NULL DEFAULT now(),
    client_id uuid
);

-- By row; parent that sets null; author by a setting.
CREATE TABLE notes (
    id uuid PRIMARY KEY,
    task_id int REFERENCES tasks ON DELETE SET NULL,
    author text DEFAULT current_setting('millstream.user_id', true),
    body text,
    n numeric(6, 2),
    updated_at timestamptz NOT NULL DEFAULT now(),
    client_id uuid
);

-- By arrival; parent that is held; odd types; numbered.
CREATE TABLE logs (
    id int PRIMARY KEY,
    task_id int REFERENCES tasks,
    number serial,
    at date,
    kind kind,
    data jsonb,
    u uuid,
    tags text[]
);

-- A key whose texts cannot be compared.
CREATE TABLE days (day date PRIMARY KEY, task_id int REFERENCES tasks, n int);

-- What goes with one row may be what keeps another.
CREATE TABLE people (id int PRIMARY KEY);
CREATE TABLE letters (
    id int PRIMARY KEY,
    sender int REFERENCES people ON DELETE CASCADE,
    recipient int REFERENCES people
);

-- Partitions that are named by themselves.
CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE parted_low PARTITION OF parted FOR VALUES FROM (0) TO (100);
CREATE TABLE pieces (id int PRIMARY KEY, part int REFERENCES parted_low);
CREATE TABLE spots (id int PRIMARY KEY, part int);

-- COMMIT decides.
CREATE TABLE ordered (id int PRIMARY KEY, place int UNIQUE DEFERRABLE INITIALLY DEFERRED);

-- Row security.
CREATE TABLE secure (id int PRIMARY KEY, owner text NOT NULL, body text);
ALTER TABLE secure ENABLE ROW LEVEL SECURITY;
CREATE POLICY seen ON secure FOR SELECT USING (owner = current_setting('millstream.user_id', true) OR body = 'public');
CREATE POLICY made ON secure FOR INSERT WITH CHECK (owner = current_setting('millstream.user_id', true));
CREATE POLICY changed ON secure FOR UPDATE USING (owner = current_setting('millstream.user_id', true));
CREATE POLICY removed ON secure FOR DELETE USING (owner = current_setting('millstream.user_id', true));
