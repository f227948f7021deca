//! Which lines are about a VM. Pure.
//!
//! Lines name VMs, and names are reused. Events have the id, and the number of the last request before them. So a request that names a
//! VM is about the one that was created last before it, if that was not deleted before it.

use std::collections::HashSet;

use jiff::Timestamp;
use nido_api::{EventKind, names_vm};

use super::super::event_record::EventParams;
use super::super::line::Line;

/// The operations that create a VM: their attempt precedes the VM.
const CREATING: [&[u8]; 4] = [b"vm_spawn", b"vm_create", b"vm_run", b"vm_fork"];

/// A VM, as the log of events knows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Subject {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The number of its first line in the log of events.
    pub first_event: u64,
    /// The last line of `acts` before its creation.
    pub since: u64,
    /// The last line of `acts` before its deletion was recorded.
    pub until: Option<u64>,
    /// The last line of `acts` that may be about an earlier VM of its name.
    pub previous_until: u64,
    /// Where its creation is not in the log: lines before this time are about another VM.
    pub not_before: Option<Timestamp>,
}

/// All VMs that the log of events knows, in the order of their first event.
#[derive(Debug, Default)]
pub struct Subjects(Vec<Subject>);

/// The id of the VM of an event.
fn id_of(line: &Line) -> Option<(EventParams, String)> {
    let mut params: EventParams = serde_json::from_slice(&line.record.params).ok()?;
    let id = params.details.vm_id.take()?;
    Some((params, id))
}

/// Whether a line of the log of events is about the VM of this id.
pub fn is_event_of(line: &Line, id: &str) -> bool {
    id_of(line).is_some_and(|(_, of)| of == id)
}

impl Subjects {
    /// The next line of the log of events.
    pub fn note(&mut self, line: &Line) {
        let Some((params, id)) = id_of(line) else { return };
        let Some(name) = params.vm_name else { return };
        let known = self.0.iter().position(|one| one.id == id);
        let at = known.unwrap_or_else(|| {
            let previous_until = self.0.iter().filter(|one| one.name == name).filter_map(|one| one.until).max();
            let previous_until = previous_until.unwrap_or(0);
            let is_creation = line.record.tool == EventKind::VmCreated.word().as_bytes();
            let since = if is_creation { params.acts } else { previous_until };
            let not_before = (!is_creation).then_some(params.at);
            let first_event = line.record.seq;
            self.0.push(Subject {
                id,
                first_event,
                since,
                until: None,
                previous_until,
                not_before,
                ..Subject::default()
            });
            self.0.len() - 1
        });
        self.0[at].name = name;
        if line.record.tool == EventKind::VmDeleted.word().as_bytes() {
            self.0[at].until = Some(params.acts);
        }
    }

    /// The VM of this id, or the last one of this name; and how many have had the name.
    #[must_use]
    pub fn find(&self, which: &str) -> Option<(Subject, usize)> {
        if let Some(one) = self.0.iter().find(|one| one.id == which) {
            return Some((one.clone(), 1));
        }
        let named: Vec<_> = self.0.iter().filter(|one| one.name == which).collect();
        named.last().map(|last| ((*last).clone(), named.len()))
    }
}

/// The requests about a VM: found in one pass over the log of writes.
#[derive(Debug)]
pub struct OwnActs<'a> {
    subject: &'a Subject,
    /// What attempts and outcomes of the VM share.
    ids: HashSet<Vec<u8>>,
    /// The request that created it.
    creation: Option<(Vec<u8>, u64)>,
}

impl<'a> OwnActs<'a> {
    /// Of this VM.
    #[must_use]
    pub fn new(subject: &'a Subject) -> Self {
        Self { subject, ids: HashSet::new(), creation: None }
    }

    /// The next line of the log of writes.
    pub fn note(&mut self, line: &Line) {
        let (subject, record) = (self.subject, &line.record);
        let Ok(params) = serde_json::from_slice(&record.params) else { return };
        let is_later = subject.not_before.is_none_or(|moment| record.time >= moment);
        let is_then = record.seq > subject.since && subject.until.is_none_or(|until| record.seq <= until) && is_later;
        let is_outcome_of_other = record.stage == b"outcome" && record.result != b"denied";
        let by_name = names_vm(&params, &subject.name);
        if names_vm(&params, &subject.id) || (by_name && is_then && !is_outcome_of_other) {
            self.ids.insert(record.id.clone());
        } else if by_name
            && record.stage == b"attempt"
            && CREATING.contains(&&*record.tool)
            && record.seq > subject.previous_until
            && record.seq <= subject.since
        {
            self.creation = Some((record.id.clone(), record.seq));
        }
    }

    /// The first line of a receipt's segment.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.creation.as_ref().map_or(self.subject.since + 1, |(_, seq)| *seq)
    }

    /// Whether a line is about the VM.
    #[must_use]
    pub fn has(&self, line: &Line) -> bool {
        self.ids.contains(&line.record.id) || self.creation.as_ref().is_some_and(|(id, _)| *id == line.record.id)
    }
}
