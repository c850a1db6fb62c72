-- The board example: the application's own tables. Millstream needs of them only a primary key and a replica identity
-- that covers the key and the scope column, so that a delete can be routed (here by a unique index over both).
--
-- Concurrent changes to projects, tasks and comments merge by column: that takes the columns `field_clocks`, `updated_at`
-- and `client_id`, here as `millstream attach` adds them to tables that exist. For statements that know nothing of them
-- triggers keep them; `millstream setup` makes those, since it brings the functions that they call.

CREATE TABLE projects (
    id uuid PRIMARY KEY,
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    created_at timestamptz NOT NULL DEFAULT now(),
    field_clocks jsonb NOT NULL DEFAULT '{}',
    updated_at timestamptz NOT NULL DEFAULT now(),
    client_id uuid
);

CREATE TABLE members (
    project_id uuid NOT NULL REFERENCES projects ON DELETE CASCADE,
    user_id text NOT NULL CHECK (length(user_id) BETWEEN 1 AND 100),
    role text NOT NULL DEFAULT 'member' CHECK (role IN ('owner', 'member')),
    PRIMARY KEY (project_id, user_id)
);
CREATE INDEX members_by_user ON members (user_id);

CREATE TABLE tasks (
    id uuid PRIMARY KEY,
    project_id uuid NOT NULL REFERENCES projects ON DELETE CASCADE,
    title text NOT NULL CHECK (length(title) BETWEEN 1 AND 500),
    done boolean NOT NULL DEFAULT false,
    position double precision NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    field_clocks jsonb NOT NULL DEFAULT '{}',
    updated_at timestamptz NOT NULL DEFAULT now(),
    client_id uuid
);
CREATE UNIQUE INDEX tasks_identity ON tasks (project_id, id);
ALTER TABLE tasks REPLICA IDENTITY USING INDEX tasks_identity;

CREATE TABLE comments (
    id uuid PRIMARY KEY,
    project_id uuid NOT NULL REFERENCES projects ON DELETE CASCADE,
    task_id uuid NOT NULL REFERENCES tasks ON DELETE CASCADE,
    author_id text NOT NULL DEFAULT current_setting('millstream.user_id', true),
    body text NOT NULL CHECK (length(body) BETWEEN 1 AND 10000),
    created_at timestamptz NOT NULL DEFAULT now(),
    field_clocks jsonb NOT NULL DEFAULT '{}',
    updated_at timestamptz NOT NULL DEFAULT now(),
    client_id uuid
);
CREATE INDEX comments_by_task ON comments (task_id);
CREATE UNIQUE INDEX comments_identity ON comments (project_id, id);
ALTER TABLE comments REPLICA IDENTITY USING INDEX comments_identity;

-- The author of a new project becomes its owner. `millstream.user_id` is set by the executor for the author of the
-- change; SQL from elsewhere has none and adds members itself.
CREATE FUNCTION project_owner() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF coalesce(current_setting('millstream.user_id', true), '') <> '' THEN
        INSERT INTO members (project_id, user_id, role) VALUES (NEW.id, current_setting('millstream.user_id', true), 'owner');
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER project_owner AFTER INSERT ON projects FOR EACH ROW EXECUTE FUNCTION project_owner();
