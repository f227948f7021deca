//! Lists, filtered and a page at a time: the same for every front end. Pure.
//!
//! Invariant: a cursor names a place in a fixed order, not a number of entries; what comes and goes meanwhile makes no other entry be
//! missed or come twice.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::VmInfo;
use crate::error::{Code, Error, Result};
use crate::state::VmState;

/// Which page of a list is requested.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageRequest {
    /// At most so many entries; all if absent.
    pub limit: Option<usize>,
    /// The `next_cursor` of an earlier page.
    pub cursor: Option<String>,
}

impl PageRequest {
    /// The most entries that one page may have.
    pub const LIMIT_MAX: usize = 1000;

    /// The requested page, and the cursor of the next one if there is one. `place` is where an entry stands in the order; it never
    /// changes.
    ///
    /// # Errors
    /// `spec_invalid`: a limit of 0 or above `limit_max`.
    pub fn of<T>(
        &self,
        mut all: Vec<T>,
        place: impl Fn(&T) -> String,
        limit_max: usize,
    ) -> Result<(Vec<T>, Option<String>)> {
        if self.limit.is_some_and(|limit| !(1..=limit_max).contains(&limit)) {
            return Err(Error::new(Code::SpecInvalid, format!("limit: it is 1 to {limit_max}")));
        }
        all.sort_by_key(&place);
        all.retain(|one| self.cursor.as_ref().is_none_or(|cursor| place(one) > *cursor));
        let limit = self.limit.unwrap_or(usize::MAX);
        let more = all.len() > limit;
        all.truncate(limit);
        let next = all.last().filter(|_| more).map(place);
        Ok((all, next))
    }
}

/// A label that a VM has to carry: `KEY`, whatever its value is, or `KEY=VALUE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelFilter {
    key: String,
    value: Option<String>,
}

impl LabelFilter {
    /// A label with this value.
    pub fn with_value(key: impl Into<String>, value: impl Into<String>) -> Self {
        Self { key: key.into(), value: Some(value.into()) }
    }

    /// Whether a VM carries it.
    #[must_use]
    pub fn holds(&self, vm: &VmInfo) -> bool {
        vm.labels.get(&self.key).is_some_and(|found| self.value.as_ref().is_none_or(|value| value == found))
    }
}

impl FromStr for LabelFilter {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (key, value) = text.split_once('=').map_or((text, None), |(key, value)| (key, Some(value.to_owned())));
        Ok(Self { key: key.to_owned(), value })
    }
}

/// Which VMs are listed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmQuery {
    /// Only VMs in one of these states; none named is all.
    pub status: Vec<VmState>,
    /// Only VMs that carry all of these labels.
    pub labels: Vec<LabelFilter>,
    /// Which of them.
    pub page: PageRequest,
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
    /// Whether a VM meets the conditions, limit and cursor apart.
    #[must_use]
    pub fn wants(&self, vm: &VmInfo) -> bool {
        (self.status.is_empty() || self.status.contains(&vm.status)) && self.labels.iter().all(|label| label.holds(vm))
    }

    /// The requested page of these VMs.
    ///
    /// # Errors
    /// `spec_invalid`: a limit of 0 or above [`PageRequest::LIMIT_MAX`], a cursor that no page gave.
    pub fn page(&self, mut vms: Vec<VmInfo>) -> Result<VmPage> {
        if self.page.cursor.as_deref().is_some_and(|cursor| !is_place(cursor)) {
            return Err(Error::new(Code::SpecInvalid, "cursor: not the next_cursor of an earlier page"));
        }
        vms.retain(|vm| self.wants(vm));
        let (vms, next_cursor) = self.page.of(vms, place, PageRequest::LIMIT_MAX)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn places(numbers: impl IntoIterator<Item = u32>) -> Vec<String> {
        numbers.into_iter().map(|number| format!("{number:020}-x")).collect()
    }

    fn page(all: &[String], cursor: Option<&str>) -> (Vec<String>, Option<String>) {
        let request = PageRequest { limit: Some(3), cursor: cursor.map(str::to_owned) };
        request.of(all.to_vec(), Clone::clone, PageRequest::LIMIT_MAX).unwrap()
    }

    #[test]
    fn each_entry_is_on_one_page_whatever_comes_and_goes() {
        let mut there = places((0..8).rev());
        let (first, next) = page(&there, None);
        assert_eq!((&first, next.as_ref()), (&places(0..3), first.last()));
        // The one that the cursor names is gone, and so is one of the next page; another has come.
        there.retain(|one| !places([2, 4]).contains(one));
        there.push(places([9]).remove(0));
        let (second, next) = page(&there, next.as_deref());
        assert_eq!(second, places([3, 5, 6]));
        assert_eq!(page(&there, next.as_deref()), (places([7, 9]), None));
    }

    #[test]
    fn a_page_that_is_just_full_is_the_last() {
        assert_eq!(page(&places(0..3), None), (places(0..3), None));
        assert_eq!(page(&[], None), (vec![], None));
    }

    #[test]
    fn a_limit_outside_its_bounds_is_refused() {
        for limit in [0, 6] {
            let request = PageRequest { limit: Some(limit), cursor: None };
            let wrong = request.of(places(0..3), Clone::clone, 5).unwrap_err();
            assert_eq!((wrong.code(), wrong.message()), (Code::SpecInvalid, "limit: it is 1 to 5"));
        }
    }

    #[test]
    fn a_cursor_that_no_page_gave_is_refused() {
        let query = |cursor: &str| VmQuery {
            page: PageRequest { limit: None, cursor: Some(cursor.to_owned()) },
            ..VmQuery::default()
        };
        assert!(query(&places([7])[0]).page(Vec::new()).is_ok());
        for wrong in ["", "x", "-", "1-x", "0000000000000000000x-x", "00000000000000000001-", "00000000000000000001"] {
            assert_eq!(query(wrong).page(Vec::new()).unwrap_err().code(), Code::SpecInvalid, "{wrong}");
        }
    }
}
