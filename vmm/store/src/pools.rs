//! The table `pools`, and the claim of a clone.
//!
//! Invariant: a clone is claimed once, by one `UPDATE` that also takes the name, or not at all.

use jiff::Timestamp;
use nido_api::error::{Error, Result};
use nido_api::machine::Machine;
use nido_api::name::TemplateName;
use nido_api::state::VmState;
use nido_api::{AgentInfo, EventKind, ForwardSpec, PoolKind, VmSpec};
use rusqlite::{OptionalExtension as _, params};

use super::events::of_creation;
use super::vms::{insert_forward, name_taken};
use super::{Origin, Store, VmRow, decode, encode, encode_spec, fault, readable_rows};

/// How long it is known what became of an attempt to claim a clone, in milliseconds.
const CLAIM_RETENTION_MS: i64 = 24 * 3600 * 1000;

/// One pool as the store knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolRow {
    /// The template its clones are made from.
    pub template: TemplateName,
    /// Their machine.
    pub kind: PoolKind,
    /// How many shall wait.
    pub wanted: u32,
}

/// What a clone becomes.
#[derive(Debug)]
pub struct Claim<'a> {
    /// What was requested.
    pub spec: &'a VmSpec,
    /// Virtual size of its disk.
    pub disk_bytes: u64,
    /// Its machine, with the reason for this VM.
    pub machine: &'a Machine,
    /// How its guest is brought to it: with the token that it has in the pool.
    pub origin: &'a Origin,
    /// Published ports, with the host's ports as they were taken.
    pub forwards: &'a [ForwardSpec],
    /// When it is claimed.
    pub now: Timestamp,
    /// When its life ends.
    pub expires_at: Option<Timestamp>,
    /// The attempt that this is; empty if the command has none. An attempt that was given up claims nothing.
    pub ticket: &'a str,
    /// Who owns it then.
    pub owner: Option<&'a str>,
    /// How many VMs that owner may have.
    pub max_vms: Option<u32>,
}

impl Store {
    /// Keeps `wanted` clones of a kind from now on; none at all for 0.
    ///
    /// # Errors
    /// Of the store.
    pub fn set_pool(&self, template: &TemplateName, kind: &PoolKind, wanted: u32) -> Result<()> {
        let kind = encode(kind)?;
        let done = if wanted == 0 {
            let delete = "DELETE FROM pools WHERE template = ?1 AND kind = ?2";
            self.connection.execute(delete, params![template.as_str(), kind])
        } else {
            let upsert = "INSERT INTO pools (template, kind, wanted) VALUES (?1, ?2, ?3) \
                          ON CONFLICT (template, kind) DO UPDATE SET wanted = excluded.wanted";
            self.connection.execute(upsert, params![template.as_str(), kind, wanted])
        };
        done.map(drop).map_err(fault)
    }

    /// All pools, in order of template and machine.
    ///
    /// # Errors
    /// Of the store.
    pub fn pools(&self) -> Result<Vec<PoolRow>> {
        let mut statement = self
            .connection
            .prepare("SELECT template, kind, wanted FROM pools ORDER BY template, kind")
            .map_err(fault)?;
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).map_err(fault)?;
        let pool = |(template, kind, wanted): (String, String, i64)| {
            let wanted = u32::try_from(wanted).map_err(|e| Error::internal(e.to_string()))?;
            Ok(PoolRow { template: template.parse()?, kind: decode("kind", &kind)?, wanted })
        };
        readable_rows("pools", rows.map(|row| row.map(pool)))
    }

    /// All clones of all pools, whatever their state, the oldest first.
    ///
    /// # Errors
    /// Of the store.
    pub fn clones(&self) -> Result<Vec<VmRow>> {
        self.select("WHERE purpose = 'pool' AND deleting = 0 ORDER BY created_ms, name")
    }

    /// Whether fewer clones are there than all pools together want. Quick.
    ///
    /// # Errors
    /// Of the store.
    pub fn pools_short(&self) -> Result<bool> {
        let count = "SELECT (SELECT coalesce(sum(wanted), 0) FROM pools) > \
                     (SELECT count(*) FROM vms WHERE purpose = 'pool' AND deleting = 0 \
                      AND state IN ('starting', 'running', 'paused'))";
        self.connection.query_row(count, [], |row| row.get(0)).map_err(fault)
    }

    /// Whether any clone waits. Quick.
    ///
    /// # Errors
    /// Of the store.
    pub fn has_waiting_clones(&self) -> Result<bool> {
        let exists = "SELECT EXISTS (SELECT 1 FROM vms WHERE purpose = 'pool' AND state = 'paused')";
        self.connection.query_row(exists, [], |row| row.get(0)).map_err(fault)
    }

    /// The ids of waiting clones that resume from the bake with this memory image, in random order, so that several who
    /// claim at the same time rarely meet.
    ///
    /// # Errors
    /// Of the store.
    pub fn waiting_clones(&self, memory_sha256: &str) -> Result<Vec<String>> {
        let query = "SELECT id FROM vms WHERE purpose = 'pool' AND state = 'paused' AND deleting = 0 \
                     AND json_extract(agent, '$.ready') = 1 AND json_extract(origin, '$.memory') = ?1 \
                     ORDER BY random()";
        let mut statement = self.connection.prepare(query).map_err(fault)?;
        let ids = statement.query_map([memory_sha256], |row| row.get(0)).map_err(fault)?;
        ids.collect::<rusqlite::Result<_>>().map_err(fault)
    }

    /// Turns a waiting clone into a VM that is starting; false if it no longer waits. The caller holds its
    /// `supervisor.lock`.
    ///
    /// # Errors
    /// `vm_exists` if the name is taken, `limit_exceeded`; the clone waits on then.
    pub fn claim_vm(&self, id: &str, claim: &Claim<'_>) -> Result<bool> {
        self.in_transaction(|| {
            if self.claim_of(claim.ticket)?.is_some() {
                return Ok(false);
            }
            self.check_count(claim.owner, claim.max_vms)?;
            let update = "UPDATE vms SET purpose = 'use', owner = ?11, name = ?2, spec = ?3, state = ?4, disk_bytes = ?5, machine = ?6, \
                          origin = ?7, created_ms = ?8, started_ms = ?8, expires_ms = ?9, agent = ?10, timings = NULL, state_cause = NULL \
                          WHERE id = ?1 AND purpose = 'pool' AND state = 'paused' AND deleting = 0";
            let changed = self.connection
                .execute(
                    update,
                    params![
                        id,
                        claim.spec.name.as_str(),
                        encode_spec(claim.spec)?,
                        VmState::Starting.word(),
                        i64::try_from(claim.disk_bytes).unwrap_or(i64::MAX),
                        encode(claim.machine)?,
                        encode(claim.origin)?,
                        claim.now.as_millisecond(),
                        claim.expires_at.map(Timestamp::as_millisecond),
                        encode(&AgentInfo::default())?,
                        claim.owner,
                    ],
                )
                .map_err(|e| match e.sqlite_error_code() {
                    Some(rusqlite::ErrorCode::ConstraintViolation) => name_taken(&claim.spec.name),
                    _ => fault(e),
                })?;
            if changed == 0 {
                return Ok(false);
            }
            if !claim.ticket.is_empty() {
                self.write_claim(claim.ticket, Some(id), claim.now)?;
            }
            for forward in claim.forwards {
                insert_forward(&self.connection, id, forward)?;
            }
            let row = self.vm_by_id(id)?.ok_or_else(|| Error::internal("a VM was deleted while it was claimed"))?;
            self.append(EventKind::VmCreated, Some(&row.spec.name), &of_creation(&row))?;
            Ok(true)
        })
    }

    /// Gives up an attempt to claim a clone, unless it has succeeded: then the clone's id is returned. After this, it cannot
    /// succeed any more.
    ///
    /// # Errors
    /// Of the store.
    pub fn give_up_claim(&self, ticket: &str, now: Timestamp) -> Result<Option<String>> {
        self.in_transaction(|| match self.claim_of(ticket)? {
            Some(claimed) => Ok(claimed),
            None => self.write_claim(ticket, None, now).map(|()| None),
        })
    }

    /// What became of an attempt: nothing yet, given up, or the clone that was claimed.
    fn claim_of(&self, ticket: &str) -> Result<Option<Option<String>>> {
        let query = "SELECT vm_id FROM claims WHERE ticket = ?1";
        self.connection.query_row(query, [ticket], |row| row.get(0)).optional().map_err(fault)
    }

    fn write_claim(&self, ticket: &str, id: Option<&str>, now: Timestamp) -> Result<()> {
        let old = now.as_millisecond() - CLAIM_RETENTION_MS;
        self.connection.execute("DELETE FROM claims WHERE at_ms < ?1", [old]).map_err(fault)?;
        let insert = "INSERT INTO claims (ticket, vm_id, at_ms) VALUES (?1, ?2, ?3)";
        self.connection.execute(insert, params![ticket, id, now.as_millisecond()]).map(drop).map_err(fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AdoptedStart, AgentReady, BootParts, Purpose, StoredBake, Transition, TransitionOutcome};
    use nido_api::error::Code;
    use nido_api::machine::{Accel, MachineType, Transport};
    use nido_api::{AccelChoice, MachineChoice, NetChoice};

    fn machine() -> Machine {
        Machine {
            machine: MachineType::Microvm,
            accel: Accel::Tcg,
            cpu_model: "max".into(),
            cpus: 1,
            memory_mib: 512,
            net: NetChoice::Nat,
            transport: Transport::VirtioSerial { reconnect_ms: false },
            tb_size_mib: None,
            tsc_khz: None,
            reason: String::new(),
            confinement: Vec::new(),
            own_user: false,
            host_limits: Default::default(),
            warnings: Vec::new(),
        }
    }

    fn origin(memory: &str, token: &str) -> Origin {
        Origin::Fork(StoredBake { memory: memory.into(), state: "s".into(), token: token.into(), live: false })
    }

    fn open_with_clones(count: usize) -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        for number in 0..count {
            let parts = BootParts {
                vmlinux: "a".into(),
                initramfs: "b".into(),
                initramfs_base: None,
                agent: None,
                root: "c".into(),
                root_bytes: 1,
                packages: "d".into(),
                init: nido_images::Init::Agent,
                append: String::new(),
                frozen: Vec::new(),
                allow: None,
            };
            let spec = VmSpec::named(format!("pool-{number}").parse().unwrap());
            let id = number.to_string();
            store.insert_vm(&VmRow::new(id.clone(), spec, Purpose::Pool, VmState::Starting, parts, 1 << 30)).unwrap();
            let forked = AdoptedStart {
                machine: None,
                origin: origin("m", "bake"),
                cid: None,
                started_at: None,
                expires_at: None,
            };
            let parked = AgentReady {
                state: VmState::Paused,
                cause: None,
                agent: AgentInfo { ready: true, ..AgentInfo::default() },
                ip_address: None,
                timings: None,
                machine: None,
            };
            for transition in [Transition::Adopted(Box::new(forked)), Transition::Ready(Box::new(parked))] {
                assert_eq!(store.transition(&id, &transition).unwrap(), TransitionOutcome::Yes);
            }
        }
        (dir, store)
    }

    fn claim(store: &Store, id: &str, name: &str) -> Result<bool> {
        claim_with(store, id, name, "")
    }

    fn claim_with(store: &Store, id: &str, name: &str, ticket: &str) -> Result<bool> {
        let spec = VmSpec { ephemeral: true, ..VmSpec::named(name.parse().unwrap()) };
        let (machine, origin) = (machine(), origin("m", "mine"));
        store.claim_vm(
            id,
            &Claim {
                spec: &spec,
                disk_bytes: 2 << 30,
                machine: &machine,
                origin: &origin,
                forwards: &["8080:80".parse().unwrap()],
                now: Timestamp::now(),
                expires_at: None,
                ticket,
                owner: Some("CLI uid:1"),
                max_vms: None,
            },
        )
    }

    #[test]
    fn a_clone_is_claimed_once_and_becomes_a_vm_that_starts() {
        let (_dir, store) = open_with_clones(2);
        assert_eq!(store.waiting_clones("m").unwrap().len(), 2);
        assert_eq!(store.waiting_clones("other").unwrap().len(), 0);
        assert!(claim(&store, "0", "web").unwrap());
        assert!(!claim(&store, "0", "again").unwrap());
        assert_eq!(store.waiting_clones("m").unwrap(), ["1"]);
        let row = store.vm_by_name(&"web".parse().unwrap()).unwrap();
        assert_eq!((row.purpose, row.state, row.agent.ready), (Purpose::Use, VmState::Starting, false));
        assert_eq!((row.forwards.len(), row.disk_bytes, row.origin), (1, 2 << 30, origin("m", "mine")));
    }

    #[test]
    fn a_name_that_is_taken_leaves_the_clone_waiting() {
        let (_dir, store) = open_with_clones(2);
        assert!(claim(&store, "0", "web").unwrap());
        assert_eq!(claim(&store, "1", "web").unwrap_err().code(), Code::VmExists);
        assert_eq!(store.waiting_clones("m").unwrap(), ["1"]);
        assert!(store.forwards("1").unwrap().is_empty());
    }

    // A claim that was slow succeeded after its command had reported an error: the VM stayed under the caller's name.
    #[test]
    fn an_attempt_either_succeeds_or_is_given_up() {
        let (_dir, store) = open_with_clones(3);
        let now = Timestamp::now();
        assert_eq!(store.give_up_claim("late", now).unwrap(), None);
        assert!(!claim_with(&store, "0", "web", "late").unwrap(), "it was given up before");
        assert_eq!(store.waiting_clones("m").unwrap().len(), 3);
        assert!(claim_with(&store, "1", "web", "quick").unwrap());
        assert_eq!(store.give_up_claim("quick", now).unwrap().as_deref(), Some("1"));
        assert_eq!(store.give_up_claim("late", now).unwrap(), None);
        // One that failed for its name may be given up as well.
        assert_eq!(claim_with(&store, "2", "web", "third").unwrap_err().code(), Code::VmExists);
        assert_eq!(store.give_up_claim("third", now).unwrap(), None);
    }

    #[test]
    fn clones_are_nobodys_vms() {
        let (_dir, store) = open_with_clones(1);
        let name = "pool-0".parse().unwrap();
        assert_eq!(store.vm_by_name(&name).unwrap_err().code(), Code::VmNotFound);
        assert_eq!(store.any_vm_by_name(&name).unwrap().purpose, Purpose::Pool);
    }

    #[test]
    fn pools_are_kept_by_template_and_machine() {
        let (_dir, store) = open_with_clones(1);
        let template: TemplateName = "sandbox".parse().unwrap();
        let kind = PoolKind {
            cpus: 1,
            memory_mib: 512,
            net: NetChoice::Nat,
            machine: MachineChoice::Auto,
            accel: AccelChoice::Auto,
            nested: false,
        };
        let large = PoolKind { memory_mib: 2048, ..kind.clone() };
        assert!(!store.pools_short().unwrap());
        store.set_pool(&template, &kind, 1).unwrap();
        assert!(!store.pools_short().unwrap());
        store.set_pool(&template, &large, 3).unwrap();
        store.set_pool(&template, &kind, 2).unwrap();
        assert!(store.pools_short().unwrap());
        let wanted: Vec<_> = store.pools().unwrap().into_iter().map(|pool| (pool.kind, pool.wanted)).collect();
        assert_eq!(wanted, [(large.clone(), 3), (kind.clone(), 2)]);
        store.set_pool(&template, &kind, 0).unwrap();
        store.set_pool(&template, &large, 0).unwrap();
        assert_eq!(store.pools().unwrap(), []);
    }
}
