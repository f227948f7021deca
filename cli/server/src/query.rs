//! The query of a request, decoded strictly: `+` is a plus, `%XX` is one byte, unknown parameters are refused.
//!
//! Invariant: the routes and the audit log decode a query with the same function, so the log has the values that were used.

use std::borrow::Cow;
use std::sync::Arc;

use axum::extract::{FromRequestParts, MatchedPath, RawQuery, Request, State};
use axum::http::Method;
use axum::http::request::Parts;
use axum::middleware::Next;
use axum::response::Response;
use nido_api::error::{Code, Error, Result};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};

use super::App;
use super::api_description::ApiDescription;
use super::extract::{escaped, parser_message};
use super::response::Problem;

/// A name and its value, as bytes: a path of a guest need not be UTF-8.
type Pair = (String, Vec<u8>);
/// The one parameter whose value may be any bytes.
const BYTES: &str = "path";
/// The one parameter that may be given several times.
const MANY: &str = "label";
/// The boolean parameters, whose bare name means `true`. A name with `=` and no value is refused: it may be a script's empty variable.
const SWITCHES: [&str; 3] = ["follow", "force", "parents"];

/// The pairs of a query, in order.
///
/// # Errors
/// `spec_invalid`: an incomplete `%XX`, a name that is not UTF-8.
pub fn pairs(query: &str) -> Result<Vec<Pair>> {
    let parts = query.split('&').filter(|part| !part.is_empty());
    let decoded = parts.map(|part| {
        let (name, value) = part.split_once('=').map_or((part, None), |(name, value)| (name, Some(value)));
        let name = String::from_utf8(percent_decoded(name)?)
            .map_err(|_| Error::new(Code::SpecInvalid, "query: the name of a parameter is not UTF-8"))?;
        let absent = if SWITCHES.contains(&&*name) { "true" } else { "" };
        Ok((name, percent_decoded(value.unwrap_or(absent))?))
    });
    decoded.collect()
}

fn percent_decoded(text: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, behind)) = rest.split_first() {
        rest = behind;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let digits = behind.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        let byte = digits
            .filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        let byte = byte.ok_or_else(|| {
            Error::new(Code::SpecInvalid, "query: '%' is not followed by two hexadecimal digits")
                .hint("a percent sign itself is sent as %25")
        })?;
        bytes.push(byte);
        rest = &behind[2..];
    }
    Ok(bytes)
}

/// A value for people and logs: text, and `\xNN` for each byte that is not UTF-8.
pub fn shown(value: &[u8]) -> Cow<'_, str> {
    if let Ok(text) = std::str::from_utf8(value) {
        return text.into();
    }
    let chunks = value.utf8_chunks().flat_map(|chunk| {
        let bytes = chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}"));
        std::iter::once(chunk.valid().to_owned()).chain(bytes)
    });
    chunks.collect::<String>().into()
}

/// The query, as its route's type.
#[derive(Debug)]
pub struct QueryParams<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for QueryParams<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> std::result::Result<Self, Problem> {
        let Ok(RawQuery(query)) = RawQuery::from_request_parts(parts, state).await;
        Ok(Self(parse(&query.unwrap_or_default())?))
    }
}

fn parse<T: DeserializeOwned>(query: &str) -> Result<T> {
    let mut again = form_urlencoded::Serializer::new(String::new());
    // Those are taken with `Labels`.
    for (name, value) in pairs(query)?.into_iter().filter(|(name, _)| name != MANY) {
        match std::str::from_utf8(&value) {
            Ok(value) => again.append_pair(&name, value),
            // The route takes its bytes with `GuestPath`.
            Err(_) if name == BYTES => again.append_pair(&name, &shown(&value)),
            Err(_) => return Err(Error::new(Code::SpecInvalid, format!("{}: its value is not UTF-8", escaped(&name)))),
        };
    }
    let again = again.finish();
    let deserializer = serde_urlencoded::Deserializer::new(form_urlencoded::parse(again.as_bytes()));
    serde_path_to_error::deserialize(deserializer).map_err(|error| {
        let path = error.path().to_string();
        let field = if path == "." { String::new() } else { format!("{}: ", escaped(&path)) };
        Error::new(Code::SpecInvalid, format!("{field}{}", parser_message(&error.into_inner().to_string())))
    })
}

/// The bytes of the parameter `path`, and the rest of the query.
#[derive(Debug)]
pub struct GuestPathParam<T>(pub Vec<u8>, pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for GuestPathParam<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> std::result::Result<Self, Problem> {
        let query = parts.uri.query().unwrap_or_default();
        let rest = parse(query)?;
        let path = pairs(query)?.into_iter().find(|(name, _)| name == BYTES).map(|(_, value)| value);
        Ok(Self(path.unwrap_or_default(), rest))
    }
}

/// All values of a parameter that may be given several times.
#[derive(Debug)]
pub struct LabelParams(pub Vec<String>);

impl<S: Send + Sync> FromRequestParts<S> for LabelParams {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> std::result::Result<Self, Problem> {
        let all = pairs(parts.uri.query().unwrap_or_default())?;
        let labels = all.into_iter().filter(|(name, _)| name == MANY).map(|(_, value)| {
            String::from_utf8(value).map_err(|_| Error::new(Code::SpecInvalid, "label: its value is not UTF-8"))
        });
        Ok(Self(labels.collect::<Result<_>>()?))
    }
}

/// A switch: `true` or `1` turns it on, `false` or `0` off.
///
/// # Errors
/// Anything else.
pub fn switch<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<bool, D::Error> {
    match &*String::deserialize(deserializer)? {
        "1" | "true" => Ok(true),
        "0" | "false" => Ok(false),
        _ => Err(D::Error::custom("it is neither true nor false")),
    }
}

/// A number within what the description allows: 64 bits with a sign, as generated clients hold it.
///
/// # Errors
/// Anything else.
pub fn number<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<u64, D::Error> {
    let number = u64::deserialize(deserializer)?;
    match i64::try_from(number) {
        Ok(_) => Ok(number),
        Err(_) => Err(D::Error::custom(format!("it is at most {}", i64::MAX))),
    }
}

/// As [`number`], of a parameter that may be absent.
///
/// # Errors
/// As [`number`].
pub fn number_if_given<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<u64>, D::Error> {
    number(deserializer).map(Some)
}

/// Refuses parameters that the route does not have: ignoring a filter would return everything.
pub async fn reject_unknown(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> std::result::Result<Response, Problem> {
    if let (Some(route), Some(query)) = (request.extensions().get::<MatchedPath>(), request.uri().query()) {
        check(&app.description, request.method(), route.as_str(), query)?;
    }
    Ok(next.run(request).await)
}

fn check(api: &ApiDescription, method: &Method, route: &str, query: &str) -> Result<()> {
    let inputs = api.inputs(method, route);
    // A method that the resource does not know is refused as such.
    let is_api = route.starts_with("/v1/") || inputs.described;
    if !is_api || (!inputs.described && api.has_route(route)) {
        return Ok(());
    }
    let unknown = pairs(query)?.into_iter().find(|(name, _)| !inputs.query.contains(name));
    let Some((name, _)) = unknown else { return Ok(()) };
    let mut names: Vec<_> = inputs.query.iter().map(String::as_str).collect();
    names.sort_unstable();
    let hint = if names.is_empty() { "it takes none".to_owned() } else { format!("it takes {}", names.join(", ")) };
    Err(Error::new(Code::SpecInvalid, format!("{}: this resource does not have that parameter", escaped(&name)))
        .hint(hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct TestQuery {
        #[serde(deserialize_with = "number_if_given")]
        since: Option<u64>,
        #[serde(deserialize_with = "switch")]
        force: bool,
        path: String,
    }

    // `a+b` was read as `a b`, and a byte that is not UTF-8 became U+FFFD: another file was written.
    #[test]
    fn a_query_is_decoded_byte_by_byte() {
        let value = |query: &str| pairs(query).unwrap().remove(0).1;
        assert_eq!(value("path=/a++.deb"), b"/a++.deb");
        assert_eq!(value("path=%2Ftmp%2f%FF%20x"), b"/tmp/\xff x");
        assert_eq!(shown(&value("path=/b%ff%41")), "/b\\xffA");
        for wrong in ["path=%", "path=%4", "path=%zz", "path=%+1", "%ff=x"] {
            assert_eq!(pairs(wrong).unwrap_err().code(), Code::SpecInvalid, "{wrong}");
        }
        assert!(parse::<TestQuery>("path=%ff").is_ok() && parse::<TestQuery>("since=%ff").is_err());
    }

    // `?force=1` and `?force` were refused in the words of a parser.
    #[test]
    fn errors_use_api_terms() {
        for (query, force) in [("force", true), ("force=1", true), ("force=true", true), ("force=0", false)] {
            assert_eq!(parse::<TestQuery>(query).unwrap().force, force, "{query}");
        }
        let refused = |query: &str| parse::<TestQuery>(query).unwrap_err().to_string();
        assert_eq!(refused("since=x"), "since: it is not a whole number");
        assert_eq!(refused("since="), "since: it is not a whole number");
        assert_eq!(refused("since=9223372036854775808"), "since: it is at most 9223372036854775807");
        assert_eq!(parse::<TestQuery>("since=9223372036854775807").unwrap().since, Some(i64::MAX.unsigned_abs()));
        // Read as `true`, an empty variable of a script deleted a running VM.
        for query in ["force=yes", "force=", "force=&path=/a", "force=%00"] {
            assert_eq!(refused(query), "force: it is neither true nor false", "{query}");
        }
        assert!(parse::<TestQuery>("force&path=/a").unwrap().force);
        assert!(refused("force=1&force=0").contains("duplicate"), "{}", refused("force=1&force=0"));
    }

    #[test]
    fn the_switches_are_the_boolean_parameters_of_the_description() {
        let api = serde_json::from_str::<serde_json::Value>(&crate::openapi::text()).unwrap();
        let routes = api["paths"].as_object().unwrap().values();
        let operations = routes.flat_map(|route| route.as_object().unwrap().values());
        let parameters = operations.filter_map(|operation| operation["parameters"].as_array()).flatten();
        let switches = parameters.filter(|p| p["in"] == "query" && p["schema"]["type"] == "boolean");
        let names: std::collections::BTreeSet<_> = switches.map(|p| p["name"].as_str().unwrap()).collect();
        assert_eq!(names, SWITCHES.into());
    }

    // `GET /v1/vms?status=stopped` answered with all VMs.
    #[test]
    fn unknown_parameters_are_refused() {
        let api = crate::openapi::api_description();
        let check = |method: &Method, route: &str, query: &str| check(&api, method, route, query);
        assert!(check(&Method::GET, "/v1/vms", "status=stopped&label=a&label=b&limit=3").is_ok());
        for (route, query) in
            [("/v1/vms", "stat=x"), ("/v1/vms/{name}", "force=1"), ("/metrics", "x"), ("/v1/host", "a=b")]
        {
            assert!(check(&Method::GET, route, query).is_err(), "{route}?{query}");
        }
        assert!(check(&Method::GET, "/v1/vms/{name}/exec/socket", "token=x").is_err());
        assert!(check(&Method::PATCH, "/v1/vms", "x=1").is_ok(), "it is the method that is wrong");
        assert!(check(&Method::GET, "/page/{file}", "v=1").is_ok());
    }
}
