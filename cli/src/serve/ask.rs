//! What requests carry, parsed once at the border: every mistake is a problem that names the field.

use axum::extract::{FromRequest, FromRequestParts, Path, RawQuery, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use nido_vmm::error::{Code, Error};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::answer::Problem;
use super::pace;
use super::routes::BODY_MAX;

/// A JSON body. An absent one counts as `{}`.
#[derive(Debug)]
pub struct Body<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
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

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    let no_json = |error| Error::new(Code::RequestInvalid, format!("the body is not JSON: {error}"));
    let mut json: Value = serde_json::from_slice(bytes).map_err(no_json)?;
    whole_numbers(&mut json);
    serde_path_to_error::deserialize(json).map_err(|error| {
        let path = error.path().to_string();
        let error: serde_json::Error = error.into_inner();
        let field = if path == "." { String::new() } else { format!("{}: ", plain(&path)) };
        Error::new(Code::SpecInvalid, format!("{field}{}", plain(&error.to_string()))).into()
    })
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
