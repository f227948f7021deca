//! The tables `vms` and `forwards`.

use nido_api::error::{Code, Error, Hint, Result};
use nido_api::name::VmName;
use nido_api::operation as op;
use nido_api::{EventDetails, EventKind, ForwardSpec, LeaseId, Limits};
use rusqlite::{OptionalExtension, Row, params};

use super::events::{of_creation, of_vm};
use super::row_decode::{COLUMNS, Raw};
use super::{Purpose, Store, VmRow, encode, encode_spec, fault};

impl Store {
    /// Inserts a VM with its forwards.
    ///
    /// # Errors
    /// `vm_exists` if the name is taken.
    pub fn insert_vm(&self, row: &VmRow) -> Result<()> {
        self.insert_vm_within(row, None)
    }

    /// The same, if its owner has fewer than so many.
    ///
    /// # Errors
    /// `vm_exists` if the name is taken, `limit_exceeded`.
    pub fn insert_vm_within(&self, row: &VmRow, max_vms: Option<u32>) -> Result<()> {
        self.in_transaction(|| {
            // An id is accepted wherever a name is: it must not mean two VMs.
            if self.one_vm("id", row.spec.name.as_str())?.is_some() {
                return Err(name_taken(&row.spec.name));
            }
            self.check_count(row.owner.as_deref(), max_vms)?;
            let insert = "INSERT INTO vms (id, name, spec, state, parts, disk_bytes, created_ms, purpose, made_by, owner) \
                          VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)";
            self.connection
                .execute(
                    insert,
                    params![
                        row.id,
                        row.spec.name.as_str(),
                        encode_spec(&row.spec)?,
                        row.state.word(),
                        encode(&row.parts)?,
                        i64::try_from(row.disk_bytes).unwrap_or(i64::MAX),
                        row.created_at.as_millisecond(),
                        row.purpose.word(),
                        row.made_by.as_ref().map(LeaseId::as_str),
                        row.owner
                    ],
                )
                .map_err(|e| match e.sqlite_error_code() {
                    Some(rusqlite::ErrorCode::ConstraintViolation) => name_taken(&row.spec.name),
                    _ => fault(e),
                })?;
            for forward in &row.forwards {
                insert_forward(&self.connection, &row.id, forward)?;
            }
            self.own_parts(row)?;
            if row.purpose == Purpose::Use {
                self.append(EventKind::VmCreated, Some(&row.spec.name), &of_creation(row))?;
            }
            Ok(())
        })
    }

    /// Whether this owner may have one more.
    pub(super) fn check_count(&self, owner: Option<&str>, max_vms: Option<u32>) -> Result<()> {
        let (Some(owner), Some(most)) = (owner, max_vms) else { return Ok(()) };
        let count = "SELECT count(*) FROM vms WHERE owner = ?1 AND purpose = 'use' AND deleting = 0";
        let count: i64 = self.connection.query_row(count, [owner], |row| row.get(0)).map_err(fault)?;
        if count < i64::from(most) { Ok(()) } else { Err(Limits::too_many(most)) }
    }

    /// The VM of that name that is there for its user, also if its row cannot be read whole.
    ///
    /// # Errors
    /// `vm_not_found`.
    pub fn vm_to_show(&self, name: &VmName) -> Result<VmRow> {
        let row = self.any_vm_by_name(name)?;
        if row.purpose == Purpose::Use { Ok(row) } else { Err(no_such_vm(name)) }
    }

    /// The VM of that name that is there for its user.
    ///
    /// # Errors
    /// `vm_not_found`, `store_damaged` if its row cannot be read whole.
    pub fn vm_by_name(&self, name: &VmName) -> Result<VmRow> {
        let row = self.vm_to_show(name)?;
        match &row.unreadable {
            None => Ok(row),
            Some(why) => Err(unreadable(name, why)),
        }
    }

    /// The VM of that name or id, whatever it is there for.
    ///
    /// # Errors
    /// `vm_not_found`.
    pub fn any_vm_by_name(&self, name: &VmName) -> Result<VmRow> {
        // No VM is called like the id of another.
        let by_name = self.one_vm("name", name.as_str())?;
        match by_name {
            None => self.one_vm("id", name.as_str())?.ok_or_else(|| no_such_vm(name)),
            Some(row) => Ok(row),
        }
    }

    /// The VM of that id, if it is still there.
    ///
    /// # Errors
    /// Of the store.
    pub fn vm_by_id(&self, id: &str) -> Result<Option<VmRow>> {
        self.one_vm("id", id)
    }

    fn one_vm(&self, column: &str, value: &str) -> Result<Option<VmRow>> {
        let raw = self
            .connection
            .query_row(&format!("SELECT {COLUMNS} FROM vms WHERE {column} = ?1"), [value], Raw::read)
            .optional()
            .map_err(fault)?;
        raw.map(|raw| {
            let forwards = self.forwards(&raw.id)?;
            raw.decode(forwards)
        })
        .transpose()
    }

    /// All VMs in order of creation.
    ///
    /// # Errors
    /// Of the store.
    pub fn vms(&self) -> Result<Vec<VmRow>> {
        self.select("ORDER BY created_ms, name")
    }

    pub(super) fn select(&self, clause: &str) -> Result<Vec<VmRow>> {
        let mut statement = self.connection.prepare(&format!("SELECT {COLUMNS} FROM vms {clause}")).map_err(fault)?;
        let raws: Vec<Raw> =
            statement.query_map([], Raw::read).map_err(fault)?.collect::<Result<_, _>>().map_err(fault)?;
        let mut forwards = self.all_forwards()?;
        raws.into_iter()
            .map(|raw| {
                let own = forwards.remove(&raw.id).unwrap_or_default();
                raw.decode(own)
            })
            .collect()
    }

    fn all_forwards(&self) -> Result<std::collections::HashMap<String, Vec<ForwardSpec>>> {
        let mut statement =
            self.connection.prepare("SELECT vm_id, host, host_port, guest_port FROM forwards").map_err(fault)?;
        let rows =
            statement.query_map([], |row| Ok((row.get::<_, String>(0)?, read_forward(row, 1)?))).map_err(fault)?;
        let mut all = std::collections::HashMap::<_, Vec<_>>::new();
        for row in rows {
            let (id, forward) = row.map_err(fault)?;
            all.entry(id).or_default().extend(forward);
        }
        Ok(all)
    }

    /// Records that a VM's files are about to be removed.
    ///
    /// # Errors
    /// Of the store.
    pub fn mark_deleting(&self, id: &str) -> Result<()> {
        self.connection.execute("UPDATE vms SET deleting = 1 WHERE id = ?1", [id]).map_err(fault).map(drop)
    }

    /// Removes a VM's row, after its process and its files are gone. `last_log_entries` are what its console showed last.
    ///
    /// # Errors
    /// Of the store.
    pub fn remove_vm(&self, id: &str, last_log_entries: Vec<String>) -> Result<()> {
        self.in_transaction(|| {
            let row = self.vm_by_id(id);
            // The parts of a warm image that was being made may be in no manifest, and what cannot be read may own any.
            let owns_unknown = |row: &VmRow| row.purpose == Purpose::Bake || row.unreadable.is_some();
            let owns_unknown = row.as_ref().map_or(true, |row| row.as_ref().is_some_and(owns_unknown));
            if owns_unknown || self.is_only_owner_of_a_part(id)? {
                self.mark_parts_due()?;
            }
            let last_address = "SELECT last_ip_address FROM vms WHERE id = ?1";
            let ip_address =
                self.connection.query_row(last_address, [id], |row| row.get(0)).optional().map_err(fault)?;
            self.connection.execute("DELETE FROM announced WHERE owner = ?1", [id]).map_err(fault)?;
            self.connection.execute("DELETE FROM vms WHERE id = ?1", [id]).map_err(fault)?;
            match row {
                Ok(Some(row)) if row.purpose == Purpose::Use => {
                    let details = EventDetails { ip_address: ip_address.flatten(), last_log_entries, ..of_vm(&row) };
                    self.append(EventKind::VmDeleted, Some(&row.spec.name), &details)
                }
                // What cannot be read can be removed nevertheless.
                _ => Ok(()),
            }
        })
    }

    /// Whether the operation that makes a VM has not ended well yet.
    ///
    /// # Errors
    /// Of the store.
    pub fn is_being_made(&self, id: &str) -> Result<bool> {
        let query = "SELECT EXISTS (SELECT 1 FROM vms WHERE id = ?1 AND made_by IS NOT NULL)";
        self.connection.query_row(query, [id], |row| row.get(0)).map_err(fault)
    }

    /// The VMs that an operation is making.
    ///
    /// # Errors
    /// Of the store.
    pub fn vms_made_by(&self, operation: &LeaseId) -> Result<Vec<VmRow>> {
        Ok(self.vms()?.into_iter().filter(|row| row.made_by.as_ref() == Some(operation)).collect())
    }

    /// Ends an operation well: its VMs stay. Only if there are `count` of them; else nothing changes.
    ///
    /// # Errors
    /// `vm_not_running` if one of them is gone, and of the store.
    pub fn keep_vms_made_by(&self, operation: &LeaseId, count: usize) -> Result<()> {
        self.in_transaction(|| {
            let update = "UPDATE vms SET made_by = NULL WHERE made_by = ?1 AND deleting = 0";
            let kept = self.connection.execute(update, [operation.as_str()]).map_err(fault)?;
            if kept == count {
                return Ok(());
            }
            Err(Error::new(Code::VmNotRunning, "one of the new VMs has already ended and was deleted"))
        })
    }

    /// A VM's published ports in order.
    ///
    /// # Errors
    /// Of the store.
    pub fn forwards(&self, id: &str) -> Result<Vec<ForwardSpec>> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT host, host_port, guest_port FROM forwards WHERE vm_id = ?1 ORDER BY host_port")
            .map_err(fault)?;
        let rows = statement.query_map([id], |row| read_forward(row, 0)).map_err(fault)?;
        rows.filter_map(rusqlite::Result::transpose).collect::<Result<_, _>>().map_err(fault)
    }

    /// Adds a published port.
    ///
    /// # Errors
    /// Of the store.
    pub fn add_forward(&self, id: &str, forward: &ForwardSpec) -> Result<()> {
        insert_forward(&self.connection, id, forward)
    }

    /// Removes a published port; whether it was there.
    ///
    /// # Errors
    /// Of the store.
    pub fn remove_forward(&self, id: &str, forward: &ForwardSpec) -> Result<bool> {
        self.connection
            .execute(
                "DELETE FROM forwards WHERE vm_id = ?1 AND host = ?2 AND host_port = ?3 AND guest_port = ?4",
                params![id, forward.host.to_string(), forward.host_port, forward.guest_port],
            )
            .map(|n| n > 0)
            .map_err(fault)
    }
}

pub(super) fn unreadable(name: &VmName, why: &str) -> Error {
    Error::new(Code::StoreDamaged, format!("the row of VM '{name}' in the store cannot be read: {why}"))
        .hint("another version of nido may be able to read it")
        .or_hint(Hint::run_on(op::VM_DELETE, name).forced())
}

fn no_such_vm(name: &VmName) -> Error {
    Error::new(Code::VmNotFound, format!("there is no VM named '{name}'")).hint(Hint::run(op::VM_LS).to("list VMs"))
}

pub(super) fn name_taken(name: &VmName) -> Error {
    Error::new(Code::VmExists, format!("a VM named '{name}' exists already"))
        .hint("choose another name")
        .or_hint(Hint::run_on(op::VM_DELETE, name))
}

pub(super) fn insert_forward(connection: &rusqlite::Connection, id: &str, forward: &ForwardSpec) -> Result<()> {
    connection
        .execute(
            "INSERT OR IGNORE INTO forwards (vm_id, host, host_port, guest_port) VALUES (?1, ?2, ?3, ?4)",
            params![id, forward.host.to_string(), forward.host_port, forward.guest_port],
        )
        .map_err(fault)
        .map(drop)
}

/// A published port; `None` if its row cannot be read, which is logged.
fn read_forward(row: &Row<'_>, first: usize) -> rusqlite::Result<Option<ForwardSpec>> {
    let (host, ports): (String, [i64; 2]) = (row.get(first)?, [row.get(first + 1)?, row.get(first + 2)?]);
    let [host_port, guest_port] = ports.map(u16::try_from);
    match (host.parse(), host_port, guest_port) {
        (Ok(host), Ok(host_port), Ok(guest_port)) => Ok(Some(ForwardSpec { host, host_port, guest_port })),
        _ => {
            tracing::warn!("a published port in the store cannot be read: {} {ports:?}", host.escape_debug());
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests;
