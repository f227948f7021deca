//! Extractors: the JSON body and the path parameters of a request, parsed once at the border. Every error is a problem that names
//! the field.

use std::sync::Arc;

use axum::extract::{FromRequest, FromRequestParts, MatchedPath, Path, Request};
use axum::http::request::Parts;
use axum::http::{Method, header};
use axum::middleware::Next;
use axum::response::Response;
use nido_api::error::{Code, Error};
use nido_api::name::VmName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::media_type::{charset, media_type};
use super::response::Problem;
use super::{App, timeouts};

/// The largest JSON body, in bytes.
pub const JSON_BODY_MAX: usize = 1 << 20;

/// A JSON body. An absent one counts as `{}`, and so does `null`.
#[derive(Debug)]
pub struct JsonBody<T>(pub T);

impl<T: DeserializeOwned + Serialize> FromRequest<Arc<App>> for JsonBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, Problem> {
        // The audit log records only bodies that the description has; a body that it did not record must not be used.
        let route = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
        if !app.description.inputs(request.method(), route).json {
            return Err(Error::internal(format!("the body of {} {route} is not described", request.method())).into());
        }
        let kind = media_type(request.headers());
        let charset = charset(request.headers());
        let bytes = timeouts::read_body(request.into_body(), JSON_BODY_MAX).await?;
        // Whatever type it claims: generated clients and HTTP libraries name one by default.
        if bytes.is_empty() {
            return parse(b"{}").map(Self);
        }
        if kind.as_deref() != Some("application/json") {
            let words = format!("the body is {}, not application/json", kind.as_deref().unwrap_or("of no media type"));
            return Err(Error::new(Code::MediaTypeUnsupported, escaped(&words))
                .hint("Content-Type: application/json")
                .into());
        }
        if let Some(charset) = charset.filter(|charset| !charset.eq_ignore_ascii_case("utf-8")) {
            let words = format!("the body is in the charset {}, not UTF-8", escaped(&charset));
            return Err(Error::new(Code::MediaTypeUnsupported, words).hint("JSON is UTF-8").into());
        }
        parse(&bytes).map(Self)
    }
}

/// JSON as whatever it is meant to be.
///
/// # Errors
/// `request_invalid`; `spec_invalid`, with the field.
pub fn parse<T: DeserializeOwned + Serialize>(bytes: &[u8]) -> Result<T, Problem> {
    let no_json = |error| Error::new(Code::RequestInvalid, format!("the body is not JSON: {error}"));
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut json: Value = serde_json::from_slice(bytes).map_err(no_json)?;
    if json.is_null() {
        json = Value::Object(serde_json::Map::new());
    }
    if !json.is_object() {
        let words = format!("the body: it is an object, not {}", kind_of(&json));
        return Err(Error::new(Code::SpecInvalid, words).into());
    }
    floats_to_integers(&mut json);
    if let Some(field) = too_large(&json) {
        let words = format!("{}: a number of this API is at most {}", escaped(&field), i64::MAX);
        return Err(Error::new(Code::SpecInvalid, words).into());
    }
    remove_null_members(&mut json);
    let read: T = serde_path_to_error::deserialize(&json).map_err(|error| {
        let path = error.path().to_string();
        let error: serde_json::Error = error.into_inner();
        let field = if path == "." { String::new() } else { format!("{}: ", escaped(&path)) };
        Error::new(Code::SpecInvalid, format!("{field}{}", parser_message(&error.to_string())))
    })?;
    let again = serde_json::to_value(&read).map_err(|e| Error::internal(e.to_string()))?;
    let Some(field) = list_for_an_object(&json, &again) else { return Ok(read) };
    let field = if field.is_empty() { "the body" } else { &field };
    Err(Error::new(Code::SpecInvalid, format!("{}: it is an object, not a list", escaped(field))).into())
}

/// A field in a field, or in a list.
fn below(at: &str, inner: &str) -> String {
    let dot = if inner.is_empty() || inner.starts_with('[') { "" } else { "." };
    format!("{at}{dot}{inner}")
}

/// The first number that is larger than those that the description allows: generated clients hold numbers in 64 bits with a sign.
fn too_large(json: &Value) -> Option<String> {
    match json {
        Value::Number(number) => {
            number.as_u64().filter(|number| i64::try_from(*number).is_err()).map(|_| String::new())
        }
        Value::Array(items) => {
            items.iter().enumerate().find_map(|(at, item)| Some(below(&format!("[{at}]"), &too_large(item)?)))
        }
        Value::Object(fields) => fields.iter().find_map(|(name, value)| Some(below(name, &too_large(value)?))),
        _ => None,
    }
}

/// The first place where a list was given and an object was read: its items were taken for fields, in the order in which these
/// happen to stand in the type. Empty is the whole.
fn list_for_an_object(given: &Value, read: &Value) -> Option<String> {
    match (given, read) {
        (Value::Array(_), Value::Object(_)) => Some(String::new()),
        (Value::Array(given), Value::Array(read)) => {
            let mut pairs = given.iter().zip(read).enumerate();
            pairs.find_map(|(at, (given, read))| Some(below(&format!("[{at}]"), &list_for_an_object(given, read)?)))
        }
        (Value::Object(given), Value::Object(read)) => {
            given.iter().find_map(|(name, given)| Some(below(name, &list_for_an_object(given, read.get(name)?)?)))
        }
        _ => None,
    }
}

/// What a JSON value is, in words.
const fn kind_of(json: &Value) -> &'static str {
    match json {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A member that is `null` is absent. Items of a list are no members.
fn remove_null_members(json: &mut Value) {
    match json {
        Value::Array(items) => items.iter_mut().for_each(remove_null_members),
        Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(remove_null_members);
        }
        _ => {}
    }
}

/// To JSON `1.0` is a whole number equivalent to `1`.
fn floats_to_integers(json: &mut Value) {
    match json {
        Value::Number(number) => {
            let whole = number.as_f64().filter(|float| number.is_f64() && float.fract() == 0.0 && float.abs() < 9e15);
            if let Some(whole) = whole {
                #[allow(clippy::cast_possible_truncation, reason = "whole, and smaller than 2^53")]
                let whole = whole as i64;
                *number = whole.into();
            }
        }
        Value::Array(items) => items.iter_mut().for_each(floats_to_integers),
        Value::Object(fields) => fields.values_mut().for_each(floats_to_integers),
        _ => {}
    }
}

/// The parameters of the path. Names follow the same rules as everywhere.
#[derive(Debug)]
pub struct PathParams<T>(pub T);

/// Path parameters, which may name a VM.
pub trait VmPathParams {
    /// The VM's name, if there is one.
    fn vm_name(&mut self) -> Option<&mut VmName> {
        None
    }
}

/// The id of the VM that `If-Match` was compared with: the handler uses it instead of the name.
#[derive(Debug, Clone)]
pub struct MatchedVmId(pub VmName);

impl<S: Send + Sync, T: DeserializeOwned + VmPathParams + Send> FromRequestParts<S> for PathParams<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Path(mut names) = Path::<T>::from_request_parts(parts, state).await.map_err(|rejection| {
            let words = rejection.body_text();
            // serde's prefix to our own sentence has no further information.
            let words = words.split_once("'").map_or(words.clone(), |(_, rest)| format!("'{rest}"));
            let words = words.replace("Invalid URL: Invalid UTF-8", "the path is not UTF-8");
            Error::new(Code::NameInvalid, escaped(&words))
        })?;
        if let (Some(MatchedVmId(id)), Some(name)) = (parts.extensions.get(), names.vm_name()) {
            name.clone_from(id);
        }
        Ok(Self(names))
    }
}

/// Text that quotes a request, with control characters escaped for terminals and logs.
pub fn escaped(text: &str) -> String {
    crate::sanitize::line(text)
}

/// The message of a parser, in the terms of JSON instead of the names of Rust types.
pub fn parser_message(text: &str) -> String {
    const NUMBERS: [&str; 3] = [
        "invalid digit found in string",
        "cannot parse integer from empty string",
        "number too small to fit in target type",
    ];
    if NUMBERS.contains(&text) {
        return "it is not a whole number".into();
    }
    if text == "number too large to fit in target type" {
        return "the number is too large".into();
    }
    let mut words = escaped(text);
    for (theirs, ours) in [
        ("invalid type: sequence", "it is a list"),
        ("invalid type: map", "it is an object"),
        ("invalid type: null", "it is null"),
        ("invalid type: ", "it is the "),
        ("invalid value: ", "it is the "),
        ("integer `", "number `"),
        ("floating point `", "number `"),
        ("expected a sequence", "not a list"),
        ("expected a map", "not an object"),
        ("expected a string", "not a string"),
        ("expected a boolean", "not true or false"),
        ("expected u8", "not a whole number from 0 to 255"),
        ("expected u16", "not a whole number from 0 to 65535"),
        ("expected u32", "not a whole number from 0 to 4294967295"),
        ("expected u64", "not a whole number from 0"),
        ("expected usize", "not a whole number from 0"),
    ] {
        words = words.replace(theirs, ours);
    }
    if let Some((before, _)) = words.split_once("expected struct ") {
        let before = if before.starts_with("invalid length") { "it is a list, " } else { before };
        return format!("{before}not an object");
    }
    words
}

/// Refuses bodies that are encoded or a part: no route decodes or assembles one.
pub async fn require_whole_body(request: Request, next: Next) -> Result<Response, Problem> {
    if !matches!(*request.method(), Method::POST | Method::PUT) {
        return Ok(next.run(request).await);
    }
    let encoding = request.headers().get(header::CONTENT_ENCODING).map(|value| value.as_bytes().to_ascii_lowercase());
    if encoding.is_some_and(|encoding| encoding != b"identity" && !encoding.is_empty()) {
        let words = "the body is encoded (Content-Encoding), which this server does not accept";
        return Err(Error::new(Code::MediaTypeUnsupported, words).hint("send it as it is").into());
    }
    if request.headers().contains_key(header::CONTENT_RANGE) {
        let words = "the body is a part (Content-Range), which this server does not accept";
        return Err(Error::new(Code::RequestInvalid, words).hint("send the whole file").into());
    }
    Ok(next.run(request).await)
}

#[cfg(test)]
mod tests {
    use nido_api::BakeRequest;
    use nido_api::ExecBody;
    use nido_api::SpawnRequest;

    use super::*;

    // `[2, 512]` was taken for a machine of 2 CPUs and 512 MiB.
    #[test]
    fn a_list_is_no_object() {
        #[track_caller]
        fn refused<T: DeserializeOwned + Serialize + std::fmt::Debug>(body: &str, words: &str) {
            let problem = format!("{:?}", parse::<T>(body.as_bytes()).unwrap_err());
            assert!(problem.contains(words), "{problem}");
        }
        refused::<BakeRequest>("[2, 512]", "the body: it is an object");
        refused::<BakeRequest>("[]", "the body: it is an object");
        refused::<SpawnRequest>(
            r#"{"name": "web", "forwards": [["127.0.0.1", 0, 80]]}"#,
            "forwards[0]: it is an object",
        );
        refused::<SpawnRequest>("null", "missing field `name`");
        assert!(parse::<BakeRequest>(b" null ").is_ok(), "what a generated client sends for a body that was not given");
        let body = r#"{"name": "web", "forwards": [{"guest_port": 80.0}], "labels": {"a": "b"}}"#;
        assert_eq!(parse::<SpawnRequest>(body.as_bytes()).unwrap().forwards.len(), 1);
    }

    // `null` was refused for some optional members and taken for others.
    #[test]
    fn a_member_that_is_null_is_absent() {
        let body = r#"{"name": "m", "template": null, "cpus": null, "net": null, "forwards": null, "labels": null, "ttl_ms": null}"#;
        assert_eq!(
            parse::<SpawnRequest>(body.as_bytes()).unwrap(),
            parse::<SpawnRequest>(br#"{"name": "m"}"#).unwrap()
        );
        let body = r#"{"argv": ["id"], "command": null, "stdin": null, "env": null, "stdin_base64": null}"#;
        assert!(parse::<ExecBody>(body.as_bytes()).unwrap().split().is_ok());
        assert!(format!("{:?}", parse::<SpawnRequest>(br#"{"name": null}"#)).contains("missing field `name`"));
        assert!(parse::<ExecBody>(br#"{"argv": ["id", null]}"#).is_err(), "an item of a list is no member");
    }

    // Names of types of the program stood in messages.
    #[test]
    fn errors_use_json_terms() {
        for (body, words) in [
            (
                r#"{"name": "web", "cpus": "two"}"#,
                "cpus: it is the string \"two\", not a whole number from 0 to 4294967295",
            ),
            (r#"{"name": "web", "forwards": {}}"#, "forwards: it is an object, not a list"),
            (r#"{"name": "web", "forwards": [[]]}"#, "forwards[0]: it is a list, not an object"),
            // Generated clients could not hold it.
            (
                r#"{"name": "web", "ttl_ms": 9223372036854775808}"#,
                "ttl_ms: a number of this API is at most 9223372036854775807",
            ),
        ] {
            let Problem(error) = parse::<SpawnRequest>(body.as_bytes()).unwrap_err();
            assert_eq!(error.message(), words);
        }
    }

    #[test]
    fn fuzz_request_bodies() {
        fn check<T: DeserializeOwned + Serialize>(input: &[u8]) {
            match parse::<T>(input) {
                Ok(read) => {
                    let again = serde_json::to_vec(&read).unwrap();
                    assert_eq!(serde_json::to_vec(&parse::<T>(&again).unwrap()).unwrap(), again);
                }
                Err(problem) => {
                    let detail = problem.0.message();
                    assert!(!detail.is_empty() && !detail.contains(char::is_control), "{detail:?}");
                }
            }
        }
        let seeds = [
            r#"{"name":"web","template":"sandbox","cpus":2,"memory_mib":512,"labels":{"a":"b"},"forwards":[{"host_port":80,"guest_port":80}],"ttl_ms":1000}"#,
            r#"{"argv":["sh","-c","true"],"env":{"A":"b"},"timeout_ms":1e3,"stdin":"eA=="}"#,
            r#"{"cpus":1,"memory_mib":512,"net":"none","again":true}"#,
        ];
        nido_fuzz::fuzz("request-bodies", &seeds.map(|body| body.as_bytes().to_vec()), |input| {
            check::<SpawnRequest>(input);
            check::<ExecBody>(input);
            check::<BakeRequest>(input);
        });
    }
}
