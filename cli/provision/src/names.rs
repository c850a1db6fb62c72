//! The names that `millstream setup` gives in Postgres.

use crate::keys::Role;

/// The publication that replication reads.
pub const PUBLICATION: &str = "millstream";
/// The policy by which edge and replication read every row of a table with row security: who may read is decided by scopes.
pub const READ_POLICY: &str = "millstream_read";
/// The services that have a role in Postgres.
pub const SERVICE_ROLES: [Role; 3] = [Role::Edge, Role::Changes, Role::Replication];

/// The Postgres role of a service.
pub fn role_name(role: Role) -> String {
    format!("millstream_{}", role.name())
}
