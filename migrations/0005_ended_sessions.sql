-- What: users whose sessions an operator has ended (`millstream sessions end`). Tokens that were issued to them until then are not
-- taken any more, by any edge.
-- Why: a token is good until it expires; an account that is closed must not go on so long.
-- Undo: DROP TABLE millstream.ended_sessions;

CREATE TABLE millstream.ended_sessions (
    user_id text PRIMARY KEY,
    ended_at timestamptz NOT NULL DEFAULT now()
);
