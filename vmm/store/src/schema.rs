//! The tables, as the steps that lead to them from an empty file.
//!
//! Invariant: a step that was released never changes; a change of the tables is a new step.

/// What takes a store from one version to the next, from an empty file on; `user_version` counts how many were taken.
pub(super) const STEPS: [&str; 18] = [
    "CREATE TABLE vms (
        id            TEXT PRIMARY KEY,
        name          TEXT NOT NULL UNIQUE,
        spec          TEXT NOT NULL,             -- VmSpec, as asked
        state         TEXT NOT NULL,             -- VmState
        parts         TEXT NOT NULL,             -- BootParts: what of the template it uses
        disk_bytes    INTEGER NOT NULL,
        cid           INTEGER UNIQUE,            -- vsock address, while it has one
        created_ms    INTEGER NOT NULL,
        machine       TEXT,                      -- Machine, as decided at the last start
        started_ms    INTEGER,
        expires_ms    INTEGER,
        agent         TEXT,                      -- AgentInfo of the last start
        ip_address    TEXT,
        failure       TEXT,                      -- Failure
        timings       TEXT,                      -- Timings
        deleting      INTEGER NOT NULL DEFAULT 0 -- its files are being removed; the row goes last
    ) STRICT;
    CREATE TABLE forwards (
        vm_id      TEXT NOT NULL REFERENCES vms(id) ON DELETE CASCADE,
        host       TEXT NOT NULL,
        host_port  INTEGER NOT NULL,
        guest_port INTEGER NOT NULL,
        PRIMARY KEY (vm_id, host, host_port, guest_port)
    ) STRICT, WITHOUT ROWID;",
    "ALTER TABLE vms ADD COLUMN purpose TEXT NOT NULL DEFAULT 'use'; -- Purpose
     ALTER TABLE vms ADD COLUMN origin TEXT;                         -- Origin: how its last start brought it to life",
    "CREATE TABLE pools (
        template   TEXT NOT NULL,
        kind       TEXT NOT NULL,                -- PoolKind: the machine of its clones
        wanted     INTEGER NOT NULL,             -- how many shall wait; at least 1
        PRIMARY KEY (template, kind)
    ) STRICT, WITHOUT ROWID;",
    "CREATE TABLE events (
        cursor     INTEGER PRIMARY KEY AUTOINCREMENT, -- never used twice
        at_ms      INTEGER NOT NULL,
        event      TEXT NOT NULL,                -- EventKind
        vm_name    TEXT,
        details    TEXT NOT NULL                 -- EventDetails
    ) STRICT;
    CREATE TABLE announced (                     -- of what lies in files: about which of them there was an event
        event      TEXT NOT NULL,
        owner      TEXT NOT NULL,                -- a VM's id, or nothing
        name       TEXT NOT NULL,
        stamp      TEXT NOT NULL,                -- when it was made
        PRIMARY KEY (event, owner, name)
    ) STRICT, WITHOUT ROWID;",
    "CREATE TABLE tokens (
        id         TEXT PRIMARY KEY,
        name       TEXT NOT NULL UNIQUE,
        sha256     TEXT NOT NULL,                -- of the secret, in hexadecimal
        scope      TEXT NOT NULL,                -- Scope
        created_ms INTEGER NOT NULL,
        expires_ms INTEGER
    ) STRICT, WITHOUT ROWID;",
    "CREATE TABLE webhooks (
        id            TEXT PRIMARY KEY,
        url           TEXT NOT NULL,
        events        TEXT NOT NULL,             -- EventKinds; none is all
        format        TEXT NOT NULL,             -- WebhookFormat
        secret        TEXT NOT NULL,             -- whsec_…
        allow_private INTEGER NOT NULL,
        created_ms    INTEGER NOT NULL,
        disabled      TEXT                       -- why it is sent nothing any more
    ) STRICT;
    CREATE TABLE deliveries (
        id            INTEGER PRIMARY KEY AUTOINCREMENT,
        webhook_id    TEXT NOT NULL REFERENCES webhooks(id) ON DELETE CASCADE,
        lane          TEXT NOT NULL,             -- of one lane one at a time is sent, in order: a VM's id, a template
        event         TEXT NOT NULL,             -- EventKind
        cursor        INTEGER NOT NULL,          -- of the event, which may be forgotten before it is delivered
        body          TEXT NOT NULL,             -- Body
        state         TEXT NOT NULL DEFAULT 'pending', -- DeliveryState
        attempts      INTEGER NOT NULL DEFAULT 0,
        due_ms        INTEGER,                   -- of the first pending one of each lane, and of no other
        last_status   INTEGER,
        last_error    TEXT,
        created_ms    INTEGER NOT NULL,
        queued_ms     INTEGER NOT NULL,          -- when it was queued for the last time
        done_ms       INTEGER
    ) STRICT;
    CREATE INDEX deliveries_of ON deliveries (webhook_id, id);
    CREATE INDEX deliveries_pending ON deliveries (webhook_id, lane, id) WHERE state = 'pending';
    CREATE INDEX deliveries_due ON deliveries (webhook_id, due_ms) WHERE due_ms IS NOT NULL;
    CREATE INDEX deliveries_done ON deliveries (webhook_id, done_ms) WHERE done_ms IS NOT NULL;",
    "CREATE TABLE answers (
        caller     TEXT NOT NULL,
        key        TEXT NOT NULL,                -- the caller's, for one request
        request    TEXT NOT NULL,                -- hash of it
        run        TEXT NOT NULL,                -- of the server that carries it out
        answer     TEXT,                         -- as the server keeps it; absent while it is carried out
        at_ms      INTEGER NOT NULL,
        PRIMARY KEY (caller, key)
    ) STRICT, WITHOUT ROWID;",
    "CREATE TABLE approvals (
        id         TEXT PRIMARY KEY,
        tool       TEXT NOT NULL,
        vm_id      TEXT NOT NULL,                -- not a reference: what was asked about a VM outlives it for an hour
        vm_name    TEXT NOT NULL,
        actor      TEXT NOT NULL,
        agent      TEXT,
        arguments  TEXT NOT NULL,                -- redacted, for people
        digest     TEXT NOT NULL,                -- of all of them: Ask::digest
        state      TEXT NOT NULL DEFAULT 'pending', -- ApprovalState; that time ran out is never written
        created_ms INTEGER NOT NULL,
        expires_ms INTEGER NOT NULL,
        decided_ms INTEGER,
        decided_by TEXT
    ) STRICT;",
    "CREATE TABLE jobs (
        id           TEXT PRIMARY KEY,
        tool         TEXT NOT NULL,
        vm_name      TEXT,
        actor        TEXT NOT NULL,
        holder       TEXT NOT NULL,              -- who carries it out: a file below present/
        state        TEXT NOT NULL DEFAULT 'running', -- JobState
        started_ms   INTEGER NOT NULL,
        ended_ms     INTEGER,
        stage        TEXT,                       -- JobProgress
        percent      INTEGER,
        cancel_asked INTEGER NOT NULL DEFAULT 0,
        result       TEXT,                       -- JSON
        error        TEXT                        -- Problem
    ) STRICT;",
    "ALTER TABLE webhooks ADD COLUMN rests_until_ms INTEGER;", // it asked to be left alone until then
    "ALTER TABLE tokens ADD COLUMN only_for TEXT;                    -- Door; all of a server if absent",
    "ALTER TABLE vms ADD COLUMN state_cause TEXT;                    -- StateCause: why it is paused or stopped",
    "ALTER TABLE vms ADD COLUMN made_by TEXT;   -- LeaseId of the operation that makes it, until that has ended well
     CREATE TABLE claims (
        ticket     TEXT PRIMARY KEY,             -- of one attempt to claim a clone of a pool
        vm_id      TEXT,                         -- the clone that was claimed; absent: the attempt was given up
        at_ms      INTEGER NOT NULL
     ) STRICT, WITHOUT ROWID;
     CREATE TABLE unused_parts (due INTEGER NOT NULL) STRICT; -- one row; not 0: there may be parts that no VM uses any more
     INSERT INTO unused_parts (due) VALUES (1);",
    "ALTER TABLE vms ADD COLUMN owner TEXT;                          -- Caller::owner of who made it
     ALTER TABLE tokens ADD COLUMN limits TEXT;                      -- Limits; none if absent
     CREATE TABLE audit_heads (
        log        TEXT PRIMARY KEY,
        seq        INTEGER NOT NULL,             -- of a line that was written
        chain      TEXT NOT NULL                 -- up to and with it
     ) STRICT, WITHOUT ROWID;",
    "ALTER TABLE vms ADD COLUMN last_ip_address TEXT;                -- the last that was not absent",
    // Of rows whose JSON is damaged nothing is known: they own no part, and while there is one, no part is removed.
    "ALTER TABLE vms ADD COLUMN ephemeral INTEGER GENERATED ALWAYS AS (
        CASE WHEN json_valid(spec) THEN json_extract(spec, '$.ephemeral') END) VIRTUAL;
     ALTER TABLE vms ADD COLUMN lease TEXT GENERATED ALWAYS AS (
        CASE WHEN json_valid(spec) THEN json_extract(spec, '$.lease') END) VIRTUAL;
     CREATE INDEX vms_to_reconcile ON vms (id) WHERE
        deleting = 1 OR state NOT IN ('created', 'stopped', 'failed')
        OR (state IN ('stopped', 'failed') AND ephemeral = 1) OR lease IS NOT NULL OR made_by IS NOT NULL;
     CREATE TABLE part_owners (
        vm_id      TEXT NOT NULL REFERENCES vms(id) ON DELETE CASCADE,
        part       TEXT NOT NULL,                -- hash of a template part that the VM uses
        in_memory  INTEGER NOT NULL,             -- 1: only while it runs (the memory image that it was forked from)
        PRIMARY KEY (vm_id, part)
     ) STRICT, WITHOUT ROWID;
     CREATE INDEX part_owners_by_part ON part_owners (part);
     INSERT INTO part_owners SELECT DISTINCT vms.id, leaf.value, 0
        FROM vms, json_tree(CASE WHEN json_valid(vms.parts) THEN vms.parts ELSE '{}' END) AS leaf
        WHERE leaf.type = 'text' AND length(leaf.value) = 64 AND leaf.value NOT GLOB '*[^0-9a-f]*';
     INSERT OR IGNORE INTO part_owners SELECT DISTINCT vms.id, leaf.value, 1
        FROM vms, json_tree(CASE WHEN json_valid(vms.origin) THEN vms.origin ELSE '{}' END) AS leaf
        WHERE vms.state NOT IN ('created', 'stopped', 'failed') AND leaf.key IN ('memory', 'state');",
    "ALTER TABLE vms ADD COLUMN restart TEXT GENERATED ALWAYS AS (
        CASE WHEN json_valid(spec) THEN json_extract(spec, '$.restart') END) VIRTUAL;
     CREATE INDEX vms_to_restart ON vms (id) WHERE restart IS NOT NULL AND state IN ('stopped', 'failed');
     CREATE TABLE restarts (
        vm_id      TEXT PRIMARY KEY REFERENCES vms(id) ON DELETE CASCADE,
        count      INTEGER NOT NULL,             -- restarts by its policy since a user started it
        in_row     INTEGER NOT NULL,             -- so many of them in a row did not work
        held       INTEGER NOT NULL              -- 1: a user keeps it stopped
     ) STRICT, WITHOUT ROWID;",
    "ALTER TABLE vms ADD COLUMN limits_hit TEXT;                      -- LimitHits since its start; none if absent",
];
/// What this build writes into `user_version`.
pub(super) const SCHEMA_VERSION: i64 = STEPS.len() as i64;
