//! Lists, filtered and a page at a time: the same for every front end. Pure.
//!
//! Invariant: a cursor names a place in the order of creation, not a number of entries; what is added or removed meanwhile makes no
//! other entry be missed or come twice.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::VmInfo;
use crate::error::{Code, Error, Result};
use crate::state::VmState;

/// The most entries that one page may have.
pub const PAGE_MAX: usize = 1000;

/// Which VMs are listed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmQuery {
    /// Only VMs in one of these states; none named is all.
    pub status: Vec<VmState>,
    /// Only VMs that carry all of these labels; without a value, whatever the label's value is.
    pub labels: BTreeMap<String, Option<String>>,
    /// At most so many; all if absent.
    pub limit: Option<usize>,
    /// The `next_cursor` of an earlier page.
    pub cursor: Option<String>,
}

/// VMs, in order of creation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VmPage {
    /// The VMs.
    pub vms: Vec<VmInfo>,
    /// The `cursor` of the next page; absent on the last one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(nullable = false)]
    pub next_cursor: Option<String>,
}

impl VmQuery {
    /// Adds a label as it is written: `KEY` or `KEY=VALUE`.
    pub fn label(&mut self, text: &str) {
        let (key, value) = text.split_once('=').map_or((text, None), |(key, value)| (key, Some(value.to_owned())));
        self.labels.insert(key.to_owned(), value);
    }

    /// Whether a VM is among those asked for, limit and cursor apart.
    #[must_use]
    pub fn wants(&self, vm: &VmInfo) -> bool {
        let has = |(key, value): (&String, &Option<String>)| {
            vm.labels.get(key).is_some_and(|is| value.as_ref().is_none_or(|value| value == is))
        };
        (self.status.is_empty() || self.status.contains(&vm.status)) && self.labels.iter().all(has)
    }

    /// The page of these VMs that is requested.
    ///
    /// # Errors
    /// `spec_invalid`: a limit of 0 or above [`PAGE_MAX`], a cursor that no page gave.
    pub fn page(&self, mut vms: Vec<VmInfo>) -> Result<VmPage> {
        if self.limit.is_some_and(|limit| !(1..=PAGE_MAX).contains(&limit)) {
            return Err(Error::new(Code::SpecInvalid, format!("limit: it is 1 to {PAGE_MAX}")));
        }
        if self.cursor.as_deref().is_some_and(|cursor| !is_place(cursor)) {
            return Err(Error::new(Code::SpecInvalid, "cursor: not a cursor of an earlier page"));
        }
        vms.retain(|vm| self.wants(vm));
        vms.sort_by_key(place);
        vms.retain(|vm| self.cursor.as_ref().is_none_or(|cursor| place(vm) > *cursor));
        let limit = self.limit.unwrap_or(usize::MAX);
        let more = vms.len() > limit;
        vms.truncate(limit);
        let next_cursor = vms.last().filter(|_| more).map(place);
        Ok(VmPage { vms, next_cursor })
    }
}

/// Where a VM stands in the order of creation.
fn place(vm: &VmInfo) -> String {
    format!("{:020}-{}", vm.created_at.as_millisecond(), vm.id)
}

fn is_place(text: &str) -> bool {
    text.split_once('-')
        .is_some_and(|(at, id)| at.len() == 20 && at.bytes().all(|byte| byte.is_ascii_digit()) && !id.is_empty())
}
