//! Lists of tools in pages: how many may be requested. Pure.

use nido_api::error::{Code, Error, Result};

use crate::pagination;

/// How many a page holds by default.
const PAGE: usize = 50;
/// The most that one may hold; the schemas state it, too.
const PAGE_MAX: usize = 500;

/// Which page is wanted, as tools are asked for it.
#[derive(Debug, Clone, Copy)]
pub struct PageRequest<'a> {
    pub limit: Option<usize>,
    pub cursor: Option<&'a str>,
}

/// The page of `items` that is wanted, and the cursor of the next if there is one; `place` as for [`pagination::page`].
pub fn page<T>(
    items: Vec<T>,
    wanted: PageRequest<'_>,
    place: impl Fn(&T) -> String,
) -> Result<(Vec<T>, Option<String>)> {
    let limit = wanted.limit.unwrap_or(PAGE);
    if !(1..=PAGE_MAX).contains(&limit) {
        return Err(Error::new(Code::SpecInvalid, format!("limit: it is 1 to {PAGE_MAX}")));
    }
    Ok(pagination::page(items, place, wanted.cursor, limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_the_requested_size_within_limits() {
        let items: Vec<u32> = (0..60).collect();
        let of = |limit, cursor| page(items.clone(), PageRequest { limit, cursor }, |item| format!("{item:02}"));
        assert_eq!(of(None, None).unwrap(), (items[..50].to_vec(), Some("49".to_owned())));
        assert_eq!(of(Some(2), Some("57")).unwrap(), (vec![58, 59], None));
        assert_eq!(of(Some(500), None).unwrap().0, items);
        for limit in [0, 501] {
            let wrong = of(Some(limit), None).unwrap_err();
            assert_eq!((wrong.code(), wrong.message()), (Code::SpecInvalid, "limit: it is 1 to 500"));
        }
    }
}
