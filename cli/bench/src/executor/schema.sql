-- The tables of the executor's bench: projects, members and tasks of the board example, with clocks. The tasks have a
-- foreign key, a check and two indexes beside their key.

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
CREATE INDEX tasks_by_position ON tasks (project_id, position);

-- The same for plain SQL: what is left without Millstream.
CREATE SCHEMA plain;
CREATE TABLE plain.projects (
    id uuid PRIMARY KEY,
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE plain.tasks (
    id uuid PRIMARY KEY,
    project_id uuid NOT NULL REFERENCES plain.projects ON DELETE CASCADE,
    title text NOT NULL CHECK (length(title) BETWEEN 1 AND 500),
    done boolean NOT NULL DEFAULT false,
    position double precision NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX tasks_identity ON plain.tasks (project_id, id);
ALTER TABLE plain.tasks REPLICA IDENTITY USING INDEX tasks_identity;
CREATE INDEX tasks_by_position ON plain.tasks (project_id, position);
