//! Responses: JSON, and `application/problem+json` for errors.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use nido_api::FrontEnd;
use nido_api::error::{Code, Error};
use serde::Serialize;

/// An error as a response.
#[derive(Debug)]
pub struct Problem(pub Error);

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let code = self.0.code();
        let problem = self.0.problem_for(FrontEnd::Api);
        let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, body(&problem)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        match code {
            Code::Unauthorized => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"nido\""));
            }
            Code::RateLimited => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            _ => {}
        }
        response.extensions_mut().insert(code);
        response
    }
}

/// What every handler returns.
pub type HandlerResult = Result<Response, Problem>;

/// A value as JSON with status 200.
pub fn ok<T: Serialize>(value: &T) -> HandlerResult {
    Ok(json(StatusCode::OK, value))
}

/// 201 for a new object, with its `Location`.
pub fn created<T: Serialize>(place: &str, value: &T) -> Response {
    let mut response = json(StatusCode::CREATED, value);
    locate(&mut response, place);
    response
}

/// Adds the `Location` of a new object to a response that is 201.
pub fn locate(response: &mut Response, place: &str) {
    if let (StatusCode::CREATED, Ok(place)) = (response.status(), HeaderValue::from_str(place)) {
        response.headers_mut().insert(header::LOCATION, place);
    }
}

/// A value as JSON.
pub fn json<T: Serialize>(status: StatusCode, value: &T) -> Response {
    let mut response = (status, body(value)).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// A response without a body.
pub fn empty(status: StatusCode) -> Response {
    let mut response = Response::default();
    *response.status_mut() = status;
    response
}

fn body<T: Serialize>(value: &T) -> Vec<u8> {
    // Our own types have string keys and no failing serializers.
    serde_json::to_vec(value).unwrap_or_default()
}
