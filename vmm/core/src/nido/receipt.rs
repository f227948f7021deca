//! Receipts of VMs: collected from the audit logs and the VM's snapshots, and signed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind, Read as _};
use std::path::Path;

use nido_api::error::{Code, Error, Hint, Result};
use nido_api::name::VmName;
use nido_api::{AuditReceipt, ReceiptSegment, ReceiptSnapshot, hex, moment};
use nido_engine::home::{DEVICE_STATE, DISK};
use nido_engine::snapshot;
use sha2::{Digest as _, Sha256};

use super::Nido;
use crate::audit::checkpoint::Key;
use crate::audit::line::Line;
use crate::audit::log::Log;
use crate::audit::read::unreadable;
use crate::audit::receipt::{
    Facts, OwnActs, SegmentBuilder, Subject, Subjects, facts, is_event_of, shortened_arguments, sign,
};

/// How much of a file is hashed at once.
const HASH_BUFFER_BYTES: usize = 1 << 20;

impl Nido {
    /// A signed receipt of a VM, by its id, or by its name: of several VMs that have had the name the last one, which `note` reports.
    /// The VM may be deleted. The files of its snapshots are read, which takes a second for each GiB.
    ///
    /// # Errors
    /// `vm_not_found` if no line is about such a VM; `audit_broken`, `audit_failed`, `internal`.
    pub fn audit_receipt(&self, which: &str, mut note: impl FnMut(&str)) -> Result<AuditReceipt> {
        self.audit_events_if_writable()?;
        let (subject, name) = self.subject(which, &mut note)?;
        let (acts, own_acts) = own_acts(&Log::at(self.home().audit()), &subject)?;
        let events_log = Log::events(self.home().audit());
        let mut events = SegmentBuilder::new(subject.first_event);
        each(&events_log, |text| events.push(text, |line| is_event_of(line, &subject.id)))?;
        let (events, own_events) = events.end();
        let arguments = whole_arguments(&Log::at(self.home().audit()), &own_acts);
        let Facts { vm, starts, network, secrets, .. } = facts(&subject.id, &name, &own_events, &own_acts, &arguments);
        let snapshots = self.hash_snapshots(&subject.id, &name, &mut note)?;
        let key = Key::open(&self.audit_log()?)?;
        let receipt = AuditReceipt {
            kind: AuditReceipt::KIND.into(),
            format: AuditReceipt::FORMAT,
            nido: env!("CARGO_PKG_VERSION").into(),
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            time: moment::now(),
            vm,
            starts,
            network,
            arguments,
            secrets,
            snapshots,
            acts,
            events,
            public_key: String::new(),
            signature: String::new(),
        };
        sign(receipt, &key)
    }

    /// The public key of checkpoints and receipts, in hexadecimal; created if the home has no key yet.
    ///
    /// # Errors
    /// `internal`.
    pub fn audit_key(&self) -> Result<String> {
        Ok(Key::open(&self.audit_log()?)?.public())
    }

    fn subject(&self, which: &str, note: &mut impl FnMut(&str)) -> Result<(Subject, VmName)> {
        let mut subjects = Subjects::default();
        each(&Log::events(self.home().audit()), |text| {
            if let Some(line) = Line::parse(text) {
                subjects.note(&line);
            }
            Ok(())
        })?;
        let Some((subject, count)) = subjects.find(which) else {
            return Err(Error::new(Code::VmNotFound, format!("no event of the audit log is about a VM '{which}'"))
                .hint(Hint::command_line(
                    "list the VMs that it knows: nido audit show --log events --tool vm.created",
                )));
        };
        if count > 1 {
            note(&format!("{count} VMs have had the name {which}; this is the last one, {}", subject.id));
        }
        let name = subject.name.parse()?;
        Ok((subject, name))
    }

    /// The snapshots of a VM and the hashes of their files. Damaged ones are left out.
    fn hash_snapshots(&self, id: &str, name: &VmName, note: &mut impl FnMut(&str)) -> Result<Vec<ReceiptSnapshot>> {
        let dir = self.vm_dir(id);
        if !dir.file(nido_engine::home::SNAPSHOTS).exists() {
            return Ok(Vec::new());
        }
        let mut snapshots = Vec::new();
        for found in snapshot::list(&dir, name)?.into_iter().filter(|found| found.damaged.is_none()) {
            note(&format!("hashing snapshot {}", found.name));
            let files = hash_files(&snapshot::dir(&dir, &found.name));
            match files {
                // Deleted meanwhile: it has none.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(Error::io(format!("cannot read snapshot '{}'", found.name), error)),
                Ok(files) => {
                    snapshots.push(ReceiptSnapshot { name: found.name, created_at: found.created_at, files });
                }
            }
        }
        Ok(snapshots)
    }
}

/// The lines of the log of writes about a VM: the segment, and the lines themselves.
fn own_acts(log: &Log, subject: &Subject) -> Result<(ReceiptSegment, Vec<Line>)> {
    let mut own = OwnActs::new(subject);
    each(log, |text| {
        if let Some(line) = Line::parse(text) {
            own.note(&line);
        }
        Ok(())
    })?;
    let mut segment = SegmentBuilder::new(own.start());
    each(log, |text| segment.push(text, |line| own.has(line)))?;
    Ok(segment.end())
}

/// The whole arguments of changes of rules that are shortened in their lines, as far as they are kept.
fn whole_arguments(log: &Log, acts: &[Line]) -> BTreeMap<String, String> {
    let named = acts.iter().filter_map(shortened_arguments);
    named.filter_map(|sha256| log.whole(&sha256).map(|text| (sha256, text))).collect()
}

/// Every whole line of a log.
fn each(log: &Log, mut seen: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let mut outcome = Ok(());
    let read = log.open_all().map_err(unreadable)?.each(|place, text, whole| {
        // A writer that was killed leaves half a line at the end.
        if whole || !place.newest {
            outcome = seen(text);
        }
        outcome.is_ok()
    });
    read.map_err(unreadable)?;
    outcome
}

/// The hash of the disk and, of a snapshot with memory, of memory and devices.
fn hash_files(snapshot: &Path) -> io::Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::from([("disk".to_owned(), hash(&snapshot.join(DISK))?)]);
    match hash(&snapshot.join(DEVICE_STATE)) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        state => drop(files.insert("state".to_owned(), state?)),
    }
    Ok(files)
}

fn hash(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; HASH_BUFFER_BYTES]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex::encode(&hash.finalize())),
            count => hash.update(&buffer[..count]),
        }
    }
}

#[cfg(test)]
mod tests;
