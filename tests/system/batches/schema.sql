-- Tables with every trait that could make a batch differ from its changes one after the other.

-- By arrival; a second unique column; a check.
CREATE TABLE teams (
    id integer PRIMARY KEY,
    name text NOT NULL UNIQUE,
    seats integer NOT NULL DEFAULT 3 CHECK (seats BETWEEN 0 AND 9),
    size integer NOT NULL DEFAULT 0
);

-- Cascades; a row trigger that writes another table, which the rules of this one read.
CREATE TABLE members (
    team_id integer NOT NULL REFERENCES teams ON DELETE CASCADE,
    user_id text NOT NULL,
    role text NOT NULL DEFAULT 'member' CHECK (role IN ('owner', 'member')),
    PRIMARY KEY (team_id, user_id)
);

-- By row; a deferred unique constraint; rules that call functions, one of which reads the table itself.
CREATE TABLE labels (
    id integer PRIMARY KEY,
    team_id integer NOT NULL REFERENCES teams ON DELETE CASCADE,
    name text NOT NULL,
    place integer NOT NULL DEFAULT 0,
    updated_at timestamptz NOT NULL DEFAULT now(),
    client_id uuid,
    UNIQUE (team_id, name),
    UNIQUE (team_id, place) DEFERRABLE INITIALLY DEFERRED
);

-- By column; SET NULL, a reference to itself, a row trigger that changes and refuses rows.
CREATE TABLE tasks (
    id integer PRIMARY KEY,
    team_id integer NOT NULL REFERENCES teams ON DELETE CASCADE,
    parent_id integer REFERENCES tasks ON DELETE CASCADE,
    label_id integer REFERENCES labels ON DELETE SET NULL,
    title varchar(20) NOT NULL,
    done boolean NOT NULL DEFAULT false,
    points integer NOT NULL DEFAULT 0 CHECK (points >= 0),
    notes integer NOT NULL DEFAULT 0,
    touched_by text,
    field_clocks jsonb NOT NULL DEFAULT '{}',
    updated_at timestamptz NOT NULL DEFAULT now(),
    client_id uuid
);

-- By column; row security, an identity column, a default that knows the author, a row trigger that writes another table.
CREATE TABLE notes (
    id integer PRIMARY KEY,
    number bigint GENERATED ALWAYS AS IDENTITY,
    task_id integer NOT NULL REFERENCES tasks ON DELETE CASCADE,
    author text NOT NULL DEFAULT current_setting('millstream.user_id', true),
    body text NOT NULL CHECK (body <> ''),
    field_clocks jsonb NOT NULL DEFAULT '{}',
    updated_at timestamptz NOT NULL DEFAULT now(),
    client_id uuid
);
ALTER TABLE notes ENABLE ROW LEVEL SECURITY;

-- By arrival; a deferred foreign key, a statement trigger that counts rows.
CREATE TABLE links (
    id integer PRIMARY KEY,
    task_id integer NOT NULL REFERENCES tasks DEFERRABLE INITIALLY DEFERRED,
    url text NOT NULL
);
CREATE TABLE log (name text NOT NULL, op text NOT NULL, rows bigint NOT NULL);

-- By column, and by arrival with a second unique column: nothing else that would keep changes apart.
CREATE TABLE cards (
    id integer PRIMARY KEY,
    team_id integer NOT NULL REFERENCES teams ON DELETE CASCADE,
    text text NOT NULL CHECK (text <> ''),
    points integer NOT NULL DEFAULT 0 CHECK (points >= 0),
    field_clocks jsonb NOT NULL DEFAULT '{}',
    updated_at timestamptz NOT NULL DEFAULT now(),
    client_id uuid
);
CREATE TABLE marks (
    id integer PRIMARY KEY,
    name text NOT NULL UNIQUE,
    points integer NOT NULL DEFAULT 0 CHECK (points >= 0)
);

CREATE FUNCTION count_members() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN UPDATE teams SET size = size + 1 WHERE id = NEW.team_id;
    ELSE UPDATE teams SET size = size - 1 WHERE id = OLD.team_id; END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER count_members AFTER INSERT OR DELETE ON members FOR EACH ROW EXECUTE FUNCTION count_members();

CREATE FUNCTION check_task() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.title = 'forbidden' THEN RAISE EXCEPTION 'this title is forbidden'; END IF;
    NEW.title := trim(NEW.title);
    NEW.touched_by := current_setting('millstream.user_id', true);
    RETURN NEW;
END $$;
CREATE TRIGGER check_task BEFORE INSERT OR UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION check_task();

CREATE FUNCTION count_notes() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN UPDATE tasks SET notes = notes + 1 WHERE id = NEW.task_id;
    ELSE UPDATE tasks SET notes = notes - 1 WHERE id = OLD.task_id; END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER count_notes AFTER INSERT OR DELETE ON notes FOR EACH ROW EXECUTE FUNCTION count_notes();

CREATE FUNCTION log_links() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    INSERT INTO log SELECT 'links', TG_OP, count(*) FROM changed HAVING count(*) > 0;
    RETURN NULL;
END $$;
CREATE TRIGGER log_insert AFTER INSERT ON links REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION log_links();
CREATE TRIGGER log_update AFTER UPDATE ON links REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION log_links();
CREATE TRIGGER log_delete AFTER DELETE ON links REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION log_links();

CREATE FUNCTION is_member(team integer, who text) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (SELECT FROM members WHERE team_id = team AND user_id = who)
$$;
CREATE FUNCTION labels_of(team integer) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT count(*) FROM labels WHERE team_id = team
$$;

-- Their deletes have to say of which scope they were.
ALTER TABLE labels REPLICA IDENTITY FULL;
ALTER TABLE tasks REPLICA IDENTITY FULL;
ALTER TABLE notes REPLICA IDENTITY FULL;
ALTER TABLE cards REPLICA IDENTITY FULL;
