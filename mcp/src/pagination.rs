//! Long lists, a page at a time. Pure.
//!
//! Invariant: a cursor names a position, not a number of entries; adding or removing entries meanwhile does not skip or repeat others.

use nido_api::VmInfo;
use nido_api::error::{Code, Error, Result};

/// Where a VM stands: in order of creation.
pub fn place(vm: &VmInfo) -> String {
    format!("{:020}-{}", vm.created_at.as_millisecond(), vm.id)
}

/// The cursor, if it may be the [`place`] of a VM.
pub fn cursor_of_vms(cursor: Option<&str>) -> Result<Option<&str>> {
    let is_place = |text: &str| {
        text.split_once('-')
            .is_some_and(|(at, id)| at.len() == 20 && at.bytes().all(|byte| byte.is_ascii_digit()) && !id.is_empty())
    };
    if cursor.is_none_or(is_place) {
        Ok(cursor)
    } else {
        Err(Error::new(Code::SpecInvalid, "cursor: not a next_cursor of an earlier response"))
    }
}

/// At most so many of those that stand behind the cursor, and the cursor of the next page, if there is one. `place` returns where one
/// stands among all, and never changes.
pub fn page<T>(
    mut all: Vec<T>,
    place: impl Fn(&T) -> String,
    cursor: Option<&str>,
    most: usize,
) -> (Vec<T>, Option<String>) {
    all.sort_by_key(&place);
    all.retain(|one| cursor.is_none_or(|cursor| place(one).as_str() > cursor));
    let more = all.len() > most;
    all.truncate(most);
    let next = all.last().filter(|_| more).map(place);
    (all, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(numbers: impl IntoIterator<Item = u32>) -> Vec<String> {
        numbers.into_iter().map(|number| format!("{number:020}-x")).collect()
    }

    #[test]
    fn every_entry_is_on_one_page_despite_concurrent_changes() {
        let ask = |there: &[String], cursor: Option<&str>| page(there.to_vec(), Clone::clone, cursor, 3);
        let mut there = places((0..8).rev());
        let (first, next) = ask(&there, None);
        assert_eq!((&first, next.as_ref()), (&places(0..3), first.last()));
        // The one that the cursor names is gone, and so is one of the next page; another has come.
        there.retain(|one| !places([2, 4]).contains(one));
        there.push(places([9]).remove(0));
        let (second, next) = ask(&there, next.as_deref());
        assert_eq!(second, places([3, 5, 6]));
        let (third, next) = ask(&there, next.as_deref());
        assert_eq!((third, next), (places([7, 9]), None));
    }

    #[test]
    fn a_page_that_is_just_full_is_the_last() {
        assert_eq!(page(places(0..3), Clone::clone, None, 3), (places(0..3), None));
        assert_eq!(page(places([]), Clone::clone, None, 3), (vec![], None));
    }

    #[test]
    fn invalid_cursors_are_refused() {
        assert_eq!(cursor_of_vms(None).unwrap(), None);
        assert_eq!(cursor_of_vms(Some(&places([7])[0])).unwrap(), Some(places([7])[0].as_str()));
        for wrong in ["", "x", "-", "1-x", "0000000000000000000x-x", "00000000000000000001-", "00000000000000000001"] {
            assert_eq!(cursor_of_vms(Some(wrong)).unwrap_err().code(), Code::SpecInvalid, "{wrong}");
        }
    }
}
