-- First rows of the board: alice owns both projects, bob works on both, carol on one.
-- Fixed ids, so that commands in the documentation can name them.

INSERT INTO projects (id, name) VALUES
    ('0190f3c2-0000-7000-8000-000000000001', 'Kitchen'),
    ('0190f3c2-0000-7000-8000-000000000002', 'Garden');

INSERT INTO members (project_id, user_id, role) VALUES
    ('0190f3c2-0000-7000-8000-000000000001', 'alice', 'owner'),
    ('0190f3c2-0000-7000-8000-000000000001', 'bob', 'member'),
    ('0190f3c2-0000-7000-8000-000000000002', 'alice', 'owner'),
    ('0190f3c2-0000-7000-8000-000000000002', 'bob', 'member'),
    ('0190f3c2-0000-7000-8000-000000000002', 'carol', 'member');

INSERT INTO tasks (id, project_id, title, done, position) VALUES
    ('0190f3c2-0000-7000-8000-000000000101', '0190f3c2-0000-7000-8000-000000000001', 'Buy milk', false, 1),
    ('0190f3c2-0000-7000-8000-000000000102', '0190f3c2-0000-7000-8000-000000000001', 'Descale the kettle', true, 2),
    ('0190f3c2-0000-7000-8000-000000000103', '0190f3c2-0000-7000-8000-000000000001', 'Sharpen the knives', false, 3),
    ('0190f3c2-0000-7000-8000-000000000201', '0190f3c2-0000-7000-8000-000000000002', 'Plant garlic', false, 1),
    ('0190f3c2-0000-7000-8000-000000000202', '0190f3c2-0000-7000-8000-000000000002', 'Rake the leaves', false, 2);

INSERT INTO comments (id, project_id, task_id, author_id, body) VALUES
    ('0190f3c2-0000-7000-8000-000000000301', '0190f3c2-0000-7000-8000-000000000001',
     '0190f3c2-0000-7000-8000-000000000101', 'bob', 'Two litres, please.'),
    ('0190f3c2-0000-7000-8000-000000000302', '0190f3c2-0000-7000-8000-000000000002',
     '0190f3c2-0000-7000-8000-000000000201', 'carol', 'The soil is ready.');
