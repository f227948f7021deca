//! The page for people: a few files that are part of the program. They hold nothing but themselves, so they need no token;
//! what the page shows it asks the API for.

use std::sync::Arc;

use axum::extract::Path;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use nido_api::error::{Code, Error};
use utoipa_axum::router::OpenApiRouter;

use crate::App;
use crate::response::Problem;

/// Only what this server itself serves is run or shown. The terminal sets styles of its own.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; \
                      img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const FILES: [(&str, &str, &str); 7] = [
    ("", "text/html; charset=utf-8", include_str!("../page/index.html")),
    ("style.css", "text/css; charset=utf-8", include_str!("../page/style.css")),
    ("app.js", "text/javascript; charset=utf-8", include_str!("../page/app.js")),
    ("network.js", "text/javascript; charset=utf-8", include_str!("../page/network.js")),
    ("xterm.css", "text/css; charset=utf-8", include_str!("../page/vendor/xterm.css")),
    ("xterm.js", "text/javascript; charset=utf-8", include_str!("../page/vendor/xterm.js")),
    ("addon-fit.js", "text/javascript; charset=utf-8", include_str!("../page/vendor/addon-fit.js")),
];

pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .route("/", get(|| async { file("") }))
        .route("/page/{file}", get(|Path(name): Path<String>| async move { file(&name) }))
}

fn file(name: &str) -> Result<Response, Problem> {
    let found = FILES.iter().find(|(file, ..)| *file == name);
    let (_, kind, text) = found.ok_or_else(|| Error::new(Code::RouteNotFound, "this path does not exist"))?;
    let mut response = (*text).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert("content-security-policy", HeaderValue::from_static(POLICY));
    headers.insert("referrer-policy", HeaderValue::from_static("no-referrer"));
    headers.insert("x-frame-options", HeaderValue::from_static("DENY"));
    Ok(response)
}
