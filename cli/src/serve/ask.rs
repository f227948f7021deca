//! What requests carry, parsed once at the border: every mistake is a problem that names the field.

use axum::extract::{FromRequest, FromRequestParts, MatchedPath, Path, RawQuery, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use nido_vmm::error::{Code, Error};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::answer::Problem;
use super::routes::BODY_MAX;
use super::{openapi, pace};

/// A JSON body. An absent one counts as `{}`.
#[derive(Debug)]
pub struct Body<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Serialize> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        // The audit log reads the bodies that are described; what it did not read must not be acted upon.
        let route = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
        if !openapi::takes(request.method(), route).json {
            return Err(Error::internal(format!("the body of {} {route} is not described", request.method())).into());
        }
        let kind = media_type(request.headers());
        let bytes = pace::read(request.into_body(), BODY_MAX).await?;
        if bytes.is_empty() && kind.is_none() {
            return parse(b"{}").map(Self);
        }
        if kind.as_deref() != Some("application/json") {
            let words = format!("the body is {}, not application/json", kind.as_deref().unwrap_or("of no media type"));
            return Err(Error::new(Code::MediaTypeUnsupported, plain(&words))
                .hint("Content-Type: application/json")
                .into());
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
    let mut json: Value = serde_json::from_slice(bytes).map_err(no_json)?;
    whole_numbers(&mut json);
    let read: T = serde_path_to_error::deserialize(&json).map_err(|error| {
        let path = error.path().to_string();
        let error: serde_json::Error = error.into_inner();
        let field = if path == "." { String::new() } else { format!("{}: ", plain(&path)) };
        Error::new(Code::SpecInvalid, format!("{field}{}", plain(&error.to_string())))
    })?;
    let again = serde_json::to_value(&read).map_err(|e| Error::internal(e.to_string()))?;
    let Some(field) = list_for_an_object(&json, &again) else { return Ok(read) };
    let field = if field.is_empty() { "the body" } else { &field };
    Err(Error::new(Code::SpecInvalid, format!("{}: it is an object, not a list", plain(field))).into())
}

/// The first place where a list was given and an object was read: its items were taken for fields, in the order in which these
/// happen to stand in the type. Empty is the whole.
fn list_for_an_object(given: &Value, read: &Value) -> Option<String> {
    let below = |at: String, inner: String| {
        let dot = if inner.is_empty() || inner.starts_with('[') { "" } else { "." };
        format!("{at}{dot}{inner}")
    };
    match (given, read) {
        (Value::Array(_), Value::Object(_)) => Some(String::new()),
        (Value::Array(given), Value::Array(read)) => {
            let mut pairs = given.iter().zip(read).enumerate();
            pairs.find_map(|(at, (given, read))| Some(below(format!("[{at}]"), list_for_an_object(given, read)?)))
        }
        (Value::Object(given), Value::Object(read)) => given
            .iter()
            .find_map(|(name, given)| Some(below(name.clone(), list_for_an_object(given, read.get(name)?)?))),
        _ => None,
    }
}

/// To JSON `1.0` is a whole number as good as `1`.
fn whole_numbers(json: &mut Value) {
    match json {
        Value::Number(number) => {
            let whole = number.as_f64().filter(|float| number.is_f64() && float.fract() == 0.0 && float.abs() < 9e15);
            if let Some(whole) = whole {
                #[allow(clippy::cast_possible_truncation, reason = "whole, and smaller than 2^53")]
                let whole = whole as i64;
                *number = whole.into();
            }
        }
        Value::Array(items) => items.iter_mut().for_each(whole_numbers),
        Value::Object(fields) => fields.values_mut().for_each(whole_numbers),
        _ => {}
    }
}

/// The media type of a body, without its parameters.
pub fn media_type(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    Some(value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase())
}

/// Parts of the path: names are parsed as everywhere.
#[derive(Debug)]
pub struct Names<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Names<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Path(names) = Path::<T>::from_request_parts(parts, state).await.map_err(|rejection| {
            let words = rejection.body_text();
            // What serde puts before our own sentence says nothing more.
            let words = words.split_once("'").map_or(words.clone(), |(_, rest)| format!("'{rest}"));
            Error::new(Code::NameInvalid, words)
        })?;
        Ok(Self(names))
    }
}

/// The query.
#[derive(Debug)]
pub struct Query<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Ok(RawQuery(query)) = RawQuery::from_request_parts(parts, state).await;
        let query = query.unwrap_or_default();
        let deserializer = serde_urlencoded::Deserializer::new(form_urlencoded::parse(query.as_bytes()));
        serde_path_to_error::deserialize(deserializer).map(Self).map_err(|error| {
            let path = error.path().to_string();
            let field = if path == "." { String::new() } else { format!("{}: ", plain(&path)) };
            let words = format!("{field}{}", plain(&error.into_inner().to_string()));
            Error::new(Code::SpecInvalid, words).into()
        })
    }
}

/// Words that quote a request, without what a terminal or a log would obey.
pub fn plain(text: &str) -> String {
    crate::sanitize::line(text)
}

/// Whether the caller would rather have this media type than JSON.
pub fn accepts(headers: &HeaderMap, media_type: &str) -> bool {
    let wanted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    wanted
        .flat_map(|value| value.split(','))
        .any(|part| part.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case(media_type)))
}

#[cfg(test)]
mod tests {
    use nido_vmm::api::{BakeRequest, ForwardSpec, SpawnRequest};

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
        refused::<Vec<ForwardSpec>>(r#"[{"guest_port": 1}, ["127.0.0.1", 0, 80]]"#, "[1]: it is an object");
        let body = r#"{"name": "web", "forwards": [{"guest_port": 80.0}], "labels": {"a": "b"}}"#;
        assert_eq!(parse::<SpawnRequest>(body.as_bytes()).unwrap().forwards.len(), 1);
    }
}
