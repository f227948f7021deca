//! Lists in pages. Pure.

use nido_vmm::error::{Code, Error, Result};

/// How many a page holds if nobody says otherwise.
const PAGE: usize = 50;
/// The most that one may hold; the schemas say so, too.
const PAGE_MAX: usize = 500;

/// Which page is wanted, as tools are asked for it.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    pub limit: Option<usize>,
    pub cursor: Option<&'a str>,
}

/// One page of `items`, and the cursor of the next if there is one. `place` says where one stands among all, and never changes: so a
/// cursor is good although others have come and gone meanwhile.
pub fn page<T>(
    mut items: Vec<T>,
    wanted: Wanted<'_>,
    place: impl Fn(&T) -> String,
) -> Result<(Vec<T>, Option<String>)> {
    let limit = wanted.limit.unwrap_or(PAGE);
    if !(1..=PAGE_MAX).contains(&limit) {
        return Err(Error::new(Code::SpecInvalid, format!("limit: it is 1 to {PAGE_MAX}")));
    }
    items.sort_by_key(&place);
    items.retain(|item| wanted.cursor.is_none_or(|cursor| place(item).as_str() > cursor));
    let more = items.len() > limit;
    items.truncate(limit);
    let next = items.last().filter(|_| more).map(place);
    Ok((items, next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_on_one_page_whatever_comes_and_goes() {
        let names = |list: &[&str]| list.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let of = |items: &[&str], limit, cursor: Option<&str>| {
            page(names(items), Wanted { limit, cursor }, Clone::clone).unwrap()
        };
        let (first, next) = of(&["c", "a", "b"], Some(2), None);
        assert_eq!((&first, next.as_deref()), (&names(&["a", "b"]), Some("b")));
        // The one that the cursor names is gone.
        assert_eq!(of(&["c", "a", "d"], Some(2), next.as_deref()), (names(&["c", "d"]), None));
        assert_eq!(of(&[], None, None), (names(&[]), None));
        for limit in [0, 501] {
            let wrong = page(names(&["a"]), Wanted { limit: Some(limit), cursor: None }, Clone::clone).unwrap_err();
            assert_eq!((wrong.code(), wrong.message()), (Code::SpecInvalid, "limit: it is 1 to 500"));
        }
        assert_eq!(of(&["a"; 1], Some(500), None).0, names(&["a"]));
    }
}
