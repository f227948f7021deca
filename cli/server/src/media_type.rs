//! Media types in headers: `Content-Type` of bodies, and content negotiation with `Accept`.

use axum::http::{HeaderMap, header};

/// The media type of a body, without its parameters.
pub fn media_type(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    Some(value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase())
}

/// The charset that a body claims.
pub fn charset(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    let parameters = value.split(';').skip(1).filter_map(|one| one.split_once('='));
    let charset = parameters.into_iter().find(|(name, _)| name.trim().eq_ignore_ascii_case("charset"));
    charset.map(|(_, value)| value.trim().trim_matches('"').to_owned())
}

/// Whether the caller would rather have this media type than `other` (RFC 9110, 12.5.1): it has the greater weight, or the
/// same and stands first.
pub fn prefers(headers: &HeaderMap, media_type: &str, other: &str) -> bool {
    let values = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let ranges: Vec<_> = values.flat_map(|value| value.split(',')).map(range).collect();
    let weight = |kind: &str| {
        let main = kind.split('/').next().unwrap_or_default();
        let exact = ranges.iter().position(|(range, _)| range == kind);
        let found = exact
            .or_else(|| ranges.iter().position(|(range, _)| *range == format!("{main}/*")))
            .or_else(|| ranges.iter().position(|(range, _)| range == "*/*"));
        found.map(|at| (ranges[at].1, std::cmp::Reverse(at)))
    };
    // A type that is only covered by `*/*` was not asked for.
    let is_named = ranges.iter().any(|(range, weight)| range == media_type && *weight > 0);
    is_named && weight(media_type) > weight(other)
}

/// A media range and its weight in thousandths.
fn range(text: &str) -> (String, u32) {
    let mut parts = text.split(';').map(str::trim);
    let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
    let weight = parts.find_map(|part| part.strip_prefix("q=").or_else(|| part.strip_prefix("Q=")));
    let weight = weight.and_then(|weight| weight.parse::<f64>().ok()).filter(|weight| (0.0..=1.0).contains(weight));
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 1000")]
    let weight = (weight.unwrap_or(1.0) * 1000.0) as u32;
    (kind, weight)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Weights and order in `Accept` were not looked at.
    #[test]
    fn the_media_type_of_the_greater_weight_is_answered() {
        let events_preferred = |accept: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, accept.parse().unwrap());
            prefers(&headers, "text/event-stream", "application/json")
        };
        for events in ["text/event-stream", "text/event-stream, application/json;q=0.5", "text/event-stream, */*"] {
            assert!(events_preferred(events), "{events}");
        }
        for json in [
            "application/json",
            "*/*",
            "application/json, text/event-stream;q=0.1",
            "text/event-stream;q=0",
            "",
            "text/*",
        ] {
            assert!(!events_preferred(json), "{json}");
        }
    }
}
